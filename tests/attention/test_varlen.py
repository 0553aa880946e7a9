"""Sequences laid end to end: each as if it were alone, by the kernels and by the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from llmkern import backend
from llmkern.attention import op
from llmkern.attention.mask import Mask
from llmkern.attention.rows import Rows, groups
from llmkern.functional import attention_varlen, scaled_dot_product_attention
from llmkern.verify import verify

LENGTHS = {
    "some": ([5, 1, 9, 3], [5, 1, 9, 3]),
    "keys apart": ([5, 1, 9, 3], [7, 12, 2, 1]),
    "empty ones": ([0, 4, 3, 0], [2, 0, 6, 0]),
    "one long": ([2] * 12 + [90], [2] * 12 + [90]),
    "alone": ([17], [23]),
    "none": ([], []),
}
FEATURES = {
    "all": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window_size": (2, 1), "causal_alignment": "bottom_right"},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 9},
    "everything": {
        "window_size": (6, 3), "softcap": 2.0, "dropout_p": 0.2, "dropout_seed": 1, "causal_alignment": "bottom_right",
    },
}  # fmt: skip


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=dtype)


def inputs(name, dtype=torch.float32):
    queries, keys = (sum(x) for x in LENGTHS[name])
    q, k, v = torch.randn(queries, 4, 16), torch.randn(keys, 2, 16), torch.randn(keys, 2, 12)
    return tuple(t.to(dtype) for t in (q, k, v)), tuple(ends(x) for x in LENGTHS[name])


def one_by_one(name, **options):
    """The dense operator on each sequence, by torch's operations on the plain version."""

    def function(q, k, v, sink=None):
        from tests.attention.cases import differentiable

        outputs, queries, keys = [q.new_empty(0, 4, 12)], *(ends(x).tolist() for x in LENGTHS[name])
        for n in range(len(queries) - 1):
            one = [t[a[n] : a[n + 1]].transpose(0, 1)[None] for t, a in ((q, queries), (k, keys), (v, keys))]
            left, right = options.get("window_size", (-1, -1))
            mask = Mask(
                None, None, options.get("alibi_slopes"), sink, None, left, 0 if options.get("is_causal") else right,
                options.get("causal_alignment") == "bottom_right", options.get("softcap", 0.0),
            )  # fmt: skip
            outputs.append(differentiable(*one, mask, 0.25)[0][0].transpose(0, 1))
        return torch.cat(outputs)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["all", "causal", "bottom right", "window"])
@pytest.mark.parametrize("name", LENGTHS)
def test_contract(name, options, dtype, isa):
    tensors, (cu_q, cu_k) = inputs(name, dtype)

    def function(q, k, v):
        return attention_varlen(q, k, v, cu_q, cu_k, **FEATURES[options])

    verify(function, one_by_one(name, **FEATURES[options]), tensors).raise_if_failed()


def test_contract_of_sinks_slopes_and_caps():
    tensors, (cu_q, cu_k) = inputs("keys apart")
    options = {"alibi_slopes": torch.rand(4), "softcap": 3.0, "is_causal": True}

    def function(q, k, v, sink):
        return attention_varlen(q, k, v, cu_q, cu_k, learnable_sink=sink, **options)

    report = verify(function, one_by_one("keys apart", **options), (*tensors, torch.randn(4)))
    assert not [r for r in report.rows if not r.passed and r.name != "sink"], str(report)


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_dropout_and_all_as_in_a_padded_batch(options):
    (q, k, v), (cu_q, cu_k) = inputs("keys apart")
    sink, slopes = torch.randn(4), torch.rand(4, 4)
    options = {**options, "learnable_sink": sink, "alibi_slopes": slopes, "return_logsumexp": True}
    output, sums = attention_varlen(q, k, v, cu_q, cu_k, max_seqlen_q=9, max_seqlen_k=12, **options)
    assert output.shape == (18, 4, 12) and sums.shape == (4, 18) and sums.dtype == torch.float64
    right = options.get("causal_alignment") == "bottom_right"
    if right and options.get("dropout_p"):
        options.update(dropout_p=0.0)  # its numbers belong to another row there
        output, sums = attention_varlen(q, k, v, cu_q, cu_k, **options)
    rows_q, rows_k = Rows(cu_q.tolist(), at_end=right), Rows(cu_k.tolist())
    padded, padded_sums = scaled_dot_product_attention(
        rows_q.batch(q), rows_k.batch(k), rows_k.batch(v), enable_gqa=True, key_lengths=rows_k.lengths, **options
    )
    torch.testing.assert_close(output, rows_q.packed(padded))
    torch.testing.assert_close(sums, rows_q.packed_rows(padded_sums))


