"""Training around frozen int8 weights: gradients are those of the dequantised weight, and a low-rank adapter learns.

The adapter is that of Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmkern import Int8Linear
from llmkern import reference as plain_modules
from llmkern.functional import int8_linear
from llmkern.int8 import reference, scheme
from llmkern.int8.scheme import Int8Scheme
from llmkern.verify import verify
from llmkern.verify.report import judge_row
from tests.int8.cases import FLOATS, QUANTIZATIONS, positional, quantized, with_outliers

SCHEMES = {
    **{name: name for name in ("outliers", "row", "symmetric", "groups", "static", "rotated", "weight_only")},
    "groups of 32": Int8Scheme("symmetric", group=32),
    "groups, rotated": Int8Scheme("symmetric", group=64, rotate=True),
    "outliers, rotated": Int8Scheme(rotate=True),
}


class LoRA(nn.Module):
    """base(x) + x A^T B^T, the base frozen."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


def int8(inputs, outputs, name, kind=Int8Linear):
    layer = kind(inputs, outputs, scheme=SCHEMES[name])
    if layer.input_scale is not None:
        layer.input_scale.copy_(torch.tensor([0.03, 131.0]))
    return layer


def dequantised(layer, dtype=torch.float32):
    """The nn.Linear whose weight is what the integers stand for."""
    linear = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
    weight = reference.dequantize_weight(layer.weight, layer.weight_scale, layer.scheme.group, dtype)
    with torch.no_grad():
        linear.weight.copy_(reference.hadamard(weight, layer.rotation))
        linear.bias.copy_(layer.bias)
    return linear


def network(name, between=nn.Identity, kind=Int8Linear):
    torch.manual_seed(1)
    return nn.Sequential(LoRA(int8(128, 96, name, kind)), between(), LoRA(int8(96, 64, name, kind)))


def gradients(model, x, cotangent):
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
    return torch.autograd.grad(model(leaf), wanted, cotangent)


def within_contract(found, plain, truth):
    for i, gradients in enumerate(zip(found, plain, truth, strict=True)):
        row = judge_row(str(i), "gradient", *gradients)
        assert row.passed, row


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_gradients_are_those_of_the_dequantised_weight(kind, dtype, one_isa):
    """Of x, exactly linear: no rounding of x enters; of bias and residual the sums and the cotangent itself."""
    choice = QUANTIZATIONS[kind]
    for shape in ((9, 128), (1, 128), (2, 3, 128), (128,)):
        x = torch.randn(shape).to(dtype)
        weight, scale = quantized(torch.randn(33, 128), **choice)
        bias, residual = torch.randn(33).to(dtype), torch.randn(*shape[:-1], 33).to(dtype)
        dense = reference.dequantize_weight(weight, scale, choice.get("group", 0), torch.float64)
        dense = reference.hadamard(dense, choice.get("rotate", 1))
        leaves = [t.clone().requires_grad_() for t in (x, bias, residual)]
        cotangent = torch.randn_like(residual)
        int8_linear(leaves[0], weight, scale, leaves[1], residual=leaves[2], **choice).backward(cotangent)
        results = []
        for wide in (torch.float32, torch.float64):
            copies = [t.to(wide, copy=True).requires_grad_() for t in (x, bias, residual)]
            (copies[0] @ dense.to(wide).t() + copies[1] + copies[2]).backward(cotangent.to(wide))
            results.append([t.grad if wide == torch.float64 else t.grad.to(dtype) for t in copies])
        within_contract([t.grad for t in leaves], *results)
        assert torch.equal(leaves[2].grad, cotangent)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_gradients_of_no_elements(kind, one_isa):
    choice = QUANTIZATIONS[kind]
    for rows, outputs in ((0, 33), (5, 0), (0, 0)):
        weight, scale = quantized(torch.randn(outputs, 128), **choice)
        leaves = [torch.randn(size, requires_grad=True) for size in ((rows, 128), (outputs,), (rows, outputs))]
        int8_linear(leaves[0], weight, scale, leaves[1], residual=leaves[2], **choice).sum().backward()
        assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
        assert not leaves[0].grad.any() and not leaves[1].grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", scheme.ACTIVATIONS)
