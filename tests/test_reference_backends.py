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

SEED = torch.tensor(-5)
# Of an attention with a mask, key lengths, causal rule and scale of its own.
RULES = (torch.rand(2, 1, 5, 7).log(), torch.tensor([7, 3]), True, True, 0.3, True)


def attention_arguments(name: str):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    output, logsumexp = Operator.all["attention"].run(q, k, v, *RULES)
    return {
        "attention": (q, k, v, *RULES),
        "attention_backward": (torch.randn_like(output), q, k, v, output, logsumexp, *RULES, True),
        "attention_weights": (q, k, logsumexp, *RULES),
        "attention_weights_backward": (torch.randn(2, 4, 5, 7), q, k, logsumexp, *RULES, True),
    }[name]


def positional_arguments(name: str):
    x, pe = torch.randn(5, 2, 16), torch.randn(9, 1, 16)
    q, k, cos, sin = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(9, 6), torch.randn(9, 6)
    return {
        "sinusoidal_add": (x, pe, SEED, 2.0, 0.3),
        "sinusoidal_dropout": (x, SEED, 2.0, 0.3),
        "rotary": (q, k, cos, sin, torch.randint(9, (2, 5)), True, True, False),
    }[name]


def int8_arguments(name: str):
    return torch.randn(3, 16), torch.randint(-127, 128, (4, 16), dtype=torch.int8), torch.rand(4), torch.randn(4)


def arguments(name: str):
    if name.startswith("attention"):
        return attention_arguments(name)
    return int8_arguments(name) if name.startswith("int8") else positional_arguments(name)


def served_by(operator: Operator, name: str, args):
    (found,) = [b for b in operator.by_device["cpu"] if b.name == name]
    assert found.unsupported(*args) is None
    return lambda *args: found.plan(*args)(*args)


@pytest.mark.parametrize("name", list(Operator.all))
def test_gives_what_the_kernel_gives(name):
    operator, args = Operator.all[name], arguments(name)
    assert not any(a is None for a in args), "every argument must be given here"
    kernel, plain = (served_by(operator, which, args) for which in ("cpu", "reference"))
    verify(kernel, plain, args, gradients=False).raise_if_failed()
    with backend.use("reference"):
        chosen, expected = operator.run(*args), plain(*args)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (chosen, expected)), strict=True):
        assert torch.equal(a, b)


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
