"""The integers are exact, and so are the few float32 operations after them: every result equals the reference's."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, extension
from llmkern.functional import int8_linear
from llmkern.int8 import reference, scheme
from llmkern.int8.compiled import MOST_DEPTH
from llmkern.verify import verify
from llmkern.verify.report import judge_row
from tests.int8.cases import FLOATS, QUANTIZATIONS, SHAPES, inputs, positional, quantized, row_kinds, with_outliers


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_the_reference(shape, dtype, isa):
    x, weight, scale, bias = inputs(shape, dtype)
    for b in (None, bias, bias.to(dtype)):
        assert same(int8_linear(x, weight, scale, b), reference.int8_linear(x, weight, scale, b))


# Depths that a rotation of size 4 takes; rows around tiles of 6, of 3, of 16 and 32.
ROWS = [1, 2, 3, 4, 5, 7, 13, 16, 17, 31, 33, 70]


@pytest.mark.parametrize("depth", [64, 128, 320])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_every_quantization(kind, depth, isa):
    """Exactly the reference's results, those of groups too."""
    choice = QUANTIZATIONS[kind]
    for rows in ROWS:
        x = with_outliers(torch.randn(rows, depth))
        weight, scale = quantized(torch.randn(67, depth), **choice)
        bias = torch.randn(67)
        args = (weight, scale, bias, *positional(**choice))
        out, expected = int8_linear(x, weight, scale, bias, **choice), reference.int8_linear(x, *args)
        assert same(out, expected), (kind, rows)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_integers_of_rows(kind, dtype, isa):
    choice = {k: v for k, v in QUANTIZATIONS[kind].items()}
    for depth in (1, 3, 63, 65, 128, 200, 4096 + 64):
        if depth % (16 * choice.get("rotate", 1)) and "rotate" in choice:
            continue
        x = with_outliers(torch.cat([torch.randn(9, depth), *(r[None] for r in row_kinds(depth).values())])).to(dtype)
        group = choice.get("group", 0)
        integers = torch.empty(x.shape, dtype=torch.int32)
        scale = torch.empty(len(x), -(-depth // group) if group else 1)
        zero = torch.empty(scale.shape, dtype=torch.int32)
        code = scheme.INPUTS[choice.get("inputs", "outliers")]
        quantization = extension._C.Quantization(code, "inputs" not in choice, group, choice.get("rotate", 1))
        given = choice.get("input_scale", torch.zeros(0)).data_ptr()
        dtype_code = extension.DTYPE_CODES[dtype]
        extension._C.quantize_rows(
            x.data_ptr(), integers.data_ptr(), scale.data_ptr(), zero.data_ptr(), given, len(x), depth, depth,
            quantization, dtype_code,
        )  # fmt: skip
        expected = reference.quantize_rows(x, **({"inputs": "outliers"} | choice))
        assert same(scale.view_as(expected[1]), expected[1]), depth
        whole = expected[1].isfinite().view(len(x), -1).all(1)
        assert torch.equal(integers[whole], expected[0][whole]) and torch.equal(
            zero.view_as(expected[2])[whole], expected[2][whole]
        ), depth


@pytest.mark.parametrize("kind", ["outliers", "row", "16bit", "groups of 32"])
@pytest.mark.parametrize("activation", scheme.ACTIVATIONS)
def test_what_follows_the_sum(activation, kind, isa):
    choice = QUANTIZATIONS[kind]
    for rows, dtype in ((3, torch.float32), (21, torch.bfloat16), (40, torch.float32)):
        outputs = 2 * 83
        x = with_outliers(torch.randn(rows, 96)).to(dtype)
        weight, scale = quantized(torch.randn(outputs, 96) * 0.3, **choice)
        bias = torch.randn(outputs)
        shape = (rows, outputs // 2 if activation in scheme.PAIRS else outputs)
        residual = torch.randn(shape).to(dtype)
        for r in (None, residual, torch.stack([residual, residual], 1)[:, 0]):
            args = (weight, scale, bias, *positional(**choice, activation=activation, residual=r))
            wide = [t.double() if isinstance(t, torch.Tensor) and t is r else t for t in args]
            out = int8_linear(x, weight, scale, bias, **choice, activation=activation, residual=r)
            expected, truth = reference.int8_linear(x, *args), reference.int8_linear(x.double(), *wide)
            assert judge_row("", "output", out, expected, truth).passed, (rows, dtype)


def test_activations_far_out(isa):
    """Where an exponential would overflow or vanish; at infinity the limit, where torch's may give NaN."""
    x = torch.tensor([-3e38, -1e4, -100.5, -88, -30, -10, -5.5, -1e-30, -0.0, 0, 1e-30, 0.4, 6, 89, 1e4, 1e38])
    x = torch.cat([x, torch.linspace(-9, 9, 4001), torch.tensor([-torch.inf, torch.inf, torch.nan])])
    weight, scale = torch.zeros(len(x), 4, dtype=torch.int8), torch.ones(len(x))
    for name in ("relu", "gelu", "gelu_tanh", "silu"):  # a weight of zeros leaves the bias
        out = int8_linear(torch.ones(1, 4), weight, scale, x, activation=name)[0]
        assert out[-3] == 0 and out[-2] == torch.inf and out[-1].isnan(), name
        expected, truth = reference.activate(x[:-3], name), reference.activate(x[:-3].double(), name)
        torch.testing.assert_close(out[:-3].double(), truth, atol=5e-7, rtol=5e-7, msg=name)
        usual = x[:-3].abs() <= 9
        assert judge_row("", name, out[:-3][usual], expected[usual], truth[usual]).passed, name


def test_the_reference_is_integer_arithmetic():
    """In Python's integers and fractions of float32, element by element."""
    x, weight, scale, _ = inputs((3, 50, 4))
    q, row_scale, zero_point = reference.quantize_rows(x)
    y = reference.int8_linear(x, weight, scale, None)
    for m in range(3):
        for n in range(4):
            total = sum((int(a) - int(zero_point[m])) * int(w) for a, w in zip(q[m], weight[n], strict=True))
            assert y[m, n] == torch.tensor(float(total)) * (row_scale[m] * scale[n])


@pytest.mark.parametrize("depth", [3, 64, 301])
def test_special_rows(depth, isa):
    kinds = row_kinds(depth)
    x = torch.stack(list(kinds.values()))
    _, weight, scale, bias = inputs((1, depth, 37))
    out, expected = int8_linear(x, weight, scale, bias), reference.int8_linear(x, weight, scale, bias)
    for i, name in enumerate(kinds):
        assert same(out[i], expected[i]), name
        broken = name in ("range beyond float32", "infinite", "negative infinite", "nan first", "nan last")
        assert out[i].isnan().all() if broken else out[i].isfinite().all(), name


@pytest.mark.parametrize("depth", [16, 4096, 65_000])
def test_the_largest_sums(depth, isa):
    """All products at their extremes: no instruction may saturate on the way."""
    for low, high, value in ((0.0, 255.0, 127), (-255.0, 0.0, -127), (0.0, 255.0, -128)):
        x = torch.full((2, depth), high if high else low)
        x[1, ::2] = low if high else high
        weight = torch.full((33, depth), value, dtype=torch.int8)
        scale = torch.ones(33)
        assert same(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_deeper_than_the_sums_hold_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    x, weight, scale = torch.ones(1, MOST_DEPTH + 1), torch.ones(1, MOST_DEPTH + 1, dtype=torch.int8), torch.ones(1)
    with pytest.warns(UserWarning, match=r"K = \d+ is above"):
        out = int8_linear(x, weight, scale)
    assert abs(out.item() / (MOST_DEPTH + 1) - 1) < 1e-6


def test_a_row_depends_on_nothing_around_it(isa):
    x, weight, scale, bias = inputs((100, 96, 130))
    whole = int8_linear(x, weight, scale, bias)
    for rows in (slice(0, 1), slice(7, 12), slice(99, 100)):
        assert torch.equal(int8_linear(x[rows], weight, scale, bias), whole[rows])
    assert torch.equal(int8_linear(x, weight[30:40], scale[30:40], bias[30:40]), whole[:, 30:40])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(int8_linear(x, weight, scale, bias), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(dtype, isa):
    """Those of a linear layer with the dequantised weight: straight through the rounding."""
    x, weight, scale, bias = inputs((9, 70, 33), dtype)

    bias = bias.to(dtype)
    arguments = (x.requires_grad_(), weight, scale, bias.requires_grad_())
    report = verify(int8_linear, reference.int8_linear, arguments)
    report.raise_if_failed()
    assert [row.name for row in report.rows] == ["output", "x", "bias"]
    grad = torch.autograd.grad(reference.int8_linear(*arguments).sum(), x)[0]
    expected = (weight * scale[:, None].double()).sum(0).expand_as(x)
    torch.testing.assert_close(grad, expected.to(dtype))
