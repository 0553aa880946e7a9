"""The losses on the CPU, forward and backward, against torch's: time, peak memory, share of this machine's peak.

    python -m benchmarks.loss [--shapes 2048,576,49152 ...] [--rounds 5] [--cases linear plain distillation]

A shape: rows, hidden width, vocabulary. Times are of contestants that take turns within one process; peak memory is
that above the start, gradients included, of one forward and backward in a process of its own. Liger-Kernel and
cut-cross-entropy, not run here, have Triton kernels alone: they are contestants of `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkern import functional
from llmkern.evaluation import machine, roofline
from llmkern.evaluation.memory import release, resident
from llmkern.evaluation.timing import markdown, measure, seconds

SHAPES = [(2048, 576, 49152), (1024, 512, 128256)]
Run = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="*", default=[",".join(map(str, s)) for s in SHAPES], metavar="N,D,V")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    shapes = [tuple(int(x) for x in s.split(",")) for s in options.shapes]
    # First of all: a fork does not take along the threads that this process has used.
    memory = {(c, s): {n: peak_apart(c, s, n) for n in CASES[c].names} for c in options.cases for s in shapes}
    print(machine.line(machine.describe()))
    for (case, shape), peaks in memory.items():
        print(f"\n{case}, N,D,V = {','.join(map(str, shape))}, float32\n")
        print(compare(case, shape, peaks, options.rounds))
    return 0


class Case:
    """make: the contestants, ours first, on tensors of a shape. work: multiply-adds counted 2, and bytes, at least."""

    def __init__(
        self, names: Sequence[str], make: Callable[..., Mapping[str, Run]], work: Callable[..., tuple[float, float]]
    ) -> None:
        self.names, self.make, self.work = names, make, work


def head(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).requires_grad_(), (torch.randn(classes, width) / width**0.5).requires_grad_()


def gradients(loss: Callable[..., Tensor], *given: Tensor) -> Run:
    return lambda: torch.autograd.grad(loss(*given), given)


def linear(rows: int, width: int, classes: int) -> dict[str, Run]:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    given, targets = head(rows, width, classes), torch.randint(classes, (rows,))
    chunks = LinearCrossEntropyOptions(batch_chunk_size=256)
    return {
        "llmkern": gradients(lambda h, w: functional.linear_cross_entropy(h, w, targets), *given),
        "torch, chunks of 256": gradients(lambda h, w: F.linear_cross_entropy(h, w, targets, options=chunks), *given),
        "torch eager": gradients(lambda h, w: F.cross_entropy(F.linear(h, w), targets), *given),
    }


def plain(rows: int, width: int, classes: int) -> dict[str, Run]:
    logits, targets = torch.randn(rows, classes).requires_grad_(), torch.randint(classes, (rows,))
    return {
        "llmkern": gradients(lambda x: functional.cross_entropy(x, targets), logits),
        "torch eager": gradients(lambda x: F.cross_entropy(x, targets), logits),
    }


def distillation(rows: int, width: int, classes: int) -> dict[str, Run]:
    from llmkern.loss import DistillationLoss
    from llmkern.reference import DistillationLoss as Plain

    student, teacher = torch.randn(rows, classes).requires_grad_(), torch.randn(rows, classes)
    targets = torch.randint(classes, (rows,))
    return {
        "llmkern": gradients(lambda x: DistillationLoss()(x, teacher, targets), student),
        "torch eager": gradients(lambda x: Plain()(x, teacher, targets), student),
    }


CASES = {
    "linear": Case(
        ["llmkern", "torch, chunks of 256", "torch eager"], linear, lambda n, d, v: (6.0 * n * d * v, 0.0)
    ),
    "plain": Case(["llmkern", "torch eager"], plain, lambda n, d, v: (0.0, 12.0 * n * v)),
    "distillation": Case(["llmkern", "torch eager"], distillation, lambda n, d, v: (0.0, 20.0 * n * v)),
}  # fmt: skip


def compare(case: str, shape: tuple[int, ...], peaks: Mapping[str, int], rounds: int) -> str:
    flops, moved = CASES[case].work(*shape)
    floor = roofline.floor(flops, torch.float32, moved, seconds=0.02)
    result = measure(CASES[case].make(*shape), rounds=rounds, warmup=1, floor=floor)
    lines = [["", "time", "times torch eager", "share of peak", "peak memory"]]
    for name in result.names:
        ratio, share = result.ratio(name, "torch eager"), result.share(name)
        lines.append([
            name, seconds(result.time(name).median), f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            f"{share.median:.0%}" if share else "", f"{peaks[name] / 2**20:.0f} MiB",
        ])  # fmt: skip
    return markdown(lines) + "".join(f"\n{name}: {why}" for name, why in result.failed.items())


def peak_apart(case: str, shape: tuple[int, ...], name: str) -> int:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=report_peak, args=(sender, case, shape, name))
    child.start()
    sender.close()
    peak: int = receiver.recv()
    child.join()
    return peak


def report_peak(pipe: Any, case: str, shape: tuple[int, ...], name: str) -> None:
    small = CASES[case].make(64, 32, 256)[name]
    small()  # what is loaded and allocated once is not the call's
    run = CASES[case].make(*shape)[name]
    release()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    found = run()
    pipe.send(resident("VmHWM") - before)
    del found


if __name__ == "__main__":
    sys.exit(main())
