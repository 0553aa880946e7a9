"""Machine code (SASS) as `cuobjdump -sass` prints it: instructions, the main loop, the pipe of each instruction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")

_TENSOR = re.compile(r"(?:[HIQOB]MMA|[HIQB]GMMA|UTC\w*MMA)$")
_FMA = {"FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "IMAD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
_FMA |= {name + ".32I" for name in ("FFMA", "FMUL", "FADD")}
_MUFU = {"MUFU", "F2F", "F2I", "I2F", "I2I", "FRND", "POPC", "FLO", "BREV"}
_GLOBAL = {"LD", "ST", "LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UTMASTG", "UBLKCP"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS", "LDL", "STL"}
_LSU = (_GLOBAL | _SHARED | {"SHFL", "MATCH"}) - {"UTMALDG", "UTMASTG", "UBLKCP"}  # those go past the LSU
_BRANCH = {
    "BRA", "BRX", "BRXU", "JMP", "JMX", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "BMOV", "BAR", "WARPSYNC",
    "WARPGROUP", "SYNCS", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "FENCE", "CCTL", "YIELD", "NANOSLEEP", "NOP",
    "ACQBULK", "ELECT", "VOTE", "USETMAXREG", "WARPGROUPSET", "ARRIVES", "KILL", "BPT", "PREEXIT",
}  # fmt: skip
_ALU = re.compile(
    r"(?:IADD3?|IADD32I|LEA|LOP3?|LOP32I|SHF|SHL|SHR|[IF]SETP|HSETP2|DSETP|[IF]MNMX3?|VIMNMX3?|VIADD|VIADDMNMX|HMNMX2"
    r"|VHMNMX|F?SEL|FSET|PRMT|MOV|MOV32I|PLOP3|P2R|R2P|I2FP|I2IP|F2FP|F2IP|FCHK|BMSK|SGXT|IABS|IDP|IDP4A|ISCADD|VABSDIFF4?"
    r"|REDUX|CREDUX)$"
)
PIPES = ("tensor", "fma", "alu", "mufu", "lsu", "branch", "uniform", "other")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", or "" where it is always executed
    name: str  # with its modifiers, as in HMMA.16816.F32.BF16
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def pipe(self) -> str:
        """The one that executes it; `uniform` and `other` take a place in the issue of instructions alone."""
        op = self.opcode
        if self.predicate == "@!PT":
            return "branch"  # never executed: what ptxas puts behind fences
        if _TENSOR.match(op):
            return "tensor"
        if op in _FMA:
            return "fma"
        if op in _MUFU:
            return "mufu"
        if op in _LSU:
            return "lsu"
        if op in _BRANCH:
            return "branch"
        if _ALU.match(op):
            return "alu"
        return "uniform" if op.startswith("U") or op in ("R2UR", "S2UR") else "other"

    @property
    def memory(self) -> bool:
        return self.opcode in _GLOBAL or self.opcode in _SHARED

    @property
    def bytes(self) -> int:
        """That a lane moves, of an instruction of the LSU."""
        parts = self.name.split(".")
        if self.opcode in ("LDSM", "STSM"):
            return 4 * next((int(p) for p in reversed(parts) if p in ("2", "4")), 1)
        sizes = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((sizes[p] for p in parts if p in sizes), 4)


def functions(text: str) -> dict[str, list[Instruction]]:
    """The mangled name of each function in the output of `cuobjdump -sass`, and its instructions."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if head := _FUNCTION.match(line):
            body = found.setdefault(head[1], [])
        elif match := _INSTRUCTION.match(line):
            address, predicate, name, operands = match.groups()
            body.append(Instruction(int(address, 16), predicate or "", name, operands.strip()))
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops: from the target of a branch backwards to the branch.

    What stands behind the last EXIT without a predicate is out of line (subroutines of divisions, second tries of
    barriers, padding) and branches back into the program without being a loop.
    """
    ends = [i for i, x in enumerate(code) if x.opcode == "EXIT" and x.predicate in ("", "@PT")]
    place = {x.address: i for i, x in enumerate(code)}
    found = []
    for i, x in enumerate(code[: ends[-1]] if ends else code):
        target = _TARGET.search(x.operands) if x.opcode == "BRA" else None
        first = place.get(int(target[1], 16)) if target else None
        if first is not None and first <= i:
            found.append(code[first : i + 1])
    return found


def _innermost(bodies: list[list[Instruction]], counts: Callable[[Instruction], int]) -> list[Instruction]:
    """The body whose instructions count most, among those that hold no smaller one with some that count; of equals the
    shortest, which goes through the tiles that are not masked."""
    holding = [b for b in bodies if any(map(counts, b))]
    ends = {id(b): (b[0].address, b[-1].address) for b in holding}

    def inside(inner: list[Instruction], outer: list[Instruction]) -> bool:
        (a, b), (c, d) = ends[id(inner)], ends[id(outer)]
        return (a, b) != (c, d) and c <= a and b <= d

    inner = [b for b in holding if not any(inside(other, b) for other in holding)]
    return max(inner, key=lambda b: (sum(map(counts, b)), -len(b)), default=[])


def multiply_adds(x: Instruction) -> int | None:
    """Of one warp's share in a matrix instruction; None where the code does not tell (tcgen05: a descriptor has it).

    HMMA.16816 is 16x8x16; HGMMA.64x128x16 is shared by the four warps of a warpgroup.
    """
    if group := re.search(r"\.(\d+)x(\d+)x(\d+)", x.name):
        m, n, k = map(int, group.groups())
        return m * n * k // 4
    if shape := re.match(r"\w+\.(16|8)(8)(\d+)(?:\.|$)", x.name):
        m, n, k = map(int, shape.groups())
        return m * n * k
    return None


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most multiply-adds of matrix instructions; with the most memory instructions where no
    loop has one.

    A kernel without such a loop counts as a whole, up to its last EXIT.
    """
    bodies = loops(code)
    # tcgen05 does not say how many: more than any other.
    found = _innermost(bodies, lambda x: (multiply_adds(x) or 2**20) if x.pipe == "tensor" else 0)
    if not found and not any(x.pipe == "tensor" for x in code):
        found = _innermost(bodies, lambda x: x.memory)
    if found:
        return found
    ends = [i for i, x in enumerate(code) if x.opcode == "EXIT" and x.predicate in ("", "@PT")]
    return code[: ends[-1] + 1] if ends else code


def matrix_instructions(code: Iterable[Instruction]) -> dict[str, int]:
    """Kind, as in HMMA.16816.F32.BF16, and how often it stands in the code."""
    return dict(sorted(Counter(x.name for x in code if x.pipe == "tensor").items()))
