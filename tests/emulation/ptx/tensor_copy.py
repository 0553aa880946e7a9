"""cp.async.bulk and cp.async.bulk.tensor: copies by the tensor memory accelerator, and tensor maps.

PTX ISA 9.7.9.25.4 (bulk), 9.7.9.27 (tensor), 5.5 (tensors, boxes, swizzling), 9.7.9.28 (tensormap.replace). Copies are
done at once by an actor of the asynchronous proxy; loads complete bytes at an mbarrier, stores belong to bulk groups.
A tensor map's 128 bytes are in a layout of this emulator, since NVIDIA's is not published.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np

from tests.emulation.ptx.check import Access
from tests.emulation.ptx.memory import EXISTS, GLOBAL_BASE, MBARRIER, READ_ONLY, WINDOWS, WRITTEN, Place
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction
from tests.emulation.ptx.parse import split_operands

#: Field -> (offset, bytes of an element), as tensormap.replace names them.
FIELDS = {
    "global_address": (0, 8), "rank": (8, 4), "elemtype": (12, 4), "swizzle_mode": (16, 4),
    "interleave_layout": (20, 4), "fill_mode": (24, 4), "box_dim": (28, 4), "global_dim": (48, 4),
    "global_stride": (72, 8), "element_stride": (104, 4),
}  # fmt: skip
#: Bytes of the element types in the order of their numbers: u8, u16, u32, s32, u64, s64, f16, f32, f32, f64, bf16, ...
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Shared addresses with the bits of the 16-byte chunk within `span` (0, 32, 64, 128) bytes exchanged.

    The chunk's number is combined with that of the 128-byte row by exclusive or. PTX ISA 5.5.5.
    """
    return address ^ (address >> 7 & max(span // 16 - 1, 0)) << 4


@dataclasses.dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled makes, as an argument of a launch. data: the tensor (a Buffer or an array), its last
    dimension contiguous; box: elements of a copy in each dimension; swizzle: 0, 32, 64 or 128 bytes. address: where
    the launch has the tensor, whose shape and strides alone are read then, as of a view of a larger buffer."""

    data: Any
    box: tuple[int, ...]
    swizzle: int = 0
    address: int | None = None

    def encode(self, launch: Any) -> bytes:
        """Raises ValueError for what the driver refuses."""
        array = self.data if isinstance(self.data, np.ndarray) else self.data.data
        size, rank = array.itemsize, array.ndim
        strides = [s for s in array.strides[:-1]][::-1]
        if len(self.box) != rank or not 1 <= rank <= 5 or any(not 1 <= b <= 256 for b in self.box):
            raise ValueError(f"box: expected {rank} numbers from 1 to 256, got {self.box}")
        inner = self.box[-1] * size
        if inner % 16 or (self.swizzle and inner > self.swizzle) or self.swizzle not in SWIZZLES:
            raise ValueError(f"box: {inner} bytes of the last dimension are no multiple of 16 up to the swizzle's span")
        if any(s % 16 for s in strides):
            raise ValueError(f"data: strides of {strides} bytes are no multiples of 16")
        address = launch.address(self.data, "tensor") if self.address is None else self.address
        if address % 16:
            raise ValueError("data: the address is no multiple of 16")
        code = {1: 0, 2: 1, 4: 2, 8: 4}[size]
        head = struct.pack("<Q5I", address, rank - 1, code, SWIZZLES[self.swizzle], 0, 0)
        five = lambda values: [*values, *[1] * (5 - len(values))]  # noqa: E731
        body = struct.pack("<5I5I4x", *five(self.box[::-1]), *five(array.shape[::-1]))
        tail = struct.pack("<4Q5I", *[*strides, *[0] * (4 - len(strides))], *five(()))
        return (head + body + tail).ljust(128, b"\0")


@dataclasses.dataclass
class Map:
    """A tensor map in use: dimensions from the innermost one, strides and address in bytes."""

    address: int
    size: int
    swizzle: int
    box: list[int]
    dims: list[int]
    strides: list[int]

    @classmethod
    def read(cls, raw: bytes) -> Map:
        def number(name: str, i: int = 0) -> int:
            offset, size = FIELDS[name]
            return int.from_bytes(raw[offset + i * size :][:size], "little")

        rank = number("rank") + 1
        size = ELEMENT_BYTES[number("elemtype")]
        span = {v: k for k, v in SWIZZLES.items()}[number("swizzle_mode")]
        each = lambda name: [number(name, i) for i in range(rank)]  # noqa: E731
        strides = [size, *(number("global_stride", i) for i in range(rank - 1))]
        return cls(number("global_address"), size, span, each("box_dim"), each("global_dim"), strides)

    def elements(self, start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the box at these coordinates, innermost first: indices into global memory, and which are in the tensor."""
        index, inside = np.array([self.address - GLOBAL_BASE]), np.array([True])
        for first, length, bound, stride in zip(start, self.box, self.dims, self.strides, strict=True):
            at = first + np.arange(length)
            index = (at * stride)[:, None] + index
            inside = ((at >= 0) & (at < bound))[:, None] & inside
            index, inside = index.reshape(-1), inside.reshape(-1)
        return index, inside


def make(form: Form) -> Run:
    """cp.async.bulk...: groups and copies."""
    if form.flag("commit_group"):

        def commit(unit: Any, mask: Mask) -> None:
            unit.group["bulk"] = unit.group["bulk"] + (1 if mask is None else mask)

        return commit
    if form.flag("wait_group"):
        kinds = ("bulk",) if form.flag("read") else ("bulk", "bulk write")
        return _wait(int(form.operands[0], 0), kinds)
    return _copy(form)


def _wait(pending: int, kinds: tuple[str, ...]) -> Run:
    """For what stores read, after which its memory may be written; without .read also for what they write."""

    def run(unit: Any, mask: Mask) -> None:
        clocks = unit.machine.clocks
        active = unit.exists if mask is None else mask
        rows, done = unit.rows[active], unit.group["bulk"][active] - 1 - pending
        for kind in kinds:
            column = clocks.first[kind] + unit.thread[active]
            clocks.known[rows, column] = np.maximum(clocks.known[rows, column], done)

    return run


def check_end(unit: Any, mask: np.ndarray) -> None:
    """A thread must not end while its bulk stores read shared memory, which ends with the block."""
    used = unit.group.get("bulk used")
    if used is None:
        return
    clocks = unit.machine.clocks
    ends = np.nonzero(mask)[0]
    known = clocks.known[unit.rows[ends], clocks.first["bulk"] + unit.thread[ends]]
    bad = ends[used[ends] > known]
    if len(bad):
        message = "the thread ends while its bulk stores may still read shared memory"
        unit.fault("missing wait", message, unit.last_bulk, int(bad[0]))


def _copy(form: Form) -> Run:
    tensor = form.flag("tensor")
    rank = int(form.one_of("1d", "2d", "3d", "4d", "5d")[0]) if tensor else 0
    form.flag("tile")
    loads = form.space() == "shared"
    if form.space() != ("global" if loads else "shared"):
        raise form.error("only copies between global and shared memory are known")
    if loads:
        form.one_of("mbarrier::complete_tx::bytes")
    else:
        form.one_of("bulk_group")
    operands = list(form.operands)
    if form.flag("L2::cache_hint"):
        operands.pop()
    to, source, *rest = operands
    coordinates = []
    outside = source if loads else to
    if tensor:
        base, numbers = split_operands(outside.strip("[]"))
        outside = f"[{base}]"
        coordinates = [form.read(x, "s32") for x in split_operands(numbers[1:-1])]
        if len(coordinates) != rank:
            raise form.error(f"expected {rank} coordinates")
    far = form.address(outside)
    near = form.address(to if loads else source)
    length = None if tensor else form.read(rest.pop(0), "u32")
    barrier = form.address(rest.pop(0)) if loads else None
    if rest:
        raise form.error("multicast and other operands are not known")
    form.code.note_access("shared", 16)
    form.code.note_access("global", 4)
    map_place = Place(form, "generic", 16)
    barrier_place = Place(form, "shared", 8, strong=True, mbarrier=True)

    def run(unit: Any, mask: Mask) -> None:
        machine = unit.machine
        active = unit.exists if mask is None else mask
        shared, other = full(near(unit), unit.count), full(far(unit), unit.count)
        at = [full(c(unit), unit.count).view(np.int32) for c in coordinates]
        slots = {}
        if barrier is not None:
            lanes, _, found = machine.mbarriers.find(unit, active, barrier_place, barrier(unit))
            slots = dict(zip(lanes.tolist(), found.tolist(), strict=True))
        else:
            unit.last_bulk = form.ins
            unit.group["bulk used"] = np.where(
                active, unit.group["bulk"], unit.group.get("bulk used", np.zeros(unit.count, np.int64))
            )
        for lane in np.nonzero(active)[0]:
            if loads and lane not in slots:
                continue
            if loads:
                machine.mbarriers.check_init_fence(unit, form.ins, int(lane), slots[int(lane)])
            copy = _Copy(form, unit, int(lane), int(shared[lane]), slots.get(int(lane)))
            if tensor:
                raw = b"".join(_map_bytes(map_place, unit, int(lane), int(other[lane])))
                copy.tensor(Map.read(raw), [int(c[lane]) for c in at], loads)
            else:
                copy.linear(int(other[lane]), int(full(length(unit), unit.count)[lane]), loads)

    return run


def _map_bytes(place: Place, unit: Any, lane: int, address: int) -> list[bytes]:
    only = np.zeros(unit.count, bool)
    only[lane] = True
    return [
        place.load(unit, np.array([address + 16 * i]), only, 8)[:, lane].astype(np.uint64).tobytes() for i in range(8)
    ]


class _Copy:
    """One bulk copy of one thread."""

    def __init__(self, form: Form, unit: Any, lane: int, shared: int, slot: int | None) -> None:
        self.form, self.unit, self.lane, self.slot = form, unit, lane, slot
        self.shared = shared & ((1 << 44) - 1) if shared >> 44 == WINDOWS["shared"] >> 44 else shared
        machine = unit.machine
        self.row = unit.rows[lane : lane + 1]
        block = int(unit.block[lane])
        if slot is not None:
            clock = machine.mbarriers.phase[block, slot] + 1
            which = np.array([slot])
        else:
            clock = unit.group["bulk"][lane]
            which = unit.thread[lane : lane + 1]
        reads, writes = ("mbarrier", "mbarrier") if slot is not None else ("bulk", "bulk write")
        #: Who reads, and who writes, and when.
        self.read_stamp, self.write_stamp = (
            machine.clocks.actor_stamp(self.row, kind, which, np.array([clock])) for kind in (reads, writes)
        )

    def fault(self, kind: str, message: str) -> None:
        self.unit.fault(kind, message, self.form.ins, self.lane)

    def tensor(self, m: Map, start: list[int], loads: bool) -> None:
        index, inside = m.elements(start)
        if self.shared % 128 or m.address % 16 or any(s % 16 for s in m.strides[1:]):
            self.fault("misaligned", f"shared address {self.shared} (128 bytes), or the tensor's strides (16)")
            return
        near = swizzled(self.shared + np.arange(len(index)) * m.size, m.swizzle)
        self.move(index, inside, near, m.size, loads)

    def linear(self, address: int, length: int, loads: bool) -> None:
        if self.shared % 16 or address % 16 or length % 16:
            self.fault("misaligned", f"a bulk copy of {length} bytes between {self.shared} and {address:#x}: not 16")
            return
        chunks = np.arange(length // 16) * 16
        self.move(address - GLOBAL_BASE + chunks, np.ones(len(chunks), bool), self.shared + chunks, 16, loads)

    def move(self, index: np.ndarray, inside: np.ndarray, near: np.ndarray, size: int, loads: bool) -> None:
        """Elements of `size` bytes between global `index` (where inside) and shared addresses `near`."""
        unit, machine = self.unit, self.unit.machine
        outer, inner = machine.spaces["global"], machine.spaces["shared"]
        if len(near) and (near.min() < 0 or near.max() + size > machine.shared_size):
            self.fault("out of bounds", f"shared address {near.max()} of {machine.shared_size} bytes")
            return
        near = near + int(unit.shared_offset[self.lane])
        each = np.arange(size)
        far_bytes = index[inside][:, None] + each
        if far_bytes.size and (far_bytes.min() < 0 or far_bytes.max() >= len(outer.data)):
            self.fault("out of bounds", "global addresses of a bulk copy, near no buffer")
            return
        state = outer.state[far_bytes]
        if (state & EXISTS == 0).any():
            self.fault("out of bounds", f"a bulk copy with {outer.describe(int(index[inside].max()))}")
            return
        near_bytes = near[:, None] + each
        near_state = inner.state[near_bytes]
        if (near_state & MBARRIER != 0).any():
            self.fault("mbarrier", "a bulk copy of bytes of an mbarrier in use")
        need, source = (state, "global") if loads else (near_state, "shared")
        if (need & WRITTEN == 0).any():
            self.fault("uninitialised", f"a bulk copy reads {source} memory that nobody has written")
        if not loads and (state & READ_ONLY).any():
            self.fault("read-only", "a bulk copy writes a read-only buffer")
            return
        self._order(outer, index[inside], size, loads)
        self._order(inner, near, size, not loads)
        if loads:
            values = np.zeros((len(near), size), np.uint8)
            values[inside] = outer.data[far_bytes]
            inner.data[near_bytes] = values
            inner.state[near_bytes] = near_state | WRITTEN
            machine.mbarriers.transferred(unit, self.form.ins, int(unit.block[self.lane]), self.slot, len(near) * size)
        else:
            outer.data[far_bytes] = inner.data[near[inside][:, None] + each]
            outer.state[far_bytes] |= WRITTEN

    def _order(self, space: Any, index: np.ndarray, size: int, reads: bool) -> None:
        machine = self.unit.machine
        granule = space.shadow.granule
        cells = np.unique(index // granule) * granule if size < granule else index  # elements share them
        access = Access(machine, space, self.form.ins, self.form.index, cells, max(size, granule))
        rows = np.broadcast_to(self.row, cells.shape)
        stamp = np.broadcast_to(self.read_stamp if reads else self.write_stamp, cells.shape)
        (access.reads if reads else access.writes)(rows, stamp, proxy=True)
        if machine.counts is not None and space.name == "global":
            machine.counts.requests(self.form.index, "global", not reads, np.zeros(len(index), np.int64), index, size)


@instruction("tensormap")
def change_map(form: Form) -> Run:
    """tensormap.replace.tile.field...; tensormap.cp_fenceproxy: a map made in shared memory goes to global memory."""
    if form.flag("cp_fenceproxy"):
        form.left.clear()
        to, source = (form.address(o) for o in form.operands[:2])
        read, write = Place(form, "shared", 16), Place(form, "global", 16)

        def copy(unit: Any, mask: Mask) -> None:
            first = unit.lane == 0 if mask is None else (unit.lane == 0) & mask
            for i in range(8):
                words = read.load(unit, source(unit) + 16 * i, first, 4)
                write.store(unit, to(unit) + 16 * i, first, list(words), 4)

        return copy
    form.one_of("replace")
    form.one_of("tile")
    t = form.type()
    form.one_of("b1024") if "b1024" in form.left else None
    field = form.one_of(*FIELDS)
    space = form.space()
    offset, size = FIELDS[field]
    operands = list(form.operands)
    address, value = form.address(operands[0]), form.read(operands[-1], t)
    offset += size * int(operands[1], 0) if len(operands) == 3 else 0
    place = Place(form, space, 4)

    def replace(unit: Any, mask: Mask) -> None:
        words = value(unit)
        for i in range(size // 4):
            part = (words.astype(np.uint64) >> np.uint64(32 * i)).astype(np.uint32)
            place.store(unit, address(unit) + offset + 4 * i, mask, [part], 4)

    return replace
