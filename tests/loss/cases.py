"""Named shapes, layouts and functions that the tests of this family share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from llmkern.loss import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100
#: Rows and classes.
SHAPES = {
    "one of everything": (1, 1),
    "one class": (5, 1),
    "usual": (33, 64),
    "primes": (7, 37),
    "a block less one": (3, 1023),
    "a block and one": (3, 1025),
    "no rows": (0, 8),
    "many rows": (300, 11),
    "blocks and a rest": (2, 5003),
}
#: label_smoothing and z_loss.
OPTIONS = {"plain": (0.0, 0.0), "smoothed": (0.1, 0.0), "z-loss": (0.0, 1e-2), "both": (0.3, 1e-3)}
LAYOUTS = {
    "rows apart": lambda t: torch.nn.functional.pad(t, (0, 5), value=7.0)[..., : t.size(-1)],
    "classes outermost": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "rows backwards": lambda t: t.flip(0).contiguous().flip(0),
}


def classes(rows: int, count: int) -> Tensor:
    """Targets, some of which do not count."""
    targets = torch.randint(count, (rows,))
    targets[2::5] = IGNORED
    return targets


def logits(shape: tuple[int, int], dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * scale).to(dtype), classes(*shape)


#: What a row of logits may hold, with classes that are hit: name -> (a row of 8, its target).
ROWS = {
    "ties": ([1.0] * 8, 3),
    "masked classes": ([1.0, -torch.inf, 2.0, -torch.inf, 0.5, 1.0, -1.0, 0.0], 2),
    "a masked target": ([1.0, -torch.inf, 2.0, 0.0, 0.5, 1.0, -1.0, 0.0], 1),
    "all masked but the target": ([-torch.inf] * 3 + [4.0] + [-torch.inf] * 4, 3),
    "all masked": ([-torch.inf] * 8, 3),
    "a NaN": ([1.0, torch.nan, 2.0, 0.0, 0.5, 1.0, -1.0, 0.0], 0),
    "infinite": ([1.0, torch.inf, 2.0, 0.0, 0.5, 1.0, -1.0, 0.0], 0),
    "an infinite target": ([1.0, torch.inf, 2.0, 0.0, 0.5, 1.0, -1.0, 0.0], 1),
    "large": ([6e4, -6e4, 5.9e4, 0.0, 6e4, 1.0, -1.0, 0.0], 0),
    "sure": ([30.0, 2.0, 1.0, 0.0, 0.5, 1.0, -1.0, 0.0], 0),
    "sure and far from 0": ([1030.0, 1012.0, 1001.0, 1000.0, 1000.5, 1001.0, 999.0, 1000.0], 0),
    "sure and wrong": ([30.0, 2.0, 1.0, 0.0, 0.5, 1.0, -1.0, 0.0], 4),
    "tiny": ([6e-8, 0.0, -6e-8, 1e-7, 0.0, 0.0, -0.0, 6e-8], 3),
    "ignored": ([1.0, torch.nan, torch.inf, 0.0, 0.5, 1.0, -1.0, 0.0], IGNORED),
}

#: Those whose loss is NaN, and of which every probability is.
NAN_ROWS = ("all masked", "a NaN", "infinite", "an infinite target")


def shown(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results as verify compares them: a float64 log-sum-exp is of float32 arithmetic."""
    return tuple(t.float() if t.dtype == torch.float64 else t for t in found)


def cross_entropy(smoothing: float = 0.0, z_loss: float = 0.0, function=None):
    """A function of (logits, targets): the rows' losses and log-sum-exps."""
    function = function or reference.cross_entropy

    def call(logits: Tensor, targets: Tensor):
        loss, lse = function(logits, targets, IGNORED, smoothing, z_loss)
        return (loss, lse) if logits.dtype == torch.float64 else shown((loss, lse))

    return call


def losses(smoothing: float = 0.0, z_loss: float = 0.0, function=None):
    """The same without the log-sum-exps, which have no gradient."""
    call = cross_entropy(smoothing, z_loss, function)
    return lambda logits, targets: call(logits, targets)[0]


def distillation(temperature: float, function=None):
    """A function of (student, teacher, targets): both losses of each row."""
    function = function or reference.distillation
    return lambda student, teacher, targets: function(student, teacher, targets, temperature, IGNORED)[:2]


def heads(rows: int, widths: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight and bias for each width, logits of about 2 in size."""
    made: list[Tensor] = []
    for width in widths:
        made += [torch.randn(rows, width), 2 * torch.randn(count, width) / width**0.5, torch.randn(count)]
    return [t.to(dtype) for t in made]


NEEDS = list(itertools.product((False, True), repeat=3))
