"""Triton's attention of quantised queries and keys in its interpreter; test_triton_int8.py runs this file, in a
process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import op, reference, triton_int8_launch
from llmkern.attention.mask import Mask
from llmkern.attention.reference import int8 as plain_int8
from llmkern.attention.triton_configurations import Configuration
from tests.attention.cases import tensors
from tests.attention.int8_cases import HALVES, NAMES, compare, rules_of, shifted
from tests.attention.on_triton import serve
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
TILE = Configuration(32, 32, 4, 1)
# (B, H, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "around tiles": (1, 1, 1, 33, 64, 16, 16),
    "grouped heads, primes": (1, 6, 2, 13, 29, 17, 23),
    "one query, many keys": (1, 2, 1, 1, 70, 32, 8),
    "wider value": (1, 1, 1, 20, 21, 8, 48),
    "widest": (1, 1, 1, 5, 40, 256, 16),
    "no keys": (1, 2, 2, 3, 0, 16, 16),
    "no queries": (1, 2, 2, 0, 5, 16, 16),
    "no heads": (2, 0, 0, 3, 5, 16, 16),
    "no value width": (1, 2, 1, 5, 20, 16, 0),
}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret, tile=TILE)
    yield
    backend.forget_plans()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    compare(shape, HALVES[shape[3] % 2], {"causal": True} if shape[4] else {})


@pytest.mark.parametrize("name", NAMES)
def test_rules(name):
    """Each in one of the dtypes, with or without the keys' average."""
    at = NAMES.index(name)
    shape = (2, 2, 1, 37, 50, 24, 12) if at % 2 else (2, 2, 2, 41, 19, 12, 24)  # and rows that stay empty
    dtype = HALVES[at // 2 % 2]
    compare(shape, dtype, rules_of(name, shape, dtype), smooth=at % 3 > 0)


def integers(monkeypatch, q, k, v, mask):
    """What the kernels stored: (integers, scales) of queries and of keys, and the queries' lift."""
    found = {}

    def keep(launch):
        if launch.kernel == "attention_int8_kernel":  # which need not run
            found["all"] = launch.arguments[:5]
        else:
            interpret(launch)

    serve(monkeypatch, keep, tile=TILE)
    op.attention_int8(q, k, v, mask, 0.25, True)
    q8, q_scale, lift, k8, k_scale = found["all"]
    width = q.size(3)
    assert not q8[..., width:].any() and not k8[..., width:].any()
    return (q8[..., :width], q_scale), (k8[..., :width], k_scale), lift


@pytest.mark.parametrize(("keys", "dtype"), [(1, HALVES[0]), (33, HALVES[1]), (1024, HALVES[0]), (1057, HALVES[1])])
def test_the_integers_are_the_references(keys, dtype, monkeypatch):
    """Bit for bit, over one chunk of keys and over several; with lengths, zeros, tiny and infinite rows."""
    q, k, v = shifted(tensors((2, 2, 1, 5, keys, 24, 16), dtype))
    q[0, 0, 1], q[0, 1, 2] = 0.0, 2.0**-24
    k[1, 0, keys // 2, 3], q[1, 1, 4, 5] = torch.inf, torch.nan
    for lengths in (None, torch.tensor([keys - keys // 3, 0])):
        average = plain_int8.key_average(k, lengths)
        got_q, got_k, lift = integers(monkeypatch, q, k, v, Mask(key_lengths=lengths))
        for got, expected in ((got_q, plain_int8.quantized(q)), (got_k, plain_int8.quantized(k, average))):
            assert torch.equal(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)
        expected = (q.double() * average.double()).sum(-1).float()
        torch.testing.assert_close(lift, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scales(scale, softcap):
    inputs, mask = shifted(tensors((1, 1, 1, 33, 40, 16, 16), torch.float16)), Mask(window_right=0, softcap=softcap)
    rest = (None, None, None, None, *mask.arguments()[5:9], scale, True)
    truth = reference.attention_int8(*(t.double() for t in inputs), *rest)
    for got, true in zip(op.attention_int8(*inputs, mask, scale, True), truth, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=2e-3, atol=2e-3)


def test_what_is_masked_has_no_part():
    """Neither infinities nor NaN in masked keys and values reach a result, by whatever rule."""
    q, k, v = tensors((2, 1, 1, 9, 40, 8, 8), torch.float16)
    seen = (torch.arange(40) % 5 > 0).expand(1, 1, 9, 40)
    hidden = {
        "lengths": (Mask(key_lengths=torch.tensor([38, 7])), torch.arange(40) >= torch.tensor([[38], [7]])),
        "causal": (Mask(window_right=0), (torch.arange(40) >= 9).expand(2, 40)),
        "columns": (Mask(seen), (torch.arange(40) % 5 == 0).expand(2, 40)),
    }
    for name, (mask, columns) in hidden.items():
        results = []
        for of_keys, of_values in ((0.0, 0.0), (torch.nan, torch.inf)):
            spoiled = [t.masked_fill(columns[:, None, :, None], x) for t, x in ((k, of_keys), (v, of_values))]
            results.append(op.attention_int8(q, *spoiled, mask, 0.3, True))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3, msg=lambda told, name=name: f"{name}: {told}")


def test_what_is_seen_passes_through():
    q, k, v = tensors((1, 2, 2, 9, 20, 16, 16), torch.float16)
    q[0, 0, 3, 2], k[0, 1, 5, 0], v[0, 0, 7, 1], v[0, 1, 1, 1] = torch.nan, torch.inf, torch.inf, -torch.inf
    for mask in (Mask(), Mask(window_right=0)):
        rest = (None, None, None, None, *mask.arguments()[5:9], 0.25, True)
        got, expected = op.attention_int8(q, k, v, mask, 0.25, True), reference.attention_int8(q, k, v, *rest)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-3, atol=2e-3)
        assert got[0].isnan().any() and got[0].isinf().any() and got[0].isfinite().any()


def test_strides():
    q, k, v = tensors((1, 2, 2, 20, 37, 16, 16), torch.bfloat16)
    layouts = {
        "as they are": lambda t: t,
        "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "off by an element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
        "last dimension apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "half of a wider head": lambda t: torch.cat([t, t], -1)[..., 16:],
    }
    expected = op.attention_int8(q, k, v, Mask(), 0.2, True)
    for name, layout in layouts.items():
        got = op.attention_int8(*(layout(t) for t in (q, k, v)), Mask(), 0.2, True)
        assert all(map(torch.equal, got, expected)), name


def test_planted_errors_are_found(monkeypatch):
    """An average that forgets its last key, and a lift that is left out."""

    def shorter(launch):
        if launch.kernel == "attention_key_sums_kernel":
            arguments = list(launch.arguments)
            arguments[4] -= 1
            launch = triton_int8_launch.triton.Launch(**{**vars(launch), "arguments": tuple(arguments)})
        interpret(launch)

    def level(launch):
        interpret(launch)
        if launch.kernel == "attention_quantize_kernel" and not launch.constants["KEYS"]:
            launch.arguments[4].zero_()

    inputs = shifted(tensors((1, 1, 1, 3, 20, 16, 16), torch.float16))
    expected = reference.attention_int8(*inputs, None, None, None, None, -1, -1, False, 0.0, 0.25, True)[1]
    for fault in (interpret, shorter, level):
        serve(monkeypatch, fault, tile=TILE)
        found = op.attention_int8(*inputs, Mask(), 0.25, True)[1]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5) == (fault is interpret), fault
