"""What kernelize knows by what it computes: look-alikes are left and told, mixed dtypes and int8 layers are served."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llmkern
from llmkern.models import rotary

transformers = pytest.importorskip("transformers", minversion="5")

from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.t5 import modeling_t5  # noqa: E402

from tests.models.test_kernelize_transformers import TOKENS, decoder, logits, pair  # noqa: E402


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj, self.act_fn = nn.Linear(12, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Scaled(MLP):
    def forward(self, x):
        return 1.01 * super().forward(x)


class Joined(nn.Module):
    """Phi-3's parts, but the gate in the second half."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = nn.Linear(8, 24), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


@pytest.mark.parametrize("kind", [Swapped, Scaled, Joined])
def test_a_gated_layer_that_is_another_is_left(kind):
    (told,) = llmkern.kernelize(kind()).modules
    assert not told.by and "computes something else" in told.left


def test_asking_leaves_no_trace():
    model = MLP()
    model.act_fn.train(False)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    values = [p.clone() for p in model.parameters()]
    assert llmkern.kernelize(model, dry_run=True).replaced == [""]
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


def test_a_gated_layer_on_the_meta_device_and_one_in_int8():
    assert llmkern.kernelize(MLP().to("meta")).replaced == [""]
    model, x = llmkern.quantize_model(MLP(), measure=False), torch.randn(4, 8)
    expected = model(x)
    assert llmkern.kernelize(model).replaced == [""]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_t5_keeps_the_last_projection_in_float32(dtype):
    config = transformers.T5Config(d_model=16, d_ff=24, feed_forward_proj="gated-gelu")
    model = modeling_t5.T5DenseGatedActDense(config).to(dtype).eval()
    model.wo.float()
    x = torch.randn(5, 16).to(dtype)
    expected = model(x)
    assert llmkern.kernelize(model).replaced == [""]
    assert model(x).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-3)


def test_t5_in_training_drops_the_middle():
    config = transformers.T5Config(d_model=16, d_ff=24, feed_forward_proj="gated-silu", dropout_rate=1.0)
    model = modeling_t5.T5DenseGatedActDense(config)
    llmkern.kernelize(model)
    assert not model(torch.randn(5, 16)).any()


class GemmaLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(16)), 1e-6

    def forward(self, x):
        return (F.rms_norm(x.float(), (16,), None, self.eps) * (1 + self.weight.float())).type_as(x)


class GemmaLikeNorm(GemmaLike):
    """Named as a norm is."""


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norms_give_the_dtype_that_the_model_gives(x_dtype, weight_dtype):
    for model in (modeling_llama.LlamaRMSNorm(16), modeling_t5.T5LayerNorm(16), GemmaLikeNorm()):
        model.weight.data = torch.randn(16).to(weight_dtype)
        x = torch.randn(3, 16).to(x_dtype)
        expected = model(x)
        assert llmkern.kernelize(model).replaced == [""]
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)  # dtypes too


def called(monkeypatch):
    """The calls of the kernel that rotates."""
    calls = []
    kernel = rotary.rotary

    def count(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(rotary, "rotary", count)
    return calls


def test_rotation_is_the_kernels_in_this_model_alone(monkeypatch):
    calls, plain = called(monkeypatch), modeling_llama.apply_rotary_pos_emb
    _, fast, _ = pair(lambda: decoder("Llama"))
    other = decoder("Llama").eval()
    logits(fast)
    assert len(calls) == 2
    logits(other)
    assert len(calls) == 2 and modeling_llama.apply_rotary_pos_emb is plain
    assert type(other.model.layers[0].self_attn) is modeling_llama.LlamaAttention
    llmkern.restore(fast)
    logits(fast)
    assert len(calls) == 2 and type(fast.model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_positions_of_each_row():
    plain, fast, _ = pair(lambda: decoder("Llama"))
    positions = torch.stack((torch.arange(11), 3 * torch.arange(11)))
    given = {"input_ids": TOKENS, "position_ids": positions}
    torch.testing.assert_close(fast(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)


def test_a_rotation_in_16_bits(monkeypatch):
    calls = called(monkeypatch)
    plain, fast, _ = pair(lambda: decoder("Olmo2"))  # tables in float32 whatever the model's dtype
    torch.testing.assert_close(logits(fast.bfloat16()), logits(plain.bfloat16()), rtol=5e-2, atol=5e-2)
    assert len(calls) == 2


def scaled(q, k, cos, sin, unsqueeze_dim=1):
    q, k = PLAIN(q, k, cos, sin, unsqueeze_dim)
    return q, 1.01 * k


PLAIN = modeling_llama.apply_rotary_pos_emb


def left_of(model):
    return {m.left for m in llmkern.kernelize(model).modules if m.kind == "LlamaAttention"}


def test_a_rotation_that_is_another_is_left(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    assert left_of(decoder("Llama")) == {"its apply_rotary_pos_emb computes something else than a rotation"}


def test_tables_that_are_others_are_left(monkeypatch):
    def forward(self, x, position_ids):
        cos = position_ids[..., None] * torch.cat((self.inv_freq, self.inv_freq + 1))
        return cos, cos

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", forward)
    assert left_of(decoder("Llama")) == {"nothing is known of the tables of its rotation"}


def test_a_forward_in_a_wrapper_is_left(monkeypatch):
    forward = modeling_llama.LlamaAttention.forward

    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    wrapper.__wrapped__ = forward
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", wrapper)
    assert left_of(decoder("Llama")) == {"its forward is wrapped by another"}


def test_what_the_kernel_does_not_take_is_the_models_own(monkeypatch):
    calls = called(monkeypatch)
    plain, fast, _ = pair(lambda: decoder("Llama"))
    fast.set_attn_implementation("eager")  # in float64 the attention raises
    torch.testing.assert_close(fast.double()(TOKENS).logits, plain.double()(TOKENS).logits)
    turn = rotary.Turn(halves=True, interleaved=False, partial=False, keeps=False)
    q, k, table = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(1, 5, 8)
    for a, b in zip(rotary._rotate(PLAIN, turn, q, k, table, table, 2), PLAIN(q, k, table, table, 2), strict=True):
        assert torch.equal(a, b)
    assert not calls


def test_a_scripted_module_is_left():
    model = nn.Sequential(torch.jit.script(MLP()), nn.LayerNorm(8))
    assert llmkern.kernelize(model).replaced == ["1"]
