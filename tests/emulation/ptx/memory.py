"""The state spaces and what every access is checked for: bounds, alignment, initialised bytes, races. PTX ISA 5.1.

A Space holds bytes and, for each byte, whether it exists, was written, and may be written. Global buffers lie apart in
an address range of their own, so that nothing beyond them exists; unwritten bytes hold a pattern that is NaN as f16,
bf16 and f32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx.check import Access, Shadow
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction
from tests.emulation.ptx.parse import PtxError, width_of
from tests.emulation.ptx.values import UNSIGNED

EXISTS, WRITTEN, READ_ONLY = 1, 2, 4
MBARRIER = 8  #: a byte of an mbarrier that is in use, which its own instructions alone may access
POISON = 0xFF
GLOBAL_BASE, GUARD = 0x70000000000, 4096
#: Where the other spaces begin among the generic addresses.
WINDOWS = {"global": 0, "shared": 1 << 44, "local": 2 << 44, "const": 3 << 44, "param": 4 << 44, "generic": 0}
SHARED_BY_THREADS = ("global", "shared", "generic")


class Space:
    def __init__(self, name: str, size: int, granule: int = 0, readers: int = 0) -> None:
        """granule: bytes of a cell of the shadow, 0 for a space that threads do not share; readers: its columns."""
        self.name = name
        self.data = np.full((size + 127) // 128 * 128 + 128, POISON, np.uint8)
        self.state = np.zeros_like(self.data)
        self.shadow = Shadow(len(self.data), granule, readers) if granule else None

    def describe(self, index: int) -> str:
        return f"{self.name} address {index}"


class GlobalMemory(Space):
    """Buffers of a launch, each named, with guard zones between them."""

    def __init__(self) -> None:
        super().__init__("global", 1 << 16)
        self.top = GUARD
        self.buffers: list[tuple[int, int, str]] = []

    def allocate(self, size: int, name: str, offset: int = 0) -> int:
        """The address of `size` bytes that nobody has written; `offset` bytes behind a multiple of 256."""
        begin = self.top + offset
        while begin + size + GUARD > len(self.data):
            grown = np.full(len(self.data), POISON, np.uint8)
            self.data = np.concatenate([self.data, grown])
            self.state = np.concatenate([self.state, np.zeros_like(grown)])
        self.state[begin : begin + size] = EXISTS
        self.buffers.append((begin, size, name))
        self.top = (begin + size + GUARD + 255) // 256 * 256
        return GLOBAL_BASE + begin

    def put(self, address: int, data: bytes | np.ndarray, read_only: bool = False) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
        begin = address - GLOBAL_BASE
        self.data[begin : begin + len(raw)] = raw
        self.state[begin : begin + len(raw)] |= WRITTEN | (READ_ONLY if read_only else 0)

    def get(self, address: int, size: int) -> np.ndarray:
        begin = address - GLOBAL_BASE
        return self.data[begin : begin + size].copy()

    def describe(self, index: int) -> str:
        for begin, size, name in self.buffers:
            if begin - GUARD // 2 <= index < begin + size + GUARD // 2:
                return f"byte {index - begin} of {name} ({size} bytes)"
        return f"global address {GLOBAL_BASE + index:#x}, near no buffer"


class Place:
    """How one instruction accesses memory: `size` bytes at once, aligned to them (or to `align`)."""

    def __init__(
        self, form: Form, space: str, size: int, strong: bool = False, noncoherent: bool = False, align: int = 0,
        mbarrier: bool = False,
    ) -> None:  # fmt: skip
        self.ins, self.site, self.space, self.size = form.ins, form.index, space, size
        self.forbidden = 0 if mbarrier else MBARRIER
        self.strong, self.noncoherent, self.align = strong, noncoherent, align or size
        form.code.note_access(space, size)

    def resolve(self, unit: Any, address: np.ndarray, mask: Mask, reads: bool, writes: bool):
        """[(space, lanes, index)] of what may be accessed; the rest is reported. lanes None: all threads."""
        lanes = None if mask is None else np.nonzero(mask)[0]
        address = full(address, unit.count)
        if lanes is not None:
            address = address[lanes]
        if self.space != "generic":
            return [self._check(unit, self.space, lanes, address, reads, writes)]
        which = address >> 44
        if not which.any():
            return [self._check(unit, "global", lanes, address, reads, writes)]
        found = []
        for name, base in WINDOWS.items():
            chosen = which == base >> 44
            if name != "generic" and chosen.any():
                some = np.nonzero(chosen)[0] if lanes is None else lanes[chosen]
                found.append(self._check(unit, name, some, address[chosen] - base, reads, writes))
        return found

    def _check(self, unit: Any, name: str, lanes: Any, address: np.ndarray, reads: bool, writes: bool):
        space = unit.machine.spaces[name]
        size = self.size
        begin, limit, offset = unit.span(name, lanes)
        relative = address - begin
        bad = relative.view(np.uint64) > np.uint64(limit - size) if limit >= size else np.ones(len(address), bool)
        if bad.any():
            lanes, relative, offset = self._drop(unit, space, "out of bounds", bad, lanes, relative, offset)
        bad = relative + begin & (self.align - 1) != 0
        if bad.any():
            lanes, relative, offset = self._drop(unit, space, "misaligned", bad, lanes, relative, offset)
        index = relative if offset is None else relative + offset
        step = min(size, 8)
        cells = index >> (step.bit_length() - 1)
        states = space.state.view(UNSIGNED[8 * step])
        state = states[cells] if size <= 8 else states[cells + np.arange(size // 8)[:, None]]
        ones = int.from_bytes(bytes([1] * step), "little")
        need = (EXISTS | WRITTEN) if reads else EXISTS
        must_not = self.forbidden | (READ_ONLY if writes else 0)
        good = state & UNSIGNED[8 * step]((need | must_not) * ones) == UNSIGNED[8 * step](need * ones)
        if not good.all():
            lanes, index = self._explain(unit, space, lanes, index, good if good.ndim == 1 else good.all(0), writes)
        return space, lanes, index

    def _explain(self, unit: Any, space: Space, lanes: Any, index: np.ndarray, good: np.ndarray, writes: bool):
        """Reports accesses to bytes that do not exist, were not written or must not be; drops the first and last."""
        state = space.state[index[:, None] + np.arange(self.size)]
        missing = (state & EXISTS == 0).any(1)
        readonly = ~missing & writes & (state & READ_ONLY != 0).any(1)
        barrier = ~missing & (state & self.forbidden != 0).any(1)
        unwritten = ~good & ~missing & ~readonly & ~barrier
        faults = {"uninitialised": unwritten, "out of bounds": missing, "read-only": readonly, "mbarrier": barrier}
        for kind, bad in faults.items():
            if bad.any():
                self._report(unit, space, kind, bad, lanes, index)
        keep = ~(missing | readonly)
        return (np.arange(unit.count) if lanes is None else lanes)[keep], index[keep]

    def _report(self, unit: Any, space: Space, kind: str, bad: np.ndarray, lanes: Any, index: np.ndarray) -> None:
        first = int(bad.argmax())
        lane = first if lanes is None else int(lanes[first])
        where = space.describe(int(index[first]))
        message = f"{self.size} bytes at {where}" + (", of an mbarrier in use" if kind == "mbarrier" else "")
        unit.fault(kind, message, self.ins, lane, int(bad.sum()))

    def _drop(self, unit: Any, space: Space, kind: str, bad: np.ndarray, lanes: Any, relative: Any, offset: Any):
        self._report(unit, space, kind, bad, lanes, relative)
        lanes = (np.arange(unit.count) if lanes is None else lanes)[~bad]
        return lanes, relative[~bad], None if offset is None or np.ndim(offset) == 0 else offset[~bad]

    # ---- plain loads and stores

    def load(self, unit: Any, address: np.ndarray, mask: Mask, width: int) -> np.ndarray:
        """Elements of `width` bytes as an array (size / width, threads); zeros where the access was faulty."""
        count = self.size // width
        result = None
        for space, lanes, index in self.resolve(unit, address, mask, True, False):
            self.observe(unit, space, lanes, index, writes=False)
            cells = index >> (width.bit_length() - 1)
            view = space.data.view(UNSIGNED[8 * width])
            values = view[cells][None] if count == 1 else view[cells + np.arange(count)[:, None]]
            if lanes is None:
                return values
            if result is None:
                result = np.zeros((count, unit.count), view.dtype)
            result[:, lanes] = values
        return result if result is not None else np.zeros((count, unit.count), UNSIGNED[8 * width])

    def store(
        self, unit: Any, address: np.ndarray, mask: Mask, values: list[np.ndarray], width: int, actor: Any = None
    ) -> None:
        """values: one array for each element of `width` bytes. actor: epochs of who writes, if not the threads."""
        count = self.size // width
        for space, lanes, index in self.resolve(unit, address, mask, False, True):
            if len(index) == 0:
                continue
            mine = np.stack([full(v, unit.count) if lanes is None else full(v, unit.count)[lanes] for v in values])
            cells = (index >> (width.bit_length() - 1)) + np.arange(count)[:, None]
            view = space.data.view(UNSIGNED[8 * width])
            # Writing what is there already changes nothing for anybody: no race.
            same = (view[cells] == mine).all(0) if space.shadow is not None and actor is None else None
            self.observe(unit, space, lanes, index, writes=True, same=same, actor=actor)
            view[cells] = mine
            space.state.view(UNSIGNED[8 * width])[cells] |= UNSIGNED[8 * width](
                WRITTEN * int.from_bytes(bytes([1] * width), "little")
            )
            if space.shadow is not None and not self.strong:
                lost = (view[cells] != mine).any(0)
                if lost.any():
                    where = space.describe(int(index[lost.argmax()]))
                    lane = int(lost.argmax()) if lanes is None else int(lanes[lost.argmax()])
                    unit.fault("race", f"threads write different values to {where} at once", self.ins, lane)

    def observe(
        self, unit: Any, space: Space, lanes: Any, index: np.ndarray, writes: bool, same: Any = None, actor: Any = None
    ) -> None:
        """Checks the order of these accesses by the threads, or by actors that they set going, and counts them."""
        if space.shadow is None or len(index) == 0:
            return
        rows = unit.rows if lanes is None else unit.rows[lanes]
        machine = unit.machine
        access = Access(machine, space, self.ins, self.site, index, self.size)
        stamp = machine.clocks.stamp[rows] if actor is None else actor if lanes is None else actor[lanes]
        if writes:
            access.writes(rows, stamp, self.strong, harmless=same)
        else:
            if self.noncoherent and space.shadow.write[access.cells].any():
                unit.fault("race", "ld.global.nc of memory that the kernel writes", self.ins, 0)
            access.reads(rows, stamp, self.strong)
        if machine.counts is not None:
            machine.counts.access(self, unit, space, lanes, index, writes)


def _ordering(form: Form) -> bool:
    """Takes the modifiers of caching and ordering; whether the access is a strong one (PTX ISA 8.4)."""
    strong = form.flag("volatile")
    order = form.one_of("weak", "relaxed", "acquire", "release", default="")
    if order in ("relaxed", "acquire", "release"):
        strong = True
        form.code.near[form.index] = form.scope("gpu", "sys")
    form.flag("ca", "cg", "cs", "lu", "cv", "wb", "wt")
    for name in [m for m in form.left if m.startswith(("L1::", "L2::"))]:
        form.left.remove(name)
        if name.endswith("cache_hint"):
            form.operands = form.operands[:-1]
    form.order = order
    return strong


@instruction("ld")
def load(form: Form) -> Run:
    """ld{.space}{.v2,.v4}.type d, [a]."""
    t = form.type()
    count = int(form.one_of("v2", "v4", "v8", default="v1")[1])
    strong = _ordering(form)
    space, nc = form.space(), form.flag("nc")
    width = width_of(t) // 8
    if width * count > 16:
        raise form.error("accesses of more than 16 bytes are not known")
    puts = [form.write(o, t) for o in form.vector(form.operands[0])]
    if len(puts) != count:
        raise form.error(f"expected {count} registers")
    place = Place(form, space, width * count, strong, nc)
    address = form.address(form.operands[1])
    acquires, hears = form.order == "acquire", strong and space in SHARED_BY_THREADS

    def run(unit, mask):
        at = address(unit)
        values = place.load(unit, at, mask, width)
        for put, value in zip(puts, values, strict=True):
            put(unit, value, mask)
        if hears:
            unit.machine.heard(unit, place, at, mask, acquires)

    def uniform(unit, mask):
        """One value for all, as all threads read the same parameter."""
        at = address(unit)
        if len(at) > 1:
            run(unit, mask)
            return
        raw = unit.machine.parameters[int(at[0]) : int(at[0]) + width * count]
        if at[0] < 0 or len(raw) < width * count or at[0] % width:
            raise PtxError(f"{place.ins.where()}: a parameter's address is wrong: {place.ins.text}")
        for put, value in zip(puts, raw.view(UNSIGNED[8 * width]), strict=True):
            put(unit, value[None], mask)

    return uniform if space == "param" else run


@instruction("st")
def store(form: Form) -> Run:
    """st{.space}{.v2,.v4}.type [a], b."""
    t = form.type()
    count = int(form.one_of("v2", "v4", default="v1")[1])
    strong = _ordering(form)
    space = form.space()
    width = width_of(t) // 8
    if width * count > 16:
        raise form.error("accesses of more than 16 bytes are not known")
    if form.flag("async", "bulk"):
        raise form.error("not known")
    reads = [form.read(o, t) for o in form.vector(form.operands[1])]
    if len(reads) != count:
        raise form.error(f"expected {count} registers")
    place, address = Place(form, space, width * count, strong), form.address(form.operands[0])
    releases, tells = form.order == "release", strong and space in SHARED_BY_THREADS

    def run(unit, mask):
        at = address(unit)
        if tells:
            unit.machine.told(unit, place, at, mask, releases)
        place.store(unit, at, mask, [read(unit) for read in reads], width)

    return run


@instruction("prefetch")
def prefetch(form: Form) -> Run:
    """prefetch{.space}.{L1,L2}, prefetch.tensormap: does nothing here."""
    form.one_of("L1", "L2", "tensormap")
    form.space()
    return lambda unit, mask: None
