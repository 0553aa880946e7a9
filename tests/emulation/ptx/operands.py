"""From operands to functions: what a thread's instruction reads, writes and addresses.

A handler is made once for each instruction of a kernel, by the function that `instruction` registers for its opcode.
It gets a Form, takes from it the modifiers that it knows, and returns `run(unit, mask)`; mask is None where all threads
of the unit take part. A modifier that nobody took is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx.parse import Instruction, Kernel, PtxError, split_operands, width_of
from tests.emulation.ptx.values import UNSIGNED, decode, encode, extend, is_float

Mask = Any  # None or an array of bool
Read = Callable[[Any], np.ndarray]
Write = Callable[[Any, np.ndarray, Mask], None]
Run = Callable[[Any, Mask], None]

HANDLERS: dict[str, Callable[[Form], Run]] = {}

#: Special registers (PTX ISA 10): those that differ between threads or blocks are set by control.Unit.
SPECIAL_WIDTH = {"%clock64": 64, "%globaltimer": 64, "%gridid": 64}
_TYPE = re.compile(r"(?:[busf](?:8|16|32|64|128)|f16x2|bf16x2|bf16|tf32|pred|e4m3x2|e5m2x2|e4m3|e5m2|[us]16x2)")
SPACES = ("global", "shared", "local", "param", "const")


def instruction(*opcodes: str) -> Callable[[Callable[[Form], Run]], Callable[[Form], Run]]:
    """Registers the maker of the handlers of these opcodes."""

    def register(make: Callable[[Form], Run]) -> Callable[[Form], Run]:
        for opcode in opcodes:
            HANDLERS[opcode] = make
        return make

    return register


class Form:
    """An instruction that is being compiled."""

    def __init__(self, kernel: Kernel, code: Any, ins: Instruction, index: int) -> None:
        self.kernel, self.code, self.ins, self.index = kernel, code, ins, index
        self.left = list(ins.modifiers)
        self.operands = ins.operands
        self.written: list[str] = []  #: names of the registers that it writes, and reads
        self.used: list[str] = []
        self.order = ""  #: of memory, where an instruction names it

    def error(self, what: str) -> PtxError:
        return PtxError(f"{self.ins.where()}: {what}: {self.ins.text}")

    # ---- modifiers

    def flag(self, *names: str) -> bool:
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return True
        return False

    def one_of(self, *names: str, default: str | None = None) -> str:
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        if default is None:
            raise self.error(f"expected one of .{', .'.join(names)}")
        return default

    def type(self) -> str:
        """The last modifier, which is a type."""
        if not self.left or not _TYPE.fullmatch(self.left[-1]):
            raise self.error("expected a type at the end")
        return self.left.pop()

    def types(self, count: int) -> list[str]:
        return [self.type() for _ in range(count)][::-1]

    def space(self) -> str:
        """The state space; generic where none is named. shared::cta is shared; of a cluster of one block too."""
        for name in list(self.left):
            if name.split("::")[0] in SPACES:
                self.left.remove(name)
                return name.split("::")[0]
        return "generic"

    def scope(self, *names: str) -> bool:
        """Takes the scope of a strong access or a fence; whether it ends with the block, as a cluster does here.

        names: those besides .cta and .cluster, none of which has to be there if one is "".
        """
        return self.one_of("cta", "cluster", *names, default="" if "" in names else None) in ("cta", "cluster")

    def done(self) -> None:
        if self.left:
            raise self.error(f"the modifier .{self.left[0]} is not known here")

    # ---- operands

    def read(self, operand: str, t: str) -> Read:
        """The operand's bits as type t: an array of UNSIGNED[width], of one element or one for each thread."""
        width = width_of(t)
        negated = operand.startswith("!")
        if negated:
            inner = self.read(operand[1:].strip(), t)
            return lambda unit: ~inner(unit)
        if operand.startswith("{"):
            return self._packed(split_operands(operand[1:-1]), width)
        if operand in self.kernel.registers:
            self.used.append(operand)
            have, i = self.kernel.registers[operand], self.code.register_index[operand]
            if have == width:
                return lambda unit: unit.registers[i]
            return lambda unit: unit.registers[i].astype(UNSIGNED[width])
        if operand.startswith("%") or operand == "WARP_SZ":
            if operand not in self.code.special:
                raise self.error(f"the special register {operand} is not known")
            return lambda unit: unit.special[operand].astype(UNSIGNED[width])
        if re.match(r"[-\d]", operand):
            value = np.array([immediate(operand, t)], UNSIGNED[width])
            return lambda unit: value
        name, offset = _symbol(operand)
        if name in self.code.symbols:
            self.code.symbols_used.add(name)
            return lambda unit: np.array([unit.machine.address_of[name] + offset]).astype(UNSIGNED[width])
        raise self.error(f"unknown operand {operand}")

    def _packed(self, names: list[str], width: int) -> Read:
        """{low, ..., high} as one number."""
        part = width // len(names)
        reads = [self.read(name, f"b{part}") for name in names]

        def packed(unit: Any) -> np.ndarray:
            total = reads[0](unit).astype(UNSIGNED[width])
            for i, read in enumerate(reads[1:], 1):
                total = total | read(unit).astype(UNSIGNED[width]) << UNSIGNED[width](i * part)
            return total

        return packed

    def write(self, operand: str, t: str) -> Write:
        """Stores bits of type t into the register: extended, or cut off, to its width; {a, b}: low part first."""
        if operand == "_":
            return lambda unit, value, mask: None
        if operand.startswith("{"):
            return self._unpacked(split_operands(operand[1:-1]), t)
        if operand not in self.kernel.registers:
            raise self.error(f"unknown register {operand}")
        self.written.append(operand)
        have, i, width = self.kernel.registers[operand], self.code.register_index[operand], width_of(t)
        if have == width:

            def put(unit: Any, value: np.ndarray, mask: Mask) -> None:
                unit.registers[i] = value if mask is None else np.where(mask, value, unit.registers[i])

            return put

        def put_extended(unit: Any, value: np.ndarray, mask: Mask) -> None:
            value = extend(t, value, have)
            unit.registers[i] = value if mask is None else np.where(mask, value, unit.registers[i])

        return put_extended

    def _unpacked(self, names: list[str], t: str) -> Write:
        part = width_of(t) // len(names)
        writes = [self.write(name, f"b{part}") for name in names]

        def unpacked(unit: Any, value: np.ndarray, mask: Mask) -> None:
            for i, write in enumerate(writes):
                write(unit, (value >> value.dtype.type(i * part)).astype(UNSIGNED[part]), mask)

        return unpacked

    def vector(self, operand: str) -> list[str]:
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def address(self, operand: str) -> Read:
        """The address in `[base + offset]` as int64."""
        inside = operand.strip()
        if not (inside.startswith("[") and inside.endswith("]")):
            raise self.error(f"expected an address in brackets, got {operand}")
        inside = inside[1:-1].strip()
        name, offset = _symbol(inside)
        if name in self.kernel.registers:
            self.used.append(name)
            i = self.code.register_index[name]
            step = np.int64(offset)
            return lambda unit: unit.registers[i].astype(np.int64) + step
        if name in self.code.symbols:
            self.code.symbols_used.add(name)
            return lambda unit: np.array([unit.machine.address_of[name] + offset], np.int64)
        if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", name):
            value = np.array([int(name, 0) + offset], np.int64)
            return lambda unit: value
        raise self.error(f"unknown base of an address: {name}")


