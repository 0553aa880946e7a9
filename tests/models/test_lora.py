"""peft's LoRA on an int8 Hugging Face model: it learns, is saved and loaded, merged and unmerged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import llmkern
from llmkern import Int8Linear, Int8Scheme
from llmkern.verify import verify

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from llmkern.models.lora import LoraInt8Linear, for_int8  # noqa: E402

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCHEMES = {
    "outliers": "outliers",
    "groups": Int8Scheme("symmetric", group=32),
    "rotated": Int8Scheme("symmetric", rotate=True),
}


def base(scheme="outliers"):
    """A small kernelized Llama in int8."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    llmkern.kernelize(model)
    return llmkern.quantize_model(model, scheme=scheme, skip=("lm_head",), measure=False, progress=False)


def adapted(model, **options):
    torch.manual_seed(2)
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": LAYERS, **options}
    return peft.get_peft_model(model, for_int8(peft.LoraConfig(**chosen)))


def train(model, steps=25):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_noise(model, size=0.1):
    """Adapters begin with zeros, in which much hides."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(size * torch.randn_like(p))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraInt8Linear)}


def test_it_learns_and_the_base_stays(tmp_path):
    model = adapted(base())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert len(layers(model)) == 14 and {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {
        "default"
    }
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0], losses
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    # Saved are the adapters alone; on the same base they give the same model.
    model.save_pretrained(tmp_path)
    assert all("lora_" in name for name in peft.utils.load_peft_weights(str(tmp_path)))
    config = for_int8(peft.LoraConfig.from_pretrained(tmp_path))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path, config=config)), logits(model))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_merged_it_is_the_sum_quantised(scheme, tmp_path):
    model = with_noise(adapted(base(scheme)))
    plain, expected = logits(base(scheme)), logits(model)
    sums = {
        name.removeprefix("base_model.model."): m.base_layer.rotated(m.base_layer.dequantized())
        + m.get_delta_weight("default")
        for name, m in layers(model).items()
    }
    merged = model.merge_and_unload()
    assert not layers(merged)
    for name, weight in sums.items():
        layer = merged.get_submodule(name)
        assert type(layer) is Int8Linear and layer.weight.dtype == torch.int8
        values, scale = Int8Linear.quantize(weight, layer.scheme)
        assert torch.equal(layer.weight, values) and torch.equal(layer.weight_scale, scale), name
    assert (logits(merged) - expected).norm() < 0.05 * (expected - plain).norm()
    # The merged model is an int8 model as any other.
    other = type(merged)(merged.config)
    llmkern.kernelize(other)
    llmkern.quantize_like(other, merged.state_dict()).load_state_dict(merged.state_dict())
    assert torch.equal(logits(other), logits(merged))


def test_unmerged_the_integers_are_those_before():
    model = with_noise(adapted(base()))
    model.add_adapter("second", for_int8(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    with_noise(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = logits(model)
    model.base_model.merge_adapter(["default"])
    once = copy.deepcopy(logits(model))
    model.base_model.merge_adapter(["second"])
    twice = logits(model)
    assert not torch.equal(once, expected) and not torch.equal(once, twice)
    model.base_model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(logits(model), expected)
    model.base_model.merge_adapter(["second", "default"])  # once from the base, in whichever order they came
    torch.testing.assert_close(logits(model), twice)


def test_an_adapter_of_zeros_merges_to_the_base_itself():
    model = adapted(base())
    before = {name: m.base_layer.weight.clone() for name, m in layers(model).items()}
    model.base_model.merge_adapter()
    for name, m in layers(model).items():
        assert torch.equal(m.base_layer.weight, before[name])


def test_biases_are_merged_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

        def forward(self, x):
            return self.second(self.first(x))

    model = llmkern.quantize_model(Net(), scheme="weight_only", progress=False)
    adapter = with_noise(adapted(model, target_modules=["first"], lora_bias=True))
    x = torch.randn(5, 32)
    expected = adapter(x)
    bias = adapter.base_model.model.first.base_layer.bias.clone()
    adapter.base_model.merge_adapter()
    assert not torch.equal(adapter.base_model.model.first.base_layer.bias, bias)
    assert (adapter(x) - expected).norm() < 0.02 * expected.norm()
    adapter.base_model.unmerge_adapter()
    assert torch.equal(adapter.base_model.model.first.base_layer.bias, bias)


def test_the_gradients_are_those_of_the_plain_layers():
    """The whole adapted model on kernels, beside the same one on the plain versions of its layers."""
    model = with_noise(adapted(base(), target_modules=["o_proj"]))
    plain = copy.deepcopy(model)
    llmkern.restore(plain.base_model.model)
    for module in plain.modules():
        if type(module) is Int8Linear:
            module.__class__ = llmkern.reference.Int8Linear
    model.config.use_cache = plain.config.use_cache = False
    report = verify(model, plain, (TOKENS,))
    assert report.rows and sum("lora_" in row.name for row in report.rows) == 4
    report.raise_if_failed()


def test_bad_input():
    with pytest.raises(TypeError, match=r"config: expected a peft\.LoraConfig, got dict"):
        for_int8({"r": 4})
    with pytest.raises(ValueError, match=r"unsupported variant combination: .*use_dora"):
        adapted(base(), use_dora=True)
    model = with_noise(adapted(base(), target_modules=["q_proj"]), size=float("inf"))
    before = {name: m.base_layer.weight for name, m in layers(model).items()}
    with pytest.raises(ValueError, match="adapter_names: expected adapters of finite numbers, got default"):
        model.base_model.merge_adapter()
    assert all(m.base_layer.weight is before[name] and not m.merged for name, m in layers(model).items())
    with pytest.raises(ValueError, match="lora_bias: expected False where the base layer has no bias, got True"):
        adapted(base(), target_modules=["q_proj"], lora_bias=True).base_model.merge_adapter()
