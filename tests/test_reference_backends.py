"""The plain version as a backend: for every operator, with all its arguments, what the kernels give."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import llmkern
from llmkern import backend
from llmkern.backend import Operator
from llmkern.functional import sinusoidal_add
from llmkern.verify import verify

torch.manual_seed(0)  # whatever was imported before
SEED = torch.tensor(-5)
# A score on its way to a weight: slopes, sink, dropout's seed, window at the bottom right, soft cap, dropout, scale.
SCORE_RULES = (torch.rand(4), torch.rand(4), SEED, 4, 1, True, 2.0, 0.3, 0.3)
# The same with a mask and key lengths before them, and no rows that attend to all keys alike.
RULES = (torch.rand(2, 1, 5, 7).log(), torch.tensor([7, 3]), *SCORE_RULES, False)
#: Arguments that the kernels do not take yet, by operator and place.
LEFT_OUT = {
    "attention_backward": {1: None},  # the gradient of the log-sum-exp
    "attention_weights_backward": {7: None},  # the sink
    "attention_varlen": {9: None, 14: 0.0},  # dropout
    "attention_varlen_backward": {1: None, 13: None, 18: 0.0},  # both
    "attention_kvcache": {8: None, 9: None, 10: None},  # pages and int8, which tests/attention/test_kvcache.py has
}


def attention_arguments(name: str):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    output, logsumexp = Operator.all["attention"].run(q, k, v, *RULES)
    grad, ends, key_ends = torch.randn_like(output), torch.tensor([0, 5, 10]), torch.tensor([0, 7, 14])
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v, output, grad)]
    sums, lengths = torch.empty(0), (ends, key_ends, 5, 7)
    cache = [t.transpose(1, 2).contiguous() for t in (q, torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6), k, v)]
    angles = (torch.rand(20, 4), torch.rand(20, 4))
    if name == "attention_weights_backward":
        without = [LEFT_OUT[name].get(i + 4, r) for i, r in enumerate(RULES)]
        logsumexp = Operator.all["attention"].run(q, k, v, *without)[1]
    if name == "attention_varlen_backward":
        without = [LEFT_OUT[name].get(i + 11, r) for i, r in enumerate(SCORE_RULES)]
        packed[3], sums = Operator.all["attention_varlen"].run(*packed[:3], *lengths, *without)
    return {
        "attention": (q, k, v, *RULES),
        "attention_backward": (grad, logsumexp, q, k, v, output, logsumexp, *RULES, True),
        "attention_weights": (q, k, logsumexp, *RULES),
        "attention_weights_backward": (torch.randn(2, 4, 5, 7), q, k, logsumexp, *RULES, True),
        "attention_column_sums": (q, k, logsumexp, *RULES),
        "attention_varlen": (*packed[:3], *lengths, *SCORE_RULES),
        "attention_varlen_backward": (packed[4], sums, *packed[:4], sums, *lengths, *SCORE_RULES),
        "attention_int8": (q, k, v, RULES[0], RULES[1], *SCORE_RULES[:2], *SCORE_RULES[3:7], 0.3, True),
        "attention_kvcache": (
            cache[0], cache[1], cache[2], cache[3][:, :2], cache[4][:, :2], *angles, torch.tensor([7, 3]), SEED, SEED,
            SEED, torch.rand(4), torch.rand(4), 4, 1, 2.0, 0.3, True,
        ),
    }[name]  # fmt: skip


def positional_arguments(name: str):
    x, pe = torch.randn(5, 2, 16), torch.randn(9, 1, 16)
    q, k, cos, sin = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(9, 6), torch.randn(9, 6)
    return {
        "sinusoidal_add": (x, pe, SEED, 2.0, 0.3),
        "sinusoidal_dropout": (x, SEED, 2.0, 0.3),
        "rotary": (q, k, cos, sin, torch.randint(9, (2, 5)), True, True, False),
    }[name]


def int8_arguments(name: str):
    weight = torch.randint(-127, 128, (4, 16), dtype=torch.int8)
    if name == "int8_linear_backward":
        return torch.randn(3, 4), weight, torch.rand(4), 0, 1
    return (
        torch.randn(3, 16),
        weight,
        torch.rand(4),
        torch.randn(4),
        torch.randn(3, 4),
        torch.tensor([0.02, 128.0]),
        "static",
        0,
        1,
        "relu",
    )


def row_arguments(name: str):
    x, other, weight, statistics = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16), torch.rand(5, 2)
    return {
        "norm": (x, other, weight, torch.randn(16), 0.1, 1.0, True),
        "norm_backward": (torch.randn(5, 16), other, x, weight, statistics, 0.1, 1.0, True, True),
        "gated": (x, other, "gelu"),
        "gated_backward": (torch.randn(5, 16), x, other, "gelu"),
    }[name]


def loss_arguments(name: str):
    logits, teacher, targets = torch.randn(5, 16), torch.randn(5, 16), torch.tensor([3, 15, 9, 0, 7])
    hidden, weight, bias, taught, head = (torch.randn(s) for s in ((5, 6), (16, 6), (16,), (5, 4), (16, 4)))
    options = 9, 0.1, 0.01
    lse = logits.double().logsumexp(-1)
    grads = torch.randn(2, 5)
    soft, _, statistics = torch.ops.llmkern.distillation(logits, teacher, targets, 2.0, 9)
    return {
        "cross_entropy": (logits, targets, *options),
        "cross_entropy_backward": (grads[0], logits, targets, lse, *options),
        "linear_cross_entropy": (hidden, weight, bias, targets, *options, "mean", (True, True, True)),
        "linear_cross_entropy_backward": (
            grads[0], hidden, weight, bias, targets, (hidden @ weight.T + bias).double().logsumexp(-1), *options,
            (True, True, True),
        ),
        "distillation": (logits, teacher, targets, 2.0, 9),
        "distillation_backward": (*grads, logits, teacher, targets, statistics, soft, 2.0, 9, (True, True)),
        "linear_distillation": (
            hidden, weight, bias, taught, head, bias, targets, 2.0, 0.3, 9, (True, True, True),
        ),
    }[name]  # fmt: skip


def arguments(name: str):
    if "cross_entropy" in name or "distillation" in name:
        return loss_arguments(name)
    if name.startswith(("norm", "gated")):
        return row_arguments(name)
    if name.startswith("attention"):
        return attention_arguments(name)
    return int8_arguments(name) if name.startswith("int8") else positional_arguments(name)


def served_by(operator: Operator, name: str, args):
    (found,) = [b for b in operator.by_device["cpu"] if b.name == name]
    assert found.unsupported(*args) is None
    # A log-sum-exp is float64, of float32 arithmetic.
    return lambda *args: tuple(r.float() if r.dtype == torch.float64 else r for r in results(found.plan(*args)(*args)))


def results(found):
    return found if isinstance(found, tuple) else (found,)


#: attention_int8 has none: tests/attention/test_int8.py is about its plain version.
WITH_A_KERNEL = [n for n, o in Operator.all.items() if any(b.name == "cpu" for b in o.by_device["cpu"])]


def test_what_has_no_kernel_for_the_cpu_is_served_by_the_plain_version():
    for name in set(Operator.all) - set(WITH_A_KERNEL):
        operator, args = Operator.all[name], arguments(name)
        with backend.use("reference"):
            expected = operator.run(*args)
        with pytest.warns(UserWarning, match=f"{name} runs on the plain PyTorch reference"):
            backend._warned.clear()
            backend.forget_plans()
            assert all(map(torch.equal, results(operator.run(*args)), results(expected)))


@pytest.mark.parametrize("name", WITH_A_KERNEL)
def test_gives_what_the_kernel_gives(name):
    operator, args = Operator.all[name], arguments(name)
    assert not any(a is None for a in args), "every argument must be given here"
    args = tuple(LEFT_OUT.get(name, {}).get(i, a) for i, a in enumerate(args))
    kernel, plain = (served_by(operator, which, args) for which in ("cpu", "reference"))
    verify(kernel, plain, args, gradients=False).raise_if_failed()
    with backend.use("reference"):
        chosen, expected = operator.run(*args), plain(*args)
    for a, b in zip(results(chosen), expected, strict=True):
        assert torch.equal(a.to(b.dtype), b)


def test_rotary_in_place():
    args = positional_arguments("rotary")[:-1]
    expected = Operator.all["rotary"].run(*args, False)
    with backend.use("reference"):
        Operator.all["rotary"].run(*args, True)
    for a, b in zip(args, expected, strict=False):
        torch.testing.assert_close(a, b)


def test_sinusoidal_add_with_its_gradient():
    x, pe = torch.randn(5, 2, 16, requires_grad=True), torch.randn(9, 1, 16, requires_grad=True)
    results = []
    for name in ("cpu", "reference"):
        with backend.use(name):
            out = sinusoidal_add(x, pe, scale=2.0, dropout_p=0.3, seed=3)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, pe))))
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


class Self(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)


MODULES = {
    "positional": lambda: (llmkern.PositionalEncoding(16, 9, dropout=0.3, scale=2.0), torch.randn(5, 2, 16)),
    "rotary": lambda: (llmkern.RotaryEmbedding(8, 9), torch.randn(1, 2, 5, 16)),
    "attention": lambda: (Self(llmkern.MultiHeadAttention(16, 4)), torch.randn(2, 5, 16)),
    "int8": lambda: (llmkern.Int8Linear(16, 4), torch.randn(3, 16)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_on_a_device_without_kernels(make):
    module, x = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fallback says so
        result = module.to("meta")(x.to("meta"))
    result = result[0] if isinstance(result, tuple) else result
    assert result.device.type == "meta" and result.dtype == x.dtype


WITHOUT_LIBRARY = """
import warnings
warnings.simplefilter("ignore")
import torch, llmkern
from llmkern import extension
assert extension.MISSING
x = torch.randn(5, 2, 16, requires_grad=True)
for module, args in (
    (llmkern.PositionalEncoding(16, dropout=0.3), (x,)), (llmkern.RotaryEmbedding(16), (x[None],)),
    (llmkern.Int8Linear(16, 4), (x,)), (llmkern.MultiHeadAttention(16, 4), (x, x, x)),
):
    out = module(*args)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
"""


def test_every_module_runs_without_the_library():
    env = {**os.environ, "LLMKERN_LIBRARY": "/nowhere/_C.so"}
    result = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