def test_through_what_follows_the_sum(activation, dtype, one_isa):
    """The function's slope is that at the quantised sum, as in the plain version."""
    for kind in ("outliers", "row", "static", "16bit", "groups of 32", "rotated"):
        choice = {**QUANTIZATIONS[kind], "activation": activation}
        x = with_outliers(torch.randn(9, 128)).to(dtype)
        weight, scale = quantized(torch.randn(66, 128) * 0.1, **choice)
        residual = torch.randn(9, 33 if activation in scheme.PAIRS else 66).to(dtype)
        bias = torch.randn(66)

        def ours(x, bias, residual, weight=weight, scale=scale, choice=choice):
            return int8_linear(x, weight, scale, bias, residual=residual, **choice)

        def plain(x, bias, residual, weight=weight, scale=scale, choice=choice):
            return reference.int8_linear(x, weight, scale, bias, *positional(**choice, residual=residual))

        report = verify(ours, plain, (x, bias, residual))
        assert report.passed and [row.name for row in report.rows] == ["output", "x", "bias", "residual"], report


def test_each_gradient_alone_and_none(one_isa):
    x, residual, bias = torch.randn(5, 64), torch.randn(5, 34), torch.randn(34)
    weight, scale = quantized(torch.randn(34, 64))
    for activation in ("none", "gelu"):
        given = {"x": x, "bias": bias, "residual": residual}
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        int8_linear(weight=weight, weight_scale=scale, activation=activation, **leaves).square().sum().backward()
        for name, leaf in leaves.items():
            alone = given[name].clone().requires_grad_()
            out = int8_linear(weight=weight, weight_scale=scale, activation=activation, **{**given, name: alone})
            assert torch.equal(torch.autograd.grad(out.square().sum(), alone)[0], leaf.grad), (activation, name)
        with torch.no_grad():
            assert not int8_linear(weight=weight, weight_scale=scale, activation=activation, **leaves).requires_grad
        assert not int8_linear(weight=weight, weight_scale=scale, activation=activation, **given).requires_grad


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_in_the_transforms_of_torch_func(kind, one_isa):
    choice, (weight, scale) = QUANTIZATIONS[kind], quantized(torch.randn(17, 64), **QUANTIZATIONS[kind])
    x, residual = torch.randn(4, 3, 64), torch.randn(4, 3, 17)

    def function(x, residual):
        return int8_linear(x, weight, scale, residual=residual, **choice).sin().sum()

    leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
    expected = torch.autograd.grad(function(*leaves), leaves)
    both = torch.func.grad(function, (0, 1))
    for found in (both(x, residual), torch.vmap(both)(x, residual), torch.vmap(both, 1, 1)(x, residual)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    only_x = torch.vmap(lambda x: int8_linear(x, weight, scale, residual=residual[0], **choice))(x)
    assert torch.equal(only_x, int8_linear(x, weight, scale, residual=residual[:1].expand(4, 3, 17), **choice))


@pytest.mark.parametrize("name", SCHEMES)
def test_an_adapters_gradients_are_those_with_the_dequantised_base(name, one_isa):
    """No value that the base rounds enters them: neither those of one layer, nor those of a layer below another."""
    ours, x, middle, cotangent = network(name), *(torch.randn(2, 7, size) for size in (128, 96, 64))
    results, results_of_one = [], []
    for wide in (torch.float32, torch.float64):
        dense = copy.deepcopy(ours).to(wide)
        for i in (0, 2):
            dense[i].base = dequantised(ours[i].base, wide).requires_grad_(False)
        results_of_one.append(gradients(dense[0], x.to(wide), middle.to(wide)))
        results.append(gradients(dense, x.to(wide), cotangent.to(wide)))
    within_contract(gradients(ours[0], x, middle), *results_of_one)
    within_contract(gradients(ours, x, cotangent)[:3], *(found[:3] for found in results))


@pytest.mark.parametrize("name", SCHEMES)
def test_an_adapted_networks_gradients_are_the_plain_versions(name, one_isa):
    """With a function between, whose slope depends on what the first layer gives."""
    ours, plain = network(name, nn.GELU), network(name, nn.GELU, plain_modules.Int8Linear)
    plain.load_state_dict(ours.state_dict())
    report = verify(ours, plain, (torch.randn(2, 7, 128),))
    report.raise_if_failed()
    assert {row.name for row in report.rows} == {"output", "input", "0.a", "0.b", "2.a", "2.b"}


@pytest.mark.parametrize("name", SCHEMES)
def test_checkpointed_the_gradients_are_the_same(name, one_isa):
    model, x, cotangent = network(name, nn.GELU), torch.randn(33, 128), torch.randn(33, 64)
    found = gradients(Checkpointed(model), x, cotangent)
    assert all(map(torch.equal, found, gradients(model, x, cotangent)))


@pytest.mark.parametrize("name", ["outliers", "static", "groups", "groups, rotated"])
def test_compiled_the_gradients_are_the_same(name):
    torch._dynamo.reset()  # which counts the models that came before
    model, x, cotangent = network(name, nn.GELU), torch.randn(33, 128), torch.randn(33, 64)
    expected = gradients(model, x, cotangent)
    for other in (model, Checkpointed(model)):
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, gradients(compiled, x, cotangent), expected))
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("kind", ["outliers", "groups of 32"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_compiled_with_what_follows_the_sum_and_sizes_left_open(activation, kind):
    torch._dynamo.reset()
    weight, scale = quantized(torch.randn(34, 192) * 0.1, **QUANTIZATIONS[kind])
    bias, options = torch.randn(34), {**QUANTIZATIONS[kind], "activation": activation}

    def function(x, weight, scale, residual):
        return int8_linear(x, weight, scale, bias, residual=residual, **options).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for depth, rows in ((192, 3), (128, 5), (128, 40)):
        weights = weight[:, :depth], scale[:, : depth // 32] if "group" in options else scale
        given = torch.randn(rows, depth), torch.randn(rows, 17 if activation in scheme.PAIRS else 34)
        assert torch.equal(compiled(given[0], *weights, given[1]), function(given[0], *weights, given[1]))
        leaves = [t.requires_grad_() for t in given]
        found, expected = (
            torch.autograd.grad(f(leaves[0], *weights, leaves[1]).sum(), leaves) for f in (compiled, function)
        )
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["outliers", "groups", "rotated"])
def test_under_autocast(name, one_isa):
    """In bfloat16, within its precision of the float32 gradients; the adapter's come in its own dtype."""
    model, x = network(name, nn.GELU), torch.randn(33, 128)
    expected = gradients(model, x, torch.ones(33, 64))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        found = gradients(model, x, torch.ones(33, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", SCHEMES)
def test_an_adapter_learns_and_its_base_stays(name, one_isa):
    """What another adapter on the same base does."""
    model, teacher, x = network(name, nn.GELU), network(name, nn.GELU), torch.randn(32, 128)
    with torch.no_grad():
        for layer in (teacher[0], teacher[2]):
            layer.b.normal_()
    target, before = teacher(x).detach(), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("base" in key), key
    assert all(p.grad is None for key, p in model.named_parameters() if "base" in key)


def test_the_bias_of_a_base_trains_too(one_isa):
    layer, x = int8(128, 33, "outliers"), torch.randn(16, 128)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).mean(0).sub(1).square().sum().backward()
        optimizer.step()
    assert layer(x).mean(0).sub(1).abs().max() < 1e-3
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
