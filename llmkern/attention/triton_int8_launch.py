"""Attention of quantised queries and keys in Triton as a backend: the keys' average, integers, attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention.compiled.params import plain, through_copies
from llmkern.attention.layout import empty_in_order
from llmkern.attention.reference.int8 import CHUNK, LANES, described
from llmkern.attention.triton_call import Call, options
from llmkern.attention.triton_configurations import configuration
from llmkern.attention.triton_launch import TARGETS, family_of, unsupported
from llmkern.attention.triton_launch import limits as limits_of_all
from llmkern.backend import Backend

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

_KERNELS = "llmkern.attention.triton_int8"
#: Divisions, products and sums round one by one, as the reference's do.
_EXACTLY = {"num_stages": 3, "enable_fp_fusion": False}
#: Integers of a row in memory: whole copies of 16 bytes.
_PITCH = 16
#: The most elements of a tile that is quantised.
_QUANTIZED = 4096
#: The first launch of sums leaves so many; a single program adds them.
_ALL = 2**28


def attention(
    run: triton.Run, family: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`."""
    if any(plain(t) is not t for t in (query, key, value)):
        return through_copies(lambda *args: attention(run, family, *args), 3)
    mask, scale, smooth = described(rest)
    rules = (*mask.arguments(), scale, False)
    call = Call(query, key, value, rules)
    width, pitch = query.size(3), -(-query.size(3) // _PITCH) * _PITCH
    block = max(triton.power_of_two(width), 32)  # of which the products of integers take no fewer
    tile = configuration("int8", family, query.element_size(), max(block, call.widths["BLOCK_DV"]), call.shape[1])
    programs = call.batch * call.heads * -(-call.queries // tile.queries)
    rows = max(_QUANTIZED // block, 16)
    of_rules = {k: v for k, v in call.rules.items() if k not in ("DROPOUT", "UNIFORM", "PACKED")}
    constants = {
        **call.widths, "D": pitch, "BLOCK_D": block, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys, **of_rules,
    }  # fmt: skip
    exactly = {"num_warps": max(8, block // 16), **_EXACTLY}
    chunks = -(-call.keys // CHUNK)

    def average(key: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, Hkv, 1, D), by one launch, or by two where there is more than one chunk of keys."""
        made, like = key, key if lengths is None else lengths
        for count, chunk, last in ((chunks, CHUNK, chunks <= 1), (1, _ALL, True))[: 1 if chunks <= 1 else 2]:
            sums = torch.empty(call.batch, call.kv_heads, count, width, dtype=torch.float32, device=key.device)
            arguments = (
                made, like, sums, call.kv_heads, made.size(2), call.keys, count, *made.stride()[:3], call.steps[0],
            )  # fmt: skip
            run(triton.Launch(
                _KERNELS, "attention_key_sums_kernel", (call.batch * call.kv_heads * count,), arguments,
                {"D": width, "BLOCK_D": block, "LENGTHS": lengths is not None, "CHUNK": chunk, "LANES": LANES,
                 "HALVINGS": LANES.bit_length() - 1, "AVERAGE": last},
                exactly, ("sums",),
            ))  # fmt: skip
            made = sums
        return made

    def quantized(x: Tensor, of_keys: Tensor | None, keys: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, length, _ = x.shape
        digits = torch.empty(batch, heads, length, pitch, dtype=torch.int8, device=x.device)
        scale, lift = (torch.empty(batch, heads, length, dtype=torch.float32, device=x.device) for _ in range(2))
        arguments = (
            x, x if of_keys is None else of_keys, digits, scale, lift, heads, heads // call.kv_heads, length,
            *x.stride()[:3],
        )  # fmt: skip
        made = {
            "D": width, "PITCH": pitch, "BLOCK_D": block, "ROWS": rows, "SMOOTH": of_keys is not None, "KEYS": keys,
        }  # fmt: skip
        run(triton.Launch(
            _KERNELS, "attention_quantize_kernel", (batch * heads * -(-length // rows),), arguments, made, exactly,
            ("digits", "scale") if keys else ("digits", "scale", "lift"),
        ))  # fmt: skip
        return digits, scale, lift

    def launch(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        output = empty_in_order(query, value.size(3))
        logsumexp = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
        if not programs:
            return output, logsumexp
        mask, _, _ = described(rest)
        integers, key_scale, of_keys = query, query, None  # not read where there are no keys
        if call.keys:
            of_keys = average(key, mask.key_lengths) if smooth else None
            integers, key_scale, _ = quantized(key, of_keys, True)
        digits, query_scale, lift = quantized(query, of_keys, False)
        arguments = (
            digits, query_scale, lift, integers, key_scale, value, output, logsumexp,
            *call.tensors(query, mask.arguments())[:-1], *call.numbers[:-2], *value.stride()[:3], *output.stride()[:3],
            *call.dense_steps, *call.steps,
        )  # fmt: skip
        run(triton.Launch(
            _KERNELS, "attention_int8_kernel", (programs,), arguments, constants, options(tile),
            ("output", "logsumexp"),
        ))  # fmt: skip
        return output, logsumexp

    return launch


def limits(query: Tensor, key: Tensor, value: Tensor, rest: Sequence[Any]) -> str | None:
    """Why the kernels cannot take tensors of these shapes, wherever they are."""
    if query.dtype == torch.float32:
        return "its kernels take bfloat16 and float16, not float32"
    if not query.shape[-1]:
        return "its kernels take heads of width 1 to 256, not 0"
    return limits_of_all(query, key, value, (*described(rest)[0].arguments(), 0.0, False))


TRITON_INT8 = Backend(
    "triton",
    lambda query, *args: attention(triton.run, family_of(query.device), query, *args),
    lambda query, key, value, *rest: unsupported(query) or limits(query, key, value, rest),
)


def examples(family: str, dtype: torch.dtype, width: int) -> Iterator[triton.Launch]:
    """The launches of a causal call, without memory."""
    made: list[triton.Launch] = []
    x = torch.empty(1, 8, 2048, width, dtype=dtype, device="meta")
    args = (x, x, x, None, None, None, None, -1, 0, False, 0.0, 0.125, True)
    attention(made.append, family, *args)(*args)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: causal calls in bfloat16 of heads of 64, 128 and 256."""
    from llmkern.inspect.triton_source import Compilation

    for (name, targets), width in itertools.product(TARGETS.items(), (64, 128, 256)):
        for launch in examples(name, torch.bfloat16, width):
            made = launch.constants
            config = f"bf16, D={width}"
            if launch.kernel == "attention_int8_kernel":
                config += f", {made['BLOCK_M']}x{made['BLOCK_N']}, {launch.options['num_warps']} warps, "
                config += f"{launch.options['num_stages']} stages"
            elif launch.kernel == "attention_key_sums_kernel":
                config += ", of sums" if made["AVERAGE"] else ", of keys"
            else:
                config += ", keys" if made["KEYS"] else ", queries"
            yield Compilation.of(launch, config, targets)
