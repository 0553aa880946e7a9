"""wgmma: matrix products of four warps on shared memory. PTX ISA 9.7.15.

The product is computed when it is issued. That it runs on by itself is kept in mind: it reads shared memory as an actor
of the asynchronous proxy, and a register of it that is used before wgmma.wait_group, or was written behind the last
wgmma.fence, is a fault. A mov between registers only renames them here, as it does in the machine code.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.emulation.ptx.check import Access
from tests.emulation.ptx.gather import WARPGROUP, gathered
from tests.emulation.ptx.matrix import collect, exact
from tests.emulation.ptx.memory import MBARRIER, WRITTEN
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.tensor_copy import swizzled
from tests.emulation.ptx.values import UNSIGNED, decode, encode

THREAD = np.arange(WARPGROUP)
ROW, QUARTER = 16 * (THREAD // 32) + THREAD % 32 // 4, THREAD % 4
SPANS = {0: 0, 1: 128, 2: 64, 3: 32}  #: swizzle mode of a descriptor -> bytes


def element_addresses(descriptor: int, rows: int, depth: int, size: int, across: bool) -> np.ndarray:
    """Shared addresses (rows, depth) of the elements of `size` bytes that a matrix descriptor points at.

    rows: of M or N. across: M or N is contiguous, not K (imm-trans = 1). PTX ISA 9.7.15.5.1. Without a swizzle, 8 rows
    of 16 bytes lie together; with one, 8 rows of its span.
    """
    field = lambda shift: (descriptor >> shift & 0x3FFF) << 4  # noqa: E731
    start, leading, stride = field(0), field(16), field(32)
    span = SPANS[descriptor >> 62 & 3]
    r, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if across:
        width = (span or 16) // size
        inner, outer = (leading, stride) if span else (stride, leading)
        offset = r % width * size + r // width * inner + k % 8 * (span or 16) + k // 8 * outer
    elif span:
        offset = r % 8 * span + r // 8 * stride + k * size
    else:
        each = 16 // size
        offset = r % 8 * 16 + r // 8 * stride + k // each * leading + k % each * size
    return swizzled(start + offset, span)


class Operand:
    """A matrix in shared memory, named by a descriptor in a register."""

    def __init__(self, form: Form, descriptor: str, rows: int, depth: int, t: str, across: bool) -> None:
        self.form, self.rows, self.depth, self.t, self.across = form, rows, depth, t, across
        self.read = form.read(descriptor, "b64")
        self.size = width_of(t) // 8
        form.code.note_access("shared", 16)

    def load(self, unit: Any, groups: np.ndarray, by_warp: bool) -> np.ndarray:
        """(warpgroups, rows, depth); zeros for those that do not take part. by_warp: a warp reads a quarter of it."""
        machine, space = unit.machine, unit.machine.spaces["shared"]
        descriptors = full(self.read(unit), unit.count).reshape(-1, WARPGROUP)
        result = np.zeros((len(descriptors), self.rows, self.depth), UNSIGNED[8 * self.size])
        view = space.data.view(UNSIGNED[8 * self.size])
        known: dict[int, np.ndarray] = {}
        for g in np.nonzero(groups)[0]:
            d = int(descriptors[g, 0])
            lane = int(g) * WARPGROUP
            if (descriptors[g] != descriptors[g, 0]).any():
                unit.fault("collective", "the threads' matrix descriptors differ", self.form.ins, lane)
            if d >> 49 & 7:
                raise self.form.error("a descriptor with a base offset is not known")
            if d not in known:
                known[d] = element_addresses(d, self.rows, self.depth, self.size, self.across)
            address = known[d]
            if address.max() + self.size > machine.shared_size:
                message = f"shared address {address.max()} of {machine.shared_size} bytes"
                unit.fault("out of bounds", message, self.form.ins, lane)
                continue
            index = address + int(unit.shared_offset[lane])
            state = space.state[index]
            if (state & WRITTEN == 0).any():
                unit.fault("uninitialised", "a matrix in shared memory", self.form.ins, lane)
            if (state & MBARRIER != 0).any():
                unit.fault("mbarrier", "a matrix with bytes of an mbarrier in use", self.form.ins, lane)
            self._order(unit, lane, index, by_warp)
            result[g] = view[index >> (self.size - 1).bit_length()]
        return result

    def _order(self, unit: Any, lane: int, index: np.ndarray, by_warp: bool) -> None:
        clocks = unit.machine.clocks
        for warp in range(4):
            if by_warp or warp == 0:
                mine = index[16 * warp : 16 * warp + 16] if by_warp else index
                chunks = np.unique(mine >> 4) << 4
            row = unit.rows[lane + 32 * warp : lane + 32 * warp + 1]
            which, group = unit.thread[lane : lane + 1] // WARPGROUP, unit.group["wgmma"][lane : lane + 1]
            access = Access(unit.machine, unit.machine.spaces["shared"], self.form.ins, self.form.index, chunks, 16)
            stamp = clocks.actor_stamp(row, "wgmma", which, group)
            access.reads(np.broadcast_to(row, chunks.shape), np.broadcast_to(stamp, chunks.shape), proxy=True)


@instruction("wgmma")
def wgmma(form: Form) -> Run:
    """wgmma.fence, .commit_group, .wait_group, .mma_async."""
    kind = form.one_of("fence", "commit_group", "wait_group", "mma_async")
    form.one_of("sync")
    form.one_of("aligned")
    if kind == "mma_async":
        return _multiply(form)
    if kind == "fence":

        def fence(unit: Any, mask: Mask) -> None:
            _clear(unit.unfenced, mask)

        return gathered(form, fence)
    if kind == "commit_group":

        def commit(unit: Any, mask: Mask) -> None:
            unit.group["wgmma"] = unit.group["wgmma"] + (1 if mask is None else mask)

        return gathered(form, commit)
    pending = int(form.operands[0], 0)

    def wait(unit: Any, mask: Mask) -> None:
        clocks = unit.machine.clocks
        active = unit.exists if mask is None else mask
        rows, column = unit.rows[active], clocks.first["wgmma"] + unit.thread[active] // WARPGROUP
        done = unit.group["wgmma"] - 1 - pending
        clocks.known[rows, column] = np.maximum(clocks.known[rows, column], done[active])
        for name, (threads, groups) in list(unit.pending.items()):
            left = threads & ~(active & (groups <= done))
            if left.any():
                unit.pending[name] = (left, groups)
            else:
                del unit.pending[name]

    return gathered(form, wait)


def _clear(table: dict[str, np.ndarray], mask: Mask) -> None:
    for name, threads in list(table.items()):
        left = np.zeros_like(threads) if mask is None else threads & ~mask
        if left.any():
            table[name] = left
        else:
            del table[name]


def _multiply(form: Form) -> Run:
    """d, a (registers or a descriptor), b (a descriptor), scale-d{, imm-scale-a, imm-scale-b{, imm-trans-a}, -b}."""
    td, ta, tb = form.types(3)
    clip = form.flag("satfinite")
    shape = next((m for m in form.left if re.fullmatch(r"m64n\d+k\d+", m)), None)
    if shape is None:
        raise form.error("expected a shape m64n*k*")
    form.left.remove(shape)
    n, k = (int(x) for x in shape[4:].split("k"))
    integer, half = ta in ("s8", "u8"), width_of(ta) == 16
    if (
        k * width_of(ta) != 256
        or n % 8
        or not 8 <= n <= 256
        or (td == "s32") != integer
        or td not in ("s32", "f32", "f16")
    ):
        raise form.error("this shape and these types are not known")
    names = form.vector(form.operands[0])
    count = n // (4 if td == "f16" else 2)
    if len(names) != count:
        raise form.error(f"expected {count} registers of the result")
    puts, starts = [form.write(x, "b32") for x in names], [form.read(x, "b32") for x in names]
    from_registers = form.operands[1].startswith("{")
    immediates = [int(x) for x in form.operands[4:]]
    scale_a, scale_b = immediates[:2] if not integer else (1, 1)
    across = immediates[2:] if half else []
    across_a = bool(across[0]) if half and not from_registers else False
    across_b = bool(across[-1]) if half else False
    a_names = form.vector(form.operands[1]) if from_registers else []
    a_reads = [form.read(x, "b32") for x in a_names]
    a = None if from_registers else Operand(form, form.operands[1], 64, k, ta, across_a)
    b = Operand(form, form.operands[2], n, k, tb, across_b)
    keep = form.read(form.operands[3], "pred")
    place_a = _fragment(k, 32 // width_of(ta))
    own = set(names) | set(a_names)

    def run(unit: Any, mask: Mask) -> None:
        active = np.ones(unit.count, bool) if mask is None else mask
        groups = active.reshape(-1, WARPGROUP).any(1)
        _check_fence(form, unit, active, own)
        if a is None:
            x = exact(ta, collect(unit, a_reads, ta, WARPGROUP)[:, place_a]).reshape(-1, 64, k)
        else:
            x = exact(ta, a.load(unit, groups, True))
        y = exact(tb, b.load(unit, groups, False))
        product = np.matmul(x, y.transpose(0, 2, 1)) * (scale_a * scale_b)
        adds = full(keep(unit), unit.count).reshape(-1, WARPGROUP)
        for j in range(count):
            words = full(starts[j](unit), unit.count).reshape(-1, WARPGROUP)
            if td == "f16":
                row, column = ROW + 8 * (j % 2), 8 * (j // 2) + 2 * QUARTER
                low, high = (
                    encode("f16", product[:, row, column + e] + np.where(adds, _half(words, e), 0)).astype(np.uint32)
                    for e in range(2)
                )
                value = low | high << np.uint32(16)
            else:
                part = product[:, ROW + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * QUARTER + j % 2]
                total = part + np.where(adds, decode(td, words).astype(np.float64), 0)
                if integer:
                    total = np.clip(total, -(2.0**31), 2.0**31 - 1) if clip else total
                    value = total.astype(np.int64).astype(np.uint32)
                else:
                    value = encode("f32", total)
            puts[j](unit, value.reshape(-1), mask)
        for name in own:
            before = unit.pending.get(name)
            threads = active if before is None else active | before[0]
            group = unit.group["wgmma"] if before is None else np.where(active, unit.group["wgmma"], before[1])
            unit.pending[name] = (threads.copy(), group)

    return gathered(form, run, size=WARPGROUP)


def _half(words: np.ndarray, e: int) -> np.ndarray:
    return decode("f16", (words >> np.uint32(16 * e)).astype(np.uint16)).astype(np.float64)


def _fragment(k: int, per: int) -> np.ndarray:
    """Position in the registers (thread, register, element) of each element of A (64, k): warp w has rows 16 w ..."""
    registers = k // (2 * per)
    thread, j, e = np.meshgrid(THREAD, np.arange(registers), np.arange(per), indexing="ij")
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (j % 2)
    column = thread % 4 * per + e + 4 * per * (j // 2)
    position = np.empty(64 * k, np.int64)
    position[(row * k + column).reshape(-1)] = np.arange(row.size)
    return position


def _check_fence(form: Form, unit: Any, active: np.ndarray, own: set[str]) -> None:
    for name in own & set(unit.unfenced):
        bad = unit.unfenced[name] & active
        if bad.any():
            message = f"{name} was written behind the last wgmma.fence"
            unit.fault("missing fence", message, form.ins, int(bad.argmax()))


def watch(form: Form, run: Run, registers: set[str]) -> Run:
    """The handler of another instruction that uses registers of wgmma: not while wgmma does."""
    used, written = registers & set(form.used), registers & set(form.written)
    if not used and not written:
        return run
    renames = _renames(form)
    constant = form.ins.opcode == "mov" and not renames

    def watched(unit: Any, mask: Mask) -> Any:
        active = unit.exists if mask is None else mask
        if renames:
            _rename(unit, form, active)
            return run(unit, mask)
        for name in (used | written) & set(unit.pending):
            bad = unit.pending[name][0] & active
            if bad.any():
                message = f"wgmma still uses {name}, which needs wgmma.wait_group"
                unit.fault("missing wait", message, form.ins, int(bad.argmax()))
        if constant and not unit.machine.init_fences:
            return run(unit, mask)
        for name in written:
            before = unit.unfenced.get(name)
            unit.unfenced[name] = active.copy() if before is None else before | active
        return run(unit, mask)

    return watched


def _renames(form: Form) -> bool:
    """A mov of one register to another; that of a number or of a special register writes it."""
    known = form.kernel.registers
    return form.ins.opcode == "mov" and all(operand in known for operand in form.operands)


def _rename(unit: Any, form: Form, active: np.ndarray) -> None:
    target, source = form.operands
    nobody = np.zeros(unit.count, bool)
    if source in unit.unfenced or target in unit.unfenced:
        before, new = (unit.unfenced.get(name, nobody) for name in (target, source))
        unit.unfenced[target] = np.where(active, new, before)
    if source in unit.pending or target in unit.pending:
        before, new = (unit.pending.get(name, (nobody, unit.group["wgmma"])) for name in (target, source))
        unit.pending[target] = np.where(active, new[0], before[0]), np.where(active, new[1], before[1])


def registers_of(forms: list[Form]) -> set[str]:
    """All registers that some wgmma of a kernel has as its operands, and those that a mov makes of them."""
    names: set[str] = set()
    for form in forms:
        if form.ins.opcode == "wgmma":
            names |= {n for n in (*form.used, *form.written) if form.kernel.registers[n] == 32}
    moves = [f for f in forms if _renames(f)]
    while True:
        more = {n for f in moves for n in f.operands if names & set(f.operands)} - names
        if not more:
            return names
        names |= more
