"""The Transformer drop-in: state, outputs and gradients of the plain one, under every mask that torch's layers take."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import llmkern
from llmkern import reference
from llmkern.verify import verify

# Wide enough that the largest error of a row is no matter of luck.
D_MODEL = 128
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PADDING = torch.arange(9).expand(3, 9) >= torch.tensor([[9], [4], [1]])
MASKS = {
    "none": {},
    "causal target": {"tgt_mask": CAUSAL},
    "causal target, as a hint": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "boolean causal target": {"tgt_mask": CAUSAL < 0},
    "padding": {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
    "causal and padding": {"tgt_mask": CAUSAL, "tgt_key_padding_mask": PADDING[:, :7]},
    "floating padding": {"src_key_padding_mask": torch.zeros(3, 9).masked_fill(PADDING, -torch.inf)},
    "one mask for each head": {"src_mask": (torch.arange(12 * 81) % 5 == 4).view(12, 9, 9)},
    "memory mask": {"memory_mask": torch.linspace(-2, 1, 63).view(7, 9)},
}


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    plain = reference.Transformer(D_MODEL, 4, 2).eval()
    torch.manual_seed(1)
    fast = llmkern.Transformer(D_MODEL, 4, 2).eval()
    return plain, fast


def test_the_same_seed_gives_the_same_state():
    plain, fast = (module.state_dict() for module in pair())
    assert list(plain) == list(fast)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_outputs_and_gradients(masks, isa):
    plain, fast = pair()
    src, tgt = torch.randn(9, 3, D_MODEL), torch.randn(7, 3, D_MODEL)
    verify(fast, plain, (src, tgt), masks).raise_if_failed()


def test_without_a_batch(isa):
    plain, fast = pair()
    verify(fast, plain, (torch.randn(9, D_MODEL), torch.randn(7, D_MODEL))).raise_if_failed()


def test_training_drops_by_torchs_seed():
    """The kernels have a mask of their own, which the seed of torch decides; without dropout training is torch's."""
    plain, fast = (module.train() for module in pair())
    src, tgt = torch.randn(9, 3, D_MODEL), torch.randn(7, 3, D_MODEL)
    outputs = []
    for seed in (2, 2, 3):
        torch.manual_seed(seed)
        outputs.append(fast(src, tgt))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    for module in (*plain.modules(), *fast.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    verify(fast, plain, (src, tgt)).raise_if_failed()


@pytest.mark.parametrize("module", [reference.Transformer, llmkern.Transformer])
def test_bad_input_is_named(module):
    with pytest.raises(ValueError, match="nhead: expected a divisor of d_model = 32, got 5"):
        module(32, 5, 1)
    model = module(32, 4, 1)
    with pytest.raises(ValueError, match=r"src: expected .* d_model = 32, got shape \(9, 3, 31\)"):
        model(torch.randn(9, 3, 31), torch.randn(7, 3, 32))
    with pytest.raises(ValueError, match=r"tgt: expected the batch of src"):
        model(torch.randn(9, 3, 32), torch.randn(7, 2, 32))


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# name: (changed arguments of a Transformer(32, 4, 1) for src (9, 3, 32) and tgt (7, 3, 32), exception, words)
BAD = {
    **{
        f"src_mask {s}": (
            {"src_mask": t(*s)},
            ValueError,
            rf"src_mask: expected .* \(9, 9\) .* \(12, 9, 9\), got shape {re.escape(str(s))}",
        )
        for s in ((1, 9), (9, 1), (12, 1, 9), (3, 4, 9, 9), (9, 7))
    },
    **{
        f"src_mask {d}": ({"src_mask": t(9, 9, dtype=d)}, TypeError, "src_mask: expected dtype bool or float32, got")
        for d in (torch.float64, torch.float16, torch.int64)
    },
    "tgt_mask": ({"tgt_mask": t(7, 9)}, ValueError, r"tgt_mask: expected .* \(7, 7\)"),
    "memory_mask": ({"memory_mask": t(9, 7)}, ValueError, r"memory_mask: expected .* \(7, 9\)"),
    "a list for a mask": ({"tgt_mask": [1.0]}, TypeError, "tgt_mask: expected a torch.Tensor, got list"),
    "mask device": ({"tgt_mask": t(7, 7, device="meta")}, ValueError, "tgt_mask: expected the device of src"),
    **{
        f"padding {s}": (
            {"src_key_padding_mask": t(*s, dtype=torch.bool)},
            ValueError,
            r"src_key_padding_mask: expected \(batch, keys\) = \(3, 9\)",
        )
        for s in ((1, 9), (3, 1), (9,))
    },
    "padding dtype": (
        {"tgt_key_padding_mask": t(3, 7, dtype=torch.int64)},
        TypeError,
        "tgt_key_padding_mask: .* bool or float32",
    ),
    "memory padding": ({"memory_key_padding_mask": t(3, 7)}, ValueError, r"memory_key_padding_mask: .* \(3, 9\)"),
    "src dtype": (
        {"src": t(9, 3, 32, dtype=torch.float64)},
        TypeError,
        "src: expected the dtype of the parameters, float32, got float64",
    ),
    "tgt dtype": (
        {"tgt": t(7, 3, 32, dtype=torch.int64)},
        TypeError,
        "tgt: expected the dtype of the parameters, float32, got int64",
    ),
    "src sparse": (
        {"src": t(9, 3, 32).to_sparse()},
        TypeError,
        r"src: expected a dense tensor \(torch.strided\), got torch.sparse_coo",
    ),
    **{
        f"{name} no flag": (
            {f"{name}_is_causal": "a", f"{name}_mask": t(*sizes)},
            TypeError,
            rf"{name}_is_causal: expected True or False( or None)?, got 'a'",
        )
        for name, sizes in (("src", (9, 9)), ("tgt", (7, 7)), ("memory", (7, 9)))
    },
    "memory flag None": ({"memory_is_causal": None}, TypeError, "memory_is_causal: expected True or False, got None"),
    **{
        f"{name} flag without a mask": (
            {f"{name}_is_causal": True},
            ValueError,
            f"{name}_mask: expected a mask with {name}_is_causal=True, .* got None",
        )
        for name in ("src", "tgt", "memory")
    },
    "src device": (
        {"src": t(9, 3, 32, device="meta")},
        ValueError,
        "src: expected the device of the parameters, cpu, got meta",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("module", [reference.Transformer, llmkern.Transformer])
@pytest.mark.parametrize(("changed", "error", "words"), BAD.values(), ids=BAD)
def test_bad_masks_and_sequences_are_named(changed, error, words, module, training):
    model = module(32, 4, 1).train(training)
    with torch.no_grad(), pytest.raises(error, match=words):
        model(**{"src": t(9, 3, 32), "tgt": t(7, 3, 32), **changed})


@pytest.mark.parametrize("module", [reference.Transformer, llmkern.Transformer])
def test_bad_sizes_are_named(module):
    with pytest.raises(TypeError, match="d_model: expected a positive integer, got '16'"):
        module("16")
    with pytest.raises(ValueError, match="num_layers: expected a positive integer, got 0"):
        module(32, 4, 0)


def test_quantised_and_under_autocast(isa):
    model = llmkern.Transformer(32, 4, 1).eval()
    src, tgt = torch.randn(9, 3, 32), torch.randn(7, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(src.bfloat16(), tgt, src_key_padding_mask=PADDING).shape == tgt.shape
        for name, arguments in (("src", (src.double(), tgt)), ("tgt", (src, tgt.long()))):
            with pytest.raises(TypeError, match=f"{name}: expected dtype float32 or bfloat16 or float16, got"):
                model(*arguments)
    assert llmkern.quantize_model(model)(src, tgt, src_key_padding_mask=PADDING).shape == tgt.shape
