"""Dense masks that are looked at by tiles, in Triton's interpreter; test_triton_mask.py runs this file."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.attention.triton_call import Call
from llmkern.attention.triton_configurations import MASK_TILE, Configuration
from llmkern.attention.triton_mask_launch import MaskTiles
from llmkern.verify import verify
from tests.attention.cases import attend, tensors
from tests.attention.mask_cases import SHAPE, looked_at, masks
from tests.attention.on_triton import serve
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
#: Smaller than a tile of the table, as large, and larger both ways.
TILES = [Configuration(16, 32, 4, 1), Configuration(32, 32, 4, 1), Configuration(64, 16, 4, 1)]
MASKS = list(masks())


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


class Interpreted:
    """Runs launches, and keeps the tables of the masks."""

    def __init__(self) -> None:
        self.tables: list[torch.Tensor] = []
        self.kernels: list[str] = []

    def __call__(self, launch):
        self.kernels.append(launch.kernel)
        interpret(launch)
        if launch.kernel == "attention_mask_tiles_kernel":
            self.tables.append(launch.arguments[1])


def results(monkeypatch, always, inputs, mask, scale=0.25, uniform=False, tile=TILES[1], grad=None):
    """Output, log-sum-exp and gradients, and what was run."""
    looked_at(monkeypatch, always)
    run = Interpreted()
    serve(monkeypatch, run, tile=tile)
    leaves = [t.clone().requires_grad_() for t in inputs]
    output, sums = op.attention(*leaves, mask, scale, uniform)
    grad = torch.ones_like(output) if grad is None else grad
    return [output, sums, *torch.autograd.grad(output, leaves, grad)], run


@pytest.mark.parametrize(
    "name", ["shared by all", "of every head", "keys alone", "zeros and -inf", "numbers among them"]
)
def test_the_same_bits(name, monkeypatch):
    """With the table and without; with a window, which has loops of its own."""
    at = MASKS.index(name)
    dtype, tile = (torch.float32, torch.bfloat16)[at % 2], TILES[at % len(TILES)]
    dense = masks()[name]
    dense = dense if dense.dtype == torch.bool else dense.to(dtype)
    inputs, mask = tensors(SHAPE, dtype), Mask(dense, window_right=-1 if at % 2 else 40)
    with_table, run = results(monkeypatch, True, inputs, mask, uniform=at % 2 == 0, tile=tile)
    without, other = results(monkeypatch, False, inputs, mask, uniform=at % 2 == 0, tile=tile)
    assert len(run.tables) == 2 and not other.tables
    assert all(map(torch.equal, with_table, without))


@pytest.mark.parametrize("name", ["of every head", "queries alone", "numbers of heads, in steps"])
def test_the_contract(name, monkeypatch):
    looked_at(monkeypatch, True)
    run = Interpreted()
    serve(monkeypatch, run, tile=TILES[1])
    functions = (attend(name != "of every head", plain) for plain in (False, True))
    verify(*functions, tensors(SHAPE, torch.float16), {"mask": masks()[name]}).raise_if_failed()
    assert run.tables


def expected_table(dense, shape):
    """(B, H, tiles, tiles): 1 with something seen, 2 with something to read."""
    batch, heads, _, queries, keys, _, _ = shape
    dense = dense.expand(batch, heads, queries, keys)
    seen, to_read = (dense, ~dense) if dense.dtype == torch.bool else (dense != -torch.inf, dense != 0)
    down, across = -(-queries // MASK_TILE), -(-keys // MASK_TILE)

    def some(x):
        x = torch.nn.functional.pad(x, (0, across * MASK_TILE - keys, 0, down * MASK_TILE - queries))
        return x.view(batch, heads, down, MASK_TILE, across, MASK_TILE).any(5).any(3)

    return some(seen).byte() + 2 * some(to_read).byte()


@pytest.mark.parametrize("name", MASKS)
def test_the_table(name, monkeypatch):
    """One for all that a mask is broadcast over; every byte."""
    looked_at(monkeypatch, True)
    dense, inputs = masks()[name], tensors(SHAPE)
    call = Call(*inputs, (*Mask(dense).arguments(), 0.25, False))
    made = MaskTiles(interpret, call, dense)
    table, expected = made.make(dense, inputs[0]), expected_table(dense, SHAPE)
    assert table.stride() == tuple(step or n for step, n in zip(made.steps, table.stride(), strict=True))
    one = [1 if n == 1 else m for n, m in zip(dense.shape[:2], expected.shape[:2], strict=True)]
    if "expanded" in name:
        one[1] = 1
    assert list(table.shape[:2]) == one and table.dtype == torch.uint8
    assert torch.equal(table.expand(expected.shape), expected)


def test_nan_and_infinity_are_read(monkeypatch):
    """In a mask that is added: as the plain version has them, and in no tile that is skipped."""
    shape = (1, 2, 1, 33, 40, 16, 16)
    inputs, added = tensors(shape), torch.where(torch.arange(40) < 32, 0.0, -torch.inf).repeat(1, 1, 33, 1)
    added[0, 0, 3, 5], added[0, 0, 32, 39] = torch.nan, torch.inf
    looked_at(monkeypatch, True)
    run = Interpreted()
    serve(monkeypatch, run, tile=TILES[1])
    output = op.attention(*inputs, Mask(added), 0.25)[0]
    expected = reference.attention(*inputs, *Mask(added).arguments(), 0.25, False)[0]
    assert run.tables[0].flatten().tolist() == [3, 2, 1, 3]
    torch.testing.assert_close(output, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert output[:, :, [3, 32]].isnan().all() and output.isfinite().sum() == 2 * 31 * 16


def test_what_is_hidden_has_no_part(monkeypatch):
    """Keys and values that no query sees may be NaN: in a hidden tile they are not read, in a mixed one they count
    nothing."""
    seen = torch.ones(1, 1, 33, 70, dtype=torch.bool)
    seen[..., 32:64] = False
    q, k, v = tensors((1, 1, 1, 33, 70, 16, 16))
    clean, _ = results(monkeypatch, True, (q, k, v), Mask(seen))
    k[:, :, 32:64], v[:, :, 32:64] = torch.nan, torch.inf
    spoiled, run = results(monkeypatch, True, (q, k, v), Mask(seen))
    assert all(map(torch.equal, clean[:3], spoiled[:3])) and run.tables
    seen[..., 5] = False
    clean[0] = op.attention(q, k, v, Mask(seen), 0.25)[0]
    k[:, :, 5], v[:, :, 5] = torch.nan, torch.inf
    torch.testing.assert_close(op.attention(q, k, v, Mask(seen), 0.25)[0], clean[0], rtol=2e-5, atol=2e-6)


def test_every_rule_together(monkeypatch):
    """The table beside lengths, windows, a soft cap, slopes, a sink and dropout."""
    looked_at(monkeypatch, True)
    run = Interpreted()
    serve(monkeypatch, run, tile=TILES[1])
    rules = {
        "mask": masks()["numbers among them"], "key_lengths": torch.tensor([70, 50]), "window": (60, 30),
        "bottom_right": True, "softcap": 3.0, "slopes": torch.rand(2, 2) / 8, "sink": torch.randn(2),
        "dropout_p": 0.2, "seed": torch.tensor(7),
    }  # fmt: skip
    verify(*(attend(plain=plain) for plain in (False, True)), tensors(SHAPE), rules).raise_if_failed()
    assert run.tables


def test_a_mask_that_changes_in_place_is_looked_at_again(monkeypatch):
    looked_at(monkeypatch, True)
    serve(monkeypatch, interpret, tile=TILES[1])
    inputs, dense = tensors(SHAPE), torch.ones(1, 1, *SHAPE[3:5], dtype=torch.bool)
    for _ in range(2):
        output = op.attention(*inputs, Mask(dense), 0.25)[0]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=dense, scale=0.25, enable_gqa=True
        )
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        dense[..., 32:64] = False
        dense[..., 35, 66] = False


@pytest.mark.parametrize("bit", [1, 2])
def test_a_table_that_is_wrong_is_seen(bit, monkeypatch):
    """Each bit is used: without it tiles are skipped that should not be, or not read."""
    looked_at(monkeypatch, True)
    left = [3]

    def run(launch):
        interpret(launch)
        if launch.kernel == "attention_mask_tiles_kernel":
            launch.arguments[1].bitwise_and_(left[0])

    serve(monkeypatch, run, tile=TILES[1])
    inputs, outputs = tensors((1, 1, 1, 33, 70, 16, 16)), []
    for left[0] in (3, 3 - bit):
        outputs.append(op.attention(*inputs, Mask(masks()["documents"][:, :, :33]), 0.25)[0])
    assert not torch.equal(*outputs)
