"""What kernels read in place of a weight, kept from call to call: the CPU's in its order, rows and sums for GPUs."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from llmkern import extension

# By id(tensor): a weak reference to it, and by what it was packed for the version, address and layout of the tensor
# then, and the copy; and what captured graphs read, which may be copies of former versions. An entry goes when its
# tensor does, so that a new tensor at the same address or with the same id never meets it.
_Layout = tuple[torch.Size, tuple[int, ...]]
_Copies = dict[Hashable, tuple[int, int, _Layout, Tensor]]
_kept: dict[int, tuple[weakref.ref[Tensor], _Copies, list[Tensor]]] = {}
_change = threading.RLock()  # one thread may come back: a finalizer may call a layer


_forgotten = [0]


def forgotten() -> int:
    """How often `forget` was called: whoever keeps copies of copies must make them anew when it rises."""
    return _forgotten[0]


def _after_fork() -> None:
    global _change
    _change = threading.RLock()  # the old one may have been another thread's, which this process has not


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def layout_of(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.stride()


def packed(weight: Tensor, layout: _Layout, isa: str, group: int = 0, pairs: bool = False) -> Tensor:
    """The bytes for the kernel `int8_linear` of the instruction set `isa`, which must be the active one.

    weight: (N, K), int8. layout: layout_of(weight), for a caller that knows it. group, pairs: as the call has them. The
    copy, of about the same size, is kept for as long as this tensor lives and packed anew after any in-place update
    that torch records in `weight._version`. A write past torch (through `weight.data` or a NumPy view) is not recorded:
    call `forget(weight)` after one. Inference tensors have no version and are packed in every call.
    """
    key = (isa, group, pairs)
    found = _found(weight, layout, key)
    return found if found is not None else _keep(weight, layout, key, lambda: pack(weight, group, pairs))


def transposed(scale: Tensor, layout: _Layout) -> Tensor:
    """(groups, N) from the scales of groups (N, groups), kept as a packed weight is."""
    make = lambda: scale.detach().t().clone(memory_format=torch.contiguous_format)  # noqa: E731
    return _found_or_made(scale, layout, "transposed", make)


def rows_of_16(weight: Tensor, layout: _Layout) -> Tensor:
    """The weight (N, K) with rows that begin at multiples of 16 bytes, zeros behind K up to the next one.

    The weight itself where it is so already, else a copy, kept as a packed weight is.
    """
    depth = weight.size(1)
    strides_fit = weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and weight.stride(0) >= depth
    if strides_fit and depth % 16 == 0 and weight.data_ptr() % 16 == 0:
        return weight
    return _found_or_made(weight, layout, ("cuda", "rows"), lambda: _padded(weight.detach()))


def _padded(weight: Tensor) -> Tensor:
    outputs, depth = weight.shape
    result = weight.new_zeros(outputs, -(-depth // 16) * 16)
    result[:, :depth] = weight
    return result


def sums_over_k(weight: Tensor, layout: _Layout) -> Tensor:
    """The sums of a weight's rows, (N,) int32, kept as a packed weight is."""
    return _found_or_made(weight, layout, ("cuda", "sums"), lambda: weight.detach().sum(1, dtype=torch.int32))


def sums_of_groups(weight: Tensor, layout: _Layout, group: int) -> Tensor:
    """The sums over groups of k, (N, ceil(K / group)) int32, kept as a packed weight is."""

    def make() -> Tensor:
        padded = torch.nn.functional.pad(weight.detach(), (0, -weight.size(1) % group))
        return padded.view(weight.size(0), -1, group).sum(2, dtype=torch.int32)

    return _found_or_made(weight, layout, ("cuda", "sums", group), make)


