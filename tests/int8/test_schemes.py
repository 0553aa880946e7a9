"""Every scheme: its name and errors, and the reference's numbers from awkward input, whatever stands around a row."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import nn

import llmkern
from llmkern import reference as plain_modules
from llmkern.functional import int8_linear
from llmkern.int8 import reference
from llmkern.int8.compiled import MOST_DEPTH
from llmkern.int8.scheme import INPUTS, NAMED, Int8Scheme, named, rotation_size
from llmkern.verify.report import judge_row
from tests.int8.bad_inputs import NO_SCHEMES, SCHEMES
from tests.int8.cases import FLOATS, QUANTIZATIONS, positional, quantized, row_kinds, with_outliers

KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)
ROOMS = pytest.mark.parametrize("room", [llmkern, plain_modules], ids=["llmkern", "reference"])


def takes(choice, depth):
    return depth % (16 * choice["rotate"]) == 0 if "rotate" in choice else True


def check(choice, x, weight, scale, bias=None, words="", **options):
    """Exactly the reference's numbers, but for sums over groups, which are within the contract."""
    out = int8_linear(x, weight, scale, bias, **choice, **options)
    args = (weight, scale, bias, *positional(**choice))
    expected = reference.int8_linear(x, *args)
    assert out.dtype == expected.dtype and out.shape == expected.shape, words
    if choice.get("group"):
        row = judge_row("", "output", out, expected, reference.int8_linear(x.double(), *args))
        assert row.passed, (words, row)
        return out
    assert torch.equal(out.isnan(), expected.isnan()), words
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)), words
    return out


