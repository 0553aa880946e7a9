"""Int8 linear layers in plain PyTorch: what every kernel of this family is held to, integer by integer.

Weights are symmetric for each output channel (or group of k of one), w = weight_scale * integer in [-127, 127].
Activations are quantised when they come, x = scale * (u - zero_point). Within its usual range u is 0..255; an outlier
of a row and every element of "16bit" has a second digit, u = 256 * high + low.

Sources: see llmkern.int8.scheme.Int8Scheme.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import autocast, check
from llmkern.int8.replace import check_weight, replace_linears
from llmkern.int8.scheme import (
    ACTIVATIONS,
    INPUTS,
    PAIRS,
    ROTATION_STRIDE,
    Int8Scheme,
    check_group,
    named,
    rotation_size,
)

#: A scale below the smallest normal number has no float32 inverse.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
#: As kUsual, kMost and kLanes in csrc/int8/quantize.h.
USUAL = 6.0
MOST = 32000.0
LANES = 64


def quantize_weight(weight: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Int8 values and float32 scales: weight (N, K) gives (N, K) int8 and (N,), with weight ~ scale * values.

    group: a scale for every so many values of a row, (N, ceil(K / group)).
    """
    weight = weight.detach().float()
    outputs, depth = weight.shape
    groups = math.ceil(depth / group) if group else 1
    parts = F.pad(weight, (0, -depth % group)).view(outputs, groups, group) if group else weight.unsqueeze(1)
    largest = parts.abs().amax(2) if depth else weight.new_zeros(outputs, parts.size(1))
    scale = _usable(largest / 127)
    values = torch.round(parts / scale[..., None]).clamp(-127, 127).to(torch.int8)
    return values.flatten(1)[:, :depth].contiguous(), scale if group else scale[:, 0]


