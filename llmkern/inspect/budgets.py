"""The most that each kernel may need: budgets.json, which the tests hold the kernels to.

{kernel: {source: {target: {"registers": n, "spill_bytes": n, "shared_bytes": n}}}}, the largest over a kernel's
configurations; where any may spill, "why" says which and what for. A kernel that is not listed may not spill and must
fit on an SM. The shared memory of kernels that take it at launch is not known here; theirs is the most that a block can
have.
"""

from __future__ import annotations

import json
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


def over(rows: Iterable[Row], budgets: dict[str, Any]) -> list[str]:
    """A sentence for each number that is larger than its budget."""
    told = []
    for r in rows:
        target = r.target if r.target in amd.LIMITS else limits.base(r.target)
        most = amd.LIMITS.get(target) or limits.LIMITS[target]
        budget = {
            "registers": most.registers_per_thread,
            "spill_bytes": 0,
            "shared_bytes": most.shared_block,
        } | budgets.get(r.kernel, {}).get(r.source, {}).get(target, {})
        name = f"{r.kernel} ({', '.join(filter(None, (r.source, r.config)))}) for {r.target}"
        for field in FIELDS:
            value = getattr(r, field)
            if value is not None and value > budget[field]:
                told.append(f"{name}: {value} {field.replace('_', ' ')}, the budget is {budget[field]}")
        if r.occupancy == 0:
            told.append(f"{name}: no block fits on an SM")
    return told
