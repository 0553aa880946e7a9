"""Dense masks that are looked at by tiles, in Triton's interpreter; test_triton_mask.py runs this file."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import op
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import MASK_TILE, Configuration
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


def results(monkeypatch, always, inputs, mask, scale=0.25, uniform=False, tile=TILES[0], grad=None):
    """Output, log-sum-exp and gradients, and what was run."""
    looked_at(monkeypatch, always)
    run = Interpreted()
    serve(monkeypatch, run, tile=tile)
    leaves = [t.clone().requires_grad_() for t in inputs]
    output, sums = op.attention(*leaves, mask, scale, uniform)
    grad = torch.ones_like(output) if grad is None else grad
    return [output, sums, *torch.autograd.grad(output, leaves, grad)], run


@pytest.mark.parametrize("name", MASKS)
def test_the_same_bits_and_the_contract(name, monkeypatch):
    """With the table and without, and held to the plain version; causal too, which has loops of its own."""
    at = MASKS.index(name)
    dtype, tile = (torch.float32, torch.bfloat16, torch.float16)[at % 3], TILES[at % len(TILES)]
    dense = masks()[name]
    dense = dense if dense.dtype == torch.bool else dense.to(dtype)
    inputs, mask = tensors(SHAPE, dtype), Mask(dense, window_right=-1 if at % 2 else 40)
    with_table, run = results(monkeypatch, True, inputs, mask, uniform=at % 2 == 0, tile=tile)
    without, other = results(monkeypatch, False, inputs, mask, uniform=at % 2 == 0, tile=tile)
    assert len(run.tables) == 2 and not other.tables
    for got, expected in zip(with_table, without, strict=True):
        assert torch.equal(got, expected)
    looked_at(monkeypatch, True)
    serve(monkeypatch, Interpreted(), tile=tile)
    backend.forget_plans()
    functions = (attend(at % 2 == 0, plain) for plain in (False, True))
    verify(*functions, inputs, {"mask": dense, "window": (-1, mask.window_right)}).raise_if_failed()


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
    dense = masks()[name]
    _, run = results(monkeypatch, True, tensors(SHAPE), Mask(dense))
    table, expected = run.tables[0], expected_table(dense, SHAPE)
    one = [1 if n == 1 else m for n, m in zip(dense.shape[:2], expected.shape[:2], strict=True)]
    if "expanded" in name:
        one[1] = 1
    assert list(table.shape[:2]) == one and table.dtype == torch.uint8
    assert torch.equal(table.expand(expected.shape), expected)


def test_nan_and_infinity_are_read(monkeypatch):
    """In a mask that is added: as the plain version has them, and in no tile that is skipped."""
    for spoiled in (torch.nan, torch.inf):
        added = masks()["zeros and -inf"].clone()
        added[0, 0, 3, 40], added[0, 0, 70, 99] = spoiled, spoiled
        inputs, mask = tensors(SHAPE), Mask(added)
        with_table, run = results(monkeypatch, True, inputs, mask)
        without, _ = results(monkeypatch, False, inputs, mask)
        assert run.tables[0][0, 0, 0, 1] & run.tables[0][0, 0, 2, 3] & 2
        for got, expected in zip(with_table, without, strict=True):
            assert torch.equal(got.isnan(), expected.isnan())
            torch.testing.assert_close(got, expected, equal_nan=True)
        assert with_table[0].isnan().any() and with_table[0].isfinite().any()


def test_what_is_hidden_has_no_part(monkeypatch):
    """Keys and values that no query sees may be NaN, in hidden tiles and in mixed ones."""
    seen = masks()["shared by all"].clone()
    seen[..., 5], seen[..., 64:96] = False, False
    columns = ~seen[0, 0].any(0)
    q, k, v = tensors(SHAPE)
    spoiled = [q, *(t.masked_fill(columns[:, None], torch.nan) for t in (k, v))]
    clean = [q, *(t.masked_fill(columns[:, None], 0.0) for t in (k, v))]
    grad = torch.randn(*q.shape[:3], v.size(3))
    pairs = (results(monkeypatch, True, inputs, Mask(seen), grad=grad)[0] for inputs in (spoiled, clean))
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def test_every_rule_together(monkeypatch):
    """The table beside lengths, windows, a soft cap, slopes, a sink and dropout."""
    looked_at(monkeypatch, True)
    run = Interpreted()
    serve(monkeypatch, run, tile=TILES[1])
    rules = {
        "mask": masks()["numbers among them"], "key_lengths": torch.tensor([101, 50]), "window": (60, 30),
        "bottom_right": True, "softcap": 3.0, "slopes": torch.rand(2, 4) / 8, "sink": torch.randn(4),
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
        dense[..., 40, 70] = False


@pytest.mark.parametrize("bit", [1, 2])
def test_a_table_that_is_wrong_is_seen(bit, monkeypatch):
    """Each bit is used: without it tiles are skipped that should not be, or not read."""
    looked_at(monkeypatch, True)

    def run(launch):
        interpret(launch)
        if launch.kernel == "attention_mask_tiles_kernel":
            launch.arguments[1].bitwise_and_(3 - bit)

    serve(monkeypatch, run, tile=TILES[1])
    functions = (attend(plain=plain) for plain in (False, True))
    rules = {"mask": masks()["documents"]}
    assert not verify(*functions, tensors(SHAPE), rules, gradients=False)
