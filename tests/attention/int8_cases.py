"""What the tests of quantised queries and keys share."""

from __future__ import annotations

import torch

from tests.attention.cases import FEATURES, RULES, rule, tensors

#: Those of attention but for dropout, which an operator for inference has not.
NAMES = [n for n in (*RULES, *FEATURES) if n != "dropout"]
HALVES = [torch.bfloat16, torch.float16]


def rules_of(name, shape, dtype=torch.float32):
    return {k: v for k, v in rule(name, shape, dtype).items() if k not in ("dropout_p", "seed")}


def shifted(inputs):
    """Keys with an average that is not zero, large in some channels, as models have them."""
    q, k, v = inputs
    shift = torch.randn(k.size(1), 1, k.size(3)) * (1 + 8 * (torch.arange(k.size(3)) % 7 == 3))
    return q, (k + shift).to(k.dtype), v


def attend(plain=False, smooth=True, exact=False):
    """A function of (query, key, value, **rules) for the operator or the plain version: the output, and the
    log-sum-exp, of float32 arithmetic.

    exact: the plain version as the truth for the same integers: what verify runs in float64 would be quantised in
    float64 too, where an element between two integers may become the other one.
    """
    from llmkern.attention import op, reference
    from llmkern.attention.mask import Mask

    def function(
        query, key, value, mask=None, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), softcap=0.0,
        slopes=None, sink=None,
    ):  # fmt: skip
        described = Mask(
            mask, key_lengths, slopes, sink, None, window[0], 0 if causal else window[1], bottom_right, softcap
        )
        scale = max(query.size(3), 1) ** -0.5
        if not plain and not exact:
            output, sums = op.attention_int8(query, key, value, described, scale, smooth)
            return output, sums.float()
        rest = (mask, key_lengths, slopes, sink, *described.arguments()[5:9], scale, smooth)
        if exact:
            with torch._C.DisableTorchFunction():  # by which verify makes float64 of what asks for float32
                return reference.attention_int8(query, key, value, *rest)
        output, sums = reference.attention_int8(query, key, value, *rest)
        return output, sums.float()

    return function


def compare(shape, dtype, rules, smooth=True):
    """Holds the operator, as it is served, to the contract; the report."""
    from llmkern.verify import verify

    candidate, reference = (attend(plain, smooth) for plain in (False, True))
    truth = attend(smooth=smooth, exact=True)
    report = verify(candidate, reference, shifted(tensors(shape, dtype)), rules, gradients=False, truth=truth)
    assert report, str(report)
