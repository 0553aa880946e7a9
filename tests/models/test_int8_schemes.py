"""quantize_model with schemes: calibration data, smoothing, the report, and layers left where int8 does not pay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llmkern
from llmkern import Int8Linear, Int8Scheme, quantize_like, quantize_model
from llmkern.int8 import calibration, cost, reference, scheme


class Gated(nn.Module):
    """Norm, SwiGLU and a residual, as in a decoder."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[5] = 30.0  # an outlier channel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PlusOne(nn.RMSNorm):
    """A norm that multiplies by 1 + weight: dividing its weight does not divide its output."""

    def forward(self, x):
        return F.rms_norm(x, (32,)) * (1 + self.weight)


def data(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 9, 32, generator=generator) for _ in range(count)]


def error(model, expected, x):
    return ((model(x) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", scheme.NAMED)
def test_every_scheme_is_near_floating_point(name, isa):
    model, x = Gated(), data()[0]
    expected = model(x).detach()
    quantize_model(model, scheme=name, calibration=data(), progress=False)
    assert model.quantization_report.replaced == ["gate", "up", "down"]
    with torch.no_grad():
        assert error(model, expected, x) < {"weight_only": 0.01, "outliers": 0.015}.get(name, 0.05)
    for layer in model.quantization_report.layers:
        assert 0 < layer.error < 0.02 and 0 < layer.output_error < 0.15


def test_outliers_are_kept_where_a_row_of_8_bits_loses():
    x = torch.randn(200, 512)
    x[:, 7] *= 300
    layer = nn.Linear(512, 64)
    expected = layer(x).detach()
    with torch.no_grad():
        errors = {
            name: error(Int8Linear.from_linear(layer, scheme=name), expected, x)
            for name in ("outliers", "row", "symmetric", "rotated", "weight_only")
        }
    rest = x.clone()
    rest[:, 7] = 0  # what an outlier of 300 hides: the error of everything else
    with torch.no_grad():
        hidden = (expected - layer.bias - rest @ layer.weight.t()).norm() / (rest @ layer.weight.t()).norm()
    assert errors["outliers"] < errors["rotated"] < errors["row"] < errors["symmetric"], (errors, hidden)
    assert errors["outliers"] < 2 * errors["weight_only"]


@pytest.mark.parametrize("items", ["tensors", "tuples", "dicts"])
def test_calibration_data_of_every_form(items):
    given = {"tensors": data(), "tuples": [(x,) for x in data()], "dicts": [{"x": x} for x in data()]}[items]
    model = quantize_model(Gated(), scheme="static", calibration=iter(given), progress=True)
    low = min(x.min().item() for x in map(copy.deepcopy(Gated()).norm, data()))
    scale, zero_point = model.gate.input_scale.tolist()
    assert scale > 0 and 0 <= zero_point <= 255 and abs(-zero_point * scale - low) < scale
    assert torch.equal(model.gate.input_scale, model.up.input_scale)


def test_a_scheme_that_needs_data_says_so():
    for name in ("static", "smooth"):
        with pytest.raises(ValueError, match="calibration: expected inputs of the model for this scheme, got None"):
            quantize_model(Gated(), scheme=name)
    with pytest.raises(ValueError, match="calibration: expected an iterable of inputs, got one without any"):
        quantize_model(Gated(), calibration=[], progress=False)
    with pytest.raises(ValueError, match=r"scheme: expected an Int8Scheme or one of outliers, .*, got 'int4'"):
        quantize_model(Gated(), scheme="int4")


def test_layers_that_data_did_not_reach_are_left():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    quantize_model(model, scheme="static", calibration=[torch.randn(4, 8)], progress=False)
    assert type(model["used"]) is Int8Linear and type(model["unused"]) is nn.Linear
    assert "did not reach it" in str(model.quantization_report)


def test_a_layer_tied_to_one_that_data_did_not_reach_is_left_too():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model["unused"].weight = model["used"].weight
    model.forward = lambda x: model["used"](x)
    quantize_model(model, scheme="static", calibration=[torch.randn(4, 8)], progress=False)
    assert type(model["used"]) is type(model["unused"]) is nn.Linear
    assert "its weight is also unused.weight" in str(model.quantization_report)


@pytest.mark.parametrize("wrong", [{"skip": ("nowhere",)}, {"bits": 4}, {"skip": "gate"}, {"weight": torch.float64}])
def test_what_is_refused_is_refused_before_the_data_is_touched(wrong):
    model, used = Gated(), []
    if "weight" in wrong:
        model.down.to(wrong.pop("weight"))
    before = copy.deepcopy(model.state_dict())
    given = (used.append(x) or x for x in data())
    with pytest.raises((TypeError, ValueError), match=r"skip|bits|layer .down."):
        quantize_model(model, scheme="smooth", calibration=given, progress=False, **wrong)
    assert not used and all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_folds_are_found_and_change_nothing_but_the_split():
    model, x = Gated(), data()[0]
    folds = calibration.observe(model, x)
    assert [(f.maker, f.readers) for f in folds] == [(model.norm, (model.gate, model.up)), (model.up, (model.down,))]
    expected = model(x)
    seen = calibration.collect(model, data())
    before = model.norm.weight.clone()
    for fold in folds:
        assert calibration.smooth(fold, seen, 0.5)
    assert model.norm.weight[5] / before[5] < 0.5 * (model.norm.weight / before).median()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_smoothing_lowers_the_error_of_outlier_channels(norm):
    x = torch.randn(4, 50, 32)
    errors = {}
    for name in ("row", "smooth"):
        torch.manual_seed(0)
        model = Gated(norm)
        expected = model(x).detach()
        quantize_model(model, scheme=name, calibration=[x], progress=False)
        with torch.no_grad():
            errors[name] = error(model, expected, x)
    assert errors["smooth"] < 0.8 * errors["row"]
    assert "smoothed" in str(model.quantization_report)


class Shared(Gated):
    def forward(self, x):
        y = self.norm(x)
        return y + self.down(F.silu(self.gate(y)) * self.up(y))  # the norm's output goes on


class Returned(Gated):
    """The norm's output is returned as well, inside a list in a dict; the sum is what the others give."""

    def forward(self, x):
        y = self.norm(x)
        return {"sum": super().forward(x), "more": [y]}


class Joined(Gated):
    def forward(self, x):
        y = self.norm(x)
        return torch.cat([self.down(F.silu(self.gate(y)) * self.up(y)), y])  # a list of tensors reads it


class Tied(Gated):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.gate.weight = self.embedding.weight


@pytest.mark.parametrize(
    "kind",
    [Shared, Tied, lambda: Gated(PlusOne), Joined, Returned],
    ids=["shared", "tied", "1 + weight", "joined", "returned"],
)
def test_what_cannot_be_folded_is_left_alone(kind):
    model, x = kind(), data()[0]
    before, expected = copy.deepcopy(model.norm.state_dict()), model(x)
    quantize_model(model, scheme="smooth", calibration=data(), progress=False)
    assert torch.equal(model.norm.weight, before["weight"])
    if kind is not Returned:
        with torch.no_grad():
            assert error(model, expected.detach(), x) < 0.03


@pytest.mark.parametrize("skip", ["gate", "down", "up"])
def test_what_is_left_is_not_smoothed(skip):
    model = Gated()
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, scheme="smooth", calibration=data(), progress=False, skip=[skip])
    assert torch.equal(getattr(model, skip).weight, before[f"{skip}.weight"])
    assert (skip == "down") != torch.equal(model.norm.weight, before["norm.weight"])


class Keyword(Gated):
    def forward(self, x):
        y = self.norm(x)
        return x + self.down(input=F.silu(self.gate(input=y)) * self.up(input=y))


@pytest.mark.parametrize("name", ["outliers", "smooth"])
def test_layers_called_by_keyword(name):
    torch.manual_seed(3)
    model, x = Keyword(), data()[0]
    expected = model(x).detach()
    quantize_model(model, scheme=name, calibration=data(), progress=False)
    with torch.no_grad():
        assert error(model, expected, x) < 0.03


def test_a_static_range_is_that_behind_the_rotation():
    model, x = nn.Sequential(nn.Linear(1024, 64)), torch.rand(64, 1024) + 1
    expected = model(x).detach()
    quantize_model(model, scheme=Int8Scheme("static", rotate=True), calibration=[x], progress=False)
    with torch.no_grad():
        assert error(model, expected, x) < 0.03


@pytest.mark.parametrize("value", [torch.zeros(0, 32), torch.full((4, 32), torch.nan)], ids=["empty", "NaN"])
def test_data_that_says_nothing_reaches_no_layer(value):
    model = quantize_model(Gated(), scheme="static", calibration=[value], progress=False)
    assert model.quantization_report.replaced == []


def test_rotation_takes_what_the_depth_allows():
    assert [scheme.rotation_size(k) for k in (8, 16, 32, 48, 384, 768, 4096, 11008)] == [1, 1, 2, 1, 8, 16, 64, 16]
    x = torch.randn(5, 256)
    for size in (1, 2, 4, 16):
        turned = reference.hadamard(x, size)
        torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
        torch.testing.assert_close(reference.hadamard(turned, size), x)


@pytest.mark.measured
def test_layers_that_would_not_gain_are_left_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(2048, 2048))
    quantize_model(model)
    assert type(model[0]) is nn.Linear
    line = next(line for line in str(model.quantization_report).splitlines() if line.startswith("0 "))
    assert "left: int8 would be" in line and "rows times as fast" in line
    assert type(quantize_model(nn.Linear(8, 8), measure=False)) is Int8Linear


