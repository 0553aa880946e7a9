"""Matrix instructions of a warp: ldmatrix, stmatrix, mma.sync. PTX ISA 9.7.14.5.

A fragment is a matrix spread over the registers of a warp. With g = lane / 4, q = lane % 4 and n elements in a
register, register j of A (16 x k) holds row g + 8 (j % 2), columns q n ... q n + n - 1 of the half j / 2; register j of
B (k x 8) holds column g, rows q n ... of the half j; register j of C and D (16 x 8) holds row g + 8 (j / 2),
column 2 q + j % 2, or as f16x2 row g + 8 j, columns 2 q and 2 q + 1. That covers every shape m16n8k*.

Products are summed exactly and rounded once, where hardware cuts off bits of the sum as it goes along.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.emulation.ptx.gather import gathered
from tests.emulation.ptx.memory import Place
from tests.emulation.ptx.operands import Form, Mask, Run, full, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import UNSIGNED, decode, encode

LANE = np.arange(32)
G, Q = LANE // 4, LANE % 4
#: (type of a, k) that mma.sync.m16n8k* knows.
DEPTHS = {
    "f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32), "e4m3": (16, 32), "e5m2": (16, 32),
}  # fmt: skip


def in_order(rows: int, columns: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """For each element (row major) of a matrix its position in the registers, given the places of the positions."""
    position = np.empty(rows * columns, np.int64)
    position[(row * columns + column).reshape(-1)] = np.arange(row.size)
    return position


def fragment_a(k: int, per: int) -> np.ndarray:
    """Position in the registers (lane, register, element) of each element of A (16, k)."""
    registers = 2 * k // (4 * per)
    lane, j, e = np.meshgrid(LANE, np.arange(registers), np.arange(per), indexing="ij")
    return in_order(16, k, lane // 4 + 8 * (j % 2), lane % 4 * per + e + 4 * per * (j // 2))


def fragment_b(k: int, per: int) -> np.ndarray:
    """The same for B (k, 8)."""
    lane, j, e = np.meshgrid(LANE, np.arange(k // (4 * per)), np.arange(per), indexing="ij")
    return in_order(k, 8, lane % 4 * per + e + 4 * per * j, lane // 4)


def collect(unit: Any, reads: list[Any], t: str, threads: int = 32) -> np.ndarray:
    """The elements in the registers of each warp (or warpgroup): (warps, threads * registers * elements)."""
    words = np.stack([full(r(unit), unit.count) for r in reads], -1)
    return words.reshape(unit.count // threads, -1).view(UNSIGNED[width_of(t)])


def exact(t: str, bits: np.ndarray) -> np.ndarray:
    return decode(t, np.ascontiguousarray(bits)).astype(np.float64)


@instruction("mma")
def multiply(form: Form) -> Run:
    """mma.sync.aligned.m16n8k*.row.col.{f32,f16,s32}.ta.tb.tc d, a, b, c."""
    td, ta, tb, tc = form.types(4)
    form.one_of("sync")
    form.one_of("aligned")
    form.one_of("row")
    form.one_of("col")
    clip = form.flag("satfinite")
    shape = next((m for m in form.left if re.fullmatch(r"m16n8k\d+", m)), None)
    k = int(shape[6:]) if shape else 0
    if shape is None or k not in DEPTHS.get(ta, ()) or width_of(ta) != width_of(tb) or td != tc:
        raise form.error("this shape and these types are not known")
    integer = ta in ("s8", "u8")
    if (td == "s32") != integer or td not in ("s32", "f32", "f16"):
        raise form.error("this type of the result is not known")
    form.left.remove(shape)
    per = 32 // width_of(ta)
    halves = td == "f16"
    puts = [form.write(o, "b32") for o in form.vector(form.operands[0])]
    a, b, c = ([form.read(o, "b32") for o in form.vector(v)] for v in form.operands[1:4])
    place_a, place_b = fragment_a(k, per), fragment_b(k, per)
    count = 2 if halves else 4
    if (len(a), len(b), len(c), len(puts)) != (2 * k // (4 * per), k // (4 * per), count, count):
        raise form.error("wrong numbers of registers")

    def run(unit: Any, mask: Mask) -> None:
        x = exact(ta, collect(unit, a, ta)[:, place_a]).reshape(-1, 16, k)
        y = exact(tb, collect(unit, b, tb)[:, place_b]).reshape(-1, k, 8)
        product = np.matmul(x, y)
        # (warps, g, upper or lower half of the rows, q, neighbour)
        parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2, 2, -1)
        for half in range(2):
            if halves:
                words = full(c[half](unit), unit.count)
                result = [
                    encode("f16", parts[half, e] + decode("f16", (words >> np.uint32(16 * e)).astype(np.uint16)))
                    for e in range(2)
                ]
                put_value = result[0].astype(np.uint32) | result[1].astype(np.uint32) << np.uint32(16)
                puts[half](unit, put_value, mask)
                continue
            for e in range(2):
                start = decode(td, full(c[2 * half + e](unit), unit.count))
                total = parts[half, e] + start
                if integer:
                    total = np.clip(total, -(2.0**31), 2.0**31 - 1) if clip else total
                    puts[2 * half + e](unit, total.astype(np.int64).astype(np.uint32), mask)
                else:
                    puts[2 * half + e](unit, encode("f32", total), mask)

    return gathered(form, run)


def _matrices(form: Form) -> tuple[int, bool]:
    if form.type() != "b16":
        raise form.error("only .b16 is known")
    form.one_of("sync")
    form.one_of("aligned")
    form.one_of("m8n8")
    count = int(form.one_of("x1", "x2", "x4")[1])
    transposed = form.flag("trans")
    if form.space() not in ("shared", "generic"):
        raise form.error("expected .shared")
    return count, transposed


@instruction("ldmatrix")
def load(form: Form) -> Run:
    """ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16: lanes 8 i ... 8 i + 7 give the rows of matrix i."""
    count, transposed = _matrices(form)
    puts = [form.write(o, "b32") for o in form.vector(form.operands[0])]
    if len(puts) != count:
        raise form.error(f"expected {count} registers")
    place, address = Place(form, "shared", 16), form.address(form.operands[1])

    def run(unit: Any, mask: Mask) -> None:
        giving = unit.lane < 8 * count
        rows = place.load(unit, address(unit), giving if mask is None else giving & mask, 2)
        rows = rows.reshape(8, -1, 32).transpose(1, 2, 0).astype(np.uint32)  # (warp, lane, column)
        for i, put in enumerate(puts):
            m = rows[:, 8 * i : 8 * i + 8]
            low, high = (m[:, 2 * Q, G], m[:, 2 * Q + 1, G]) if transposed else (m[:, G, 2 * Q], m[:, G, 2 * Q + 1])
            put(unit, (low | high << np.uint32(16)).reshape(-1), mask)

    return gathered(form, run)


@instruction("stmatrix")
def store(form: Form) -> Run:
    """stmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16: the way back of ldmatrix."""
    count, transposed = _matrices(form)
    reads = [form.read(o, "b32") for o in form.vector(form.operands[1])]
    if len(reads) != count:
        raise form.error(f"expected {count} registers")
    place, address = Place(form, "shared", 16), form.address(form.operands[0])

    def run(unit: Any, mask: Mask) -> None:
        giving = unit.lane < 8 * count
        rows = np.zeros((unit.count // 32, 32, 8), np.uint16)
        for i, read in enumerate(reads):
            words = full(read(unit), unit.count).reshape(-1, 32)
            m = rows[:, 8 * i : 8 * i + 8]
            for e in range(2):
                part = (words >> np.uint32(16 * e)).astype(np.uint16)
                if transposed:
                    m[:, 2 * Q + e, G] = part
                else:
                    m[:, G, 2 * Q + e] = part
        columns = list(rows.reshape(-1, 8).T)
        place.store(unit, address(unit), giving if mask is None else giving & mask, columns, 2)

    return gathered(form, run)


@instruction("movmatrix")
def transpose(form: Form) -> Run:
    """movmatrix.sync.aligned.m8n8.trans.b16 d, a."""
    if form.type() != "b16":
        raise form.error("only .b16 is known")
    for name in ("sync", "aligned", "m8n8", "trans"):
        form.one_of(name)
    put, a = form.write(form.operands[0], "b32"), form.read(form.operands[1], "b32")

    def run(unit: Any, mask: Mask) -> None:
        words = full(a(unit), unit.count).reshape(-1, 32)
        m = np.zeros((len(words), 8, 8), np.uint32)
        m[:, 2 * Q, G], m[:, 2 * Q + 1, G] = words & np.uint32(0xFFFF), words >> np.uint32(16)
        put(unit, (m[:, G, 2 * Q] | m[:, G, 2 * Q + 1] << np.uint32(16)).reshape(-1), mask)

    return gathered(form, run)
