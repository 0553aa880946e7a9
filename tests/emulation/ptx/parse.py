"""From the text of PTX to instructions: opcodes with modifiers, operands, labels, registers, variables, source lines.

Grammar: PTX ISA, chapters 4 (syntax) and 5 (state spaces, types and variables). Only what compilers emit is read; a
directive that is not known is an error.
"""

from __future__ import annotations

import dataclasses
import math
import re

REGISTERS = 65536  #: of a multiprocessor


class PtxError(Exception):
    """PTX that cannot be read or executed; the message names the instruction."""


@dataclasses.dataclass
class Instruction:
    """One instruction. `source` is (file, line) of the .loc before it, or None without line information."""

    opcode: str
    modifiers: list[str]
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int
    source: tuple[str, int] | None
    text: str

    def where(self) -> str:
        at = f"PTX line {self.line}"
        return f"{at} ({self.source[0]}:{self.source[1]})" if self.source else at


@dataclasses.dataclass
class Variable:
    """A variable of a state space: `size` bytes, None for an unsized array (dynamic shared memory)."""

    name: str
    size: int | None
    align: int
    data: bytes | None = None
    type: str = "b8"


@dataclasses.dataclass
class Kernel:
    """An .entry: parameters, instructions, label -> index, register -> width in bits, variables by space."""

    name: str
    parameters: list[Variable]
    instructions: list[Instruction]
    labels: dict[str, int]
    targets: dict[str, list[str]]  #: .branchtargets lists
    registers: dict[str, int]
    shared: list[Variable]
    local: list[Variable]
    constant: list[Variable]
    module: list[Variable]  #: .global variables of the module
    target: str = ""
    registers_of_thread: int | None = None  #: at the launch, where directives say so: what setmaxnreg shares out
    most_threads: int | None = None  #: of a block, by .maxntid
    block: tuple[int, ...] | None = None  #: the block's shape, by .reqntid


BITS = re.compile(r"\d+")


def width_of(type_name: str) -> int:
    """Bits of a fundamental or packed type; a predicate has 1. PTX ISA 5.2."""
    if type_name == "pred":
        return 1
    if type_name in ("f16x2", "bf16x2", "u16x2", "s16x2"):
        return 32
    if type_name in ("e4m3x2", "e5m2x2"):
        return 16
    if type_name in ("e4m3", "e5m2"):
        return 8
    if type_name == "tf32":
        return 32
    found = BITS.search(type_name)
    if found is None:
        raise PtxError(f"unknown type .{type_name}")
    return int(found[0])


