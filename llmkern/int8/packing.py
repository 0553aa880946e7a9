"""Weights in the order that the CPU kernel reads, kept from call to call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from llmkern import extension

# By id(tensor): a weak reference to it, and by what it was packed for the version and address of the tensor then, and
# the copy. An entry goes when its tensor does, so that a new tensor at the same address or with the same id never meets
# it.
_Copies = dict[Hashable, tuple[int, int, Tensor]]
_kept: dict[int, tuple[weakref.ref[Tensor], _Copies]] = {}


def packed(weight: Tensor, isa: str, group: int = 0, pairs: bool = False) -> Tensor:
    """The bytes for the kernel `int8_linear` of the instruction set `isa`, which must be the active one.

    weight: (N, K), int8. group, pairs: as the call has them. The copy, of about the same size, is kept for as long as
    this tensor lives and packed anew after any in-place update that torch records in `weight._version`. A write past
    torch (through `weight.data` or a NumPy view) is not recorded: call `forget(weight)` after one. Inference tensors
    have no version and are packed in every call.
    """
    entry = _kept.get(id(weight))
    if entry is not None and entry[0]() is weight:
        found = entry[1].get((isa, group, pairs))
        if found is not None and found[0] == weight._version and found[1] == weight.data_ptr():
            return found[2]
    return _keep(weight, (isa, group, pairs), lambda: _pack(weight, group, pairs))


def transposed(scale: Tensor) -> Tensor:
    """(groups, N) from the scales of groups (N, groups), kept as a packed weight is."""
    entry = _kept.get(id(scale))
    if entry is not None and entry[0]() is scale:
        found = entry[1].get("transposed")
        if found is not None and found[0] == scale._version and found[1] == scale.data_ptr():
            return found[2]
    return _keep(scale, "transposed", lambda: scale.detach().t().clone(memory_format=torch.contiguous_format))


def forget(tensor: Tensor) -> None:
    """Drops what is kept of this weight or scale."""
    _kept.pop(id(tensor), None)


def _keep(tensor: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    if tensor.is_inference():
        return make()
    version, address = tensor._version, tensor.data_ptr()
    with torch.inference_mode(False):  # the copy outlives the block of the call
        result = make()
    entry = _kept.get(id(tensor))
    if entry is None or entry[0]() is not tensor:
        entry = _kept[id(tensor)] = (weakref.ref(tensor, _remover(id(tensor))), {})
    copies = entry[1]
    for other in [k for k, kept in copies.items() if kept[:2] != (version, address) or not _same_isa(k, key)]:
        del copies[other]
    copies[key] = (version, address, result)
    return result


def _same_isa(a: Hashable, b: Hashable) -> bool:
    return not (isinstance(a, tuple) and isinstance(b, tuple)) or a[0] == b[0]


def _remover(key: int) -> Callable[[weakref.ref[Tensor]], None]:
    def remove(reference: weakref.ref[Tensor]) -> None:
        kept = _kept.get(key)
        if kept is not None and kept[0] is reference:  # and not that of a later tensor with this id
            del _kept[key]

    return remove


def _pack(weight: Tensor, group: int, pairs: bool) -> Tensor:
    kernels = extension._C
    outputs, depth = weight.shape
    source = weight.detach().contiguous()
    result = torch.empty(kernels.int8_packed_bytes(outputs, depth, group, pairs), dtype=torch.uint8)
    kernels.int8_pack(source.data_ptr(), result.data_ptr(), outputs, depth, group, pairs, extension.threads())
    return result
