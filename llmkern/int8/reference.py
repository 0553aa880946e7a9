"""Int8 linear layers in plain PyTorch: what every kernel of this family is held to, integer by integer.

Weights are symmetric for each output channel, w = weight_scale * integer in [-127, 127]. Activations are quantised
for each row when they come, asymmetrically: x = scale * (q - zero_point), q in [0, 255], the range widened to hold
zero.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import autocast, check
from llmkern.int8.replace import check_weight, replace_linears

#: A scale below the smallest normal number has no float32 inverse.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 values and float32 scales: weight (N, K) gives (N, K) int8 and (N,), with weight ~ scale * values."""
    weight = weight.detach().float()
    largest = weight.abs().amax(1) if weight.size(1) else weight.new_zeros(weight.size(0))
    scale = largest / 127
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 values, float32 scales and int32 zero points of x (M, K): (M, K), (M,), (M,).

    A row whose range is not a finite float32 (it holds inf or NaN) has the scale NaN and zeros as values.
    """
    x = x.float()
    zero = x.new_zeros(x.size(0))
    low, high = (torch.minimum(x.amin(1), zero), torch.maximum(x.amax(1), zero)) if x.size(1) else (zero, zero)
    scale = (high - low) / 255
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    scale = torch.where(scale.isfinite(), scale, torch.full_like(scale, torch.nan))
    inverse = 1.0 / scale
    zero_point = torch.round(-low * inverse).clamp(0, 255).nan_to_num(0.0)
    q = (torch.round(x * inverse[:, None]) + zero_point[:, None]).clamp(0, 255).nan_to_num(0.0)
    return q.to(torch.uint8), scale, zero_point.to(torch.int32)


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ (weight_scale * weight)^T + bias with x quantised: exact integers, then one float32 product and sum.

    x (..., K), weight (N, K) int8, weight_scale (N,) float32, bias (N,). Returns (..., N) in x's dtype. Gradients are
    those of the dequantised weight, straight through the rounding.
    """
    y = _quantized(x, weight, weight_scale, bias)
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return y
    linear = (x.float() @ weight.float().t()) * weight_scale
    linear = linear if bias is None else linear + bias.float()
    return _StraightThrough.apply(y, linear.to(x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The first argument, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, linear: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


@torch.no_grad()
def _quantized(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(x.shape[:-1].numel(), 0)
    q, scale, zero_point = quantize_rows(rows)
    # Float64 holds every integer here exactly, and its matmul is fast.
    exact = (q.double() - zero_point.double()[:, None]) @ weight.double().t()
    y = exact.float() * (scale[:, None] * weight_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.size(0))


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, activations quantised for each row on the fly.

    in_features, out_features, bias, device, dtype: as for nn.Linear; dtype is that of the bias. Buffers: weight
    (out_features, in_features) int8, weight_scale (out_features,) float32, which keeps its dtype under half() and to().
    A state_dict of an nn.Linear loads too: its weight is quantised.

    Raises TypeError where in_features or out_features is no integer and for a dtype other than float32, bfloat16 or
    float16, ValueError for a negative size. Source: Jacob et al. 2018, section 2.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check.integer(name, value)
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if dtype is not None and dtype not in check.FLOATS:
            expected = " or ".join(map(check.short, check.FLOATS))
            raise TypeError(f"dtype: expected {expected} or None, got {dtype}")
        check.flag("bias", bias)
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._take(linear, *quantize_weight(linear.weight))

    def _take(self, linear: nn.Linear, weight: Tensor, weight_scale: Tensor) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = linear.bias
        self.training = linear.training

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: tuple[Tensor, Tensor] | None = None) -> Int8Linear:
        """The quantised form of a layer, with its bias, the same parameter.

        quantized: its int8 values and their scales, if they are made already.

        Raises TypeError for what is no nn.Linear and for a weight that is not float32, bfloat16 or float16, ValueError
        for a weight without values (on the meta device, or of a lazy layer).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        check_weight("linear", linear.weight)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(linear, *(quantized or quantize_weight(linear.weight)))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features) in x's dtype, under autocast in autocast's, from x (..., in_features), floating.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
        """
        check_linear(x, self.weight, self.weight_scale, self.bias, check.PLAIN_FLOATS)
        (x,) = autocast.cast(x)
        return int8_linear(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}weight")
        if isinstance(loaded, Tensor) and loaded.is_floating_point() and loaded.dim() == 2:
            # Assigned, what layers share must be one tensor; copied, it goes into the one that they share already.
            assigned = metadata.get("assign_to_params_buffers", False)
            made = self._taken_by_another(loaded) if assigned else quantize_weight(loaded)
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = made
        scale = state_dict.get(f"{prefix}weight_scale")
        if isinstance(scale, Tensor) and scale.is_floating_point():
            state_dict[f"{prefix}weight_scale"] = scale.float()
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

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
        made = quantize_weight(loaded)
        given_up._llmkern_replaced_by = (layout, made)
        return made


def check_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, floats: tuple[torch.dtype, ...] = check.FLOATS
) -> None:
    """Raises on what `int8_linear` cannot take: TypeError for dtypes, ValueError for shapes and devices.

    floats: the dtypes of x and bias. float64 is the plain version's alone, which gives the truth to compare with.
    """
    check.dtype("x", x, floats)
    check.dtype("weight", weight, (torch.int8,))
    check.rank("weight", weight, "(N, K)")
    features, size = weight.shape
    if x.dim() < 1 or x.size(-1) != size:
        raise ValueError(f"x: expected (..., K) with K = {size} as in weight, got shape {tuple(x.shape)}")
    check.dtype("weight_scale", weight_scale, (torch.float32,))
    check.shape("weight_scale", weight_scale, "(N,)", (features,))
    check.same_device("weight", weight, "x", x)
    check.same_device("weight_scale", weight_scale, "x", x)
    if bias is not None:
        check.dtype("bias", bias, floats)
        check.shape("bias", bias, "(N,)", (features,))
        check.same_device("bias", bias, "x", x)


def quantize_model(model: nn.Module, bits: int = 8) -> nn.Module:
    """Replaces every nn.Linear by the plain Int8Linear, in place; returns the model (a lone nn.Linear's replacement).

    Raises TypeError for what is no module and for weights that are not float32, bfloat16 or float16; ValueError for
    bits other than 8 and for weights on the meta device. Source of the scheme: Jacob et al. 2018, section 2.
    """
    return replace_linears(model, Int8Linear.from_linear, quantize_weight, bits)
