"""kernelize on torch's modules and our references: results, state, pickles; report, dry run, verification, undo."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import llmkern
from llmkern import reference
from llmkern.models import swap
from llmkern.verify import verify

WIDTH = 32
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PADDING = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [4], [1]])
#: (attn_mask, key_padding_mask) for 7 queries and keys, 3 batches, 4 heads
MASKS = {
    "none": (None, None),
    "causal": (CAUSAL, None),
    "boolean": (CAUSAL < 0, None),
    "padding": (None, PADDING),
    "floating padding": (None, torch.zeros(3, 7).masked_fill(PADDING, -torch.inf)),
    "both, boolean": (CAUSAL < 0, PADDING),
    "both, mixed": (CAUSAL, PADDING),
    "one for each head": (torch.randn(12, 7, 7, generator=torch.Generator().manual_seed(0)), None),
    "one for each head, and padding": (
        (torch.arange(12 * 49) % 5 == 4).view(12, 7, 7) & (torch.arange(7) > 0),
        PADDING,
    ),
}
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "kdim and vdim": {"kdim": 24, "vdim": 20},
    "kdim, vdim, without bias": {"kdim": 24, "vdim": 20, "bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True},
    "all of it": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 24, "vdim": 20, "batch_first": True},
}


def pair(make, *args, **kwargs):
    """A module and its kernelized twin."""
    torch.manual_seed(1)
    plain = make(*args, **kwargs)
    with torch.no_grad():
        for p in plain.parameters():  # torch begins with zeros and ones, in which much hides
            p.add_(0.1 * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    llmkern.kernelize(fast)
    return plain.eval(), fast.eval()


def attention_inputs(options, same=False):
    shape = (3, 7) if options.get("batch_first") else (7, 3)
    query = torch.randn(*shape, WIDTH)
    if same:
        return query, query, query
    return query, torch.randn(*shape, options.get("kdim", WIDTH)), torch.randn(*shape, options.get("vdim", WIDTH))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_multihead_attention(options, masks, need_weights):
    plain, fast = pair(nn.MultiheadAttention, WIDTH, 4, **options)
    arguments = {"attn_mask": masks[0], "key_padding_mask": masks[1], "need_weights": need_weights}
    if need_weights and "all" not in options:
        arguments["average_attn_weights"] = masks[1] is None
    verify(fast, plain, attention_inputs(options), arguments).raise_if_failed()
    assert type(fast) is not nn.MultiheadAttention


@pytest.mark.parametrize("batched", [True, False])
def test_self_attention_and_no_batch(batched):
    for options, hint in itertools.product(({}, {"batch_first": True}), (True, False)):
        plain, fast = pair(nn.MultiheadAttention, WIDTH, 4, **options)
        q, k, v = attention_inputs(options, same=True)
        if not batched:
            q = k = v = q[0] if options else q[:, 0]
        causal = {"attn_mask": CAUSAL, "is_causal": hint, "need_weights": False}
        torch.testing.assert_close(fast(q, k, v, **causal)[0], plain(q, k, v, **causal)[0])
        for weights in (True, False):
            for got, expected in zip(*(m(q, k, v, need_weights=weights) for m in (fast, plain)), strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    torch.testing.assert_close(got, expected)


def test_attention_in_training_drops_weights():
    plain, fast = pair(nn.MultiheadAttention, WIDTH, 4, dropout=0.5)
    q = torch.randn(7, 3, WIDTH)
    outputs = [fast.train()(q, q, q, need_weights=False)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    torch.manual_seed(3)
    expected = plain.train()(q, q, q)
    torch.manual_seed(3)
    for a, b in zip(fast(q, q, q), expected, strict=True):  # with weights: torch's own
        assert torch.equal(a, b)
    assert torch.equal(fast.eval()(q, q, q, need_weights=False)[0], fast(q, q, q, need_weights=False)[0])


LAYERS = list(itertools.product((True, False), (True, False), ("relu", "gelu")))


@pytest.mark.parametrize(("norm_first", "batch_first", "activation"), LAYERS)
def test_encoder_and_decoder_layers(norm_first, batch_first, activation):
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": activation, "dim_feedforward": 48}
    shape = (3, 7) if batch_first else (7, 3)
    src, memory = torch.randn(*shape, WIDTH), torch.randn(*shape, WIDTH)
    plain, fast = pair(nn.TransformerEncoderLayer, WIDTH, 4, **options)
    for mask, padding in MASKS.values():
        arguments = {"src_mask": mask, "src_key_padding_mask": padding}
        verify(fast, plain, src, arguments).raise_if_failed()
    plain, fast = pair(nn.TransformerDecoderLayer, WIDTH, 4, **options)
    for mask, padding in MASKS.values():
        arguments = {"tgt_mask": mask, "tgt_key_padding_mask": padding, "memory_key_padding_mask": PADDING}
        verify(fast, plain, (src, memory), arguments).raise_if_failed()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_whole_transformer(batch_first, grad):
    """Without gradients torch takes its own function for inference, where it can, and nested tensors."""
    plain, fast = pair(nn.Transformer, WIDTH, 4, 2, 2, 48, batch_first=batch_first)
    shape = (3, 7) if batch_first else (7, 3)
    src, tgt = torch.randn(*shape, WIDTH), torch.randn(*shape, WIDTH)
    padding = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    for arguments in ({}, {"tgt_mask": CAUSAL, "tgt_is_causal": True}, padding):
        verify(fast, plain, (src, tgt), arguments, gradients=grad).raise_if_failed()
    kinds = {type(m) for m in fast.modules()}
    assert not kinds & {nn.LayerNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer}


def test_nothing_of_the_state_changes():
    plain, fast = pair(nn.Transformer, WIDTH, 4, 1, 1, 48)
    assert list(plain.state_dict()) == list(fast.state_dict())
    for (name, a), (other, b) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    plain.load_state_dict(fast.state_dict())
    before = dict(fast.named_parameters())
    llmkern.restore(fast)
    assert all(before[name] is p for name, p in fast.named_parameters())


def test_restore():
    model = nn.Sequential(
        nn.Transformer(WIDTH, 4, 1, 1, 48), nn.LayerNorm(WIDTH), reference.MultiHeadAttention(WIDTH, 4)
    )
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    nested = model[0].encoder.use_nested_tensor
    llmkern.kernelize(model)
    assert [type(m) for m in model.modules()] != kinds and model[0].encoder.use_nested_tensor is False
    assert llmkern.restore(model) is model
    assert [type(m) for m in model.modules()] == kinds and [set(vars(m)) for m in model.modules()] == attributes
    assert model[0].encoder.use_nested_tensor is nested
    with pytest.raises(ValueError, match=r"model: expected one that llmkern\.kernelize has changed"):
        llmkern.report(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(WIDTH, 4, 48),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 48), 1),
    ],
)
def test_copies_and_pickles_can_be_restored(make):
    plain, fast = pair(make)
    x = torch.randn(7, 3, WIDTH)
    expected = fast(x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected) and llmkern.report(other).replaced == llmkern.report(fast).replaced
        assert [type(m) for m in llmkern.restore(other).modules()] == [type(m) for m in plain.modules()]


REFERENCES = {
    "attention": (lambda: reference.MultiHeadAttention(WIDTH, 4), lambda: (torch.randn(2, 5, WIDTH),) * 3),
    "positional": (lambda: reference.PositionalEncoding(WIDTH, 20), lambda: (torch.randn(5, 2, WIDTH),)),
    "rotary": (lambda: reference.RotaryEmbedding(8, 20), lambda: (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8))),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), lambda: (torch.randn(5, WIDTH),)),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), lambda: (torch.randn(5, WIDTH),)),
}


@pytest.mark.parametrize(("make", "inputs"), REFERENCES.values(), ids=REFERENCES)
def test_the_object_given_is_the_one_that_changes(make, inputs):
    plain, fast = pair(make)
    assert type(fast) is not type(plain) and isinstance(fast, type(plain))
    assert llmkern.report(fast).replaced == [""]
    verify(fast, plain, inputs()).raise_if_failed()


def test_dry_run():
    model = nn.TransformerEncoderLayer(WIDTH, 4, 48)
    kinds = [type(m) for m in model.modules()]
    planned = llmkern.kernelize(model, dry_run=True)
    assert [type(m) for m in model.modules()] == kinds and "would be replaced" in str(planned)
    done = llmkern.kernelize(model)
    assert done.modules == planned.modules and llmkern.report(model) is done
    assert done.replaced == ["", "self_attn", "norm1", "norm2"]
    again = llmkern.kernelize(model)  # does no harm
    assert again.replaced == done.replaced


class OddAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[0] * 2, None


class OddNorm(nn.Module):
    """What looks like an RMSNorm."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_what_is_not_known_is_left_and_told():
    norm = nn.LayerNorm(WIDTH)
    norm.forward = lambda x: x * 3
    model = nn.ModuleList([OddAttention(WIDTH, 4), OddNorm(), norm, nn.Linear(3, 3)])
    plain = copy.deepcopy(model)
    told = llmkern.kernelize(model)
    assert told.replaced == ["0.out_proj"][:0]
    reasons = {m.name: m.left for m in told.modules}
    assert "a subclass of MultiheadAttention" in reasons["0"] and "something else than an RMSNorm" in reasons["1"]
    assert "forward of its own" in reasons["2"] and set(reasons) == {"0", "1", "2"}
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert "0 of 3 modules that kernels might serve replaced" in str(told)