def split_operands(text: str) -> list[str]:
    """Parts of a list that commas separate outside of brackets."""
    parts, current, depth = [], "", 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def _without_comments(text: str) -> str:
    """Comments become blanks; lines keep their numbers."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


_VARIABLE = re.compile(
    r"\.(?:b|u|s|f)(?P<bits>\d+)\s+(?P<name>[\w$%]+)\s*(?P<array>\[\s*\d*\s*\])?(?:\s*=\s*(?P<value>.*))?$", re.S
)


def _variable(declaration: str) -> Variable:
    """`.align 16 .b8 name[64] = {1, 2}` without its state space; initial values are integers or 0f/0d floats."""
    align = re.search(r"\.align\s+(\d+)", declaration)
    # Attributes of a pointer parameter: what it points at, and how that is aligned.
    plain = re.sub(r"\.ptr(\s+\.(global|shared|const|local|param))?(\s+\.align\s+\d+)?|\.align\s+\d+", "", declaration)
    found = _VARIABLE.search(plain.strip())
    if found is None:
        raise PtxError(f"unknown declaration: {declaration.strip()}")
    each = int(found["bits"]) // 8
    count: int | None = 1
    if found["array"]:
        inside = found["array"].strip("[] ")
        count = int(inside) if inside else None
    data = None
    if found["value"]:
        numbers = [_integer(x) for x in split_operands(found["value"].strip().strip("{}"))]
        data = b"".join((n & ((1 << 8 * each) - 1)).to_bytes(each, "little") for n in numbers)
        count = len(numbers) if count is None else count
        data = data.ljust(each * count, b"\0")
    # A parameter's own alignment stands before its type, that of a pointer's target behind .ptr.
    own = each if align is None or ".ptr" in declaration else int(align[1])
    kind = re.search(r"\.([busf]\d+)\s", declaration)
    assert kind is not None
    return Variable(found["name"], None if count is None else each * count, own, data, kind[1])


def _integer(text: str) -> int:
    text = text.strip()
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_IGNORED = (".pragma", ".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".explicitcluster", ".noreturn")


class _Body:
    """Reads the statements of one function body. Names declared in an inner scope are renamed to be unique."""

    def __init__(self, files: dict[int, str]) -> None:
        self.files = files
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.targets: dict[str, list[str]] = {}
        self.registers: dict[str, int] = {}
        self.variables: dict[str, list[Variable]] = {"shared": [], "local": [], "const": [], "global": [], "param": []}
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.source: tuple[str, int] | None = None

    def read(self, text: str, line: int) -> None:
        token = re.compile(
            r"\s*(?:(\.loc\s[^\n]*|\.file\s[^\n]*)|([\w$]+:)(?!:)(?!\s*\.branchtargets)|([{}])|([^;]*?);)", re.S
        )
        at = 0
        while at < len(text):
            found = token.match(text, at)
            if found is None:
                if text[at:].strip():
                    raise PtxError(f"PTX line {line}: cannot read {text[at:].strip()[:80]!r}")
                return
            directive, label, brace, statement = found.groups()
            begin = next(found.start(i) for i in (1, 2, 3, 4) if found[i] is not None)
            line += text.count("\n", at, begin)
            if directive:
                self._location(directive)
            elif label:
                self.labels[self._name(label[:-1])] = len(self.instructions)
            elif brace == "{":
                self.scopes.append({})
                self.scope_count += 1
                inside = text[begin : _closing(text, begin)]
                for name in re.findall(r"(?:^|[;{}:\s])([A-Za-z_$][\w$]*)\s*:(?!:)", inside):
                    self._declare(name)
            elif brace == "}":
                self.scopes.pop()
            elif statement.strip():
                self._statement(statement.strip(), line)
            line += text.count("\n", begin, found.end())
            at = found.end()

    def _location(self, text: str) -> None:
        found = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if found and int(found[2]):
            self.source = (self.files.get(int(found[1]), found[1]), int(found[2]))

    def _name(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _declare(self, name: str) -> str:
        if len(self.scopes) == 1:
            return name
        self.scopes[-1][name] = f"{name}@{self.scope_count}"
        return self.scopes[-1][name]

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(_IGNORED):
            return
        if text.startswith(".reg"):
            found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
            if found is None:
                raise PtxError(f"PTX line {line}: cannot read {text!r}")
            for name in map(str.strip, found[2].split(",")):
                many = re.fullmatch(r"(.*)<(\d+)>", name)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
                for each in names:
                    self.registers[self._declare(each)] = width_of(found[1])
            return
        targets = re.match(r"([\w$]+):\s*\.branchtargets\s+(.*)", text, re.S)
        if targets:
            self.targets[targets[1]] = [self._name(x) for x in split_operands(targets[2])]
            return
        space = re.match(r"\.(shared|local|const|global|param)\b", text)
        if space:
            variable = _variable(text[space.end() :])
            variable.name = self._declare(variable.name)
            self.variables[space[1]].append(variable)
            return
        found = _INSTRUCTION.fullmatch(text)
        if found is None:
            raise PtxError(f"PTX line {line}: unknown statement {text[:80]!r}")
        opcode, *modifiers = re.split(r"\.", found[3])
        operands = split_operands(found[4])
        predicate = found[2]
        if len(self.scopes) > 1:
            rename = lambda s: re.sub(r"[%$\w]+", lambda m: self._name(m[0]), s)  # noqa: E731
            operands = [rename(o) for o in operands]
            predicate = predicate and rename(predicate)
        self.instructions.append(
            Instruction(
                opcode, modifiers, operands, predicate, found[1] == "!", line, self.source, " ".join(text.split())
            )
        )


def _closing(text: str, opening: int) -> int:
    """The index behind the brace that closes the one at `opening`."""
    depth = 0
    for found in re.finditer(r"[{}]", text[opening:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return opening + found.end()
    raise PtxError("a function's body is not closed")


def _registers(directives: str) -> int | None:
    """Registers of a thread by .maxnreg, or as many as the threads of .maxntid or .reqntid leave each other."""
    said = re.search(r"\.maxnreg\s+(\d+)", directives)
    if said:
        return int(said[1])
    threads = _shape("maxntid|reqntid", directives)
    if threads is None:
        return None
    blocks = re.search(r"\.minnctapersm\s+(\d+)", directives)
    total = math.prod(threads) * (int(blocks[1]) if blocks else 1)
    return min(REGISTERS // total // 8 * 8, 255)


def _shape(names: str, directives: str) -> tuple[int, ...] | None:
    """The dimensions of a block that a directive of one of these names gives; those that it leaves out are 1."""
    found = re.search(rf"\.(?:{names})\s+([\d\s,]+)", directives)
    if found is None:
        return None
    given = [int(x) for x in found[1].split(",") if x.strip()]
    return (*given, *[1] * (3 - len(given)))


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name. Functions other than kernels are not read: a call of one is an error."""
    text = _without_comments(text)
    files = {int(n): path.rsplit("/", 1)[-1] for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*(\((.*?)\))?([^{]*?)\{", text, re.S))
    bodies = [(m.end() - 1, _closing(text, m.end() - 1)) for m in entries]
    outside = text
    functions = list(re.finditer(r"\.func\b[^;{]*?\{", text, re.S))
    sections = list(re.finditer(r"\.section\s+[\w.]+\s*\{", text))
    skipped = bodies + [(m.end() - 1, _closing(text, m.end() - 1)) for m in functions + sections]
    for begin, end in skipped:
        outside = outside[:begin] + re.sub(r"[^\n]", " ", text[begin:end]) + outside[end:]
    variables: dict[str, list[Variable]] = {"shared": [], "const": [], "global": [], "local": []}
    for m in re.finditer(
        r"^[ \t]*(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|const|global)\b([^;]*);", outside, re.M
    ):
        variables[m[1]].append(_variable(m[2]))
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    kernels = {}
    for m, (begin, end) in zip(entries, bodies, strict=True):
        parameters = [_variable(re.sub(r"\.param\b", "", p, count=1)) for p in split_operands(m[3] or "")]
        body = _Body(files)
        body.read(text[begin + 1 : end - 1], 1 + text.count("\n", 0, begin + 1))
        v = body.variables
        most = _shape("maxntid", m[4])
        kernels[m[1]] = Kernel(
            m[1], parameters, body.instructions, body.labels, body.targets, body.registers,
            variables["shared"] + v["shared"], v["local"], variables["const"] + v["const"],
            variables["global"] + v["global"], target[1] if target else "", _registers(m[4]),
            None if most is None else math.prod(most), _shape("reqntid", m[4]),
        )  # fmt: skip
    if not kernels:
        raise PtxError("there is no .entry in this PTX")
    return kernels
