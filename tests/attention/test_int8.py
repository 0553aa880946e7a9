"""Attention of quantised queries and keys: the plain version's rule, the operator as torch sees it, bad input, and the
error that is reported."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from llmkern.attention import reference
from llmkern.attention.mask import Mask
from llmkern.attention.reference import int8
from llmkern.functional import attention_int8, attention_int8_error, scaled_dot_product_attention
from tests.attention.bad_inputs import CASES, t
from tests.attention.cases import tensors
from tests.attention.int8_cases import HALVES, NAMES, rules_of, shifted

pytestmark = pytest.mark.filterwarnings("ignore:llmkern.attention_int8 runs on the plain PyTorch reference")
OP = torch.ops.llmkern.attention_int8


def test_integers_and_scales_by_hand():
    x = torch.tensor([[3.0, -6.35, 0.024, 0.026], [0.0, 0.0, 0.0, 0.0], [1.0, torch.inf, 0.0, 1.0]])[None, None]
    integers, scale = int8.quantized(x)
    assert integers.tolist()[0][0] == [[60, -127, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scale[0, 0, 0] == torch.tensor(6.35) / 127 and scale[0, 0, 1] == 1.0 and scale[0, 0, 2].isnan()


@pytest.mark.parametrize("keys", [0, 1, 31, 1024, 2500])
def test_the_average_key(keys):
    """Of those that exist; what is not finite counts as 0."""
    key = torch.randn(2, 3, keys, 5) + 4
    lengths = torch.tensor([keys // 2, 0])
    broken = key.clone()
    broken[:, 1, keys // 4 : keys // 4 + 1, 2] = torch.nan
    for x, n in ((key, keys), (broken, keys)):
        expected = x.double().nan_to_num(0.0).sum(2, keepdim=True) / max(n, 1)
        torch.testing.assert_close(int8.key_average(x).double(), expected, rtol=1e-6, atol=1e-6)
    found = int8.key_average(key, lengths)
    expected = key[:1, :, : keys // 2].double().sum(2, keepdim=True) / max(keys // 2, 1)
    torch.testing.assert_close(found[:1].double(), expected, rtol=1e-6, atol=1e-6)
    assert not found[1].any()


def test_the_average_does_not_overflow():
    key = torch.full((1, 1, 3, 2), 3e38, dtype=torch.bfloat16)
    assert int8.key_average(key).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_attention_of_what_the_integers_stand_for(name):
    """Keys with their average again, under every rule; the log-sum-exp too, and whether the average was taken off."""
    shape = (2, 4, 2, 21, 33, 16, 12)
    q, k, v = (t.double() for t in shifted(tensors(shape)))
    rules = rules_of(name, shape, torch.float64)
    causal, right = rules.get("causal", False), rules.get("window", (-1, -1))[1]
    mask = Mask(
        rules.get("mask"), rules.get("key_lengths"), rules.get("slopes"), rules.get("sink"), None,
        rules.get("window", (-1, -1))[0], 0 if causal else right, rules.get("bottom_right", False),
        rules.get("softcap", 0.0),
    )  # fmt: skip
    q8, of_queries = int8.quantized(q)
    for smooth in (True, False):
        average = int8.key_average(k, mask.key_lengths) if smooth else None
        k8, of_keys = int8.quantized(k, average)
        keys = k8.double() * of_keys.double()[..., None]
        # q.average is not quantised: one more channel of queries and keys, which is 1 in the keys.
        added = torch.zeros(2, 4, 21, 1, dtype=torch.float64)
        if average is not None:
            added = q @ average.double().repeat_interleave(2, 1).transpose(2, 3)
        wide = torch.cat([q8.double() * of_queries.double()[..., None], added], -1)
        keys = torch.cat([keys, torch.ones_like(keys[..., :1])], -1)
        expected = reference.attention(wide, keys, v, *mask.arguments(), 0.3, False)
        got = reference.attention_int8(q, k, v, *mask.arguments()[:4], *mask.arguments()[5:9], 0.3, smooth)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def options(name):
    """Keyword arguments of the public functions."""
    return {
        "none": {}, "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
        "padding": {"attn_mask": torch.rand(2, 1, 1, 9) > 0.3}, "bias": {"attn_mask": torch.randn(5, 9)},
        "features": {
            "window_size": (4, 1), "softcap": 3.0, "alibi_slopes": torch.rand(2, 4), "learnable_sink": torch.rand(4),
            "key_lengths": torch.tensor([9, 4]),
        },
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["none", "causal", "padding", "bias", "features"])
def test_it_is_near_to_scaled_dot_product_attention(name):
    """With the same arguments, of the same meaning, and torch's shapes; in float32 as in half precision."""
    q, k, v = shifted(tensors((2, 4, 2, 5, 9, 32, 16)))
    given = {"scale": 0.2, "enable_gqa": True, **options(name)}
    for dtype in (torch.float32, *HALVES):
        inputs = [t.to(dtype) for t in (q, k, v)]
        expected, sums = scaled_dot_product_attention(*inputs, return_logsumexp=True, **given)
        found, found_sums = attention_int8(*inputs, return_logsumexp=True, **given)
        assert found.dtype == dtype and found.shape == expected.shape and found.stride() == expected.stride()
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.06)
        torch.testing.assert_close(found_sums, sums, rtol=0, atol=0.06)
        assert torch.equal(found, attention_int8(*inputs, **given))