def test_verify_runs_the_contract():
    model = nn.TransformerEncoderLayer(WIDTH, 4, 48).eval()
    x = torch.randn(7, 3, WIDTH)
    for inputs in (x, (x,), {"src": x}):
        told = llmkern.kernelize(model, verify=inputs)
        assert told.verification and "output" in str(told)
        llmkern.restore(model)


def test_a_model_that_fails_is_changed_back(monkeypatch):
    model = nn.TransformerEncoderLayer(WIDTH, 4, 48).eval()
    from llmkern.transformer.layers import FusedAttention

    monkeypatch.setattr(FusedAttention, "forward", lambda self, q, *args, **kwargs: (q * 2, None))
    with pytest.raises(RuntimeError, match="does not keep the contract, and was changed back"):
        llmkern.kernelize(model, verify=torch.randn(7, 3, WIDTH))
    assert type(model) is nn.TransformerEncoderLayer and all(swap.exchanged(m) is None for m in model.modules())
    llmkern.kernelize(model)  # what an earlier call has changed is held to what it was before that
    with pytest.raises(RuntimeError, match="does not keep the contract, and was changed back"):
        llmkern.kernelize(model, verify=torch.randn(7, 3, WIDTH))


def test_bad_input():
    for call in (llmkern.kernelize, llmkern.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
            call([])
    with pytest.raises(TypeError, match="dry_run: expected True or False, got 1"):
        llmkern.kernelize(nn.Linear(1, 1), dry_run=1)


def test_compile_fullgraph():
    _, fast = pair(nn.TransformerEncoderLayer, WIDTH, 4, 48, norm_first=True)
    x = torch.randn(7, 3, WIDTH)
    made = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(x), fast(x))
    exported = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(exported(x), fast(x))
