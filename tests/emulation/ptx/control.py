"""Control flow: the order of basic blocks, threads that part and meet again, and whose turn it is. PTX ISA 9.7.12.

A Unit is a set of warps, of all the blocks that run together, whose threads execute together where they are at the same
instruction. Threads that part at a branch become groups with an instruction of their own each; the group that stands
first in the order of the code runs until it reaches the next one, and joins it. The code is laid out so that a block
follows all that lead to it and a loop lies together: a group then waits at the latest at the post-dominator of the
branch (Diamos et al. 2011, "SIMD re-convergence at thread frontiers").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.ptx import wgmma
from tests.emulation.ptx.operands import HANDLERS, Form, full
from tests.emulation.ptx.parse import Instruction, Kernel, PtxError, split_operands

#: Instructions of a turn, after which others get theirs: also what ends a loop that waits for another thread.
LONG_TURN = 4_000
BRANCHES, ENDS = ("bra", "brx"), ("ret", "exit", "trap")
_AXES = ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid")
_SINGLE = (
    "laneid", "warpid", "nwarpid", "smid", "nsmid", "gridid", "lanemask_eq", "lanemask_le", "lanemask_lt",
    "lanemask_ge", "lanemask_gt", "dynamic_smem_size", "total_smem_size", "cluster_ctarank", "cluster_nctarank",
)  # fmt: skip
SPECIAL = {*(f"%{name}.{axis}" for name in _AXES for axis in "xyz"), *(f"%{name}" for name in _SINGLE), "WARP_SZ"}


class Code:
    """A kernel with a handler for each instruction, in an order in which control flow meets."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.register_index = {name: i for i, name in enumerate(kernel.registers)}
        self.widths = list(kernel.registers.values())
        self.special = SPECIAL
        variables = (*kernel.parameters, *kernel.shared, *kernel.local, *kernel.constant, *kernel.module)
        self.symbols = {v.name for v in variables}
        self.symbols_used: set[str] = set()
        self.granules = {"global": 16, "shared": 16}
        self.opcodes = {i.opcode + "." + ".".join(i.modifiers) for i in kernel.instructions}
        self.instructions, self.target_of = layout(kernel)
        #: Strong accesses whose scope is the block: to other blocks they are weak ones.
        self.near = np.zeros(len(self.instructions), bool)
        self.forms = [Form(kernel, self, ins, at) for at, ins in enumerate(self.instructions)]
        self.handlers = [self._compile(form) for form in self.forms]
        if self.uses("wgmma"):
            registers = wgmma.registers_of(self.forms)
            pairs = zip(self.forms, self.handlers, strict=True)
            self.handlers = [h if f.ins.opcode == "wgmma" else wgmma.watch(f, h, registers) for f, h in pairs]
        self.predicates = [
            None if i.predicate is None else (self.register_index[i.predicate], i.negated) for i in self.instructions
        ]

    def _compile(self, form: Form) -> Any:
        ins = form.ins
        if ins.predicate is not None:
            if ins.predicate not in self.register_index:
                raise form.error(f"unknown predicate {ins.predicate}")
            form.used.append(ins.predicate)
        if ins.opcode not in HANDLERS:
            raise form.error(f"the instruction {ins.opcode} is not known")
        run = HANDLERS[ins.opcode](form)
        form.done()
        return run

    def note_access(self, space: str, size: int) -> None:
        for name in ("global", "shared") if space == "generic" else (space,):
            if name in self.granules:
                self.granules[name] = min(self.granules[name], size)

    def uses(self, beginning: str) -> bool:
        return any(opcode.startswith(beginning) for opcode in self.opcodes)