def test_the_models_arithmetic_of_costs():
    rates = cost.Rates(call=1e-6, weights=1e9, products=1e10, elements=1e-12)
    assert rates.seconds(1, 1000, 1000) == pytest.approx(1e-6 + 1e-3 + 2e-9)
    assert rates.seconds(100, 1000, 1000) == pytest.approx(1e-6 + 1e-2 + 2e-7)
    assert (
        cost.Verdict({1: 2.0}, {1: 1.0}, False).pays
        and not cost.Verdict({1: 2.0, 9: 1.0}, {1: 1.0, 9: 1.0}, False).pays
    )


def test_what_one_machine_replaced_loads_on_another():
    model = quantize_model(Gated(), skip=["up"], scheme="groups")
    other = quantize_like(Gated(), model.state_dict())
    assert type(other.up) is nn.Linear and type(other.gate) is Int8Linear
    other.load_state_dict(model.state_dict())
    x = data()[0]
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match=r"state_dict: expected int8 layers .* got one without"):
        quantize_like(Gated(), Gated().state_dict())
    with pytest.raises(ValueError, match="got one with 'down'"):
        quantize_like(nn.Sequential(nn.Linear(2, 2)), model.state_dict())
    assert Int8Scheme.from_numbers(Int8Scheme("symmetric", group=32).numbers()) == Int8Scheme("symmetric", group=32)
    with pytest.raises(ValueError, match="scheme: expected the three numbers of a saved scheme, got"):
        Int8Scheme.from_numbers([9, 0, 0])


