"""What a layer does with its weights and inputs before it multiplies integers: one small description.

Kernels and the reference read it alike; `named` gives the usual ones by a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkern import check

#: How an input becomes integers; the numbers are those of enum Scaling in csrc/int8/params.h.
INPUTS = {"outliers": 0, "row": 0, "symmetric": 1, "static": 2, "16bit": 3}
#: What follows the sum; the numbers are those of enum Activation. The last two take pairs of outputs.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5, "geglu": 6}
PAIRS = ("swiglu", "geglu")
#: A group of k is so many values, or a multiple.
GROUP_GRAIN = 32
#: Elements that a rotation mixes lie so far apart (csrc/int8/quantize.h).
ROTATION_STRIDE = 16


def check_group(group: int, inputs: str) -> None:
    check.integer("group", group)
    if group == 0:
        return
    if group < 0 or group % GROUP_GRAIN:
        raise ValueError(f"group: expected 0 or a multiple of {GROUP_GRAIN}, got {group}")
    if inputs not in ("symmetric", "row"):
        raise ValueError(f"group: expected 0 with inputs={inputs!r} ('symmetric' and 'row' take groups), got {group}")


@dataclass(frozen=True)
class Int8Scheme:
    """How a linear layer is quantised: int8 weights, inputs as integers of one or two digits of 8 bits.

    inputs: "outliers": a scale and a zero point for each row from its usual magnitudes; what lies far outside (beyond 6
    times the mean) keeps its value in a second digit, which costs time only where it is. "row": for each row, so that 8
    bits span it. "symmetric": the same without a zero point. "static": one scale and zero point for all rows, from
    calibration data. "16bit": two digits everywhere, which leaves the weights' error alone (as weight-only schemes
    do) at half the speed where arithmetic is the cost.
    group: with "symmetric" or "row", scales for every so many values along K, of weights and inputs, and zero points of
    inputs; 32, 64, 128 are usual.
    rotate: inputs and weights go through Hadamard's transform, which spreads outliers over their neighbours.
    smooth: from calibration data, channels of large inputs are divided, and their weights multiplied, by
    |x|^smooth / |w|^(1 - smooth), where what makes the inputs can take the division in; 0.5 is usual. None: nothing.

    Raises TypeError and ValueError where a field is none of these. Sources: Jacob et al. 2018, section 2 (rows, zero
    points); Dettmers et al. 2022, "LLM.int8()" (outliers apart); Xiao et al. 2023, "SmoothQuant"; Ashkboos et al. 2024,
    "QuaRot" (rotation).
    """

    inputs: str = "outliers"
    group: int = 0
    rotate: bool = False
    smooth: float | None = None

    def __post_init__(self) -> None:
        check.one_of("inputs", self.inputs, tuple(INPUTS))
        check_group(self.group, self.inputs)
        check.flag("rotate", self.rotate)
        if self.smooth is not None:
            check.probability("smooth", self.smooth)

    @property
    def calibrated(self) -> bool:
        """Whether it needs data."""
        return self.inputs == "static" or self.smooth is not None

    def numbers(self) -> list[int]:
        """What a state_dict keeps of it: which of INPUTS, the group, whether inputs are rotated."""
        return [list(INPUTS).index(self.inputs), self.group, int(self.rotate)]

    @staticmethod
    def from_numbers(numbers: Sequence[int]) -> Int8Scheme:
        """The scheme of a saved layer, whatever smoothing its weights went through. ValueError for other numbers."""
        if len(numbers) != 3 or not 0 <= numbers[0] < len(INPUTS) or numbers[2] not in (0, 1):
            raise ValueError(f"scheme: expected the three numbers of a saved scheme, got {list(numbers)}")
        return Int8Scheme(list(INPUTS)[numbers[0]], numbers[1], bool(numbers[2]))


NAMED = {
    "outliers": Int8Scheme(),
    "row": Int8Scheme("row"),
    "symmetric": Int8Scheme("symmetric"),
    "groups": Int8Scheme("symmetric", group=128),
    "static": Int8Scheme("static"),
    "smooth": Int8Scheme("row", smooth=0.5),
    "rotated": Int8Scheme("row", rotate=True),
    "weight_only": Int8Scheme("16bit"),
}


def named(scheme: Int8Scheme | str) -> Int8Scheme:
    """The scheme of a name, or the scheme itself."""
    if isinstance(scheme, Int8Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in NAMED:
        raise ValueError(f"scheme: expected an Int8Scheme or one of {', '.join(NAMED)}, got {scheme!r}")
    return NAMED[scheme]


def rotation_size(depth: int) -> int:
    """The largest Hadamard transform, at most 64, that K = depth takes; 1 where it takes none."""
    size = 1
    while size < 64 and depth % (2 * size * ROTATION_STRIDE) == 0:
        size *= 2
    return size
