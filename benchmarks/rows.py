"""LayerNorm, RMSNorm and gated activations against eager and torch.compile: `python -m benchmarks.rows`.

All are bound by memory: the peak is reading as many bytes as are read and written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import family, peers
from benchmarks.family import DTYPES, Case, Options
from llmkern import functional
from llmkern.verify import verify

SHAPES = [(1, 576), (512, 768), (2048, 4096)]  # rows, elements of a row


def main(argv: Sequence[str] | None = None) -> int:
    return family.main("rows", __doc__, cases, "M,N", argv)


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes or (SHAPES[:2] if options.quick else SHAPES):
        for short in DTYPES:
            for name in ("layer_norm", "rms_norm"):
                yield forward(name, shape, short, options)
            yield backward("rms_norm", shape, short, options)
            yield forward("swiglu", shape, short, options)
            yield backward("swiglu", shape, short, options)


def llama_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """As the published models write it, behind the addition of the residual."""
    total = x + residual
    wide = total.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype), total


def plain_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, 1e-5), total


def plain_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, None, 1e-5), total


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


#: name: ours, the peers, how many rows of M x N are read and written in the forward, and in the backward
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Callable[..., Any]], int, int]] = {
    "layer_norm": (
        lambda x, residual, weight: functional.layer_norm(x, weight, residual=residual),
        {"torch eager": plain_layer_norm}, 4, 4,
    ),
    "rms_norm": (
        lambda x, residual, weight: functional.rms_norm(x, weight, 1e-5, residual=residual),
        {"torch eager": plain_rms_norm, "as Llama has it": llama_rms_norm}, 4, 4,
    ),
    "swiglu": (functional.swiglu, {"torch eager": plain_swiglu}, 3, 5),
}  # fmt: skip


def arguments(name: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]
    return tuple(rows) if name == "swiglu" else (*rows, torch.randn(shape[1], generator=generator).to(dtype))


def forward(name: str, shape: Sequence[int], short: str, options: Options) -> Case:
    ours, others, moved, _ = FUNCTIONS[name]
    given = arguments(name, shape, DTYPES[short])
    found: dict[str, Callable[[], Any]] = {n: partial(f, *given) for n, f in others.items()}
    found["llmkern"] = partial(ours, *given)
    plain = others["torch eager"]
    skipped = peers.with_compiled(found, plain, given, options.compile)
    return Case(
        f"{title(name)} {shape[0]},{shape[1]} {short}", found, "torch eager",
        lambda: verify(ours, plain, given, gradients=False), bytes=float(moved * given[0].nbytes), skipped=skipped,
    )  # fmt: skip


def backward(name: str, shape: Sequence[int], short: str, options: Options) -> Case:
    """The gradients alone, of graphs that were made before."""
    ours, others, _, moved = FUNCTIONS[name]
    given = arguments(name, shape, DTYPES[short])

    def gradients(function: Callable[..., Any]) -> Callable[[], Any]:
        leaves = [t.clone().requires_grad_() for t in given]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.ones_like(r) for r in results]
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)

    found = {n: gradients(f) for n, f in others.items()}
    found["llmkern"] = gradients(ours)
    skipped = {}
    if options.compile:
        if missing := peers.compile_missing():
            skipped["torch.compile"] = missing
        else:
            found["torch.compile"] = gradients(peers.compiled(others["torch eager"]))
    return Case(
        f"{title(name)} backward {shape[0]},{shape[1]} {short}", found, "torch eager",
        lambda: verify(ours, others["torch eager"], given), bytes=float(moved * given[0].nbytes), skipped=skipped,
    )  # fmt: skip


def title(name: str) -> str:
    return name if name == "swiglu" else f"residual and {name}"


if __name__ == "__main__":
    sys.exit(main())