def test_any_rank_and_autocast():
    q, k, v = tensors((2, 4, 4, 5, 9, 32, 16))
    whole = attention_int8(q, k, v)
    assert torch.equal(attention_int8(q[0], k[0], v[0]), whole[0])
    assert torch.equal(attention_int8(q[0, 1], k[0, 1], v[0, 1]), whole[0, 1])
    assert torch.equal(attention_int8(q[None], k[None], v[None], return_logsumexp=True)[0], whole[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_int8(q, k, v), attention_int8(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_a_row_depends_on_no_other():
    """Without the average: neither on other queries nor on what is masked."""
    q, k, v = tensors((1, 2, 2, 7, 9, 16, 16), torch.float16)
    whole = attention_int8(q, k, v, is_causal=True, smooth_keys=False)
    alone = attention_int8(q[:, :, :4], k[:, :, :4], v[:, :, :4], is_causal=True, smooth_keys=False)
    torch.testing.assert_close(whole[:, :, :4], alone, rtol=1e-3, atol=1e-3)
    assert not torch.equal(attention_int8(q, k + 8, v), attention_int8(q, k + 8, v, smooth_keys=False))


@pytest.mark.parametrize("smooth", [False, True])
def test_opcheck(smooth):
    q, k, v = tensors((2, 4, 2, 5, 7, 16, 12), torch.bfloat16)
    rules = (torch.randn(1, 4, 5, 7), torch.tensor([7, 3]), torch.rand(2, 4), torch.randn(4), 4, 3, True, 20.0)
    opcheck(OP, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, *rules, 0.25, smooth))
    opcheck(OP, (q, k, v, None, None, None, None, -1, 0, False, 0.0, 0.25, smooth))


def test_compile_and_vmap():
    q, k, v = tensors((2, 4, 2, 5, 7, 16, 12), torch.bfloat16)
    function = lambda q, k, v: attention_int8(q, k, v, is_causal=True, enable_gqa=True) * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), function(q, k, v))
    expected = torch.stack([OP(q[:1], k[:1], v[:1], *(None,) * 4, -1, 0, False, 0.0, 0.25, True)[0]] * 3)
    stacked = (t[:1].expand(3, *t[:1].shape) for t in (q, k, v))
    got = torch.vmap(lambda q, k, v: OP(q, k, v, *(None,) * 4, -1, 0, False, 0.0, 0.25, True)[0])(*stacked)
    assert torch.equal(got, expected)


