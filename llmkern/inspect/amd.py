"""Triton's kernels for AMD: what the metadata of the machine code tell, and how many waves a compute unit holds.

Metadata: LLVM's "User Guide for AMDGPU Backend", "Code Object V5 Metadata". Limits: AMD's white paper on CDNA 3 and
instruction set guides of CDNA 3 and RDNA 3; the units in which registers are given out: LLVM, `AMDGPUBaseInfo.cpp`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row

KIB = 1024
SCALAR_UNIT = 16


@dataclass(frozen=True)
class AmdLimits:
    """Of one compute unit, or (RDNA) of the pair that shares a workgroup: SIMDs, waves of each, vector registers that a
    lane of each has, in units, and of one wave at most; LDS, and of one workgroup at most. lanes: of a wave. scalars:
    of each SIMD; None where every wave has the most."""

    simds: int
    waves: int
    registers: int
    register_unit: int
    registers_per_thread: int
    lanes: int
    shared: int
    shared_block: int
    scalars: int | None


#: Target -> limits. gfx942: MI300, whose registers for sums (AGPRs) are of the same 512. gfx1100: Radeon RX 7900.
LIMITS = {
    "gfx942": AmdLimits(4, 8, 512, 8, 512, 64, 64 * KIB, 64 * KIB, 800),
    "gfx1100": AmdLimits(4, 16, 1536, 24, 256, 32, 128 * KIB, 64 * KIB, None),
}


@dataclass(frozen=True)
class Resources:
    """Of a kernel. registers: vector registers of a lane. local_bytes: of a lane, for what its registers do not hold;
    spilled scalar registers lie in vector registers and are not counted."""

    registers: int
    scalars: int
    local_bytes: int


def resources(code: str) -> Resources:
    """What the metadata at the end of `code`, an AMD assembly file of one kernel, tell."""

    def number(key: str) -> int:
        found = re.findall(rf"^\s*\.{key}: +(\d+)\s*$", code, re.M)
        if len(found) != 1:
            raise InspectError(f"the machine code tells .{key} {len(found)} times, expected once")
        return int(found[0])

    spilled = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return Resources(number("vgpr_count"), number("sgpr_count"), spilled)


def matrix_instructions(code: str) -> dict[str, int]:
    """Kind, as in v_mfma_f32_32x32x8_bf16, and how often it stands in the code."""
    return dict(sorted(Counter(re.findall(r"^\s+(v_(?:mfma|smfmac|wmma|swmmac)_\w+)\s", code, re.M)).items()))


def occupancy(target: str, used: Resources, shared_bytes: int, threads: int) -> float:
    """Resident waves as a share of the most that the SIMDs hold; 0 where not one workgroup fits."""
    limits = LIMITS[target]
    if used.registers > limits.registers_per_thread or shared_bytes > limits.shared_block:
        return 0.0
    waves = -(-threads // limits.lanes)
    each = min(limits.waves, limits.registers // _up(max(used.registers, 1), limits.register_unit))
    if limits.scalars is not None:
        each = min(each, limits.scalars // _up(max(used.scalars, 1), SCALAR_UNIT))
    groups = each * limits.simds // waves
    if shared_bytes:
        groups = min(groups, limits.shared // shared_bytes)
    return groups * waves / (limits.waves * limits.simds)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def row(kernel: str, config: str, target: str, shared_bytes: int, threads: int, code: str) -> Row:
    """The row of a Triton kernel with this machine code. There is no bracket: the model of pipes is NVIDIA's."""
    used = resources(code)
    share = round(occupancy(target, used, shared_bytes, threads), 4)
    return Row(
        kernel, "triton", config, target, used.registers, used.local_bytes, shared_bytes, share,
        matrix_instructions(code), None, None,
    )  # fmt: skip
