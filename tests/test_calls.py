"""The short way of a call past torch's dispatcher: which calls may take it, and what its key tells apart."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from llmkern import extension
from llmkern.functional import int8_linear, rotary, scaled_dot_product_attention, sinusoidal_add
from llmkern.operator import call_key, is_plain
from tests.attention.cases import tensors


class Subclass(torch.Tensor):
    pass


def test_equal_metadata_give_equal_keys_and_others_do_not():
    x = torch.randn(2, 3)
    different = [
        (x,), (x.t(),), (x.double(),), (x.half(),), (x.bfloat16(),), (x.to(torch.uint8),), (x.bool(),), (x[0],),
        (x[:, :2],), (x[None],), (x, None), (None, x), (x, True), (x, False), (x, 0), (x, 1), (x, 0.0), (x, 1.0),
        (x, -1), (x, 2**40), (x, "a"), (x, "ab"), (x, "a", "b"), (x, x), (x.as_strided((1, 1), (2**31, 1)),),
        (x.as_strided((1, 1), (2**31 + 1, 1)),), (nn.Parameter(x),), (x, ""), (torch.empty(0, 3),),
    ]  # fmt: skip
    keys = [call_key(*args) for args in different]
    assert None not in keys
    for (i, a), (j, b) in itertools.combinations(enumerate(keys), 2):
        assert a != b, (different[i], different[j])
    assert call_key(torch.zeros(2, 3), "a", 2.5) == call_key(torch.ones(2, 3), "a", 2.5)


def test_the_first_byte_says_whether_autograd_records():
    x, leaf = torch.randn(2), torch.randn(2, requires_grad=True)
    assert [call_key(*a)[0] for a in ((x,), (leaf,), (x, None, leaf), (leaf * 2, x))] == [0, 1, 1, 1]
    with torch.no_grad():
        assert call_key(leaf)[0] == 0


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode", [FunctionMode, DispatchMode, lambda: torch.autocast("cpu"), torch.autograd.forward_ad.dual_level]
)
def test_no_short_way_where_torch_is_in_some_mode(mode):
    x = torch.randn(2)
    with mode():
        assert call_key(x) is None and not is_plain(x)
    assert call_key(x) is not None and is_plain(x)


def test_no_short_way_in_transforms_nor_while_tracing():
    x, seen = torch.randn(2), []

    def function(x):
        seen.append((call_key(x), is_plain(x)))
        return x.sum()

    torch.func.grad(function)(x)
    torch.func.vmap(function)(torch.randn(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(function, x, check_trace=False)
    assert seen == [(None, False)] * 3


def test_no_short_way_for_what_is_no_plain_tensor():
    x = torch.randn(2)
    negated = torch.randn(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for other in (x.as_subclass(Subclass), [1.0], negated, torch.empty(2, device="meta"), 2**70, object()):
        assert call_key(x, other) is None
    assert not is_plain(x.as_subclass(Subclass)) and not is_plain(negated)


def test_a_view_that_is_negated_when_it_is_read_gives_its_values():
    q, k, v = (torch.randn(1, 2, 5, 16, dtype=torch.complex64).conj().imag for _ in range(3))
    plain = [t.clone() for t in (q, k, v)]
    assert torch.equal(scaled_dot_product_attention(q, k, v), scaled_dot_product_attention(*plain))
    weight, scale = torch.randint(-127, 128, (16, 16), dtype=torch.int8), torch.rand(16)
    assert torch.equal(int8_linear(q, weight, scale), int8_linear(plain[0], weight, scale))
    cos, sin = torch.rand(5, 8), torch.rand(5, 8)
    rotated, expected = (llmkern.functional.rotary(*t, cos, sin) for t in ((q, k), plain[:2]))
    for a, b in zip(rotated, expected, strict=True):
        assert torch.equal(a, b)
    pe = torch.randn(5, 1, 16)
    x = torch.randn(5, 2, 16, dtype=torch.complex64).conj().imag
    assert torch.equal(llmkern.functional.sinusoidal_add(x, pe), llmkern.functional.sinusoidal_add(x.clone(), pe))
    inplace = torch.randn(1, 2, 5, 16, dtype=torch.complex64).conj().imag
    expected = llmkern.functional.rotary(inplace.clone(), None, cos, sin)[0]
    llmkern.functional.rotary(inplace, None, cos, sin, inplace=True)
    assert torch.equal(inplace, expected)


def test_the_short_way_gives_what_the_operator_gives():
    q, k, v = tensors((2, 4, 2, 7, 9, 16, 16))
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(2, 4, 7, 9) > 0.4}, {"scale": 0.3}):
        first = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        again = scaled_dot_product_attention(q.clone(), k.clone(), v.clone(), enable_gqa=True, **options)
        with DispatchMode():
            dispatched = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert torch.equal(first, again) and torch.equal(first, dispatched)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        recorded = scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
        assert recorded.requires_grad and torch.equal(recorded.detach(), first)


def test_dlpacks_structs_are_those_of_the_installed_torch():
    """Field by field, in order: csrc/common/call.h declares them anew, so that the build needs no torch."""
    text = (Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h").read_text()
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)

    def fields(name: str) -> list[str]:
        (body,) = re.findall(rf"typedef struct(?: {name})? \{{([^{{}}]*)\}} {name};", text)
        return [" ".join(f.split()) for f in body.split(";") if f.strip()]

    assert fields("DLTensor") == [
        "void* data", "DLDevice device", "int32_t ndim", "DLDataType dtype", "int64_t* shape", "int64_t* strides",
        "uint64_t byte_offset",
    ]  # fmt: skip
    assert fields("DLDevice") == ["DLDeviceType device_type", "int32_t device_id"]
    assert fields("DLDataType") == ["uint8_t code", "uint8_t bits", "uint16_t lanes"]
    assert fields("DLPackExchangeAPIHeader") == ["DLPackVersion version", "struct DLPackExchangeAPIHeader* prev_api"]
    assert fields("DLPackVersion") == ["uint32_t major", "uint32_t minor"]
    assert [f.split()[-1] for f in fields("DLPackExchangeAPI")] == [
        "header", "managed_tensor_allocator", "managed_tensor_from_py_object_no_sync",
        "managed_tensor_to_py_object_no_sync", "dltensor_from_py_object_no_sync", "current_work_stream",
    ]  # fmt: skip
    assert extension.SHORT_CALLS


def test_kernels_refuse_what_is_no_plan_and_a_wrong_count():
    with pytest.raises(TypeError, match="expected a plan"):
        extension._C.int8_linear(None, 1, None, None, None, None, None)
    with pytest.raises(TypeError, match="7 tensors, got 1"):
        extension._C.int8_linear(None)


@pytest.mark.parametrize("offset", [0, 3, 10**6])
def test_released_memory_is_not_read(offset):
    """As sharded training leaves parameters between uses, views into one storage that is gone."""

    def released(t):
        t = torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)
        t.untyped_storage().resize_(0)
        return t

    x, table = torch.randn(1, 1, 4, 8), torch.randn(4, 4)
    layer, gone = llmkern.Int8Linear(8, 4), llmkern.Int8Linear(8, 4)
    gone.weight = released(gone.weight)
    errors = []
    for call in (
        lambda: scaled_dot_product_attention(released(x), x, x),
        lambda: rotary(released(x), None, table, table),
        lambda: sinusoidal_add(released(x[0]), torch.randn(1, 8)),
        lambda: layer(released(x)),
        lambda: gone(x),
    ):
        try:  # no tensor may be left for pytest to print, which torch does not survive
            call()
        except ValueError as e:
            errors.append("storage was released" in str(e))
    assert errors == [True] * 5
    assert layer(released(x[:0])).shape == (0, 1, 4, 4)