def test_a_gradient_is_refused():
    q, k, v = tensors((1, 2, 2, 3, 5, 8, 8))
    for leaf in range(3):
        inputs = [t.clone().requires_grad_(i == leaf) for i, t in enumerate((q, k, v))]
        with pytest.raises(RuntimeError, match=r"attention_int8 has no gradient: call it under torch.no_grad\(\), or"):
            attention_int8(*inputs)
        with torch.no_grad():
            attention_int8(*inputs)
    with pytest.raises(RuntimeError, match="has no gradient"):
        attention_int8(q, k, v, learnable_sink=torch.zeros(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="llmkern::attention_int8 has no gradient"):
        torch.compile(attention_int8, backend="eager")(q.requires_grad_(), k, v)


#: What scaled_dot_product_attention refuses and this function takes as arguments too.
SHARED = {n: c for n, c in CASES.items() if not {"dropout_p", "dropout_seed", "deterministic"} & set(c[0])}
MORE = {
    "smooth_keys": ({"smooth_keys": "a"}, TypeError, ["smooth_keys: expected True or False, got 'a'"]),
    "dropout": ({"dropout_p": 0.1}, TypeError, ["dropout_p"]),
}


@pytest.mark.parametrize(("changed", "error", "words"), [*SHARED.values(), *MORE.values()], ids=[*SHARED, *MORE])
def test_bad_input(changed, error, words):
    with pytest.raises(error) as raised:
        attention_int8(**{"query": t(), "key": t(), "value": t(), **changed})
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("name", ["none", "causal", "padding", "bias", "features"])
def test_the_reported_error(name):
    """Against float64, whatever the rules; keys of large average cost much only where it stays on them."""
    q, k, v = shifted(tensors((2, 4, 2, 5, 9, 32, 16), torch.bfloat16))
    k = k + 20
    given = {"enable_gqa": True, **options(name)}
    found = attention_int8_error(q, k, v, **given)
    truth = scaled_dot_product_attention(*(x.double().float() for x in (q, k, v)), **given).double()
    ours = attention_int8(q, k, v, **given).double()
    assert found.largest == pytest.approx(float((ours - truth).abs().max()), rel=1e-3)
    assert found.relative_rms == pytest.approx(float((ours - truth).norm() / truth.norm()), rel=1e-3)
    cosine = F.cosine_similarity(ours.flatten(), truth.flatten(), 0)
    assert found.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert found.exact_rms < found.relative_rms < 0.05
    assert found.relative_rms < attention_int8_error(q, k, v, smooth_keys=False, **given).relative_rms
    assert f"relative RMS {found.relative_rms:.2e}" in str(found) and "cosine 0.99" in str(found)


def test_the_reported_error_of_little():
    x = torch.zeros(1, 2, 3, 8)
    for q, k, v in ((x, x, x), (x[:, :, :0], x, x), (x, x[:, :, :0], x[:, :, :0])):
        assert tuple(vars(attention_int8_error(q, k, v)).values()) == (0.0, 0.0, 1.0, 0.0)
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    broken = v.clone()
    broken[0, 0, 1, 2] = torch.inf  # what is infinite in the truth has no part
    assert 0.0 < attention_int8_error(q, k, broken).relative_rms < 0.1


def test_a_result_that_is_lost_has_an_infinite_error():
    """A key that no query sees in exact attention, and whose rounding to integers is not a number."""
    q, k, v = torch.rand(1, 2, 3, 8) + 0.5, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    k[0, 0, 1, 2] = -torch.inf
    found = attention_int8_error(q, k, v)
    assert (found.largest, found.relative_rms, found.cosine) == (torch.inf, torch.inf, 0.0) and found.exact_rms < 1e-5


def test_the_reported_error_refuses_other_arguments():
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(TypeError, match="return_logsumexp: expected no such argument"):
        attention_int8_error(x, x, x, return_logsumexp=True)
    with pytest.raises(TypeError, match="dropout_p"):
        attention_int8_error(x, x, x, dropout_p=0.5)


def test_flops_are_those_of_attention():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = tensors((2, 4, 4, 5, 7, 8, 16))
    with FlopCounterMode(display=False) as counter:
        attention_int8(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 7 * (8 + 16)


def test_all_rules_at_once_have_no_leak():
    """NaN in keys and values that no query sees."""
    q, k, v = tensors((2, 2, 2, 5, 12, 8, 8), torch.float16)
    for smooth, alignment in itertools.product((True, False), ("top_left", "bottom_right")):
        given = {"is_causal": True, "causal_alignment": alignment, "key_lengths": torch.tensor([9, 4])}
        k[0, :, 9:], k[1, :, 4:], v[0, :, 9:], v[1, :, 4:] = (torch.nan,) * 4
        assert attention_int8(q, k, v, smooth_keys=smooth, **given).isfinite().all()


def test_the_table_of_errors(capsys):
    """What docs/attention_int8.md prints: the average matters where the keys have one, and nowhere else."""
    from benchmarks import attention_int8 as table

    assert table.main(["--shape", "1,2,96,32", "--causal"]) == 0
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    errors = {(line[0], line[1]): float(line[3]) for line in lines}
    assert len(errors) == 6
    assert errors["channels", "as they are"] > 1.5 * errors["channels", "less their average"]
    for data in ("normal", "outliers"):
        assert errors[data, "as they are"] < 1.3 * errors[data, "less their average"]
    for wrong in ("1,2,3", "1,2,0,4", "a"):
        with pytest.raises(SystemExit):
            table.main(["--shape", wrong])
    assert "expected B,H,S,D, positive integers, got 'a'" in capsys.readouterr().err
