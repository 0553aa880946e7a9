"""Bad input raises before any kernel runs, in eager mode and while tracing, and is named."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llmkern
from llmkern import functional, reference
from llmkern.functional import scaled_dot_product_attention
from tests.attention.bad_inputs import CASES, t


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "words"), CASES.values(), ids=CASES)
def test_scaled_dot_product_attention(changed, error, words, mode):
    arguments = {"query": t(), "key": t(), "value": t(), **changed}
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        scaled_dot_product_attention(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([t(4, 5, 8), t(3, 5, 8)], layout=layout)
    with pytest.raises(TypeError, match=rf"key: expected a dense tensor .* got a nested tensor \({layout}\)"):
        scaled_dot_product_attention(t(), nested, t())


def released(x):
    x.untyped_storage().resize_(0)
    return x


def test_released_storages():
    x, sums = t(), t(2, 4, 5, dtype=torch.float64)
    ends, tokens, q, cache = torch.tensor([0, 5]), t(5, 4, 8), t(2, 1, 4, 8), t(2, 9, 4, 8)
    for name, call in [
        ("attn_mask", lambda: scaled_dot_product_attention(x, x, x, released(t(5, 5)))),
        ("attn_mask", lambda: functional.attention_column_sums(x, x, sums, released(t(5, 5)))),
        ("key", lambda: functional.attention_column_sums(x, released(t()), sums)),
        ("value", lambda: functional.attention_varlen(tokens, tokens, released(t(5, 4, 8)), ends, ends)),
        ("v", lambda: functional.attention_with_kvcache(q, cache, cache.clone(), q, released(t(2, 1, 4, 8)), None)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with memory"):
            call()


def test_a_mask_of_fixed_size_while_sizes_are_symbols():
    x, mask = torch.randn(2, 4, 5, 8), torch.rand(5, 5) > 0.3
    module, y = llmkern.MultiHeadAttention(8, 2).requires_grad_(False), torch.randn(2, 5, 8)
    for function, argument in [
        (lambda x: scaled_dot_product_attention(x, x, x, mask.clone()), x),
        (lambda y: module(y, y, y, torch.ones(5, 5))[0], y),
    ]:
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(argument), function(argument))


MODULES = [llmkern.MultiHeadAttention, reference.MultiHeadAttention]


@pytest.mark.parametrize("module", MODULES)
def test_module(module):
    with pytest.raises(ValueError, match="n_head: expected a positive divisor of d_model = 10, got 3"):
        module(10, 3)
    for arguments, error, message in [
        ((8, 0), ValueError, "n_head: expected a positive integer, got 0"),
        ((-8, 2), ValueError, "d_model: expected a positive integer, got -8"),
        (("8", 2), TypeError, "d_model: expected a positive integer, got '8'"),
    ]:
        with pytest.raises(error, match=message):
            module(*arguments)
    attention, x = module(8, 2), torch.zeros(2, 5, 8)
    for arguments, error, message in [
        ((x[0], x, x), ValueError, r"query: expected \(B, Sq, d_model\)"),
        ((x[..., :7], x, x), ValueError, r"query: .* d_model = 8"),
        ((x.double(), x, x), TypeError, "query: .* float32, got float64"),
        ((x, x[:1], x), ValueError, "key: expected the batch of query, 2"),
        ((x, x, x[:, :4]), ValueError, "value: expected the length of key, 5"),
        ((x, x, x, torch.ones(5, 4)), ValueError, r"mask: .*n_head, Sq, Sk\) = \(2, 2, 5, 5\), got shape \(5, 4\)"),
        ((x, x, x.tolist()), TypeError, "value: expected a torch.Tensor, got list"),
        ((x, x.to("meta"), x), ValueError, "key: expected the device"),
        ((x, x.to_sparse(), x), TypeError, "key: expected a dense tensor .* got torch.sparse_coo"),
        ((x, x, x, torch.ones(5, 5).to_sparse()), TypeError, "mask: expected a dense tensor .* got torch.sparse_coo"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            attention(*arguments)


@pytest.mark.parametrize("module", MODULES)
def test_module_under_autocast(module):
    attention, x = module(8, 2), torch.zeros(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, x.bfloat16(), x.half())[0].dtype == torch.bfloat16
        for wrong, came in ((x.long(), "int64"), (x.double(), "float64")):
            for name, arguments in (("query", (wrong, x, x)), ("value", (x, x, wrong))):
                with pytest.raises(TypeError, match=f"{name}: expected dtype float32 .* float16, got {came}"):
                    attention(*arguments)
        wide, y = reference.MultiHeadAttention(8, 2).double(), x.double()
        assert wide(y, y, y)[0].dtype == torch.float64
        with pytest.raises(TypeError, match="key: expected the dtype of the parameters, float64, got float32"):
            wide(y, x, y)


def test_a_projection_of_another_dtype():
    attention, x = llmkern.MultiHeadAttention(8, 2), torch.zeros(2, 5, 8)
    attention.w_o.bfloat16()
    with pytest.raises(TypeError, match="query: expected the dtype of the parameters, bfloat16, got float32"):
        attention(x, x, x)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"key_lengths": [3]}, TypeError, "key_lengths: expected a torch.Tensor, got list"),
        ({"alibi_slopes": [1]}, TypeError, "alibi_slopes: expected a torch.Tensor, got list"),
        ({"learnable_sink": [2]}, TypeError, "learnable_sink: expected a torch.Tensor, got list"),
        ({"need_weights": "a"}, TypeError, "need_weights: expected True or False, got 'a'"),
        ({"is_causal": "a"}, TypeError, "is_causal: expected True or False, got 'a'"),
        ({"softcap": "a"}, TypeError, "softcap: expected a number, got 'a'"),
        ({"window_size": (2**70, 0)}, ValueError, "window_size: expected .* at most"),
    ],
)
def test_options_of_the_module(changed, error, message):
    x = torch.zeros(2, 5, 8)
    with pytest.raises(error, match=message):
        llmkern.MultiHeadAttention(8, 2)(x, x, x, **changed)