def dequantize_weight(
    weight: Tensor, weight_scale: Tensor, group: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """weight_scale * weight, (N, K)."""
    scale = weight_scale.to(dtype)
    if not group:
        return weight.to(dtype) * scale[:, None]
    return weight.to(dtype) * scale.repeat_interleave(group, 1)[:, : weight.size(1)]


def quantize_rows(
    x: Tensor, inputs: str = "row", group: int = 0, rotate: int = 1, input_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """int32 integers, float32 scales and int32 zero points of x (M, K): (M, K), twice (M,) or (M, groups).

    inputs, group: see Int8Scheme. rotate: the size of Hadamard's transform before. input_scale: of "static", (2,), the
    scale and the zero point. A row whose range is not a finite float32 (it holds inf or NaN) has the scale NaN and
    zeros as integers.
    """
    x = hadamard(x.float(), rotate)
    rows, depth = x.shape
    if group:
        parts = F.pad(x, (0, -depth % group)).reshape(-1, group)
        integers, scale, zero_point = quantize_rows(parts, inputs)
        groups = math.ceil(depth / group)
        integers = integers.view(rows, groups * group)[:, :depth].contiguous()
        return integers, scale.view(rows, groups), zero_point.view(rows, groups)
    zero = x.new_zeros(rows)
    low, high = (torch.minimum(x.amin(1), zero), torch.maximum(x.amax(1), zero)) if depth else (zero, zero)
    magnitude = torch.maximum(-low, high)
    broken = (magnitude * 0).isnan()
    two_digits = inputs in ("outliers", "16bit")
    if inputs == "outliers":
        bound = USUAL * _mean_magnitude(x)
        low, high = torch.maximum(low, -bound), torch.minimum(high, bound)
    if input_scale is not None:
        scale = input_scale[0].expand(rows)
    elif inputs == "symmetric":
        scale = magnitude / 127
    elif inputs == "16bit":
        scale = magnitude / MOST
    else:
        scale = (high - low) / 255
        if two_digits:
            scale = torch.maximum(scale, magnitude / MOST)
    if input_scale is None:
        scale = _usable(scale)
    scale = torch.where(scale.isfinite() & ~broken, scale, torch.full_like(scale, torch.nan))
    inverse = 1.0 / scale
    if input_scale is not None:
        zero_point = input_scale[1].nan_to_num(0.0).clamp(0, 255).trunc().expand(rows)
    elif inputs in ("symmetric", "16bit"):
        zero_point = torch.full_like(scale, 128)
    else:
        zero_point = torch.round(-low * inverse).clamp(0, 255).nan_to_num(0.0)
    u = torch.round((x * inverse[:, None]).clamp(-MOST, MOST)) + zero_point[:, None]
    if not two_digits:
        u = u.clamp(0, 255)
    return u.nan_to_num(0.0).to(torch.int32), scale, zero_point.to(torch.int32)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


def _mean_magnitude(x: Tensor) -> Tensor:
    """The mean of |x| (M, K) by rows, added in one order on every machine: 64 sums in the order of k, then by
    halves."""
    rows, depth = x.shape
    parts = F.pad(x.abs(), (0, -depth % LANES)).view(rows, math.ceil(depth / LANES), LANES)
    lanes = x.new_zeros(rows, LANES)
    for i in range(parts.size(1)):
        lanes = lanes + parts[:, i]
    while lanes.size(1) > 1:
        first, second = lanes.chunk(2, 1)
        lanes = first + second
    return lanes[:, 0] / depth if depth else lanes[:, 0]


def hadamard(x: Tensor, size: int) -> Tensor:
    """x (..., K) with each block of 16 * size elements through Hadamard's transform of the elements 16 apart.

    Orthonormal and its own inverse. size: a power of two, 1 for none; K must be a multiple of 16 * size.
    """
    if size == 1:
        return x
    blocks = x.size(-1) // (size * ROTATION_STRIDE)
    parts = x.reshape(*x.shape[:-1], blocks, size, ROTATION_STRIDE)
    half = 1
    while half < size:
        pairs = parts.reshape(*parts.shape[:-2], size // (2 * half), 2, half, ROTATION_STRIDE)
        a, b = pairs.unbind(-3)
        parts = torch.stack((a + b, a - b), -3).view_as(parts)
        half *= 2
    factor = 1.0 / torch.tensor(float(size), dtype=x.dtype).sqrt()
    return (parts * factor).reshape(x.shape)


def activate(y: Tensor, activation: str) -> Tensor:
    """What follows the sum; of pairs, the first half of the outputs goes through the function."""
    if activation in PAIRS:
        first, second = y.chunk(2, -1)
        return (F.silu(first) if activation == "swiglu" else F.gelu(first)) * second
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return y if activation == "none" else getattr(F, activation)(y)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    inputs: str = "outliers",
    group: int = 0,
    rotate: int = 1,
    activation: str = "none",
) -> Tensor:
    """activation(x @ (weight_scale * weight)^T + bias) + residual with x quantised: exact integers, then float32.

    x (..., K), weight (N, K) int8, weight_scale (N,) or (N, groups) float32, bias (N,), residual (..., N) or for pairs
    (..., N / 2). Returns residual's shape in x's dtype. Gradients are those of the dequantised weight, straight through
    the rounding.
    """
    y = _quantized(x, weight, weight_scale, bias, input_scale, inputs, group, rotate)
    wanted = [t for t in (x, bias, residual) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and wanted:
        linear = hadamard(x.float(), rotate) @ dequantize_weight(weight, weight_scale, group).t()
        linear = linear if bias is None else linear + bias.float()
        y = _StraightThrough.apply(y, linear.to(y.dtype))
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype)


def input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int = 0, rotate: int = 1) -> Tensor:
    """The gradient of int8_linear's x, in grad's dtype: grad (..., N) times the dequantised weight, (..., K), rotated
    back. In float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if group:
        grad_x = grad.to(wide) @ dequantize_weight(weight, weight_scale, group, wide)
    else:
        grad_x = (grad.to(wide) * weight_scale) @ weight.to(wide)
    return hadamard(grad_x, rotate).to(grad.dtype)


class _StraightThrough(torch.autograd.Function):
    """The first argument, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, linear: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@torch.no_grad()
def _quantized(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None, inputs: str,
    group: int, rotate: int,
) -> Tensor:  # fmt: skip
    """The linear layer in float32, or in float64 behind the integers where x is float64."""
    rows = x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(x.shape[:-1].numel(), 0)
    u, scale, zero_point = quantize_rows(rows, inputs, group, rotate, input_scale)
    result = torch.float64 if x.dtype == torch.float64 else torch.float32
    high = u >> 8
    each = zero_point.repeat_interleave(group, 1)[:, : u.size(1)] if group else zero_point[:, None]
    low = (u - 256 * high - each).double()
    scale, weight_scale = scale.to(result), weight_scale.to(result)
    if group:
        y = torch.zeros(rows.size(0), weight.size(0), dtype=result, device=x.device)
        for g in range(scale.size(1)):
            part = slice(g * group, (g + 1) * group)
            y = y + (low[:, part] @ weight[:, part].double().t()).to(result) * (scale[:, g, None] * weight_scale[:, g])
    else:
        # Float64 holds every integer here exactly, and its matmul is fast.
        y = (low @ weight.double().t()).to(result)
        if inputs in ("outliers", "16bit"):
            y = y + 256 * (high.double() @ weight.double().t()).to(result)
        y = y * (scale[:, None] * weight_scale)
    if bias is not None:
        y = y + bias.to(result)
    return y.view(*x.shape[:-1], weight.size(0))


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, inputs quantised on the fly.

    in_features, out_features, bias, device, dtype: as for nn.Linear; dtype is that of the bias. scheme: an Int8Scheme
    or the name of one (llmkern.int8.scheme). Buffers: weight (out_features, in_features) int8, weight_scale
    (out_features,) float32 or with groups (out_features, groups), and of a static scheme input_scale (2,), scale and
    zero point; they keep their dtypes under half() and to(). A state_dict of an nn.Linear loads too: its weight is
    quantised.

    Raises TypeError where in_features or out_features is no integer and for a dtype other than float32, bfloat16 or
    float16, ValueError for a negative size or an unknown scheme. Source: see Int8Scheme.
    """

    weight: Tensor
    weight_scale: Tensor
    saved_scheme: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: Int8Scheme | str = "outliers",
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check.integer(name, value)
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if dtype is not None and dtype not in check.FLOATS:
            expected = " or ".join(map(check.short, check.FLOATS))
            raise TypeError(f"dtype: expected {expected} or None, got {dtype}")
        check.flag("bias", bias)
        scheme = named(scheme)
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._take(linear, scheme, *self.quantize(linear.weight, scheme))

    @staticmethod
    def quantize(weight: Tensor, scheme: Int8Scheme) -> tuple[Tensor, Tensor]:
        """The int8 values and scales of a weight under this scheme."""
        if scheme.rotate:
            weight = hadamard(weight.detach().float(), rotation_size(weight.size(1)))
        return quantize_weight(weight, scheme.group)

    def _take(self, linear: nn.Linear, scheme: Int8Scheme, weight: Tensor, weight_scale: Tensor) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.rotation = rotation_size(linear.in_features) if scheme.rotate else 1
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        given = torch.tensor([1.0, 128.0], device=weight.device) if scheme.inputs == "static" else None
        self.register_buffer("input_scale", given)
        numbers = torch.tensor(scheme.numbers(), dtype=torch.int32, device=weight.device)
        self.register_buffer("saved_scheme", numbers)  # so that a state_dict says what its integers are
        self.bias = linear.bias
        self.training = linear.training

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quantized: tuple[Tensor, Tensor] | None = None,
        scheme: Int8Scheme | str = "outliers",
    ) -> Int8Linear:
        """The quantised form of a layer, with its bias, the same parameter.

        quantized: its int8 values and their scales, if they are made already. scheme: as for the constructor; a static
        one starts with the scale 1 and the zero point 128, for the caller to set.

        Raises TypeError for what is no nn.Linear and for a weight that is not float32, bfloat16 or float16, ValueError
        for a weight without values (on the meta device, or of a lazy layer).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        check_weight("linear", linear.weight)
        scheme = named(scheme)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(linear, scheme, *(quantized or cls.quantize(linear.weight, scheme)))
        return made

    def rotated(self, weight: Tensor) -> Tensor:
        """A weight (N, K) as this layer multiplies it."""
        return hadamard(weight, self.rotation)

    def dequantized(self) -> Tensor:
        """The weight that the integers stand for, (N, K) float32, rotated as they are."""
        return dequantize_weight(self.weight, self.weight_scale, self.scheme.group)

    def arguments(self) -> tuple[Any, ...]:
        """What `int8_linear` takes from input_scale on."""
        return self.input_scale, self.scheme.inputs, self.scheme.group, self.rotation

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) in the input's dtype, under autocast in autocast's, from (..., in_features), floating.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
        """
        args = (input, self.weight, self.weight_scale, self.bias, None, *self.arguments(), "none")
        check_linear(*args, floats=check.PLAIN_FLOATS)
        (x,) = autocast.cast(input)
        return int8_linear(x, *args[1:])

    def extra_repr(self) -> str:
        words = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return words if self.scheme == Int8Scheme() else f"{words}, scheme={self.scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        kept = {name: getattr(self, name) for name in ("weight_scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, scale in kept.items():
            now = getattr(self, name)
            if now is not None and now.dtype != scale.dtype:
                setattr(self, name, scale.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if isinstance(loaded, Tensor) and loaded.is_floating_point() and loaded.dim() == 2:
            # Assigned, what layers share must be one tensor; copied, it goes into the one that they share already.
            assigned = metadata.get("assign_to_params_buffers", False)
            made = self._taken_by_another(loaded) if assigned else self.quantize(loaded, self.scheme)
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = made
            if self.input_scale is not None:  # a linear layer knows none
                state_dict.setdefault(f"{prefix}input_scale", self.input_scale.clone())
        saved = state_dict.setdefault(f"{prefix}saved_scheme", self.saved_scheme.clone())
        if isinstance(saved, Tensor) and saved.device.type != "meta":
            self._check_saved(saved.tolist(), prefix, args[-1])
        for name in ("weight_scale", "input_scale"):
            scale = state_dict.get(f"{prefix}{name}")
            if isinstance(scale, Tensor) and scale.is_floating_point():
                state_dict[f"{prefix}{name}"] = scale.float()
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def _check_saved(self, numbers: list[int], prefix: str, errors: list[str]) -> None:
        """Adds an error where the integers of a state_dict are of a scheme that this layer would read otherwise."""
        try:
            saved = Int8Scheme.from_numbers(numbers)
        except ValueError as error:
            errors.append(f"{prefix}saved_scheme: {error}")
            return
        if (saved.group, saved.rotate) != (self.scheme.group, self.scheme.rotate):  # inputs may change
            errors.append(
                f"{prefix}weight: expected the integers of {self.scheme}, got those of {saved}; quantize_like(model, "
                "state_dict) gives a model the layers of a state_dict"
            )

    def _taken_by_another(self, loaded: Tensor) -> tuple[Tensor, Tensor]:
        """The quantised weight; that of the layer which shared this one's weight until it was loaded just before.

        A checkpoint has a tensor of its own for each name of a tied weight, of the same memory. What was made of it
        is noted on the weight that is given up, and goes with that.
        """
        given_up: Any = self.weight
        layout = (loaded.data_ptr(), loaded.dtype, loaded.device, loaded.shape, loaded.stride())
        noted = getattr(given_up, "_llmkern_replaced_by", None)
        if noted is not None and noted[0] == layout:
            made: tuple[Tensor, Tensor] = noted[1]
            return made
        made = self.quantize(loaded, self.scheme)
        given_up._llmkern_replaced_by = (layout, made)
        return made


def check_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    inputs: str = "outliers",
    group: int = 0,
    rotate: int = 1,
    activation: str = "none",
    *,
    floats: tuple[torch.dtype, ...] = check.FLOATS,
) -> None:
    """Raises on what `int8_linear` cannot take: TypeError for dtypes, ValueError for shapes, devices and names.

    floats: the dtypes of x and bias. float64 is the plain version's alone, which gives the truth to compare with.
    """
    check.one_of("inputs", inputs, tuple(INPUTS))
    check.one_of("activation", activation, tuple(ACTIVATIONS))
    check_group(group, inputs)
    check.dtype("x", x, floats)
    check.dtype("weight", weight, (torch.int8,))
    check.rank("weight", weight, "(N, K)")
    features, size = weight.shape
    if x.dim() < 1 or x.size(-1) != size:
        raise ValueError(f"x: expected (..., K) with K = {size} as in weight, got shape {tuple(x.shape)}")
    check.dtype("weight_scale", weight_scale, (torch.float32,))
    if group:
        check.shape("weight_scale", weight_scale, "(N, groups)", (features, math.ceil(size / group)))
    else:
        check.shape("weight_scale", weight_scale, "(N,)", (features,))
    check.same_device("weight", weight, "x", x)
    check.same_device("weight_scale", weight_scale, "x", x)
    if bias is not None:
        check.dtype("bias", bias, floats)
        check.shape("bias", bias, "(N,)", (features,))
        check.same_device("bias", bias, "x", x)
    if activation in PAIRS and features % 2:
        raise ValueError(f"weight: expected an even N, (N, K), for activation={activation!r}, got N = {features}")
    if residual is not None:
        check.same_dtype("residual", residual, "x", x)
        outputs = features // 2 if activation in PAIRS else features
        check.shape("residual", residual, "(..., outputs)", (*x.shape[:-1], outputs))
        check.same_device("residual", residual, "x", x)
    if (input_scale is None) != (inputs != "static"):
        came = "None" if input_scale is None else "a tensor"
        raise ValueError(
            f"input_scale: expected {'a tensor' if inputs == 'static' else 'None'} with inputs={inputs!r}, got {came}"
        )
    if input_scale is not None:
        check.dtype("input_scale", input_scale, (torch.float32,))
        check.shape("input_scale", input_scale, "(scale and zero point,)", (2,))
        check.same_device("input_scale", input_scale, "x", x)
    check.positive("rotate", rotate)
    if rotate & (rotate - 1) or (rotate > 1 and size % (rotate * ROTATION_STRIDE)):
        raise ValueError(
            f"rotate: expected a power of two r with K a multiple of {ROTATION_STRIDE} r, got {rotate} for K = {size}"
        )


def quantize_model(model: nn.Module, bits: int = 8, *, scheme: Int8Scheme | str = "outliers") -> nn.Module:
    """Replaces every nn.Linear by the plain Int8Linear, in place; returns the model (a lone nn.Linear's replacement).

    scheme: one that needs no calibration.

    Raises TypeError for what is no module and for weights that are not float32, bfloat16 or float16; ValueError for
    bits other than 8 and for weights on the meta device. Source: see Int8Scheme.
    """
    return replace_linears(model, Int8Linear, named(scheme), bits)
