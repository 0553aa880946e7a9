"""The launcher of the attention forward for Hopper: which calls it takes, and what it hands to the kernel."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkern.extension import DTYPE_CODES
from llmkern.verify import verify
from tests.emulation import compilers
from tests.emulation.launches import Emulated, library
from tests.emulation.ptx.launch import Buffer, Launch, empty
from tests.emulation.test_ptx_attention_sm90 import SOURCE, inputs, plain

pytestmark = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
UNBOUNDED = 1 << 48  #: kUnbounded of csrc/attention/params.h


def built() -> Path:
    return library(SOURCE, "attention_sm90.cpp", "90a", ("LLMKERN_SM90",))


def call(
    library: ctypes.CDLL, query: Any, key: Any, value: Any, output: Any, addresses: list[int], launch: bool = True,
    key_lengths: torch.Tensor | None = None, causal: bool = False, bottom_right: bool = False,
    window: tuple[int, int] = (-1, -1), uniform: bool = False, scale: float | None = None, mask: int = 0,
) -> str | None:  # fmt: skip
    """What the launcher says, or its judgement alone. addresses: of query, key, value, output, logsumexp, lengths."""
    left, right = (UNBOUNDED if side < 0 else side for side in (window[0], 0 if causal else window[1]))
    tensors = (query, key, value, output)
    numbers = [n for t, where in zip(tensors, addresses[:4], strict=True) for n in (where, *t.stride()[:3])]
    numbers += [*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3]]
    numbers += [DTYPE_CODES[query.dtype], addresses[4], addresses[5]]
    numbers += [key_lengths is not None and key_lengths.dtype == torch.int64]
    numbers += [0 if key_lengths is None else key_lengths.stride(0), 0, left, right, bottom_right, uniform, mask]
    function = library.attention_sm90
    function.restype = ctypes.c_char_p
    scale = query.size(3) ** -0.5 if scale is None else scale
    said = function((ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_float(scale), ctypes.c_bool(launch))
    return None if said is None else said.decode()


def launched(query, key, value, old_driver=False, path=None, **rules):
    """A function for `verify` that calls the launcher; its output has the order of the query's dimensions."""
    launch, library = Launch(), ctypes.CDLL(str(path or built()))

    def place(x: torch.Tensor, name: str) -> int:
        storage = torch.empty(0, dtype=torch.int16).set_(x.untyped_storage()).numpy().view(np.uint16)
        return launch.address(Buffer(storage, name, read_only=True)) + 2 * x.storage_offset() if x.numel() else 0

    order = sorted(range(4), key=lambda d: (-query.stride(d), d))
    made = empty([query.shape[d] for d in order], np.uint16, "output")
    sums = empty(query.shape[:3], np.float64, "logsumexp")
    output = torch.from_numpy(made.data.view(np.int16)).permute([order.index(d) for d in range(4)])
    lengths = rules.get("key_lengths")
    addresses = [place(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))]
    addresses += [launch.address(made), launch.address(sums)]
    addresses += [0 if lengths is None else launch.address(lengths.numpy(), "lengths")]
    with Emulated(library, compilers.nvcc(SOURCE, "90a"), launch, old_driver) as gpu:
        said = call(library, query, key, value, output, addresses, **rules)
    if said is not None:
        raise RuntimeError(said)
    for report in gpu.reports:
        report.raise_if_faulty()
    assert len(gpu.reports) == (query.numel() > 0)
    return output.view(query.dtype).clone(), torch.from_numpy(sums.data.copy()).float()


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_a_call(width, dtype):
    lengths = torch.tensor([137, 20], dtype=torch.int32)
    rules = {"key_lengths": lengths, "causal": True, "bottom_right": True, "uniform": True}
    x = inputs((2, 2, 1, 30, 140, width), dtype)
    verify(launched, plain, x, rules, gradients=False).raise_if_failed()


def test_layouts_and_dimensions_of_one():
    packed = torch.randn(1, 70, 3, 2, 64).half().permute(2, 0, 3, 1, 4)
    verify(launched, plain, tuple(packed), {"window": (20, 9)}, gradients=False).raise_if_failed()
    one = torch.randn(1, 9, 64).half()
    x = one.as_strided((1, 1, 9, 64), (1, 3, 64, 1))  # steps that no map could have, of dimensions of one
    verify(launched, plain, (x, x, x), {"scale": 0.3}, gradients=False).raise_if_failed()


def test_nothing_to_do():
    for shape in ((0, 2, 1, 3, 4, 64), (1, 2, 1, 0, 4, 64)):
        launched(*inputs(shape, torch.float16))
    output, sums = launched(*inputs((1, 2, 1, 3, 0, 64), torch.float16))
    assert (output == 0).all() and (sums == -torch.inf).all()


def judged(shape=(1, 2, 1, 8, 9, 64), dtype=torch.float16, value=None, query=None, at=0, **rules):
    made = inputs(shape, dtype)
    query, value = made[0] if query is None else query, made[2] if value is None else value
    library = ctypes.CDLL(str(built()))
    return call(library, query, made[1], value, torch.empty_like(made[0]), [at] * 6, launch=False, **rules)


def test_what_it_does_not_serve_it_says():
    assert judged() is None and judged(causal=True, window=(3, -1), at=4096) is None
    assert "bfloat16 and float16" in judged(dtype=torch.float32)
    assert "width 64 or 128" in judged((1, 2, 1, 8, 9, 32))
    assert "width 64 or 128" in judged(value=torch.empty(1, 1, 9, 128).half())
    assert "causal masks, windows and key lengths" in judged(mask=4096)
    assert "positive scale" in judged(scale=0.0) and "positive scale" in judged(scale=-1.0)
    assert "positive scale" in judged(scale=float("nan"))
    assert "2**29 queries" in judged(query=torch.empty(1, 1, 1, 64).half().expand(1, 2, 2**29 + 1, 64))
    assert "multiples of 16 bytes" in judged(at=4098)
    assert "multiples of 16 bytes" in judged(query=torch.empty(1, 2, 8, 65).half()[..., :64])
    assert "no step is 0" in judged(query=torch.empty(1, 1, 8, 64).half().expand(1, 2, 8, 64))


def test_what_the_driver_refuses_is_named():
    library, x = ctypes.CDLL(str(built())), torch.empty(3, 2, 8, 64, dtype=torch.float16, device="meta")
    library.refuse_tensor_maps(ctypes.c_bool(True))
    try:
        said = call(library, x, x, x, x, [0] * 6)
    finally:
        library.refuse_tensor_maps(ctypes.c_bool(False))
    words = r"^attention_forward_sm90: cuTensorMapEncodeTiled refused the query with error 1: "
    words += r"sizes \(64, 8, 2, 3\), steps \(1, 64, 512, 1024\), address modulo 16: 0; please report .*use\("
    assert re.search(words, said)


def test_an_old_driver_is_named(tmp_path):
    """By a library that has not asked for the encoder yet, which it does once."""
    path = shutil.copy(built(), tmp_path / "old.so")
    with pytest.raises(RuntimeError, match="driver has no cuTensorMapEncodeTiled"):
        launched(*inputs((1, 1, 1, 3, 4, 64), torch.float16), old_driver=True, path=path)
