"""Rotary embedding and the sinusoidal add against eager and torch.compile: `python -m benchmarks.positional`.

Both are bound by memory: the peak is reading as many bytes as are read and written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import family, peers
from benchmarks.family import DTYPES, Case, Options
from llmkern import functional
from llmkern.verify import Report, verify

ROTARY = [(1, 32, 1, 128), (1, 12, 512, 64), (4, 32, 2048, 128)]
SINUSOIDAL = [(128, 32, 384), (512, 1, 768), (2048, 8, 512)]  # (S, B, D)


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("positional", __doc__, cases, "B,H,S,D", argv)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (ROTARY[:2] if options.quick else ROTARY):
        for short in DTYPES:
            for interleaved in (False, True):
                yield rotary(shape, short, interleaved, options)
    for b, h, s, d in options.shapes:
        yield sinusoidal((s, b, h * d), "fp32", options)
    if not options.shapes:
        for width in SINUSOIDAL[:2] if options.quick else SINUSOIDAL:
            for short in DTYPES:
                yield sinusoidal(width, short, options)


def rotary(shape: Sequence[int], short: str, interleaved: bool, options: Options) -> Case:
    _, _, s, d = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, generator=generator).to(DTYPES[short]) for _ in range(2))
    angles = torch.arange(s)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = angles.cos(), angles.sin()
    args = (q, k, cos, sin, interleaved)
    own_q, own_k = q.clone(), k.clone()  # turned again and again, their length stays

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return functional.rotary(q, k, cos, sin, interleaved=interleaved)

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return functional.rotary(q, k, cos, sin, interleaved=interleaved, inplace=True)

    def check() -> Report:
        plain = lambda q, k, cos, sin: peers.rotary_eager(q, k, cos, sin, interleaved)  # noqa: E731
        reports = [verify(f, plain, (q, k, cos, sin), gradients=False) for f in (ours, in_place)]
        return Report(reports[0].rows + reports[1].rows, reports[0].note)

    found: dict[str, Callable[[], Any]] = {
        "torch eager": lambda: peers.rotary_eager(*args),
        "llmkern": lambda: ours(q, k, cos, sin),
        "llmkern, in place": lambda: in_place(own_q, own_k, cos, sin),
    }
    skipped = peers.with_compiled(found, peers.rotary_eager, args, options.compile)
    name = f"rotary {','.join(map(str, shape))} {short}{' interleaved' if interleaved else ''}"
    return Case(name, found, "torch eager", check, bytes=4.0 * q.nbytes, skipped=skipped)


def sinusoidal(shape: Sequence[int], short: str, options: Options) -> Case:
    s, _, d = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(DTYPES[short])
    pe = torch.randn(s, 1, d, generator=generator)
    found: dict[str, Callable[[], Any]] = {
        "torch eager": lambda: peers.sinusoidal_eager(x, pe),
        "llmkern": lambda: functional.sinusoidal_add(x, pe),
    }
    skipped = peers.with_compiled(found, peers.sinusoidal_eager, (x, pe), options.compile)
    return Case(
        f"sinusoidal {','.join(map(str, shape))} {short}", found, "torch eager",
        lambda: verify(functional.sinusoidal_add, peers.sinusoidal_eager, (x, pe), gradients=False),
        bytes=2.0 * x.nbytes + pe.nbytes, skipped=skipped,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
