"""Every operator that has a GPU kernel, as calls with their plain versions, at full and at small sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.call import FLOATS, HALVES, Call, Case, random
from benchmarks.gpu.loss_calls import loss_cases
from benchmarks.gpu.packed_calls import packed_cases
from benchmarks.gpu.row_calls import row_cases
from benchmarks.gpu.steps import Setting
from llmkern import functional
from llmkern.attention import op as attention_op
from llmkern.attention import reference as attention_reference
from llmkern.attention.mask import Mask
from llmkern.int8 import reference as int8_reference
from llmkern.int8.backward import input_gradient
from llmkern.positional import reference as positional_reference


def cases(setting: Setting, small: bool = False) -> Iterator[Case]:
    """small: of compute-sanitizer, which slows a kernel down a hundred times."""
    small = small or setting.tiny
    yield from _attention(setting, small)
    yield from packed_cases(setting, small)
    yield from _attention_int8(setting, small)
    yield from _decode(setting, small)
    yield from _positional(setting, small)
    yield from row_cases(setting, small)
    yield from loss_cases(setting, small)
    yield from _int8(setting, small)


def _attention(setting: Setting, small: bool) -> Iterator[Case]:
    # (B, H, Hkv, Sq, Sk, D): lengths that no tile divides, grouped heads.
    shapes = [(1, 2, 1, 33, 70, 64)] if small else [(1, 8, 2, 2047, 2113, 128), (2, 8, 8, 1000, 1531, 64)]
    if not small and not setting.quick:
        shapes += [(1, 4, 4, 515, 770, 256), (1, 4, 2, 515, 770, 40)]
    rules = {"all": {}, "causal": {"window_right": 0}}
    more = ("window", "lengths", "mask", "bias", "softcap", "slopes", "sink", "dropout")
    for shape in shapes:
        first = shape == shapes[0]
        for short, dtype in (FLOATS if first else HALVES).items():
            names = [*rules, *(more if first and (short == "bf16" or not setting.quick) else ())]
            for rule in names:
                for gradients in (False, True):
                    operator = "attention backward" if gradients else "attention"
                    name = f"{','.join(map(str, shape))} {short} {rule}"
                    yield Case(
                        operator, name,
                        lambda shape=shape, dtype=dtype, rule=rule, gradients=gradients: attention(
                            setting, shape, dtype, rule, gradients
                        ),
                    )  # fmt: skip


def attention(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, rule: str, gradients: bool) -> Call:
    args, described = _attention_arguments(setting, shape, dtype, rule)
    scale = shape[-1] ** -0.5

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_op.attention(q, k, v, described, scale)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference.attention(q, k, v, *described.arguments(), scale, False)[0]

    return Call(ours, plain, args, gradients)


def _attention_arguments(
    setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, rule: str
) -> tuple[tuple[Tensor, ...], Mask]:
    b, h, hkv, sq, sk, d = shape
    args = tuple(random(setting, b, n, s, d, dtype=dtype) for n, s in ((h, sq), (hkv, sk), (hkv, sk)))
    on = {"device": setting.device}
    described = {
        "all": lambda: Mask(),
        "causal": lambda: Mask(window_right=0),
        "window": lambda: Mask(window_left=100, window_right=0, bottom_right=True),
        "lengths": lambda: Mask(key_lengths=torch.tensor([sk - 3] * b, **on)),
        "mask": lambda: Mask(random(setting, 1, 1, sq, sk) > -1.0),
        "bias": lambda: Mask(random(setting, 1, h, sq, sk, dtype=dtype)),
        "softcap": lambda: Mask(softcap=20.0, window_right=0),
        "slopes": lambda: Mask(alibi_slopes=2.0 ** -torch.arange(1.0, h + 1, **on), window_right=0),
        "sink": lambda: Mask(learnable_sink=random(setting, h)),
        "dropout": lambda: Mask(dropout_p=0.1, dropout_seed=torch.tensor(7), window_right=0),
    }[rule]()
    return args, described


def _attention_int8(setting: Setting, small: bool) -> Iterator[Case]:
    shapes = [(1, 2, 1, 33, 70, 64)] if small else [(1, 8, 2, 2047, 2113, 128), (2, 8, 8, 1000, 1531, 64)]
    for shape in shapes:
        for short, dtype in HALVES.items():
            for rule in ("causal", "lengths", "softcap", "sink"):
                yield Case(
                    "attention int8", f"{','.join(map(str, shape))} {short} {rule}",
                    lambda shape=shape, dtype=dtype, rule=rule: attention_int8(setting, shape, dtype, rule),
                )  # fmt: skip


def attention_int8(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, rule: str) -> Call:
    """Keys with an average that is not zero."""
    (q, k, v), described = _attention_arguments(setting, shape, dtype, rule)
    k = k + random(setting, shape[2], 1, shape[-1], dtype=dtype)
    rules = described.arguments()
    rest = (*rules[:4], *rules[5:9], shape[-1] ** -0.5, True)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference.attention_int8(q, k, v, *rest)[0]

    return Call(lambda q, k, v: torch.ops.llmkern.attention_int8(q, k, v, *rest)[0], plain, (q, k, v))


def _decode(setting: Setting, small: bool) -> Iterator[Case]:
    # (B, H, Hkv, capacity, D, new tokens)
    shapes = [(2, 4, 2, 64, 64, 1)] if small else [(3, 32, 8, 8192, 128, 1), (3, 12, 12, 2000, 64, 5)]
    for shape in shapes:
        for short, dtype in HALVES.items():
            for kind in ("static", "paged", "int8", "paged int8"):
                yield Case(
                    "decode", f"{','.join(map(str, shape))} {short} {kind}",
                    lambda shape=shape, dtype=dtype, kind=kind: decode(setting, shape, dtype, kind),
                )  # fmt: skip


def decode(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Call:
    """Rotates, writes the new tokens and attends to the cache; floating caches are part of what is compared."""
    b, h, hkv, size, d, new = shape
    page = 16
    places = (b * size // page, page) if "paged" in kind else (b, size)
    caches = [random(setting, *places, hkv, d, dtype=dtype) for _ in range(2)]
    scales: list[Tensor | None] = [None, None]
    if "int8" in kind:
        scales = [c.float().abs().amax(-1) / 127 for c in caches]
        caches = [(c / s[..., None]).round().to(torch.int8) for c, s in zip(caches, scales, strict=True)]
    table = None
    if "paged" in kind:
        table = torch.randperm(b * size // page, generator=torch.Generator().manual_seed(1)).view(b, -1)
        table = table.int().to(setting.device)
    lengths = torch.tensor([(size - new) * (i + 1) // b for i in range(b)], dtype=torch.int32, device=setting.device)
    cos, sin = (t.to(setting.device) for t in positional_reference.rotary_table(size, d, 10000.0))
    q, k, v = (random(setting, b, new, n, d, dtype=dtype) for n in (h, hkv, hkv))
    scale, floating = d**-0.5, "int8" not in kind

    def ours(q: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *scales: Any) -> Any:
        out = functional.attention_with_kvcache(
            q, kc, vc, k, v, cos, sin, lengths, table, softmax_scale=scale, causal=True, k_scale=scales[0],
            v_scale=scales[1],
        )  # fmt: skip
        return (out, kc, vc) if floating else out

    def plain(q: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *scales: Any) -> Any:
        out, _ = attention_reference.attention_kvcache(
            q, kc, vc, k, v, cos, sin, lengths, table, *scales, None, None, -1, 0, 0.0, scale, True
        )
        return (out, kc, vc) if floating else out

    return Call(ours, plain, (q, *caches, k, v, cos, sin, *scales))


def _positional(setting: Setting, small: bool) -> Iterator[Case]:
    shape = (1, 2, 17, 64) if small else (2, 32, 4001, 128)
    for short, dtype in FLOATS.items():
        for interleaved in (False, True):
            yield Case(
                "rotary", f"{','.join(map(str, shape))} {short}{' interleaved' if interleaved else ''}",
                lambda dtype=dtype, interleaved=interleaved: rotary(setting, shape, dtype, interleaved),
            )  # fmt: skip
        for dropout_p in (0.0, 0.1):
            rows = (17, 3, 40) if small else (4001, 8, 1024)
            yield Case(
                "sinusoidal", f"{','.join(map(str, rows))} {short}{' dropout' if dropout_p else ''}",
                lambda rows=rows, dtype=dtype, dropout_p=dropout_p: sinusoidal(setting, rows, dtype, dropout_p),
            )  # fmt: skip


def rotary(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool) -> Call:
    q, k = random(setting, *shape, dtype=dtype), random(setting, *shape, dtype=dtype)
    cos, sin = (t.to(setting.device) for t in positional_reference.rotary_table(shape[2], shape[3], 10000.0))

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        return functional.rotary(q, k, cos, sin, interleaved=interleaved)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return peers.rotary_eager(q, k, cos, sin, interleaved)

    return Call(ours, plain, (q, k), True)


def sinusoidal(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float) -> Call:
    x = random(setting, *shape, dtype=dtype)
    pe = positional_reference.sinusoidal_table(shape[0], shape[2]).to(setting.device)

    def ours(x: Tensor) -> Tensor:
        return functional.sinusoidal_add(x, pe, scale=2.0, dropout_p=dropout_p, seed=7)

    def plain(x: Tensor) -> Tensor:
        y = peers.sinusoidal_eager(x, pe, 2.0)
        return y * positional_reference.dropout_factor(y, dropout_p, 7) if dropout_p else y

    return Call(ours, plain, (x,), True)


#: How inputs become integers (llmkern.int8.scheme), as keyword arguments of int8_linear.
SCHEMES: dict[str, dict[str, Any]] = {
    "outliers": {"inputs": "outliers"}, "row": {"inputs": "row"}, "symmetric": {"inputs": "symmetric"},
    "static": {"inputs": "static"}, "16bit": {"inputs": "16bit"}, "groups": {"inputs": "symmetric", "group": 128},
    "groups by row": {"inputs": "row", "group": 64}, "rotated": {"inputs": "row", "rotate": 4},
}  # fmt: skip


def _int8(setting: Setting, small: bool) -> Iterator[Case]:
    shapes = [(3, 256, 70), (70, 256, 130)] if small else [(1, 4096, 4096), (16, 4096, 4096), (2000, 4096, 4096)]
    for shape in shapes:
        for scheme in SCHEMES:
            for short, dtype in (HALVES if setting.quick or small else FLOATS).items():
                for activation in ("none", "swiglu") if scheme in ("outliers", "groups") else ("none",):
                    yield Case(
                        "int8 linear", f"{','.join(map(str, shape))} {short} {scheme} {activation}",
                        lambda shape=shape, dtype=dtype, scheme=scheme, activation=activation: int8_linear(
                            setting, shape, dtype, scheme, activation
                        ),
                    )  # fmt: skip

    for shape in shapes:
        for short, dtype in (HALVES if setting.quick or small else FLOATS).items():
            for group, rotate in ((0, 1), (128, 1), (0, 4)):
                yield Case(
                    "int8 linear backward",
                    f"{','.join(map(str, shape))} {short}{f' groups of {group}' if group else ''}"
                    f"{' rotated' if rotate > 1 else ''}",
                    lambda shape=shape, dtype=dtype, group=group, rotate=rotate: int8_backward(
                        setting, shape, dtype, group, rotate
                    ),
                )  # fmt: skip


def int8_backward(
    setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype, group: int = 0, rotate: int = 1
) -> Call:
    """The gradient of int8_linear's input, from that of its output, over a frozen weight."""
    rows, depth, outputs = shape
    weight, scale = int8_reference.quantize_weight(random(setting, outputs, depth) * depth**-0.5, group)
    return Call(
        lambda grad: input_gradient(grad, weight, scale, group, rotate),
        lambda grad: int8_reference.input_gradient(grad, weight, scale, group, rotate),
        (random(setting, rows, outputs, dtype=dtype),),
    )


def int8_linear(
    setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype, scheme: str, activation: str
) -> Call:
    rows, depth, outputs = shape
    options = SCHEMES[scheme]
    group, rotate = options.get("group", 0), options.get("rotate", 1)
    x = random(setting, rows, depth, dtype=dtype)
    x[:, depth // 3] *= 20  # a channel of outliers
    weight, scale = int8_reference.quantize_weight(random(setting, outputs, depth) * depth**-0.5, group)
    bias = random(setting, outputs)
    static = torch.tensor([0.1, 3.0], device=setting.device) if scheme == "static" else None

    def ours(x: Tensor) -> Tensor:
        return functional.int8_linear(
            x, weight, scale, bias, input_scale=static, inputs=options["inputs"], group=group, rotate=rotate,
            activation=activation,
        )  # fmt: skip

    def plain(x: Tensor) -> Tensor:
        return int8_reference.int8_linear(
            x, weight, scale, bias, None, static, options["inputs"], group, rotate, activation
        )

    return Call(ours, plain, (x,))
