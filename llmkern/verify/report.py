"""The rows of a comparison, and the verdict on one of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.check import short


@dataclasses.dataclass(frozen=True)
class Row:
    """One output or gradient. Errors are distances to the float64 truth, over the elements that are finite."""

    name: str
    kind: str  #: "output" or "gradient"
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    max_error: float
    max_reference: float
    max_allowed: float
    rms_error: float
    rms_reference: float
    rms_allowed: float
    scale: float  #: the largest finite magnitude of the truth
    passed: bool
    reason: str  #: why it failed; empty where it passed
    draws: int = 1  #: of the errors; where there were several, these are their quadratic means

    @property
    def inaccurate(self) -> bool:
        """An error is larger than the allowed one, which more draws may show to be chance."""
        return self.max_error > self.max_allowed or self.rms_error > self.rms_allowed


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found. True where every row passed; printed, a table."""

    rows: tuple[Row, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the table, unless every row passed."""
        if not self.passed:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        measures = ("max error", "reference", "allowed", "rms error", "reference", "allowed")
        table: list[tuple[str, ...]] = [("", "kind", "shape", "dtype", *measures, "")]
        for row in self.rows:
            largest = (row.max_error, row.max_reference, row.max_allowed)
            errors = (*largest, row.rms_error, row.rms_reference, row.rms_allowed)
            shape = "x".join(map(str, row.shape)) or "scalar"
            dtype = "" if row.dtype is None else short(row.dtype)
            numbers = ("-" if math.isnan(e) else f"{e:.2e}" for e in errors)
            verdict = "ok" if row.passed else f"FAILED: {row.reason}"
            table.append((row.name, row.kind, shape, dtype, *numbers, verdict))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
        lines = []
        for line in table:
            cells = [c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))]
            lines.append("  ".join([*cells, line[-1]]).rstrip())
        good = sum(row.passed for row in self.rows)
        verdict = "PASSED" if self.passed else "FAILED"
        lines.append(
            f"{verdict}: {good} of {len(self.rows)} rows within 2 x the reference's error + 1 ulp of the scale"
        )
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """What a reader of the verdict should know besides."""
        # A truth that is another function than the reference would let everything pass.
        weak = [f"{r.name} ({r.kind})" for r in self.rows if r.max_reference > r.scale / 4 > 0]
        said = f"This says little about {', '.join(weak)}: there the reference itself is far from the truth."
        drawn = [f"{r.name} ({r.kind}, {r.draws})" for r in self.rows if r.draws > 1]
        chance = f"Errors are the quadratic means of several draws in {', '.join(drawn)}."
        return [text for text in (self.note, drawn and chance, weak and said) if text]


MISSING = object()
_NAN = math.nan
Errors = tuple[float, float, float, float, float, float, float]  # the floats of Row, in its order


#: Of each further draw, the largest and the root mean square error of the candidate, then those of the reference.
Draws = Sequence[tuple[float, float, float, float]]


def gradient_row(name: str, *runs: Mapping[str, Tensor | None], draws: Draws = ()) -> Row | None:
    """The row of one gradient; a gradient that is None counts as zeros, and there is no row where all are None."""
    k, r, t = (run.get(name, MISSING) for run in runs)
    if k is None and r is None and t is None:
        return None
    if any(g is MISSING for g in (k, r, t)):
        return judge_row(name, "gradient", k, r, t)
    like_r = next(g for g in (r, k, t) if isinstance(g, Tensor))
    zeros = torch.zeros_like(like_r)
    k_or_zeros, r_or_zeros = (zeros if g is None else g for g in (k, r))
    row = judge_row(name, "gradient", k_or_zeros, r_or_zeros, zeros.double() if t is None else t, draws)
    if k is None and not row.passed:
        return dataclasses.replace(row, reason=f"no gradient came (None): {row.reason}")
    return row


def judge_row(name: str, kind: str, k: Any, r: Any, t: Any, draws: Draws = ()) -> Row:
    """The verdict on k, by the quadratic means of its errors and of the reference's over this draw and `draws`."""
    shape = tuple(k.shape) if isinstance(k, Tensor) else ()
    dtype = k.dtype if isinstance(k, Tensor) else None

    def row(reason: str, errors: Errors = (_NAN,) * 7) -> Row:
        return Row(name, kind, shape, dtype, *errors, not reason, reason, 1 + len(draws))

    for value, who in ((k, "the candidate"), (r, "the reference"), (t, "the truth")):
        if value is MISSING:
            return row(f"{who} has no such {kind if kind == 'output' else 'parameter'}")
    if not isinstance(r, Tensor) or not isinstance(k, Tensor):
        same = type(k) is type(r) and not isinstance(k, Tensor) and (k == r or (k != k and r != r))
        return row("" if same else f"expected {_described(r)}, got {_described(k)}")
    for what, expected, got in (
        ("shape", tuple(r.shape), shape),
        ("dtype", short(r.dtype), short(k.dtype)),
        ("device", r.device, k.device),
    ):
        if expected != got:
            return row(f"expected {what} {expected}, got {got}")
    if not r.is_floating_point():
        wrong = int((k != r).sum())
        return row(f"{wrong} of {k.numel()} elements differ from the reference" if wrong else "")
    if not isinstance(t, Tensor) or t.shape != r.shape:
        return row(f"the truth has {_described(t)}, the reference {_described(r)}")
    if t.dtype != torch.float64:
        return row(f"the truth came out in {short(t.dtype)} and not in float64")
    if k.numel() == 0:
        return row("", (0.0,) * 7)
    return row(*_judge(k.double(), r.double(), t, k.dtype, draws))


def _judge(k: Tensor, r: Tensor, t: Tensor, dtype: torch.dtype, draws: Draws) -> tuple[str, Errors]:
    """The reason why k fails, or "", and its errors beside the reference's and the allowed ones."""
    rounded = t.to(dtype).double()
    in_truth = rounded.isfinite()
    kind_k, kind_r, kind_t = (_kind(x) for x in (k, r, rounded))
    misplaced = (kind_k != kind_r) & (kind_k != kind_t)
    reason = ""
    if misplaced.any():
        count, where = int(misplaced.sum()), tuple(misplaced.nonzero()[0].tolist())
        reason = f"{count} of {k.numel()} elements: {k[where]:g} where the reference has {r[where]:g}, first at {where}"
    scale = float(t.abs()[in_truth].max()) if in_truth.any() else 0.0
    info = torch.finfo(dtype)
    ulp = info.eps * 2.0 ** math.floor(math.log2(max(scale, info.tiny)))  # of a subnormal scale: the smallest number
    (max_k, rms_k), (max_r, rms_r) = (_errors(x, t, x.isfinite() & in_truth) for x in (k, r))
    worst = max_k
    max_k, rms_k, max_r, rms_r = map(_quadratic_mean, zip((max_k, rms_k, max_r, rms_r), *draws, strict=True))
    allowed = (2 * max_r + ulp, 2 * rms_r + ulp)
    if not reason and max_k > allowed[0]:
        where = tuple(((k - t).abs().nan_to_num(nan=-1.0, posinf=-1.0) == worst).nonzero()[0].tolist())
        reason = f"max error {max_k:.3g} above {allowed[0]:.3g}, at {where}: {k[where]:.9g} instead of {t[where]:.9g}"
    if not reason and rms_k > allowed[1]:
        reason = f"rms error {rms_k:.3g} above {allowed[1]:.3g}"
    return reason, (max_k, max_r, allowed[0], rms_k, rms_r, allowed[1], scale)


def draw_errors(k: Any, r: Any, t: Any) -> tuple[float, float, float, float]:
    """One further draw of what judge_row compares; a gradient may be None."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return (0.0,) * 4
    k, r = (torch.zeros_like(t) if g is None else g for g in (k, r))
    in_truth = t.to(r.dtype).isfinite()
    max_r, rms_r = _errors(r.double(), t, r.isfinite() & in_truth)
    if (r.isfinite() & in_truth & ~k.isfinite()).any():
        return math.inf, math.inf, max_r, rms_r
    max_k, rms_k = _errors(k.double(), t, k.isfinite() & in_truth)
    return max_k, rms_k, max_r, rms_r


def _quadratic_mean(values: Sequence[float]) -> float:
    largest = max(values)  # by which they are divided first: squares of subnormal numbers would be 0
    if largest == 0.0 or math.isinf(largest):
        return largest
    return largest * math.sqrt(sum((v / largest) ** 2 for v in values) / len(values))


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return x.isposinf().int() + 2 * x.isneginf().int() + 3 * x.isnan().int()


def _errors(x: Tensor, t: Tensor, where: Tensor) -> tuple[float, float]:
    difference = (x - t)[where].abs()
    if difference.numel() == 0:
        return 0.0, 0.0
    return float(difference.max()), float(difference.square().mean().sqrt())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else repr(value)