def test_dropout_is_made_again_in_the_backward():
    (q, k, v), (cu_q, cu_k) = inputs("some")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    output = attention_varlen(*leaves, cu_q, cu_k, dropout_p=0.5, dropout_seed=3)
    rows = Rows(cu_q.tolist())
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    padded = scaled_dot_product_attention(
        *(rows.batch(t) for t in copies), enable_gqa=True, key_lengths=rows.lengths, dropout_p=0.5, dropout_seed=3
    )
    grad = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, grad)
    for a, b in zip(found, torch.autograd.grad(rows.packed(padded), copies, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_the_kernels_serve_what_the_dense_ones_can():
    (q, k, v), (cu_q, cu_k) = inputs("one long")
    with backend.use("cpu"):
        output = attention_varlen(q, k, v, cu_q, cu_k, is_causal=True)
    with backend.use("reference"):
        torch.testing.assert_close(output, attention_varlen(q, k, v, cu_q, cu_k, is_causal=True))


def test_bits_do_not_depend_on_neighbours(isa):
    (q, k, v), (cu_q, cu_k) = inputs("keys apart")
    output = attention_varlen(q, k, v, cu_q, cu_k)
    for n in range(4):
        a, b = slice(*cu_q[n : n + 2].tolist()), slice(*cu_k[n : n + 2].tolist())
        alone = scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q[a], k[b], v[b])), enable_gqa=True)
        assert torch.equal(output[a], alone[0].transpose(0, 1))


LONG = [700, 3, 0, 97, 1030, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (130, 40)}], ids=str)
def test_long_sequences_are_those_alone(options, dtype, isa):
    ends_of = ends(LONG, torch.int64)
    q, k, v = (torch.randn(sum(LONG), h, d).to(dtype).requires_grad_() for h, d in ((4, 20), (2, 20), (2, 24)))
    output = attention_varlen(q, k, v, ends_of, ends_of, **options)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    for n in range(len(LONG)):
        at = slice(*ends_of[n : n + 2].tolist())
        alone = [t[at].detach().transpose(0, 1)[None].requires_grad_() for t in (q, k, v)]
        expected = scaled_dot_product_attention(*alone, enable_gqa=True, **options)
        assert torch.equal(output[at], expected[0].transpose(0, 1))
        of_one = torch.autograd.grad(expected, alone, grad[at].transpose(0, 1)[None])
        for found, one in zip(grads, of_one, strict=True):
            torch.testing.assert_close(found[at], one[0].transpose(0, 1))


def test_strides_and_threads():
    ends_of = ends(LONG)
    fused = torch.randn(sum(LONG), 3, 2, 24, requires_grad=True)
    apart = [t.contiguous().detach().requires_grad_() for t in fused.unbind(1)]
    found = attention_varlen(*fused.unbind(1), ends_of, ends_of, is_causal=True)
    expected = attention_varlen(*apart, ends_of, ends_of, is_causal=True)
    assert torch.equal(found, expected)
    grad = torch.randn(24, 2, sum(LONG)).permute(2, 1, 0)
    (together,) = torch.autograd.grad(found, fused, grad)
    for t, g in zip(together.unbind(1), torch.autograd.grad(expected, apart, grad), strict=True):
        assert torch.equal(t, g)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(attention_varlen(*apart, ends_of, ends_of, is_causal=True), expected)
    finally:
        torch.set_num_threads(threads)


def test_batches_hold_little_padding():
    assert list(groups([0, 5, 6, 15], [0, 5, 6, 15])) == [(0, 3)]
    bounds = ends([2] * 12 + [90]).tolist()
    found = list(groups(bounds, bounds))
    assert found == [(0, 12), (12, 13)]
    assert list(groups([0], [0])) == [] and list(groups([0, 0, 0], [0, 0, 0])) == [(0, 2)]