def layout(kernel: Kernel) -> tuple[list[Instruction], list[list[int] | None]]:
    """The instructions in the order of execution, and for each branch the indices that it may jump to.

    A block that does not follow its predecessor in the new order is reached by an added `bra`.
    """
    code = kernel.instructions
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, ins in enumerate(code) if ins.opcode in BRANCHES + ENDS}
    begins = sorted(s for s in starts if s < len(code))
    block_at = {begin: b for b, begin in enumerate(begins)}
    ends = [*begins[1:], len(code)]

    def labels(ins: Instruction) -> list[str]:
        if ins.opcode == "bra":
            return [ins.operands[0]]
        if ins.opcode == "brx":
            if ins.operands[1] in kernel.targets:
                return kernel.targets[ins.operands[1]]
            return split_operands(ins.operands[1].strip("{}"))
        return []

    def index(label: str, ins: Instruction) -> int:
        if label not in kernel.labels:
            raise PtxError(f"{ins.where()}: unknown label {label}")
        return kernel.labels[label]

    follows: list[int | None] = []
    successors: list[list[int]] = []
    for b, end in enumerate(ends):
        last = code[end - 1]
        stops = last.predicate is None and last.opcode in ("bra", "brx", "ret", "exit")
        follows.append(b + 1 if not stops and b + 1 < len(begins) else None)
        jumps = [block_at[i] for i in (index(x, last) for x in labels(last)) if i < len(code)]
        successors.append(jumps + ([b + 1] if follows[b] is not None else []))
    order = _in_order(list(range(len(begins))), {b: set(s) for b, s in enumerate(successors)}, 0)
    placed = {b: i for i, b in enumerate(order)}
    instructions: list[Instruction] = []
    new_begin: dict[int, int] = {}
    jump_to: dict[int, list[int]] = {}  # index -> blocks
    for i, b in enumerate(order):
        new_begin[b] = len(instructions)
        for ins in code[begins[b] : ends[b]]:
            if ins.opcode in BRANCHES:
                jump_to[len(instructions)] = [block_at.get(index(x, ins), -1) for x in labels(ins)]
            instructions.append(ins)
        after = follows[b]
        if after is not None and placed[after] != i + 1:
            last = instructions[-1]
            jump_to[len(instructions)] = [after]
            instructions.append(
                Instruction("bra", ["uni"], ["next"], None, False, last.line, last.source, "bra.uni (added)")
            )
    new_begin[-1] = len(instructions)
    targets = [[new_begin[b] for b in jump_to[i]] if i in jump_to else None for i in range(len(instructions))]
    return instructions, targets


def _in_order(nodes: list[int], successors: dict[int, set[int]], entry: int) -> list[int]:
    """Nodes so that each follows its predecessors, apart from edges back to a loop's head; loops lie together."""
    inside = set(nodes)
    result: list[int] = []
    for part in reversed(_components(nodes, {n: successors[n] & inside for n in nodes}, entry)):
        if len(part) == 1:
            result += part
            continue
        members = set(part)
        outside = [n for n in sorted(part) if n == entry or any(n in successors[m] for m in inside - members)]
        head = outside[0] if outside else min(part)
        cut = {n: {s for s in successors[n] & members if s != head} for n in part}
        result += _in_order(part, cut, head)
    return result


