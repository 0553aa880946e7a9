"""Logic, shifts, fields and bytes of a word. PTX ISA 9.7.8 (logic and shift), 9.7.1.13 to 9.7.1.20 (bit fields)."""

from __future__ import annotations

import numpy as np

from tests.emulation.ptx.integer import Numbers, elementwise
from tests.emulation.ptx.operands import Form, Run, instruction
from tests.emulation.ptx.parse import width_of
from tests.emulation.ptx.values import SIGNED, UNSIGNED


@instruction("and", "or", "xor", "not", "cnot")
def logic(form: Form) -> Run:
    t = form.type()
    op = form.ins.opcode
    one = UNSIGNED[width_of(t)](1)
    functions: dict[str, Numbers] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a,
        "cnot": lambda a: np.where(a == 0, one, one - one),
    }
    return elementwise(form, t, functions[op], 1 if op in ("not", "cnot") else 2)


@instruction("shl", "shr")
def shift(form: Form) -> Run:
    """Distances are clamped to the width; shr of a signed type fills with the sign."""
    t = form.type()
    width = width_of(t)
    unsigned = UNSIGNED[width]
    put, a, by = form.write(form.operands[0], t), form.read(form.operands[1], t), form.read(form.operands[2], "u32")
    left = form.ins.opcode == "shl"

    def run(unit, mask):
        x, n = a(unit), by(unit)
        if t[0] == "s" and not left:
            moved = (x.view(SIGNED[width]) >> np.minimum(n, width - 1).astype(SIGNED[width])).view(unsigned)
        else:
            m = np.minimum(n, width - 1).astype(unsigned)
            moved = np.where(n >= width, unsigned(0), x << m if left else x >> m)
        put(unit, moved, mask)

    return run


@instruction("shf")
def funnel_shift(form: Form) -> Run:
    """shf.{l,r}.{clamp,wrap}.b32 d, low, high, distance: a part of high:low."""
    t, left, clamp = form.type(), form.one_of("l", "r") == "l", form.one_of("clamp", "wrap") == "clamp"

    def compute(low, high, n):
        n = (np.minimum(n, 32) if clamp else n & np.uint32(31)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(form, t, compute, 3)


@instruction("bfe")
def extract_field(form: Form) -> Run:
    """bfe d, a, position, length: `length` bits at `position`, extended by the field's (or the word's) top bit."""
    t = form.type()
    width = width_of(t)
    put, a = form.write(form.operands[0], t), form.read(form.operands[1], t)
    position, length = (form.read(o, "u32") for o in form.operands[2:4])

    def run(unit, mask):
        x = a(unit).astype(np.uint64)
        p, n = ((r(unit) & np.uint32(255)).astype(np.uint64) for r in (position, length))
        kept = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, 63)) - np.uint64(1))
        field = np.where(p >= width, np.uint64(0), x >> np.minimum(p, 63)) & kept
        if t[0] == "s":
            top = np.minimum(p + n - np.uint64(1), np.uint64(width - 1))
            negative = (n > 0) & (x >> np.minimum(top, 63) & np.uint64(1) == 1)
            # Above the bits that the word has at all, the field is filled with the sign, too.
            have = np.minimum(n, np.where(p >= width, np.uint64(0), np.uint64(width) - np.minimum(p, np.uint64(width))))
            fill = np.where(have >= 64, np.uint64(0), ~np.uint64(0) << np.minimum(have, 63))
            field = np.where(negative, field | fill, field)
        put(unit, field.astype(UNSIGNED[width]), mask)

    return run


@instruction("bfi")
def insert_field(form: Form) -> Run:
    """bfi f, a, b, position, length: b with `length` low bits of a at `position`."""
    t = form.type()
    put = form.write(form.operands[0], t)
    a, b = (form.read(o, t) for o in form.operands[1:3])
    position, length = (form.read(o, "u32") for o in form.operands[3:5])

    def run(unit, mask):
        p, n = ((r(unit) & np.uint32(255)).astype(np.uint64) for r in (position, length))
        ones = np.where(n >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n, 63)) - np.uint64(1))
        window = np.where(p >= 64, np.uint64(0), ones << np.minimum(p, 63))
        moved = np.where(p >= 64, np.uint64(0), a(unit).astype(np.uint64) << np.minimum(p, 63))
        put(unit, (b(unit).astype(np.uint64) & ~window | moved & window).astype(UNSIGNED[width_of(t)]), mask)

    return run


@instruction("lop3")
def three_input_logic(form: Form) -> Run:
    """lop3.b32 d, a, b, c, table: bit (a b c) of the table for each bit (PTX ISA 9.7.8.6)."""
    t = form.type()
    table = int(form.operands[4], 0)
    form.operands = form.operands[:4]

    def compute(a, b, c):
        total = np.zeros(1, np.uint32)
        for i in range(8):
            if table >> i & 1:
                total = total | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return total

    return elementwise(form, t, compute, 3)


@instruction("prmt")
def permute_bytes(form: Form) -> Run:
    """prmt.b32 d, a, b, selector: each nibble chooses a byte of b:a; its top bit spreads the byte's sign."""
    t = form.type()

    def compute(a, b, selector):
        both = b.astype(np.uint64) << np.uint64(32) | a
        total = np.zeros(1, np.uint32)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            total = total | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return total

    return elementwise(form, t, compute, 3)


@instruction("popc", "clz", "brev", "bfind")
def bit_count(form: Form) -> Run:
    t = form.type()
    op, width = form.ins.opcode, width_of(t)
    shift_amount = op == "bfind" and form.flag("shiftamt")
    put, a = form.write(form.operands[0], t if op == "brev" else "u32"), form.read(form.operands[1], t)
    powers = np.arange(width, dtype=np.uint64)

    def run(unit, mask):
        x = a(unit)
        if op == "bfind" and t[0] == "s":  # the highest bit that differs from the sign
            x = np.where(x >> x.dtype.type(width - 1), ~x, x)
        bits = x[:, None].astype(np.uint64) >> powers & np.uint64(1)
        if op == "popc":
            result = bits.sum(1)
        elif op == "brev":
            result = (bits << powers[::-1]).sum(1, dtype=np.uint64)
        else:
            highest = np.where(bits.any(1), width - 1 - bits[:, ::-1].argmax(1), -1)
            result = width - 1 - highest if op == "clz" or shift_amount else highest
            if shift_amount:
                result = np.where(highest < 0, -1, result)
        put(unit, result.astype(UNSIGNED[width] if op == "brev" else np.uint32), mask)

    return run
