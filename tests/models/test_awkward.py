"""Look-alikes, hooks, training, surroundings, pickles in a new process: kernelize changes no result."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llmkern
from llmkern.models import structure
from tests.models.test_structure import MLP

transformers = pytest.importorskip("transformers", minversion="5")


class RMSNorm(nn.Module):
    """Of a model's own, with rules to be changed."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class GatedRMSNorm(RMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class NormOfAnything(RMSNorm):
    def forward(self, *args):
        return super().forward(*args)


class NormWithEpsOutside(RMSNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class ClampedNorm(RMSNorm):
    def forward(self, x):
        return self.weight * x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=self.eps)


class DroppingNorm(RMSNorm):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class DroppingMLP(MLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Bounded(nn.Module):
    def forward(self, x):
        return F.silu(x).clamp(-10, 10)


@pytest.mark.parametrize(
    "kind", [GatedRMSNorm, NormOfAnything, NormWithEpsOutside, ClampedNorm, DroppingNorm, DroppingMLP]
)
@pytest.mark.parametrize("training", [True, False])
def test_what_only_looks_like_another_is_left_and_told(kind, training):
    (told,) = llmkern.kernelize(kind().train(training)).modules
    assert not told.by and told.left


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_a_norm_is_served_by_any_name_of_its_argument():
    model = RMSNorm()
    expected, _ = model(torch.ones(2, 16)), llmkern.kernelize(model)
    assert type(model) is not RMSNorm and torch.allclose(model(x=torch.ones(2, 16)), expected)


def test_an_activation_with_something_of_its_own_is_left():
    for change in (
        lambda m: setattr(m, "act_fn", Swish()),
        lambda m: m.act_fn.register_forward_hook(lambda *args: None),
        lambda m: setattr(m, "act_fn", Bounded()),
    ):
        model = MLP()
        change(model)
        (told,) = llmkern.kernelize(model).modules
        assert not told.by and "its activation" in told.left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_without_an_eps_has_torchs(dtype):
    plain, x = nn.RMSNorm(64).to(dtype), (1e-3 * torch.randn(4, 64)).to(dtype)
    fast = copy.deepcopy(plain)
    llmkern.kernelize(fast)
    torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.parametrize("batch", [2, 3])
def test_hooks_on_the_norms_of_layers(batch):
    """Each sees and changes what it does in torch's own layer."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    fast = copy.deepcopy(plain)
    llmkern.kernelize(fast)
    for model in (plain, fast):
        model.norm1.register_forward_pre_hook(lambda module, args: (args[0].clamp(-0.5, 0.5),))
        model.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(batch, 5, 16)
    torch.testing.assert_close(fast(x), plain(x))


def test_hooks_of_all_modules():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    llmkern.kernelize(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(torch.randn(2, 5, 16))
    finally:
        handle.remove()
    assert seen and not [o for o in seen if isinstance(o, tuple) and o[1] is not None]


def test_modules_with_hooks_are_served_and_keep_them():
    model, calls = nn.ModuleList([MLP(), RMSNorm()]), []
    model[0].register_forward_hook(lambda *args: calls.append(0))
    model[1].register_forward_pre_hook(lambda *args: calls.append(1))
    assert llmkern.kernelize(model).replaced == ["0", "1"] and not calls  # asking runs no hook
    model[0](torch.randn(2, 8)), model[1](torch.randn(2, 16))
    assert calls == [0, 1]


def test_modules_with_a_forward_of_their_own_are_left_and_told():
    """As libraries put one on the object that move weights before each call."""
    model = llama()
    for module in model.modules():
        if type(module).__name__ in ("LlamaAttention", "LlamaMLP", "LlamaRMSNorm"):
            module.forward = module.forward
    told = [m for m in llmkern.kernelize(model).modules if m.name]
    assert len(told) == 5 and {m.left for m in told} == {structure.OWN_FORWARD}


@pytest.mark.parametrize("surroundings", ["autocast", "bfloat16", "float64", "meta"])
def test_in_any_surroundings(surroundings):
    model = llama()
    before = torch.get_default_dtype()
    try:
        if surroundings == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                told = llmkern.kernelize(model)
        elif surroundings == "meta":
            with torch.device("meta"):
                told = llmkern.kernelize(model)
        else:
            torch.set_default_dtype(getattr(torch, surroundings))
            told = llmkern.kernelize(model)
    finally:
        torch.set_default_dtype(before)
    assert told.replaced and not [m for m in told.modules if m.left]


def test_asking_moves_no_generator():
    model = DroppingMLP()
    state = torch.get_rng_state()
    llmkern.kernelize(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_verify_with_a_cache_among_the_outputs():
    model, ids = llama().eval(), torch.randint(3, 50, (2, 7))
    told = llmkern.kernelize(model, verify={"input_ids": ids})
    assert told.verification and "past_key_values" in model(ids)


def test_verify_that_raises_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(RuntimeError):
        llmkern.kernelize(model, verify=torch.randn(2, 7))
    assert type(model[0]) is nn.LayerNorm
    model = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"verify: expected a model that drops nothing"):
        llmkern.kernelize(model, verify=torch.randn(2, 8))
    assert type(model[0]) is nn.LayerNorm


def test_float64_of_a_hugging_face_model():
    model, ids = llama().double().eval(), torch.randint(3, 50, (2, 7))
    expected = model(ids).logits
    llmkern.kernelize(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_does_not_ask_the_interface_is_left():
    config = transformers.FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    told = llmkern.kernelize(transformers.FalconForCausalLM(config))
    attention = [m for m in told.modules if m.kind == "FalconForCausalLM"]
    assert [m.by for m in attention] == [""] and "cannot be exchanged" in attention[0].left


def test_a_pickle_runs_in_a_new_process(tmp_path):
    model, ids = llama().eval(), torch.arange(3, 10)[None]
    llmkern.kernelize(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1] + '/model.pt', weights_only=False); "
        "same = torch.equal(model(torch.arange(3, 10)[None]).logits, torch.load(sys.argv[1] + '/logits.pt')); "
        "sys.exit(0 if same else 3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        (
            {"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)},
            TypeError,
            "key_padding_mask: expected dtype bool",
        ),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "attn_mask: expected dtype bool"),
        ({"key_padding_mask": torch.zeros(1, 5)}, ValueError, r"key_padding_mask: expected shape \(2, 5\)"),
        ({"attn_mask": torch.zeros(1, 5)}, ValueError, r"attn_mask: expected shape \(5, 5\) or \(8, 5, 5\)"),
        ({"attn_mask": torch.zeros(4, 5, 5)}, ValueError, "attn_mask: expected shape"),
    ],
)
def test_masks_that_torch_refuses(masks, error, words):
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    llmkern.kernelize(model)
    x = torch.randn(2, 5, 16)
    with pytest.raises(error, match=words):
        model(x, x, x, **masks)


def test_questions_show_where_eps_stands():
    assert structure.rms_norm(RMSNorm(1e-3)) and isinstance(structure.rms_norm(NormWithEpsOutside(1e-6)), str)