def test_opcheck_and_compile():
    (q, k, v), (cu_q, cu_k) = inputs("keys apart")
    rest = (cu_q, cu_k, 9, None, torch.rand(4, 4), torch.randn(4), torch.tensor(3), 4, 1, True, 5.0, 0.2, 0.25)
    operators = torch.ops.llmkern
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    opcheck(operators.attention_varlen, (*leaves, *rest))
    output, sums = operators.attention_varlen(q, k, v, *rest)
    opcheck(operators.attention_varlen_backward, (output, torch.randn_like(sums), q, k, v, output, sums, *rest))
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    found = compiled(*leaves, cu_q, cu_k, is_causal=True)
    expected = attention_varlen(*leaves, cu_q, cu_k, is_causal=True)
    assert torch.equal(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_its_operator_has_the_rules_of_the_dense_ones():
    assert [n for n in Mask.__dataclass_fields__][2:] == [
        a.name for a in torch.ops.llmkern.attention_varlen.default._schema.arguments[7:-1]
    ]
    assert callable(op.attention_varlen)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3])}, ValueError, ["cu_seqlens_k", "(N + 1,) = (2,)", "(3,)"]),
        ({"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, ["cu_seqlens_q", "number of tokens, 5", "[0, 3, 6]"]),
        ({"cu_seqlens_k": torch.tensor([0, 8, 7])}, ValueError, ["cu_seqlens_k", "rise from 0", "[0, 8, 7]"]),
        ({"cu_seqlens_k": torch.tensor([1, 4, 7])}, ValueError, ["cu_seqlens_k", "from 0", "[1, 4, 7]"]),
        ({"cu_seqlens_q": torch.zeros(3)}, TypeError, ["cu_seqlens_q", "int32 or int64", "float32"]),
        ({"cu_seqlens_q": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, ["cu_seqlens_q", "(3, 1)"]),
        ({"max_seqlen_q": 2}, ValueError, ["max_seqlen_q", "longest sequence, 3", "got 2"]),
        ({"query": torch.zeros(5, 4)}, ValueError, ["query", "(Tq, H, D)", "(5, 4)"]),
        ({"query": torch.zeros(5, 4, 8).double()}, TypeError, ["query", "float64"]),
        ({"key": torch.zeros(7, 3, 8)}, ValueError, ["key", "Hkv a divisor of H = 4", "(7, 3, 8)"]),
        ({"key": torch.zeros(7, 2, 9)}, ValueError, ["key", "D = 8", "(7, 2, 9)"]),
        ({"value": torch.zeros(6, 2, 8)}, ValueError, ["value", "(7, 2) as in key", "(6, 2, 8)"]),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, ["alibi_slopes", "(2, 4)", "(3, 4)"]),
        ({"window_size": 3}, ValueError, ["window_size", "(left, right)", "got 3"]),
        ({"causal_alignment": "right"}, ValueError, ["causal_alignment", "top_left", "'right'"]),
        *(
            ({name: [1.0]}, TypeError, [f"{name}: expected a torch.Tensor, got list"])
            for name in ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learnable_sink")
        ),
        *(
            ({name: "a"}, TypeError, [f"{name}: expected a number, got 'a'"])
            for name in ("softcap", "scale", "dropout_p")
        ),
        ({"scale": True}, TypeError, ["scale", "number", "True"]),
        ({"scale": float("nan")}, ValueError, ["scale", "finite number", "nan"]),
        ({"max_seqlen_q": "a"}, TypeError, ["max_seqlen_q: expected an integer, got 'a'"]),
        ({"max_seqlen_k": 2**70}, ValueError, ["max_seqlen_k", "64 bits", str(2**70)]),
        ({"is_causal": "a"}, TypeError, ["is_causal: expected True or False, got 'a'"]),
        ({"return_logsumexp": "a"}, TypeError, ["return_logsumexp: expected True or False, got 'a'"]),
        ({"query": torch.zeros(())}, ValueError, ["query", "(Tq, H, D)", "()"]),
        ({"key": torch.zeros(7, 2, 8).to_sparse()}, TypeError, ["key: expected a dense tensor", "torch.sparse_coo"]),
    ],
)
def test_bad_inputs(changed, error, words):
    arguments = {
        "query": torch.zeros(5, 4, 8), "key": torch.zeros(7, 2, 8), "value": torch.zeros(7, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3, 5]), "cu_seqlens_k": torch.tensor([0, 3, 7]), **changed,
    }  # fmt: skip
    with pytest.raises(error) as raised:
        attention_varlen(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