def _found_or_made(tensor: Tensor, layout: _Layout, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    found = _found(tensor, layout, key)
    if not tensor.is_cuda:
        return found if found is not None else _keep(tensor, layout, key, make)
    if found is not None:
        if torch.cuda.is_current_stream_capturing():
            _hold(tensor, found)
            return found
        return _seen_by_this_stream(found)
    if torch.cuda.is_current_stream_capturing():
        return make()  # it belongs to the graph, and holds nothing before the graph has run
    return _keep(tensor, layout, key, lambda: _noted(make()))


# What one stream has written, another may only read behind it.
def _noted(copy: Tensor) -> Tensor:
    kept: Any = copy
    kept._llmkern_written = torch.cuda.current_stream(copy.device).cuda_stream, torch.cuda.Event()
    kept._llmkern_written[1].record(torch.cuda.current_stream(copy.device))
    return copy


def _seen_by_this_stream(copy: Tensor) -> Tensor:
    kept: Any = copy
    stream, event = kept._llmkern_written
    if torch._C._cuda_getCurrentRawStream(copy.device.index) == stream:
        return copy
    now = torch.cuda.current_stream(copy.device)
    now.wait_event(event)
    copy.record_stream(now)
    return copy


def _hold(tensor: Tensor, copy: Tensor) -> None:
    """Keeps a copy that a graph being captured will read at every replay, when another may have taken its place.

    A capture cannot wait for an event from outside of it: torch.cuda.graph waits for the device before it begins.
    """
    with _change:
        entry = _kept.get(id(tensor))
        if entry is not None and entry[0]() is tensor and not any(held is copy for held in entry[2]):
            entry[2].append(copy)


def forget(tensor: Tensor) -> None:
    """Drops what is kept of this weight or scale, but for copies that captured CUDA graphs read."""
    with _change:
        _forgotten[0] += 1
        entry = _kept.pop(id(tensor), None)
        if entry is not None and entry[0]() is tensor and entry[2]:
            _kept[id(tensor)] = (entry[0], {}, entry[2])


def _found(tensor: Tensor, layout: _Layout, key: Hashable) -> Tensor | None:
    entry = _kept.get(id(tensor))
    if entry is None or entry[0]() is not tensor:
        return None
    found = entry[1].get(key)
    if found is None or found[0] != tensor._version or found[1] != tensor.data_ptr() or found[2] != layout:
        return None
    return found[3]


def _keep(tensor: Tensor, layout: _Layout, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    if tensor.is_inference():
        return make()
    now = (tensor._version, tensor.data_ptr(), layout)
    with torch.inference_mode(False):  # the copy outlives the block of the call
        result = make()
    with _change:
        entry = _kept.get(id(tensor))
        copies: _Copies = {}
        held: list[Tensor] = []
        if entry is not None and entry[0]() is tensor:  # a new dictionary, since others may be reading the old one
            copies = {k: kept for k, kept in entry[1].items() if kept[:3] == now and _same_isa(k, key)}
            held = entry[2]
        copies[key] = (*now, result)
        _kept[id(tensor)] = (weakref.ref(tensor, _remover(id(tensor))), copies, held)
    return result


def _same_isa(a: Hashable, b: Hashable) -> bool:
    return not (isinstance(a, tuple) and isinstance(b, tuple)) or a[0] == b[0]


def _remover(key: int) -> Callable[[weakref.ref[Tensor]], None]:
    def remove(reference: weakref.ref[Tensor]) -> None:  # may interrupt the holder of the lock: it takes none
        kept = _kept.get(key)
        if kept is not None and kept[0] is reference:  # and not that of a later tensor with this id
            del _kept[key]

    return remove


def pack(weight: Tensor, group: int, pairs: bool) -> Tensor:
    """As `packed`, a copy that nobody keeps."""
    kernels = extension._C
    outputs, depth = weight.shape
    source = weight.detach().contiguous()
    result = torch.empty(kernels.int8_packed_bytes(outputs, depth, group, pairs), dtype=torch.uint8)
    kernels.int8_pack(source.data_ptr(), result.data_ptr(), outputs, depth, group, pairs, extension.threads())
    return result