def _components(nodes: list[int], successors: dict[int, set[int]], entry: int) -> list[list[int]]:
    """Strongly connected components, each behind those that it leads to (Tarjan 1972), without recursion."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in [entry, *nodes]:
        if root in number:
            continue
        work = [(root, iter(sorted(successors[root])))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for s in rest:
                if s not in number:
                    number[s] = low[s] = len(number)
                    stack.append(s)
                    on_stack.add(s)
                    work.append((s, iter(sorted(successors[s]))))
                    break
                if s in on_stack:
                    low[node] = min(low[node], number[s])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    cut = stack.index(node)
                    found.append(stack[cut:])
                    on_stack.difference_update(stack[cut:])
                    del stack[cut:]
    return found


class Unit:
    """Warps `warps` (numbers within a block) of all blocks of a machine: `count` threads with their registers."""

    def __init__(self, machine: Any, warps: range) -> None:
        self.machine, self.code = machine, machine.code
        threads = np.arange(warps.start * 32, warps.stop * 32)
        self.per_block = len(threads)
        blocks = np.arange(machine.block_count)
        self.block = np.repeat(blocks, len(threads))  #: number within the machine
        self.thread = np.tile(threads, machine.block_count)
        self.count = len(self.thread)
        self.exists = self.thread < machine.threads  # the last warp of a block may be cut
        self.rows = np.where(self.exists, self.block * machine.threads + self.thread, 0)
        self.lane = np.arange(self.count) % 32
        self.alive = self.exists.copy()
        self.registers = [
            np.zeros(1, bool) if w == 1 else np.full(1, 0xBADC0FFEE0DDF00D & ((1 << w) - 1), f"u{w // 8}")
            for w in self.code.widths
        ]
        #: The number of the group that cp.async, bulk copies and wgmma of each thread belong to now.
        self.group = {kind: np.ones(self.count, np.int64) for kind in ("cp.async", "bulk", "wgmma")}
        #: Registers that wgmma still uses: name -> (threads, their groups); and those written since the last fence.
        self.pending: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.unfenced: dict[str, np.ndarray] = {}
        self.shared_offset = self.block * machine.shared_stride
        self.special = self._special()
        #: Threads that wait at a collective instruction for others of their warp: instruction -> mask.
        self.waiting: dict[int, np.ndarray] = {}
        self.looked_again: dict[int, tuple[int, int]] = {}
        #: Groups that have run for long while others of the unit waited: they go on when those cannot.
        self.resting: list[tuple[int, np.ndarray]] = []
        self.without_rest = 0
        #: Groups of threads that can run, the next one last: (instruction, mask).
        self.groups: list[tuple[int, np.ndarray]] = [(0, self.alive.copy())]

    def _special(self) -> dict[str, np.ndarray]:
        m = self.machine
        block = m.blocks[self.block]
        tid, grid = m.block_shape, m.grid
        one = lambda v: np.array([v], np.uint32)  # noqa: E731
        each = {
            "%tid.x": self.thread % tid[0],
            "%tid.y": self.thread // tid[0] % tid[1],
            "%tid.z": self.thread // (tid[0] * tid[1]),
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // (grid[0] * grid[1]),
            "%laneid": self.lane,
            "%warpid": self.thread // 32,
            "%lanemask_eq": 1 << self.lane,
            "%lanemask_lt": (1 << self.lane) - 1,
            "%lanemask_le": (2 << self.lane) - 1,
            "%lanemask_ge": (1 << 32) - (1 << self.lane),
            "%lanemask_gt": (1 << 32) - (2 << self.lane),
        }
        values = {name: np.asarray(v).astype(np.uint32) for name, v in each.items()}
        for i, axis in enumerate("xyz"):
            values[f"%ntid.{axis}"], values[f"%nctaid.{axis}"] = one(tid[i]), one(grid[i])
            # Clusters have one block here.
            values[f"%cluster_ctaid.{axis}"], values[f"%cluster_nctaid.{axis}"] = one(0), one(1)
            values[f"%clusterid.{axis}"], values[f"%nclusterid.{axis}"] = values[f"%ctaid.{axis}"], one(grid[i])
        values |= {"%cluster_ctarank": one(0), "%cluster_nctarank": one(1), "WARP_SZ": one(32), "%gridid": one(1)}
        values |= {"%smid": one(0), "%nsmid": one(1), "%nwarpid": one((m.threads + 31) // 32)}
        values |= {"%dynamic_smem_size": one(m.dynamic_shared), "%total_smem_size": one(m.shared_size)}
        return values

    def span(self, space: str, lanes: Any) -> tuple[int, int, Any]:
        """Of a space: the first address, the size, and what leads from an address to an index, for each lane."""
        if space == "shared":
            return 0, self.machine.shared_size, self.shared_offset if lanes is None else self.shared_offset[lanes]
        if space == "local":
            size = self.machine.local_size
            return 0, self.machine.local_used, (self.rows if lanes is None else self.rows[lanes]) * size
        if space == "global":
            from tests.emulation.ptx.memory import GLOBAL_BASE

            return GLOBAL_BASE, len(self.machine.spaces["global"].data), None
        return 0, len(self.machine.spaces[space].data), None

    def fault(self, kind: str, message: str, ins: Instruction | None, lane: int, count: int = 1) -> None:
        block = int(self.machine.blocks[self.block[lane]])
        self.machine.faults.add(kind, message, ins, block, int(self.thread[lane]), count)

    def add_group(self, at: int, mask: np.ndarray) -> None:
        """Lets threads go on at an instruction, with those that are there already."""
        if not mask.any():
            return
        for i, (other, others) in enumerate(self.groups):
            if other == at:
                self.groups[i] = (at, mask | others)
                return
        self.groups.append((at, mask))
        self.groups.sort(key=lambda g: -g[0])

    def run(self) -> bool:
        """Runs groups until none can go on, or the unit's turn is over (then True)."""
        handlers, predicates = self.code.handlers, self.code.predicates
        length, registers, issued = len(handlers), self.registers, self.machine.issued
        code = self.code
        left = turn = self.machine.turn()
        if not self.groups:
            self._wake()
        while self.groups:
            at, mask = self.groups.pop()
            warps = int(mask.reshape(-1, 32).any(1).sum())
            whole = bool(mask.all())
            while True:
                if self.groups and at >= self.groups[-1][0]:  # others stand here, or before
                    self.add_group(at, mask)
                    break
                if at >= length:
                    self.machine.finished(self, mask)
                    break
                left -= 1
                if left < 0:
                    self._rest(at, mask, turn)
                    self.machine.steps += turn
                    return True
                issued[at] += warps
                active = None if whole else mask
                predicate = predicates[at]
                if predicate is not None:
                    holds = registers[predicate[0]]
                    holds = full(~holds if predicate[1] else holds, self.count)
                    active = holds & mask
                    if not active.any():
                        at += 1
                        continue
                    if whole and active.all():
                        active = None
                targets = code.target_of[at]
                if targets is not None:
                    moved = self._branch(at, mask, active, targets)
                    if moved is None:
                        break
                    at = moved
                    continue
                step = handlers[at](self, active)
                if step is not None:  # the handler took the threads: they wait, or have ended
                    rest = mask & ~(mask if active is None else active)
                    self.add_group(at + 1, rest)
                    break
                at += 1
        self.machine.steps += turn - left
        self.without_rest = 0
        return False

    def _rest(self, at: int, mask: np.ndarray, turn: int) -> None:
        """A group whose turn is over. One that has run for long may wait for others of the unit, and lets them go."""
        self.without_rest += turn
        if self.without_rest < LONG_TURN or not (self.groups or self.resting):
            self.add_group(at, mask)
            return
        self.without_rest = 0
        self._wake()
        self.resting.append((at, mask))

    def _wake(self) -> None:
        resting, self.resting = self.resting, []
        for at, mask in resting:
            self.add_group(at, mask)

    def _branch(self, at: int, mask: np.ndarray, active: Any, targets: list[int]) -> int | None:
        """The instruction that all go to, or None where they part into groups."""
        ins = self.code.instructions[at]
        if ins.opcode == "brx":
            choice = full(self.code.forms[at].choice(self), self.count)
            for i, target in enumerate(targets):
                self.add_group(target, (mask if active is None else active) & (choice == i))
            if active is not None:
                self.add_group(at + 1, mask & ~active)
            return None
        if active is None or (active == mask).all():
            return targets[0]
        if "uni" in ins.modifiers:
            warps = active.reshape(-1, 32).any(1) & (mask & ~active).reshape(-1, 32).any(1)
            if warps.any():
                self.fault("collective", "bra.uni is taken by a part of a warp", ins, int(active.argmax()))
        self.add_group(targets[0], active.copy())
        self.add_group(at + 1, mask & ~active)
        return None
