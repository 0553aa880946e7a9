"""Comparisons and choices: setp, set, selp, slct. PTX ISA 9.7.6."""

from __future__ import annotations

import numpy as np

from tests.emulation.ptx.integer import Numbers
from tests.emulation.ptx.operands import Form, Run, instruction
from tests.emulation.ptx.values import PACKED, decode, flush, is_float

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(form: Form, t: str) -> Numbers:
    """The comparison named by a modifier; of floats: false where one is NaN, but true with the suffix u."""
    for name in list(form.left):
        plain = name[:-1] if name.endswith("u") and name[:-1] in COMPARE else name
        if name in ("num", "nan") or plain in COMPARE:
            form.left.remove(name)
            break
    else:
        raise form.error("expected a comparison")
    if not is_float(t):
        return lambda a, b: COMPARE[plain](decode(t, a), decode(t, b))

    def of_floats(a, b):
        x, y = decode(t, a), decode(t, b)
        if name in ("num", "nan"):
            unordered = np.isnan(x) | np.isnan(y)
            return unordered if name == "nan" else ~unordered
        result = COMPARE[plain](x, y)
        if plain == name and name != "ne":
            return result
        unordered = np.isnan(x) | np.isnan(y)
        return result | unordered if plain != name else result & ~unordered

    return of_floats


@instruction("setp", "set")
def compare(form: Form) -> Run:
    """setp.cmp{.and,.or,.xor} p|q, a, b{, c}: q is the opposite comparison, of packed types that of the upper halves.
    set gives all ones, or 1.0."""
    t = form.type()
    as_predicate = form.ins.opcode == "setp"
    packed, t = t in PACKED, PACKED.get(t, t)
    if packed and not (as_predicate and is_float(t) and "|" in form.operands[0]):
        raise form.error("packed types: expected setp of f16x2 or bf16x2 into two predicates")
    result = "pred" if as_predicate else form.type()
    combine = form.one_of("and", "or", "xor", default="none")
    ftz = form.flag("ftz")
    if ftz and t != "f32":
        raise form.error(".ftz is for f32")
    test = comparison(form, t)
    outputs = [form.write(o, result) for o in form.operands[0].split("|")]
    a, b = (form.read(o, "b32" if packed else t) for o in form.operands[1:3])
    other = form.read(form.operands[3], "pred") if combine != "none" else None
    joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "none": None}[combine]
    one = np.uint32(0x3F800000) if result == "f32" else np.uint32(0xFFFFFFFF)

    def run(unit, mask):
        x, y = a(unit), b(unit)
        if ftz:
            x, y = (flush("f32", v.view(np.float32)).view(np.uint32) for v in (x, y))
        holds = test(x & 0xFFFF, y & 0xFFFF) if packed else test(x, y)
        for i, put in enumerate(outputs):
            value = holds if not i else test(x >> 16, y >> 16) if packed else ~holds
            if joined is not None:
                value = joined(value, other(unit))
            put(unit, value if as_predicate else np.where(value, one, np.uint32(0)), mask)

    return run


@instruction("selp")
def select(form: Form) -> Run:
    t = form.type()
    put, (a, b) = form.write(form.operands[0], t), (form.read(o, t) for o in form.operands[1:3])
    p = form.read(form.operands[3], "pred")
    return lambda unit, mask: put(unit, np.where(p(unit), a(unit), b(unit)), mask)


@instruction("slct")
def select_by_sign(form: Form) -> Run:
    """slct d, a, b, c: a where c >= 0, else b."""
    t, tc = form.types(2)
    form.flag("ftz")  # -0 and negative subnormals, flushed to -0, count as >= 0 either way where c is a subnormal
    put, (a, b) = form.write(form.operands[0], t), (form.read(o, t) for o in form.operands[1:3])
    c = form.read(form.operands[3], tc)
    return lambda unit, mask: put(unit, np.where(decode(tc, c(unit)) >= 0, a(unit), b(unit)), mask)
