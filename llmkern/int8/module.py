"""The int8 linear layer on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.int8 import packing, reference
from llmkern.int8.op import int8_linear
from llmkern.int8.scheme import Int8Scheme


class Int8Linear(reference.Int8Linear):
    """nn.Linear with int8 weights, inputs quantised on the fly, in one kernel.

    in_features, out_features, bias, device, dtype: as for nn.Linear; dtype is that of the bias. scheme: an Int8Scheme,
    which tells the choices, or the name of one: outliers (the default), row, symmetric, groups, static, rotated,
    weight_only. Constructor, forward and state_dict are those of llmkern.reference.Int8Linear;
    `Int8Linear.from_linear(layer)` quantises a layer, and a state_dict of an nn.Linear loads too. Kernels read a packed
    copy of the weight, made at the first call and again after every change that torch counts; one through `.data` it
    does not count: call `repack()` after it.

    Raises TypeError where in_features or out_features is no integer and for a dtype other than float32, bfloat16 or
    float16, ValueError for a negative size or an unknown scheme. Source: see Int8Scheme.
    """

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
        super().__init__(in_features, out_features, bias, device, dtype, scheme=scheme)

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) in the input's dtype from (..., in_features), float32, bfloat16 or float16.

        Under autocast in autocast's dtype, as nn.Linear.

        Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
        """
        input_scale, inputs, group, rotate = self.arguments()
        return int8_linear(
            input, self.weight, self.weight_scale, self.bias,
            input_scale=input_scale, inputs=inputs, group=group, rotate=rotate,
        )  # fmt: skip

    def repack(self) -> None:
        """Makes the next call read weight and weight_scale anew, after a change past torch: through `.data` or
        NumPy."""
        packing.forget(self.weight)
        packing.forget(self.weight_scale)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.repack()  # torch swaps no tensor that something refers to weakly, if it is told to swap
        super()._load_from_state_dict(*args)
