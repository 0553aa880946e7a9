"""attention_forward_cuda without a GPU: what the launcher would launch, from the same arguments, executed as PTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmkern import extension
from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, Report, find, run

SOURCE = compilers.ROOT / "csrc/attention/cuda_forward.cu"
MANGLED = {torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E"}
Changes = tuple[tuple[str, str], ...]


def place(launch: Launch, tensor: torch.Tensor, name: str, written: bool) -> tuple[int, np.ndarray]:
    """The address of a tensor whose storage is copied as it lies, and the bytes of the copy."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    # The same distance from a multiple of 16 as in torch's memory.
    buffer = Buffer(storage, name, written, read_only=written, offset=tensor.untyped_storage().data_ptr() % 16)
    return launch.address(buffer) + tensor.storage_offset() * tensor.element_size(), storage


class Emulated:
    """Stands for the kernel of the library: called with a plan, device, stream and tensors on the CPU."""

    def __init__(self, architecture: str = "80", schedule: str = "lockstep", counts: bool = False,
                 changes: Changes = ()) -> None:  # fmt: skip
        self.architecture, self.schedule, self.counts, self.changes = architecture, schedule, counts, changes
        self.reports: list[Report] = []

    def __call__(self, plan: Any, device: int, stream: int, *tensors: torch.Tensor | None) -> None:
        launch = Launch()
        names = ["mask", "lengths", "logsumexp", "slopes", "sink", "seed", "query", "key", "value", "output"]
        addresses = [
            0 if t is None or not t.numel() else t.data_ptr() if name == "seed"  # which the launcher reads
            else place(launch, t, name, name not in ("logsumexp", "output"))[0]
            for name, t in zip(names, tensors, strict=True)
        ]  # fmt: skip
        kind, params, work = extension._C.attention_forward_cuda_launch(plan, addresses)
        width, row_tiles, features, blocks, threads, shared = kind
        if not blocks:
            return
        query = tensors[6]
        assert query is not None
        ptx = compilers.nvcc(SOURCE, self.architecture, self.changes)
        part = f"attention_forward_kernelI{MANGLED[query.dtype]}Li{width}ELi{row_tiles}ELb{int(features)}E"
        report = run(
            ptx, find(ptx, part), blocks, threads, [params, work], shared_bytes=shared, schedule=self.schedule,
            counts=self.counts, launch=launch,
        )  # fmt: skip
        self.reports.append(report.raise_if_faulty())


def as_launcher(kernel: Emulated) -> Any:
    """For llmkern.cuda.kernel: the name of the library's function to what stands for it."""
    return lambda name: {"attention_forward_cuda": kernel}[name]


def served(kernel: Emulated, monkeypatch: Any, operators: Sequence[str] = ("attention",)) -> None:
    """Calls of the operators on the CPU are served by the CUDA backend, whose kernel runs as PTX."""
    from llmkern import backend
    from llmkern.attention import cuda

    monkeypatch.setattr("llmkern.cuda.kernel", as_launcher(kernel))
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    for name in operators:
        operator = backend.Operator.all[name]
        stands = backend.Backend("cuda", cuda.CUDA_ATTENTION.plan, lambda *args: cuda._limits(*args[:3], args[3:]))
        monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()
