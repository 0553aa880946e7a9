"""What the mix of a loop's instructions lets the busiest unit reach: a bracket, derived and not measured.

Each instruction of a warp takes its pipe for some cycles of the SM (32 lanes over the lanes that the SM has for it).
With nothing overlapping, the cycles of all pipes add up; with everything overlapping, the busiest pipe, or the issue of
instructions, decides. The share of the matrix pipe (of the memory pipe where the loop has no matrix instructions) in
the one and in the other is the bracket.

Rates: CUDA C++ Programming Guide, "Arithmetic Instructions", table of results per clock cycle and SM; those of the
tensor cores from the peaks in NVIDIA's architecture white papers (A100, GA102, Ada, H100, Blackwell), divided by SMs
and clock; 128 bytes a cycle and SM between registers and the first-level cache or shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkern.inspect.limits import WARP, base
from llmkern.inspect.sass import Instruction, multiply_adds

MUFU = 16  # results a cycle
LSU_BYTES = 128  # a cycle
ISSUE = 4  # instructions of warps a cycle: one of each partition


@dataclass(frozen=True)
class Rates:
    """Of one SM in a cycle: lanes of the pipes, dense multiply-adds of the tensor cores (fp16: with fp32 sums)."""

    fma: int
    alu: int
    fp16: int
    int8: int
    tf32: int


RATES = {
    "sm_80": Rates(fma=64, alu=64, fp16=1024, int8=2048, tf32=512),
    "sm_86": Rates(fma=128, alu=64, fp16=512, int8=1024, tf32=256),
    "sm_89": Rates(fma=128, alu=64, fp16=512, int8=1024, tf32=256),
    "sm_90": Rates(fma=128, alu=64, fp16=2048, int8=4096, tf32=1024),
    "sm_100": Rates(fma=128, alu=64, fp16=4096, int8=8192, tf32=2048),
    "sm_120": Rates(fma=128, alu=64, fp16=512, int8=1024, tf32=256),
}


def _tensor_rate(x: Instruction, rates: Rates) -> int:
    if x.opcode[0] in "IQ":  # int8; fp8, which has the rate of int8 wherever it exists
        return rates.int8
    return rates.tf32 if "TF32" in x.name else rates.fp16


def cycles(body: list[Instruction], target: str) -> dict[str, float] | None:
    """Cycles of the SM that one pass of one warp through `body` takes of each pipe, and of the issue.

    None where a matrix instruction does not tell its size.
    """
    rates = RATES[base(target)]
    taken = dict.fromkeys(("tensor", "fma", "alu", "mufu", "lsu"), 0.0)
    for x in body:
        if x.pipe == "tensor":
            work = multiply_adds(x)
            if work is None:
                return None
            taken["tensor"] += work / _tensor_rate(x, rates)
        elif x.pipe == "fma":
            taken["fma"] += (2 if x.opcode == "FFMA2" else 1) * WARP / rates.fma
        elif x.pipe == "alu":
            taken["alu"] += WARP / rates.alu
        elif x.pipe == "mufu":
            taken["mufu"] += WARP / MUFU
        elif x.pipe == "lsu":
            taken["lsu"] += max(1, x.bytes * WARP / LSU_BYTES)
    return {**taken, "issue": len(body) / ISSUE}


def bracket(body: list[Instruction], target: str) -> tuple[float, float] | tuple[None, None]:
    """(serial, bound): the least and the most share of the matrix pipe's peak, or of the memory instructions' rate
    where `body` has no matrix instructions, that its mix allows; (None, None) where it has neither, or cannot be told.
    """
    taken = cycles(body, target)
    if taken is None:
        return None, None
    busy = taken["tensor"] or taken["lsu"]
    if not busy:
        return None, None
    pipes = sum(n for pipe, n in taken.items() if pipe != "issue")
    return busy / max(pipes, taken["issue"]), busy / max(taken.values())


def turns(body: list[Instruction], target: str) -> float | None:
    """The share of the matrix pipe's peak where products and all else take turns, and the other pipes overlap with one
    another; None where `body` has no matrix instructions, or they do not tell their size."""
    taken = cycles(body, target)
    if taken is None or not taken["tensor"]:
        return None
    return taken["tensor"] / (taken["tensor"] + max(n for pipe, n in taken.items() if pipe != "tensor"))
