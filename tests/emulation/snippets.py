"""Small PTX kernels for the tests of single instructions, and numbers computed a second time, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.emulation.ptx.launch import Buffer, Report, empty, run

HEAD = ".version 8.5\n.target sm_90a\n.address_size 64\n"
#: Register types by width, and numpy's types.
REGISTER = {1: ".pred", 16: ".b16", 32: ".b32", 64: ".b64"}
WIDTH = {
    "pred": 1, "u8": 8, "s8": 8, "b8": 8, "u16": 16, "s16": 16, "b16": 16, "f16": 16, "bf16": 16, "u32": 32, "s32": 32,
    "b32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "u64": 64, "s64": 64, "b64": 64, "f64": 64,
    "e4m3x2": 16, "e5m2x2": 16, "u16x2": 32, "s16x2": 32,
}  # fmt: skip


def kernel(body: str, parameters: Sequence[str] = (), outside: str = "", name: str = "k") -> str:
    """A module with one kernel; parameters: `.u64 p`."""
    listed = ",\n".join(f".param {p}" for p in parameters)
    return f"{HEAD}{outside}\n.visible .entry {name}({listed})\n{{\n{body}\n}}\n"


def evaluate(
    instruction: str,
    result: str,
    inputs: dict[str, tuple[str, np.ndarray]],
    setup: str = "",
    schedule: str = "lockstep",
) -> np.ndarray:
    """The bits that the instruction gives in %d for each thread, whose inputs are in %name; of any number of threads.

    inputs: name -> (type, numbers whose bits are taken). `setup` may declare further registers. %lane is there too.
    """
    count = len(next(iter(inputs.values()))[1])
    width = WIDTH[result]
    stored = 32 if width == 1 else width
    lines = [
        f".reg {REGISTER[max(width, 16) if width > 1 else 1]} %d;",
        ".reg .b64 %p<9>, %at; .reg .b32 %tid, %cta, %lane, %o;",
        "mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mad.lo.s32 %tid, %cta, 128, %tid; and.b32 %lane, %tid, 31;",
        ".reg .pred %in; setp.ge.u32 %in, %tid, " + f"{count}; @%in ret;",
    ]
    arguments: list[np.ndarray | Buffer] = []
    for i, (name, (t, values)) in enumerate(inputs.items()):
        w = WIDTH[t]
        lines.append(f".reg {REGISTER[max(w, 16)]} %{name};")
        lines.append(
            f"ld.param.u64 %p{i}, [in{i}]; mad.wide.u32 %at, %tid, {w // 8}, %p{i}; ld.global.b{w} %{name}, [%at];"
        )
        arguments.append(np.ascontiguousarray(values))
    lines += [setup, instruction]
    if width == 1:
        lines.append("selp.u32 %o, 1, 0, %d;")
    lines.append(f"ld.param.u64 %p8, [out]; mad.wide.u32 %at, %tid, {stored // 8}, %p8;")
    lines.append(f"st.global.b{stored} [%at], {'%o' if width == 1 else '%d'};")
    lines.append("ret;")
    out = empty((count,), f"u{stored // 8}")
    names = [".u64 out", *(f".u64 in{i}" for i in range(len(inputs)))]
    ptx = kernel("\n".join(lines), names)
    report = run(ptx, "k", -(-count // 128), 128, [out, *arguments], schedule=schedule)
    report.raise_if_faulty()
    return out.data


def execute(
    body: str, arguments: Sequence[object], threads: int = 32, blocks: int = 1, outside: str = "", **options: object
) -> Report:
    """Runs a body with parameters p0, p1, ... of 64 bits: %a0, %a1 ...; %t is the thread's number, %b the block's."""
    lines = [".reg .b32 %t, %b; .reg .b64 %tw; mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; cvt.u64.u32 %tw, %t;"]
    for i in range(len(arguments)):
        lines.append(f".reg .b64 %a{i}; ld.param.u64 %a{i}, [p{i}];")
    ptx = kernel("\n".join([*lines, body]), [f".u64 p{i}" for i in range(len(arguments))], outside)
    return run(ptx, "k", blocks, threads, arguments, **options)  # type: ignore[arg-type]


def kinds(report: Report) -> set[str]:
    return {fault.kind for fault in report.faults}


#: (bits of the mantissa without the leading one, smallest normal exponent, largest exponent, has infinity)
FORMATS = {
    "f32": (23, -126, 127, True), "f16": (10, -14, 15, True), "bf16": (7, -126, 127, True),
    "tf32": (10, -126, 127, True), "e4m3": (3, -6, 8, False), "e5m2": (2, -14, 15, True),
    "f64": (52, -1022, 1023, True),
}  # fmt: skip


def rounded(exact: Fraction, t: str, mode: str = "rn", finite: bool = False) -> float:
    """An exact number in a floating format: to nearest even (rn), ties away (rna), to zero (rz), down (rm), up (rp).

    Source: IEEE 754-2019, section 4.3. finite: the largest number instead of infinity.
    """
    bits, low, high, _ = FORMATS[t]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent = max(exponent - (Fraction(2) ** exponent > size), low)
    unit = Fraction(2) ** (exponent - bits)
    below = size // unit
    rest = size / unit - below
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": rest > 0 and exact < 0,
        "rp": rest > 0 and exact > 0,
    }[mode]
    result = (below + up) * unit
    largest = (2 - Fraction(2) ** -bits) * Fraction(2) ** high
    if t == "e4m3":
        largest = Fraction(448)
    if result > largest:
        towards = mode in ("rz",) or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        result = largest if finite or towards else Fraction(0)
        if result == 0:
            return -math.inf if exact < 0 else math.inf
    return -float(result) if exact < 0 else float(result)


def value_of(bits: int, t: str) -> float:
    """The number that a bit pattern means."""
    mantissa, low, _, infinite = FORMATS[t]
    width = {"f64": 64, "f32": 32, "tf32": 32, "f16": 16, "bf16": 16, "e4m3": 8, "e5m2": 8}[t]
    mantissa = 23 if t == "tf32" else mantissa
    field = width - 1 - mantissa
    sign = -1.0 if bits >> (width - 1) else 1.0
    exponent, fraction = bits >> mantissa & ((1 << field) - 1), bits & ((1 << mantissa) - 1)
    if exponent == (1 << field) - 1 and infinite:
        return math.nan if fraction else sign * math.inf
    if t == "e4m3" and bits & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(fraction, low - mantissa)
    return sign * math.ldexp(fraction + (1 << mantissa), exponent - 1 + low - mantissa)


def interesting(t: str, count: int, seed: int = 0) -> np.ndarray:
    """Bit patterns of a type of which many are corners: zeros, limits, subnormals, halves, infinities, NaN."""
    width = WIDTH.get(t, 8)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 1 << 32, count, dtype=np.uint64) << np.uint64(32) | rng.integers(
        0, 1 << 32, count, dtype=np.uint64
    )
    edges = [0, 1, 2, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, (1 << (width - 1)) + 1]
    if t in FORMATS and t != "tf32":
        mantissa = FORMATS[t][0]
        top = ((1 << (width - 1 - mantissa)) - 1) << mantissa
        one = ((1 << (width - 2 - mantissa)) - 1) << mantissa
        edges += [top, top - 1, top + 1, one, one + 1, one | 1 << (width - 1), 1 << mantissa, (1 << mantissa) - 1]
        edges += [top | 1 << (width - 1), one + (1 << mantissa), one - 1]
    chosen = rng.choice(np.array(edges, np.uint64), count)
    return np.where(rng.random(count) < 0.3, chosen, raw).astype(f"u{width // 8}")
