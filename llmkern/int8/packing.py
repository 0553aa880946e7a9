"""Weights in the order that the CPU kernel reads, kept from call to call."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from llmkern import extension

# By id(weight): a weak reference to it, its version, its address, the instruction set, the packed copy. An entry goes
# when its weight does, so that a new tensor at the same address or with the same id never meets it.
_kept: dict[int, tuple[weakref.ref[Tensor], int, int, str, Tensor]] = {}


def packed(weight: Tensor, isa: str) -> Tensor:
    """The bytes for the kernel `int8_linear` of the instruction set `isa`, which must be the active one.

    weight: (N, K), int8. The copy, of about the same size, is kept for as long as this tensor lives and packed anew
    after any in-place update that torch records in `weight._version`. A write past torch (through `weight.data` or
    a NumPy view) is not recorded: call `forget(weight)` after one. Inference tensors have no version and are packed
    in every call.
    """
    key = id(weight)
    kept = _kept.get(key)
    if kept is not None and kept[0]() is weight:
        _, version, address, kept_isa, result = kept
        if version == weight._version and address == weight.data_ptr() and kept_isa == isa:
            return result
    if weight.is_inference():
        return _pack(weight)
    version = weight._version
    result = _pack(weight)
    _kept[key] = (weakref.ref(weight, _remover(key)), version, weight.data_ptr(), isa, result)
    return result


def forget(weight: Tensor) -> None:
    """Drops what is kept of this weight."""
    _kept.pop(id(weight), None)


def _remover(key: int) -> Any:
    def remove(reference: weakref.ref[Tensor]) -> None:
        kept = _kept.get(key)
        if kept is not None and kept[0] is reference:  # and not that of a later tensor with this id
            del _kept[key]

    return remove


def _pack(weight: Tensor) -> Tensor:
    kernels = extension._C
    outputs, depth = weight.shape
    source = weight.detach().contiguous()
    with torch.inference_mode(False):  # the copy outlives the block of the call
        result = torch.empty(kernels.int8_packed_bytes(outputs, depth), dtype=torch.uint8)
    kernels.int8_pack(source.data_ptr(), result.data_ptr(), outputs, depth, extension.threads())
    return result
