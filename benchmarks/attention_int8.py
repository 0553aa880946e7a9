"""The error of attention with queries and keys in 8 bits, against attention in float64, with and without the keys'
average. No time: there is no kernel for CPUs, and the error is the same everywhere.

    python -m benchmarks.attention_int8 [--shape 1,8,1024,64] [--dtype bf16] [--causal]

- normal: queries, keys and values from a normal distribution.
- channels: as normal, and to the keys an offset is added that all keys of a head share: 8 times as large as the rest in
  4 of the channels, 1 in the others. So keys look in many models (Zhang et al. 2024, "SageAttention", section 4.2).
- outliers: as normal, and 4 channels of queries and keys are 8 times as large, with either sign from key to key:
  what no average takes off.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.evaluation.timing import markdown
from llmkern.functional import attention_int8_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DATA = ("normal", "channels", "outliers")
CHANNELS, TIMES = 4, 8.0


def tensors(data: str, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value (B, H, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator) for _ in range(3))
    large = torch.ones(shape[-1])
    large[:: max(shape[-1] // CHANNELS, 1)] = TIMES
    if data == "channels":
        k = k + torch.randn(shape[1], 1, shape[-1], generator=generator).sign() * large
    elif data == "outliers":
        q, k = q * large, k * large / TIMES  # so that scores stay within reach of the softmax
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rows(shape: Sequence[int], dtype: torch.dtype, causal: bool) -> list[list[str]]:
    found = [["data", "keys", "largest", "relative RMS", "RMS of the dtype alone", "cosine"]]
    for data in DATA:
        inputs = tensors(data, shape, dtype)
        for smooth in (True, False):
            e = attention_int8_error(*inputs, smooth_keys=smooth, is_causal=causal)
            name = "less their average" if smooth else "as they are"
            numbers = (f"{e.largest:.1e}", f"{e.relative_rms:.1e}", f"{e.exact_rms:.1e}", f"{e.cosine:.6f}")
            found.append([data, name, *numbers])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_int8", description=(__doc__ or "").split("\n\n", 1)[0]
    )
    parser.add_argument("--shape", default="1,8,1024,64", help="B,H,S,D (default 1,8,1024,64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args(argv)
    try:
        shape = [int(n) for n in options.shape.split(",")]
    except ValueError:
        shape = []
    if len(shape) != 4 or min(shape) < 1:
        parser.error(f"--shape: expected B,H,S,D, positive integers, got {options.shape!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the plain version serves the call
        print(markdown(rows(shape, DTYPES[options.dtype], options.causal)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