def test_a_checkpoint_without_the_second_name_of_a_shared_weight():
    def tied():
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
        model[1].weight = model[0].weight
        return model

    model, x = quantize_model(tied(), scheme="rotated"), torch.randn(3, 32)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("1.")}  # as safetensors keeps it
    other = quantize_like(tied(), state)
    assert type(other[0]) is type(other[1]) is Int8Linear and other[0].weight is other[1].weight
    other.load_state_dict(state, strict=False)
    assert torch.equal(other(x), model(x))


def test_rows_are_checked():
    for wrong in (5, "12"):
        with pytest.raises(TypeError, match="rows: expected a sequence of positive integers"):
            quantize_model(Gated(), rows=wrong)
    with pytest.raises(ValueError, match="rows: expected at least one number of rows"):
        quantize_model(Gated(), rows=[])
    for wrong in (5, torch.randn(2, 9, 32)):
        with pytest.raises(TypeError, match="calibration: expected an iterable of inputs of the model, got"):
            quantize_model(Gated(), calibration=wrong)
    with pytest.raises(ValueError, match="rows: expected a positive integer, got 0"):
        quantize_model(Gated(), rows=[0])


def test_the_scheme_is_part_of_a_layers_words():
    layer = llmkern.Int8Linear(32, 4, scheme=Int8Scheme("symmetric", group=32))
    assert "group=32" in repr(layer) and "scheme" not in repr(llmkern.Int8Linear(32, 4))
