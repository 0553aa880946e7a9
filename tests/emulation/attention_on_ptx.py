"""The attention with its CUDA backends on the CPU: launchers as nvcc compiled them, their kernels by the emulator."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern import backend
from llmkern.attention import cuda, cuda_decode
from tests.emulation import compilers, cuda_launches
from tests.emulation.ptx.launch import Buffer, Launch

DECODE, FORWARD = (compilers.ROOT / f"csrc/attention/cuda_{name}.cu" for name in ("decode", "forward"))
SECTOR = 32  #: bytes; torch's memory on a GPU lies at multiples of 512, on the CPU of 64


@dataclasses.dataclass(frozen=True)
class Address:
    """What the library's functions take in place of a tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Memory:
    """The tensors of a call in the emulator's memory, each storage once."""

    def __init__(self) -> None:
        self.launch = Launch()
        self.storages: dict[int, int] = {}

    def place(self, t: Tensor | None, name: str, fresh: bool = False, written: bool = False) -> Address | None:
        """fresh: nobody has written it before; written: the kernel does."""
        if t is None or not t.numel():
            return None
        storage = t.untyped_storage()
        where = storage.data_ptr()
        if where not in self.storages:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            read_only = not fresh and not written
            buffer = Buffer(data, name, written=not fresh, read_only=read_only, offset=where % SECTOR)
            self.storages[where] = self.launch.address(buffer)
        return Address(self.storages[where] + t.storage_offset() * t.element_size())

    def place_all(
        self, names: Sequence[str], tensors: Sequence[Tensor | None], fresh: Sequence[str], written: Sequence[str] = ()
    ) -> list[Address | None]:
        return [self.place(t, n, n in fresh, n in written) for n, t in zip(names, tensors, strict=True)]


class Emulated(cuda_launches.Emulated):
    """Has the functions of llmkern._C, by name. options: of the emulator's `run`; changes: of the kernels' source."""

    family: str
    source: Path

    def __init__(self, changes: compilers.Changes = (), **options: Any) -> None:
        super().__init__(*_built(self.family))
        self.options = {"schedule": "lockstep", **options}
        if changes:
            self.use(compilers.nvcc(self.source, "80", changes))


class ForwardOnEmulator(Emulated):
    family, source = "attention", FORWARD

    def attention_forward_cuda(self, *arguments: Any) -> None:
        self._forward(self.module.attention_forward_cuda, *arguments)

    def attention_forward_hopper(self, *arguments: Any) -> None:
        self._forward(self.module.attention_forward_hopper, *arguments)

    def _forward(
        self, kernel: Callable[..., None], plan: Any, device: int, stream: int, *tensors: Tensor | None
    ) -> None:
        names = ["mask", "lengths", "logsumexp", "slopes", "sink", "seed", "query", "key", "value", "output"]
        memory = Memory()
        placed = memory.place_all(names, tensors, ("logsumexp", "output"))
        placed[5] = None if tensors[5] is None else Address(tensors[5].data_ptr())  # the launcher reads the seed
        self.call(lambda: kernel(plan, device, stream, *placed), memory.launch)


class CachedOnEmulator(Emulated):
    family, source = "attention_cached", DECODE

    def attention_decode_cuda(
        self, plan: Any, device: int, stream: int, splits: int, workspace: Tensor | None, *tensors: Tensor | None
    ) -> None:  # fmt: skip
        memory = Memory()
        names = ("table", "key scales", "value scales", "lengths", "logsumexp", "slopes", "sink", "query", "keys",
                 "values", "output")  # fmt: skip
        placed = [memory.place(workspace, "workspace", fresh=True)]
        placed += memory.place_all(names, tensors, ("logsumexp", "output"))
        self.call(lambda: self.module.attention_decode_cuda(plan, device, stream, splits, *placed), memory.launch)

    def cache_append_cuda(self, plan: Any, device: int, stream: int, *tensors: Tensor | None) -> None:
        memory = Memory()
        names = ("lengths", "table", "key scales", "value scales", "cos", "sin", "query", "rotated", "key", "value",
                 "key cache", "value cache")  # fmt: skip
        fresh = ("rotated",) if tensors[4] is not None else ()
        placed = memory.place_all(names, tensors, fresh, ("key scales", "value scales", "key cache", "value cache"))
        self.call(lambda: self.module.cache_append_cuda(plan, device, stream, *placed), memory.launch)


@functools.cache
def _built(family: str) -> tuple[Any, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return cuda_launches.build(Path(folder), family)


def _serve(monkeypatch: Any, emulated: Emulated, operators: Sequence[str], served: backend.Backend) -> None:
    monkeypatch.setattr("llmkern.cuda.kernel", lambda name: getattr(emulated, name))
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    for name in operators:
        operator = backend.Operator.all[name]
        monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [served]})
    backend.forget_plans()


def serve_cached(monkeypatch: Any, emulated: CachedOnEmulator, processors: int) -> None:
    """Calls of attention_with_kvcache on CPU tensors are served by the CUDA backend, on the emulator."""
    monkeypatch.setattr(cuda_decode, "processors", lambda device: processors)
    served = backend.Backend("cuda", cuda_decode.CUDA_KVCACHE.plan, lambda *args: None)
    _serve(monkeypatch, emulated, ["attention_kvcache"], served)


def serve_forward(
    monkeypatch: Any, emulated: ForwardOnEmulator, operators: Sequence[str] = ("attention",), hopper: bool = False
) -> ForwardOnEmulator:  # fmt: skip
    """The same for the attention. hopper: as on a device of compute capability 9.0."""
    monkeypatch.setattr("llmkern.cuda.is_hopper", lambda device: hopper)
    served = backend.Backend("cuda", cuda.CUDA_ATTENTION.plan, lambda *args: cuda._limits(*args[:3], args[3:]))
    _serve(monkeypatch, emulated, operators, served)
    return emulated
