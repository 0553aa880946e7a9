"""What one streaming multiprocessor (SM) holds, and how many blocks of a kernel fit on it.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
How registers and shared memory are handed out (the units): the CUDA Occupancy Calculator and `cuda_occupancy.h` of the
toolkit. From compute capability 8.0 on, the system keeps 1 KiB of shared memory for each resident block.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkern.inspect.errors import InspectError

KIB = 1024
WARP = 32
REGISTERS_PER_THREAD = 255
THREADS_PER_BLOCK = 1024
RESERVED_SHARED = 1 * KIB  # of each block
SHARED_UNIT = 128  # bytes
REGISTER_UNIT = 256  # registers of a warp
PARTITIONS = 4  # of an SM; a warp's registers lie in one of them


@dataclass(frozen=True)
class Limits:
    """Of one SM; `shared_block` is the most that one block may ask for."""

    warps: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 64 * KIB
    registers_per_thread: int = REGISTERS_PER_THREAD


#: Target -> limits. The default targets of the inspector, in order.
LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, shared=164 * KIB, shared_block=163 * KIB),
    "sm_86": Limits(warps=48, blocks=16, shared=100 * KIB, shared_block=99 * KIB),
    "sm_89": Limits(warps=48, blocks=24, shared=100 * KIB, shared_block=99 * KIB),
    "sm_90": Limits(warps=64, blocks=32, shared=228 * KIB, shared_block=227 * KIB),
    "sm_100": Limits(warps=64, blocks=32, shared=228 * KIB, shared_block=227 * KIB),
    "sm_120": Limits(warps=48, blocks=24, shared=100 * KIB, shared_block=99 * KIB),
}
TARGETS = tuple(LIMITS)


def base(target: str) -> str:
    """The target whose limits and rates hold: that of sm_90a is sm_90."""
    name = target.rstrip("af")
    if name not in LIMITS:
        raise InspectError(f"target: expected some of {', '.join(TARGETS)}, got {target!r}")
    return name


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def blocks_per_sm(target: str, registers: int, shared_bytes: int, threads: int) -> int:
    """How many blocks of `threads` threads reside on an SM at once; 0 where not even one fits.

    registers: of a thread. shared_bytes: of a block, static and dynamic together.
    """
    limits = LIMITS[base(target)]
    if threads > THREADS_PER_BLOCK or registers > REGISTERS_PER_THREAD or shared_bytes > limits.shared_block:
        return 0
    warps = -(-threads // WARP)
    register_unit = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = limits.registers // PARTITIONS // register_unit * PARTITIONS // warps
    by_shared = limits.shared // _up(shared_bytes + RESERVED_SHARED, SHARED_UNIT)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def occupancy(target: str, registers: int, shared_bytes: int, threads: int) -> float:
    """Resident warps as a share of the most that the SM holds."""
    warps = -(-threads // WARP)
    return blocks_per_sm(target, registers, shared_bytes, threads) * warps / LIMITS[base(target)].warps
