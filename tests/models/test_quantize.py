"""quantize_model: what it replaces, what it leaves, tied weights, saving and loading, its report."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import llmkern
from llmkern import Int8Linear, quantize_model, reference
from llmkern.int8 import reference as int8_reference
from llmkern.int8.replace import replace_linears
from llmkern.int8.scheme import Int8Scheme


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head, whose weight may be the embedding's."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(24).view(2, 12)


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}


def test_every_linear_is_replaced_and_the_model_returned():
    model = Model()
    assert quantize_model(model) is model
    assert kinds(model) == {
        name: "Int8Linear" for name in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head")
    }
    assert all(type(m) is Int8Linear for m in model.modules() if hasattr(m, "in_features"))


def test_outputs_are_those_of_the_reference_and_near_the_original(isa):
    model = Model().eval()
    plain, original = reference.quantize_model(copy.deepcopy(model)), model(IDS)
    assert torch.equal(quantize_model(model)(IDS), plain(IDS))
    assert nn.functional.cosine_similarity(model(IDS), original, dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head"], {"lm_head"}),
        (["layers.0.up"], {"layers.0.up"}),
        (["up"], {"layers.0.up", "layers.1.up"}),
        (["layers.1.*"], {"layers.1.up", "layers.1.down"}),
        (["*"], {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head"}),
    ],
)
def test_skip(skip, left):
    model = quantize_model(Model(), skip=skip)
    assert {name for name, kind in kinds(model).items() if kind == "Linear"} == left
    assert {layer.name for layer in model.quantization_report.layers if layer.left == "named in skip"} == left


def test_a_weight_tied_to_an_embedding_is_left():
    model = quantize_model(Model(tied=True))
    assert model.lm_head.weight is model.embedding.weight
    (left,) = [layer for layer in model.quantization_report.layers if layer.left]
    assert left.name == "lm_head" and "embedding.weight" in left.left


def test_linears_that_share_a_weight_or_are_one_layer_stay_so():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    quantize_model(model)
    assert model["a"].weight is model["b"].weight and model["a"].weight_scale is model["b"].weight_scale
    assert model["a"].bias is not model["b"].bias
    assert model["d"] is model["c"] and type(model["c"]) is Int8Linear


def test_tied_layers_are_left_together():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    quantize_model(model, skip=["a"])
    assert type(model["b"]) is nn.Linear and model["b"].weight is model["a"].weight


def test_a_lone_linear_and_one_quantised_already():
    layer = quantize_model(nn.Linear(8, 4))
    assert type(layer) is Int8Linear
    model = quantize_model(Model())
    before = dict(model.named_modules())
    assert all(before[name] is module for name, module in quantize_model(model).named_modules())


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda *args: None),
    "forward, with keywords": lambda layer: layer.register_forward_hook(lambda *args: None, with_kwargs=True),
    "before forward": lambda layer: layer.register_forward_pre_hook(lambda *args: None),
    "backward": lambda layer: layer.register_full_backward_hook(lambda *args: None),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    "state_dict": lambda layer: layer.register_state_dict_post_hook(lambda *args: None),
    "before state_dict": lambda layer: layer.register_state_dict_pre_hook(lambda *args: None),
    "load": lambda layer: layer.register_load_state_dict_post_hook(lambda *args: None),
    "before load": lambda layer: layer.register_load_state_dict_pre_hook(lambda *args: None),
    "weight": lambda layer: layer.weight.register_hook(lambda grad: None),
    "weight, once accumulated": lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda weight: None),
    "its own forward": lambda layer: setattr(layer, "forward", lambda x: x),
}


@pytest.mark.parametrize(("what", "hook"), HOOKS.items(), ids=HOOKS)
def test_what_hangs_on_a_layer_keeps_it(what, hook):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hook(model[0])
    quantize_model(model)
    assert [type(layer) for layer in model] == [nn.Linear, Int8Linear]
    left = model.quantization_report.layers[0].left
    assert left == {"weight": "its weight has hooks", "its own forward": "it has a forward of its own"}.get(
        what.partition(",")[0], "it has hooks"
    )
    assert left in str(model.quantization_report)


def test_a_hook_on_the_bias_goes_with_it():
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    model[0].bias.register_hook(seen.append)
    quantize_model(model)(torch.randn(2, 4)).sum().backward()
    assert type(model[0]) is Int8Linear and len(seen) == 1


def test_subclasses_and_layers_with_hooks_are_left():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].register_forward_hook(lambda *args: None)
    quantize_model(model)
    assert [type(m).__name__ for m in model] == ["Special", "Linear", "Int8Linear"]
    assert [bool(layer.left) for layer in model.quantization_report.layers] == [True, True, False]


@pytest.mark.parametrize("way", ["state_dict", "safetensors"])
def test_saved_and_loaded(way, tmp_path):
    model, other = quantize_model(Model().eval()), quantize_model(Model().eval())
    expected = model(IDS)
    assert not torch.equal(other(IDS), expected)
    path = tmp_path / "model"
    if way == "safetensors":
        save_model(model, str(path))
        load_model(other, str(path))
    else:
        torch.save(model.state_dict(), path)
        other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other(IDS), expected)


def test_a_tied_model_is_saved_and_loaded(tmp_path):
    model, other = (quantize_model(Model(tied=True).eval()) for _ in range(2))
    save_model(model, str(tmp_path / "model"))
    load_model(other, str(tmp_path / "model"))
    assert torch.equal(other(IDS), model(IDS)) and other.lm_head.weight is other.embedding.weight


def test_the_checkpoint_before_loads_after():
    model = Model().eval()
    other = quantize_model(Model().eval())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), quantize_model(model)(IDS))


@pytest.mark.parametrize("function", [quantize_model, reference.quantize_model])
def test_layers_stay_tied_when_a_checkpoint_is_assigned(function):
    def tied():
        model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
        model["b"].weight = model["a"].weight
        return model

    model, before = function(tied()), tied()
    expected = function(copy.deepcopy(before))
    checkpoint = before.state_dict()
    model.load_state_dict(checkpoint, assign=True)
    assert model["a"].weight is model["b"].weight and model["a"].weight_scale is model["b"].weight_scale
    x = torch.randn(3, 16)
    assert all(torch.equal(model[name](x), expected[name](x)) for name in "abc")
    checkpoint["a.weight"].data.mul_(-1)  # of both; what was quantised before is no longer it
    model.load_state_dict(checkpoint, assign=True)
    assert not torch.equal(model["b"](x), expected["b"](x)) and model["a"].weight is model["b"].weight
    with torch.inference_mode():
        made_inside = {name: value.clone() for name, value in checkpoint.items()}
        model.load_state_dict(made_inside, assign=True)


@pytest.mark.parametrize("kind", [Int8Linear, int8_reference.Int8Linear])
def test_layers_that_share_a_checkpoint_alone_stay_apart(kind):
    checkpoint, x = nn.Linear(8, 8, bias=False).state_dict(), torch.randn(2, 8)
    first, second = kind(8, 8, bias=False), kind(8, 8, bias=False)
    first.load_state_dict(checkpoint, assign=True)
    expected = first(x)
    first.load_state_dict(nn.Linear(8, 8, bias=False).state_dict())
    second.load_state_dict(checkpoint, assign=True)
    assert torch.equal(second(x), expected) and second.weight is not first.weight
    half = {name: value.half() if value.is_floating_point() else value for name, value in second.state_dict().items()}
    second.load_state_dict({**second.state_dict(), "weight_scale": half["weight_scale"]}, assign=True)
    assert second.weight_scale.dtype == torch.float32
    second(x)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_loads_by_swapping(assign):
    model, other = quantize_model(Model().eval()), Model().eval()
    model(IDS)  # packs the weights
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        before = other.state_dict()
        quantize_model(other)
        for checkpoint in (before, other.state_dict()):
            model.load_state_dict(checkpoint, assign=assign)
            assert torch.equal(model(IDS), other(IDS))
        model.bfloat16()
        assert model(IDS).dtype == torch.bfloat16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_report():
    model = quantize_model(Model(), skip=["lm_head"])
    report = model.quantization_report
    assert report.replaced == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    up = report.layers[0]
    assert (up.shape, up.bytes_before, up.bytes_after) == ((64, 16), 64 * 16 * 4, 64 * 16 + 64 * 4)
    assert 0 < up.error < 0.01
    text = str(report)
    assert "4 of 5 linear layers in int8" in text and "left: named in skip" in text


def test_torchs_transformer_layer_does_not_read_past_the_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    with torch.inference_mode():
        out = quantize_model(layer)(x)
    assert type(layer.linear1) is Int8Linear
    assert nn.functional.cosine_similarity(out, expected, dim=-1).min() > 0.99


def test_our_modules(isa):
    model = llmkern.Transformer(32, 4, 1).eval()
    src, tgt = torch.randn(6, 2, 32), torch.randn(5, 2, 32)
    expected = model(src, tgt)
    out = quantize_model(model)(src, tgt)
    assert nn.functional.cosine_similarity(out, expected, dim=-1).min() > 0.99
    assert model.quantization_report.replaced


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("function", [quantize_model, reference.quantize_model])
def test_torchs_encoder_with_padding(function, activation):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation=activation)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        out = function(encoder)(x, src_key_padding_mask=padding)
    assert nn.functional.cosine_similarity(out, expected, dim=-1)[~padding].min() > 0.99


def test_torchs_fused_layer_stays_where_no_layer_is_replaced():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    quantize_model(encoder, skip=["layers.0.*"])
    assert encoder.layers[0].activation_relu_or_gelu and not encoder.layers[1].activation_relu_or_gelu
    assert not encoder.use_nested_tensor
    untouched = quantize_model(nn.TransformerEncoder(encoder.layers[0], 2), skip=["*linear*"])
    assert untouched.use_nested_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_our_attention(dtype, bias_dtype, isa):
    fast = llmkern.MultiHeadAttention(64, 4).to(bias_dtype)
    plain = reference.MultiHeadAttention(64, 4).to(bias_dtype)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 5, 64)
    expected = copy.deepcopy(plain).float()(x, x, x)
    quantize_model(fast), reference.quantize_model(plain)
    x = x.to(dtype)
    for module in (fast, plain):
        for result, exact in zip(module(x, x, x), expected, strict=True):
            assert result.dtype == dtype
            assert nn.functional.cosine_similarity(result.float(), exact, dim=-1).min() > 0.99
        with pytest.raises(TypeError, match="key: expected the dtype of query"):
            module(x, x.half(), x)
        with pytest.raises(TypeError, match=r"query: expected dtype float32 .* got int64"):
            module(x.long(), x, x)


@pytest.mark.parametrize("skip", ["w_q", "w_k", "w_v", "w_o"])
@pytest.mark.parametrize("room", [llmkern, reference])
def test_our_attention_quantised_in_part(room, skip, isa):
    module, x = room.MultiHeadAttention(16, 4), torch.randn(2, 5, 16)
    replace_linears(module, room.Int8Linear, Int8Scheme(), skip=[skip])
    assert module(x, x, x)[0].dtype == torch.float32
    for inputs in ((x.bfloat16(), x, x), (x.bfloat16(),) * 3):
        with pytest.raises(TypeError, match="query: expected the dtype of the parameters, float32, got bfloat16"):
            module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16(), x, x.half())[0].dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"query: expected dtype float32 .* got float64"):
            module(*(x.double(),) * 3)


def test_our_attention_quantised_takes_float64_in_the_plain_version_alone():
    fast = quantize_model(llmkern.MultiHeadAttention(16, 4))
    plain = reference.quantize_model(reference.MultiHeadAttention(16, 4))
    x = torch.randn(2, 5, 16).double()
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert plain(x, x, x)[0].dtype == torch.float64
            with pytest.raises(TypeError, match="query: expected dtype float32 or bfloat16 or float16, got float64"):
                fast(x, x, x)
            with pytest.raises(TypeError, match="key: expected the dtype of query, float64, got float32"):
                plain(x, x.float(), x)


@pytest.mark.parametrize("function", [quantize_model, reference.quantize_model])
def test_bad_input_is_named(function):
    with pytest.raises(ValueError, match="bits: expected the integer 8, got 7"):
        function(Model(), bits=7)
    for bits, came in ((8.0, "8.0"), ("8", "'8'"), (torch.tensor([8, 7]), "tensor"), (True, "True"), (None, "None")):
        with pytest.raises(TypeError, match=f"bits: expected the integer 8, got {came}"):
            function(Model(), bits=bits)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        function([])


@pytest.mark.parametrize("function", [quantize_model, reference.quantize_model])
def test_weights_that_cannot_be_quantised_are_named_before_any_is(function):
    for broken, error, words in [
        (
            nn.Linear(4, 4).double(),
            TypeError,
            "layer '1': expected a weight of float32 or bfloat16 or float16, got float64",
        ),
        (
            nn.Linear(4, 4, device="meta"),
            ValueError,
            "layer '1': expected a weight with values, got one on the device meta",
        ),
    ]:
        model = nn.Sequential(nn.Linear(4, 4), broken)
        with pytest.raises(error, match=words):
            function(model)
        assert type(model[0]) is nn.Linear
    lazy = function(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))
    assert type(lazy[1]) is nn.LazyLinear and "a LazyLinear" in str(lazy.quantization_report)


@pytest.mark.parametrize("layer", [Int8Linear, reference.Int8Linear])
def test_a_layer_that_cannot_be_quantised_is_named(layer):
    for given, error, words in [
        ("a", TypeError, "linear: expected a torch.nn.Linear, got str"),
        (nn.Conv1d(4, 4, 1), TypeError, "linear: expected a torch.nn.Linear, got Conv1d"),
        (nn.Linear(4, 4).double(), TypeError, "linear: expected a weight of float32 .* got float64"),
        (nn.Linear(4, 4, device="meta"), ValueError, "linear: expected a weight with values, got one on the device"),
        (nn.LazyLinear(4), ValueError, "linear: expected a weight with values, got one whose sizes"),
    ]:
        with pytest.raises(error, match=words):
            layer.from_linear(given)


def test_bad_names_in_skip():
    for skip in (None, 3, [1]):
        with pytest.raises(TypeError, match="skip: expected a sequence of names, got"):
            quantize_model(Model(), skip=skip)
    with pytest.raises(
        ValueError, match=r"skip: expected names of linear layers .*lm_head.* got 'head', which fits none"
    ):
        quantize_model(Model(), skip=["head"])
    with pytest.raises(TypeError, match="skip: expected a sequence of names"):
        quantize_model(Model(), skip="lm_head")