def _symbol(text: str) -> tuple[str, int]:
    """`name + 8`, `name+-8`, `name` as (name, offset)."""
    found = re.fullmatch(r"([\w$%@]+)\s*(?:\+\s*(-?\w+)|-\s*(\w+))?", text)
    if found is None:
        raise PtxError(f"cannot read the address {text!r}")
    offset = int(found[2], 0) if found[2] else -int(found[3], 0) if found[3] else 0
    return found[1], offset


def immediate(text: str, t: str) -> int:
    """A literal's bits as type t. 0f and 0d literals are the bits of a float (PTX ISA 4.5.2)."""
    width = width_of(t)
    floating = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text)
    if floating:
        single = floating[1] is not None
        bits = int(floating[1] or floating[2], 16)
        if width == (32 if single else 64):
            return bits
        source = "f32" if single else "f64"
        value = decode(source, np.array([bits], UNSIGNED[width_of(source)])).astype(np.float64)
        return int(encode(t, value)[0])
    if re.fullmatch(r"-?\d+\.\d+(?:[eE][-+]?\d+)?", text) and is_float(t):
        return int(encode(t, np.array([float(text)]))[0])
    value = int(text.rstrip("U"), 0)
    return value & ((1 << width) - 1) if width > 1 else int(value != 0)


def full(values: np.ndarray, count: int) -> np.ndarray:
    """The values as one for each of `count` threads."""
    return values if len(values) == count else np.broadcast_to(values, (count,))
