"""The most that each configuration of a kernel may need: budgets.json, which the tests hold the kernels to.

{kernel: {source: {config: {target: [registers, spill bytes, shared bytes, matrix instructions]}}}}; where any may
spill, the entry "why" of the source says which and what for. Registers are rounded up to 8, in which units a processor
gives them to threads. What is not listed may not spill and must fit on an SM. Shared memory is null where a kernel
takes it at launch. The kinds of matrix instructions, "HGMMA", are those that the code may not lose; "" where there are
none.

`python -m llmkern inspect --write-budgets` sets the budgets of what it has compiled to what that needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkern.inspect import amd, limits
from llmkern.inspect.row import Row

FILE = Path(__file__).with_name("budgets.json")
FIELDS = ("registers", "spill_bytes", "shared_bytes")


def load() -> dict[str, Any]:
    budgets: dict[str, Any] = json.loads(FILE.read_text())
    return budgets


def target_of(row: Row) -> str:
    return row.target if row.target in amd.LIMITS else limits.base(row.target)


def matrix_kinds(row: Row) -> str:
    """Which kinds of matrix instructions its code has: "HGMMA", "v_mfma", or both of two, parted by a space."""
    parts = (re.match(r"v_[a-z]+|\w+", name) for name in row.matrix_instructions)  # of v_mfma_f32_..., HMMA.16816....
    return " ".join(sorted({part[0] for part in parts if part}))


def over(rows: Iterable[Row], budgets: dict[str, Any]) -> list[str]:
    """A sentence for each number that is larger than its budget."""
    told = []
    for r in rows:
        target = target_of(r)
        most = amd.LIMITS.get(target) or limits.LIMITS[target]
        listed = budgets.get(r.kernel, {}).get(r.source, {}).get(r.config, {}).get(target)
        *budget, kinds = listed or [most.registers_per_thread, 0, most.shared_block, ""]
        name = f"{r.kernel} ({', '.join(filter(None, (r.source, r.config)))}) for {r.target}"
        for field, allowed in zip(FIELDS, budget, strict=True):
            value = getattr(r, field)
            if value is not None and allowed is not None and value > allowed:
                told.append(f"{name}: {value} {field.replace('_', ' ')}, the budget is {allowed}")
        if lost := set(kinds.split()) - set(matrix_kinds(r).split()):
            told.append(f"{name}: no {' and no '.join(sorted(lost))}, which the budget lists")
        if r.occupancy == 0:
            told.append(f"{name}: no block fits on an SM")
    return told


def write(rows: Iterable[Row], path: Path = FILE) -> None:
    """Sets the budgets of the targets and kernels of `rows` to what they need, and leaves the others; configurations of
    these kernels that are not among the rows for any of these targets are forgotten."""
    budgets: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    made = list(rows)
    targets = {target_of(r) for r in made}
    for kernel, source in {(r.kernel, r.source) for r in made}:
        for config, of_config in list(budgets.get(kernel, {}).get(source, {}).items()):
            if config != "why":
                left = {t: n for t, n in of_config.items() if t not in targets}
                budgets[kernel][source][config] = left
    for r in made:
        most = (amd.LIMITS.get(target_of(r)) or limits.LIMITS[target_of(r)]).registers_per_thread
        numbers = [min(-(-r.registers // 8) * 8, most), r.spill_bytes, r.shared_bytes, matrix_kinds(r)]
        budgets.setdefault(r.kernel, {}).setdefault(r.source, {}).setdefault(r.config, {})[target_of(r)] = numbers
    for sources in budgets.values():
        for source, configs in sources.items():
            sources[source] = {c: v for c, v in configs.items() if v}
    path.write_text(text(budgets))


def text(budgets: dict[str, Any]) -> str:
    """As JSON with a line for each configuration, in order."""
    order = list(limits.LIMITS) + list(amd.LIMITS)
    lines = []
    for kernel in sorted(budgets):
        parts = []
        for source in sorted(budgets[kernel]):
            configs = [
                f"   {json.dumps(config)}: " + json.dumps(
                    numbers if config == "why" else {t: numbers[t] for t in order if t in numbers}
                )
                for config, numbers in sorted(budgets[kernel][source].items())
            ]  # fmt: skip
            parts.append(f"  {json.dumps(source)}: {{\n" + ",\n".join(configs) + "\n  }")
        lines.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"