@pytest.mark.parametrize(("arguments", "error", "words"), SCHEMES.values(), ids=SCHEMES)
def test_bad_fields_are_named(arguments, error, words):
    with pytest.raises(error) as raised:
        Int8Scheme(*arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@ROOMS
@pytest.mark.parametrize(("scheme", "words"), NO_SCHEMES.values(), ids=NO_SCHEMES)
def test_what_is_no_scheme_is_refused(scheme, words, room):
    for call in (
        lambda: room.Int8Linear(8, 4, scheme=scheme),
        lambda: room.Int8Linear.from_linear(nn.Linear(8, 4), scheme=scheme),
        lambda: room.quantize_model(nn.Sequential(nn.Linear(8, 4)), scheme=scheme),
        lambda: named(scheme),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_scheme_is_a_value():
    assert Int8Scheme() == Int8Scheme("outliers", 0, False, None) == named("outliers")
    assert Int8Scheme("row") != Int8Scheme() and len({Int8Scheme(), Int8Scheme(), named("row")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Int8Scheme().group = 32
    for name, scheme in NAMED.items():
        assert named(name) is scheme and named(scheme) is scheme
        assert pickle.loads(pickle.dumps(scheme)) == scheme == dataclasses.replace(scheme)
        assert scheme.calibrated == (name in ("static", "smooth"))
        assert scheme.inputs in INPUTS


def test_the_largest_rotation_of_a_depth():
    depths = {1: 1, 16: 1, 31: 1, 32: 2, 48: 1, 64: 4, 96: 2, 128: 8, 768: 16, 1024: 64, 4096: 64, 4100: 1}
    assert {depth: rotation_size(depth) for depth in depths} == depths


@ROOMS
@pytest.mark.parametrize("name", [n for n in NAMED if n != "smooth"])
def test_layers_by_name_and_by_scheme(name, room, isa):
    """The integers, scales and numbers that the functions give for the same choice."""
    linear, x = nn.Linear(128, 33), with_outliers(torch.randn(9, 128))
    first, second = (room.Int8Linear.from_linear(linear, scheme=s) for s in (name, NAMED[name]))
    assert first.scheme == second.scheme == NAMED[name] and torch.equal(first(x), second(x))
    scheme, rotation = NAMED[name], 8 if NAMED[name].rotate else 1
    weight, scale = reference.quantize_weight(reference.hadamard(linear.weight.detach(), rotation), scheme.group)
    assert torch.equal(first.weight, weight) and torch.equal(first.weight_scale, scale)
    assert first.arguments()[1:] == (scheme.inputs, scheme.group, rotation)
    choice = {"inputs": scheme.inputs, "group": scheme.group, "rotate": rotation, "input_scale": first.input_scale}
    assert torch.equal(int8_linear(x, weight, scale, linear.bias, **choice), llmkern.Int8Linear.forward(first, x))
    assert (str(scheme) in repr(first)) == (scheme != Int8Scheme())
    if not scheme.calibrated:
        assert nn.functional.cosine_similarity(first(x), linear(x), dim=-1).min() > 0.999


# Not a multiple of what one instruction adds, nor of a vector, of a group, of a panel.
@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_uneven_sizes(kind, dtype, isa):
    choice = QUANTIZATIONS[kind]
    for depth in (3, 5, 7, 63, 65, 64, 320):
        for rows, outputs in ((1, 1), (3, 1), (33, 1), (5, 31), (17, 66)):
            if not takes(choice, depth):
                continue
            weight, scale = quantized(torch.randn(outputs, depth), **choice)
            x = with_outliers(torch.randn(rows, depth)).to(dtype)
            check(choice, x, weight, scale, torch.randn(outputs), (depth, rows, outputs))
            check(choice, x, weight, scale, None, (depth, rows, outputs))


# Around tiles of 6, of 16 and of 32 rows, and blocks of them.
@KINDS
def test_rows_around_tiles(kind, isa):
    choice = QUANTIZATIONS[kind]
    weight, scale = quantized(torch.randn(49, 64), **choice)
    whole, bias = with_outliers(torch.randn(130, 64)), torch.randn(49)
    for rows in (4, 5, 6, 7, 11, 14, 15, 16, 17, 18, 30, 31, 32, 33, 34, 47, 48, 49, 63, 64, 65, 95, 96, 97, 130):
        check(choice, whole[:rows], weight, scale, bias, rows)


@KINDS
def test_outputs_around_panels(kind, isa):
    choice = QUANTIZATIONS[kind]
    x, bias = with_outliers(torch.randn(37, 64)), torch.randn(130)
    weight, scale = quantized(torch.randn(130, 64), **choice)
    for outputs in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129):
        for rows in (2, 37):
            check(choice, x[:rows], weight[:outputs], scale[:outputs], bias[:outputs], (rows, outputs))


@KINDS
def test_nothing(kind, isa):
    """No rows, no outputs, no columns: a sum of nothing is the bias."""
    choice = QUANTIZATIONS[kind]
    for shape, outputs in (
        ((0, 64), 5),
        ((2, 0, 3, 64), 5),
        ((3, 64), 0),
        ((0, 64), 0),
        ((3, 0), 5),
        ((40, 0), 5),
        ((0, 0), 0),
    ):
        weight, scale = quantized(torch.randn(outputs, shape[-1]), **choice)
        bias = torch.randn(outputs)
        out = check(choice, torch.randn(shape), weight, scale, bias, shape)
        assert out.shape == (*shape[:-1], outputs)
        if not shape[-1]:
            assert torch.equal(out, bias.expand_as(out))
        pairs = int8_linear(torch.randn(shape), weight[: outputs // 2 * 2], scale[: outputs // 2 * 2],
                            **choice, activation="swiglu")  # fmt: skip
        assert pairs.shape == (*shape[:-1], outputs // 2)


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_rows(kind, dtype, isa):
    """Zeros, ties, subnormal and huge numbers, infinity and NaN: each row as the reference has it, and as alone."""
    choice = QUANTIZATIONS[kind]
    for depth in (5, 64, 65, 192):
        if not takes(choice, depth):
            continue
        kinds = row_kinds(depth)
        if "group" in choice:
            del kinds["range beyond float32"]  # below
        x = torch.stack(list(kinds.values())).to(dtype)
        weight, scale = quantized(torch.randn(37, depth), **choice)
        bias = torch.randn(37)
        whole = int8_linear(x, weight, scale, bias, **choice)
        for i, name in enumerate(kinds):
            alone = check(choice, x[i : i + 1], weight, scale, bias, (name, depth))[0]
            assert torch.equal(alone.nan_to_num(nan=7.0), whole[i].nan_to_num(nan=7.0)), (name, depth)
            assert x[i].isfinite().all() or alone.isnan().all(), (name, depth)
        assert torch.equal(whole[list(kinds).index("zeros")], bias.to(dtype)), depth


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZATIONS if "group" in kind])
def test_sums_over_groups_that_overflow(kind, isa):
    """Where a group's part is beyond float32 the reference has infinity, and NaN where two of them meet."""
    choice = QUANTIZATIONS[kind]
    weight, scale = quantized(torch.randn(37, 192), **choice)
    for factor in (1e37, 1e38, 3e38):
        check(choice, torch.linspace(-1, 1, 192)[None] * factor, weight, scale, torch.randn(37), factor)


@KINDS
def test_one_broken_element_anywhere(kind, isa):
    """Breaks its row, and no other: the position decides which vector, group and digit it meets."""
    choice = QUANTIZATIONS[kind]
    weight, scale = quantized(torch.randn(21, 192), **choice)
    clean = torch.randn(192, 192)
    expected = int8_linear(clean, weight, scale, **choice)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = clean.clone()
        x[range(0, 192, 2), range(0, 192, 2)] = value
        out = check(choice, x, weight, scale, None, value)
        assert out[::2].isnan().all() and torch.equal(out[1::2], expected[1::2]), value


def spread(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": spread,
    "every second row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "padded rows": lambda x: torch.cat([x, x[:, :3]], 1)[:, : x.size(1)],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "rows far apart": lambda x: torch.cat([x, x.new_full((x.size(0), 4096), 99)], 1)[:, : x.size(1)],
    "a batch in another order": lambda x: x.view(3, 11, -1).transpose(0, 1).contiguous().transpose(0, 1),
}


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(kind, dtype, isa):
    """Of x, weight, scales, bias and residual."""
    choice = QUANTIZATIONS[kind]
    x = with_outliers(torch.randn(33, 64)).to(dtype)
    weight, scale = quantized(torch.randn(35, 64), **choice)
    bias, residual = torch.randn(35), torch.randn(33, 35).to(dtype)
    expected = int8_linear(x, weight, scale, bias, residual=residual, **choice)
    for name, layout in LAYOUTS.items():
        out = int8_linear(layout(x), weight, scale, bias, residual=residual.view(*layout(x).shape[:-1], 35), **choice)
        assert torch.equal(out.reshape(33, 35), expected), name
        if name != "a batch in another order":
            out = int8_linear(x, layout(weight), scale, bias, residual=layout(residual), **choice)
            assert torch.equal(out, expected), name
    rest = {**choice, "residual": residual}
    if "input_scale" in choice:
        rest["input_scale"] = spread(choice["input_scale"])
    assert torch.equal(int8_linear(x, weight, spread(scale), spread(bias), **rest), expected)
    assert torch.equal(int8_linear(x, weight, scale.t().contiguous().t(), bias.expand(1, 35)[0], **rest), expected)


@KINDS
def test_rows_that_are_one_row(kind, isa):
    """A stride of 0, of all rows or of some."""
    choice = QUANTIZATIONS[kind]
    weight, scale = quantized(torch.randn(35, 64), **choice)
    x = with_outliers(torch.randn(3, 64))
    expected = int8_linear(x, weight, scale, **choice)
    assert torch.equal(int8_linear(x[1].expand(40, 64), weight, scale, **choice), expected[1].expand(40, 35))
    for shape in ((3, 40), (40, 3)):
        rows = x[:, None].expand(3, 40, 64) if shape[0] == 3 else x.expand(40, 3, 64)
        results = expected[:, None].expand(3, 40, 35) if shape[0] == 3 else expected.expand(40, 3, 35)
        assert torch.equal(int8_linear(rows, weight, scale, **choice), results)
    assert torch.equal(int8_linear(x[:1, :1].expand(40, 64), weight, scale, **choice),
                       int8_linear(x[:1, :1].repeat(40, 64), weight, scale, **choice))  # fmt: skip
    same = int8_linear(x, weight[:1].expand(35, 64), scale[:1].expand(35, *scale.shape[1:]), **choice)
    assert torch.equal(same, expected[:, :1].expand(3, 35))


@pytest.mark.parametrize("kind", ["outliers", "16bit", "groups of 32", "rotated"])
def test_rows_beyond_what_32_bits_count(kind, isa, tmp_path):
    """In a file with holes, of x, residual and out: every distance is one of 64 bits."""
    choice, apart = QUANTIZATIONS[kind], 2**31 + 64
    x, residual = torch.randn(5, 64).bfloat16(), torch.randn(5, 35).bfloat16()
    weight, scale = quantized(torch.randn(35, 64), **choice)
    expected = int8_linear(x, weight, scale, residual=residual, **choice)
    file = tmp_path / "holes"
    whole = torch.from_file(str(file), shared=True, size=4 * apart + 192, dtype=torch.bfloat16)
    file.unlink()
    far_x, far_residual, out = (
        whole.as_strided((5, n), (apart, 1), offset) for n, offset in ((64, 0), (35, 64), (35, 128))
    )
    far_x.copy_(x), far_residual.copy_(residual)
    assert int8_linear(far_x, weight, scale, residual=far_residual, out=out, **choice) is out
    assert torch.equal(out, expected)


@KINDS
@pytest.mark.parametrize("depth", [64, 8192, MOST_DEPTH // 64 * 64, MOST_DEPTH])
def test_the_largest_sums(kind, depth, isa):
    """All products at their extremes, in both digits: nothing overflows or saturates on the way."""
    choice = QUANTIZATIONS[kind]
    if not takes(choice, depth):
        return
    weight = torch.tensor([[127, 127], [-127, -127], [-128, -128], [127, -128], [-127, 127]], dtype=torch.int8)
    weight = weight.repeat(4, depth // 2 + 1)[:, :depth]
    scale = torch.ones(20, -(-depth // choice["group"])) if "group" in choice else torch.ones(20)
    x = torch.full((7, depth), 3.0)
    x[1] = -3.0
    x[2, ::2], x[3, 1::2] = -3.0, 0.0
    x[4, : depth // 64] = 1e4  # outliers, where there are few of them
    x[5, : depth // 64] = -1e4
    x[6] = 0.0
    whole = check(choice, x, weight, scale)
    for rows in (slice(0, 3), slice(3, 7)):
        assert torch.equal(int8_linear(x[rows], weight, scale, **choice), whole[rows])


@pytest.mark.parametrize("zero", [0.0, 1.0, 128.0, 254.0, 255.0])
@pytest.mark.parametrize("step", [0.02, 1e-30, 1e30, 2.0**-126, 3e38])
def test_static_scales(step, zero, isa):
    """What is beyond the range is cut off at it."""
    choice = {"inputs": "static", "input_scale": torch.tensor([step, zero])}
    x = torch.cat([with_outliers(torch.randn(9, 65)), torch.stack(list(row_kinds(65).values()))])
    x = torch.cat([x, x[:9] * step])
    weight, scale = quantized(torch.randn(37, 65))
    check(choice, x, weight, scale, torch.randn(37))
    ends = torch.tensor([[-1.0], [1.0]]) * min(1e3 * step, 3e38)
    check(choice, ends, torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
    if step < 1e38:
        found = int8_linear(ends, torch.ones(1, 1, dtype=torch.int8), torch.ones(1), **choice)
        assert torch.equal(found, torch.tensor([[-zero], [255.0 - zero]]) * step)


@KINDS
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(kind, dtype, isa):
    """Whatever the others hold, outliers or what breaks them, and on however many threads."""
    choice = QUANTIZATIONS[kind]
    x = torch.randn(100, 384)
    weight, scale = quantized(torch.randn(2 * 67, 384) * 0.1, **choice)
    bias = torch.randn(2 * 67)
    usual = x.clone().to(dtype)
    x[1::3] = with_outliers(x[1::3])
    x[2::6] *= 1e3
    x[5, 7], x[11, 8] = torch.nan, torch.inf
    x = x.to(dtype)
    threads = torch.get_num_threads()
    for activation in ("none", "gelu", "swiglu"):
        options = {**choice, "activation": activation}
        whole = int8_linear(x, weight, scale, bias, **options).nan_to_num(nan=7.0)
        for rows in (slice(0, 1), slice(1, 2), slice(3, 8), slice(48, 81), slice(99, 100), slice(0, 17)):
            part = int8_linear(x[rows], weight, scale, bias, **options).nan_to_num(nan=7.0)
            assert torch.equal(part, whole[rows]), (activation, rows)
        assert torch.equal(int8_linear(usual, weight, scale, bias, **options)[::3], whole[::3]), activation
        assert torch.equal(int8_linear(x.flip(0), weight, scale, bias, **options).nan_to_num(nan=7.0), whole.flip(0))
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(int8_linear(x, weight, scale, bias, **options).nan_to_num(nan=7.0), whole), count
        finally:
            torch.set_num_threads(threads)


@KINDS
def test_an_output_alone_has_the_bits_that_it_has_among_others(kind, isa):
    choice = QUANTIZATIONS[kind]
    x = with_outliers(torch.randn(20, 192))
    weight, scale = quantized(torch.randn(134, 192), **choice)
    bias = torch.randn(134)
    whole = int8_linear(x, weight, scale, bias, **choice)
    for outputs in (slice(0, 1), slice(15, 17), slice(30, 97), slice(133, 134)):
        part = int8_linear(x, weight[outputs], scale[outputs], bias[outputs], **choice)
        assert torch.equal(part, whole[:, outputs]), outputs


@pytest.mark.parametrize("kind", ["outliers", "row", "16bit", "groups of 128", "rotated"])
def test_more_rows_than_are_quantised_at_a_time(kind, isa):
    """Rows come in chunks, whose sizes the depth decides; residual and out move along with them."""
    choice = QUANTIZATIONS[kind]
    x = torch.randn(40, 16448).bfloat16().repeat(15, 1)
    x[::7, 5] = 50
    weight, scale = quantized(torch.randn(6, 16448), **choice)
    residual, out = (torch.zeros(600, 9, dtype=x.dtype)[:, 2:8] for _ in range(2))
    residual.normal_()
    int8_linear(x, weight, scale, residual=residual, out=out, **choice)
    for begin in range(0, 600, 200):
        part = slice(begin, begin + 200)
        assert torch.equal(int8_linear(x[part], weight, scale, residual=residual[part], **choice), out[part]), begin
    check(choice, x[-10:], weight, scale)
