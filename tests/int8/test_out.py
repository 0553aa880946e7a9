"""int8_linear(..., out=...): the same bits, in any rows and nothing besides; what must not be written is refused."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.functional import int8_linear
from llmkern.int8 import scheme
from tests.int8.cases import FLOATS, QUANTIZATIONS, inputs, positional, quantized, with_outliers

OP = torch.ops.llmkern.int8_linear_out


def arguments(rows, outputs, choice, activation="none", dtype=torch.float32, depth=64):
    """x, weight, weight_scale and bias, and a residual, which has the shape of the result."""
    x = with_outliers(torch.randn(rows, depth)).to(dtype)
    weight, scale = quantized(torch.randn(outputs, depth), **choice)
    written = outputs // 2 if activation in scheme.PAIRS else outputs
    return (x, weight, scale, torch.randn(outputs)), torch.randn(rows, written).to(dtype)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("activation", scheme.ACTIVATIONS)
def test_the_bits_of_a_call_without(activation, kind, isa):
    choice = {**QUANTIZATIONS[kind], "activation": activation}
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16), (33, torch.float16), (35, torch.float32)):
        args, residual = arguments(rows, 2 * 37, QUANTIZATIONS[kind], activation, dtype)
        for r in (None, residual):
            expected = int8_linear(*args, residual=r, **choice)
            for out in (torch.empty_like(expected), torch.empty_like(expected)):  # the second by the plan that is kept
                assert int8_linear(*args, residual=r, out=out, **choice) is out
                assert torch.equal(out, expected), (rows, dtype)


# A view of the shape (m, n) in what `new` makes, which is larger.
LAYOUTS = {
    "padded rows": lambda new, m, n: new(m, n + 5)[:, 2 : n + 2],
    "every second row": lambda new, m, n: new(2 * m, n)[1::2],
    "rows far apart": lambda new, m, n: new(m, 4099)[:, 1000 : 1000 + n],
    "misaligned": lambda new, m, n: new(m * n + 2)[1:-1].view(m, n),
    "every second column": lambda new, m, n: new(m, 2 * n + 1)[:, 1::2],
    "transposed": lambda new, m, n: new(n, m + 1)[:, 1:].t(),
    "a dimension of one between": lambda new, m, n: new(m, 3, n)[:, 1:2].squeeze(1),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_and_nothing_around_it(layout, dtype, isa):
    for kind, activation in (("outliers", "none"), ("16bit", "gelu"), ("groups of 32", "swiglu")):
        choice = {**QUANTIZATIONS[kind], "activation": activation}
        for rows, outputs in ((1, 2), (7, 66), (33, 130)):
            args, residual = arguments(rows, outputs, QUANTIZATIONS[kind], activation, dtype)
            out = layout(lambda *size: torch.full(size, 7, dtype=dtype), *residual.shape)
            whole = out._base
            around = torch.ones_like(whole, dtype=torch.bool)
            around.as_strided(out.shape, out.stride(), out.storage_offset()).zero_()
            assert int8_linear(*args, residual=residual, out=out, **choice) is out
            assert torch.equal(out, int8_linear(*args, residual=residual, **choice)), (kind, rows)
            assert (whole[around] == 7).all(), (kind, rows)


@pytest.mark.parametrize("kind", ["outliers", "groups of 32"])
def test_any_rank_and_no_elements(kind, isa):
    choice = QUANTIZATIONS[kind]
    (x, weight, scale, bias), _ = arguments(24, 33, choice)
    expected = int8_linear(x, weight, scale, bias, **choice)
    for shape in ((2, 12), (2, 3, 4), (1, 24, 1)):
        out = torch.empty(*shape, 33)
        assert int8_linear(x.view(*shape, 64), weight, scale, bias, out=out, **choice) is out
        assert torch.equal(out.view(24, 33), expected)
        # Dimensions in another order than x has them, which no distance of rows describes.
        out = torch.empty(*shape[::-1], 33).permute(*range(len(shape))[::-1], -1)
        int8_linear(x.view(*shape, 64), weight, scale, bias, out=out, **choice)
        assert torch.equal(out.reshape(24, 33), expected)
    out = torch.empty(33)
    assert torch.equal(int8_linear(x[3], weight, scale, bias, out=out, **choice), expected[3])
    for none in (x[:0], x.view(4, 6, 64)[:, :0]):
        out = torch.empty(*none.shape[:-1], 33)
        assert int8_linear(none, weight, scale, bias, out=out, **choice) is out
    assert int8_linear(x, weight[:0], scale[:0], bias[:0], out=torch.empty(24, 0), **choice).shape == (24, 0)
    assert torch.equal(int8_linear(x, weight[:1], scale[:1], None, out=torch.empty(24, 1), **choice)[:, 0],
                       int8_linear(x, weight, scale, None, **choice)[:, 0])  # fmt: skip


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def within(context, call):
    with context:
        call()


WAYS = {
    "the function": lambda args, out: int8_linear(*args, out=out),
    "into a view": lambda args, out: int8_linear(*args, out=out[:]),
    "the operator": lambda args, out: OP(*args, *positional(), out),
    "a dispatch mode": lambda args, out: within(Dispatched(), lambda: int8_linear(*args, out=out)),
    "autocast": lambda args, out: within(torch.autocast("cpu"), lambda: int8_linear(*args, out=out)),
    "vmap": lambda args, out: torch.vmap(lambda x, out: int8_linear(x, *args[1:], out=out))(args[0], out),
    "compiled": lambda args, out: torch.compile(int8_linear, backend="aot_eager", fullgraph=True)(*args, out=out),
    "inference mode": lambda args, out: within(torch.inference_mode(), lambda: int8_linear(*args, out=out)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_write_is_counted_and_breaks_what_was_saved(way, isa):
    """Else a gradient would be wrong in silence."""
    args, _ = arguments(5, 17, {})
    leaf, out = torch.randn(5, 17, requires_grad=True), torch.zeros(5, 17)
    for _ in range(2):
        version, product = out._version, leaf * out
        way(args, out)
        assert out._version > version and torch.equal(out, int8_linear(*args))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_it_is_refused_where_a_gradient_is_recorded(isa):
    (x, weight, scale, bias), residual = arguments(5, 17, {})
    for name in ("x", "bias", "residual", "out"):
        given = {"x": x, "weight": weight, "weight_scale": scale, "bias": bias, "residual": residual}
        given["out"] = torch.zeros(5, 17)
        given[name] = given[name].clone().requires_grad_()
        for activation in ("none", "gelu"):
            with pytest.raises(ValueError, match="out: expected None where a gradient is recorded, got a tensor"):
                int8_linear(**given, activation=activation)
            assert not given["out"].any()
            with torch.no_grad():
                out = int8_linear(**given, activation=activation)
                assert torch.equal(out, int8_linear(**{**given, "out": None}, activation=activation))
            given["out"].detach().zero_()
    with pytest.raises(ValueError, match="out: expected None where a gradient is recorded"):
        int8_linear(x, weight, scale, bias, out=(torch.zeros(5, 17, requires_grad=True) * 2))
    with pytest.raises((RuntimeError, ValueError), match=r"gradient"):
        OP(x.clone().requires_grad_(), weight, scale, bias, *positional(), torch.zeros(5, 17))


# What shares memory with `out`: the name, other arguments of a call on x (4, 64), weight (16, 64), the tensor written.
SHARED = {
    "x itself": ("x", lambda: {"x": (x := torch.randn(4, 64)), "out": x[:, 5:21]}),
    "x, shifted by rows": ("x", lambda: {"x": (m := torch.randn(9, 64))[:4], "out": m[1:5, :16]}),
    "x, at its end": ("x", lambda: {"x": (m := torch.randn(400))[:256].view(4, 64), "out": m[255:319].view(4, -1)}),
    "x, other columns and one": ("x", lambda: {"x": (m := torch.randn(4, 99))[:, :64], "out": m[:, 63:79]}),
    "weight": (
        "weight", lambda: {"weight": (m := torch.zeros(16, 64, dtype=torch.int8)), "out": m[5:9].view(torch.float32)},
    ),
    "weight_scale": ("weight_scale", lambda: {"weight_scale": (m := torch.rand(64))[16:32], "out": m.view(4, 16)}),
    "bias": ("bias", lambda: {"bias": (m := torch.rand(64))[63:].expand(16), "out": m.view(4, 16)}),
    "residual itself": ("residual", lambda: {"residual": (m := torch.randn(4, 16)), "out": m}),
    "residual, shifted": ("residual", lambda: {"residual": (m := torch.randn(5, 16))[:4], "out": m[1:]}),
    "input_scale": (
        "input_scale",
        lambda: {"input_scale": (m := torch.rand(64))[10:12], "inputs": "static", "out": m.view(4, 16)},
    ),
}  # fmt: skip


def shared(make):
    return {"x": torch.randn(4, 64), "weight": torch.randint(-9, 9, (16, 64), dtype=torch.int8),
            "weight_scale": torch.rand(16), **make()}  # fmt: skip


@pytest.mark.parametrize("dispatched", [False, True], ids=["short", "dispatched"])
@pytest.mark.parametrize(("name", "make"), SHARED.values(), ids=SHARED)
def test_shared_memory_is_refused(name, make, dispatched):
    given = shared(make)
    before = given["out"].clone()
    with pytest.raises(ValueError, match=f"out: expected memory of its own, got .* with {name}$"):
        if dispatched:
            with Dispatched():
                int8_linear(**given)
        else:
            int8_linear(**given)
    assert torch.equal(given["out"], before)


@pytest.mark.parametrize("through", [lambda t: torch.from_numpy(t.numpy()), torch.from_dlpack], ids=["NumPy", "DLPack"])
@pytest.mark.parametrize("name", ["x", "residual"])
def test_memory_shared_by_another_name_is_refused(name, through):
    """Another storage, the same addresses."""
    whole = torch.randn(9, 64)
    given = shared(lambda: {name: whole[:4] if name == "x" else whole[:4, :16], "out": through(whole)[1:5, :16]})
    with pytest.raises(ValueError, match=f"out: expected memory of its own, got .* with {name}$"):
        int8_linear(**given)


# Parts of one tensor that do not meet.
APART = {
    "columns beside x": lambda: {"x": (m := torch.randn(4, 80))[:, :64], "out": m[:, 64:]},
    "rows between those of x": lambda: {"x": (m := torch.randn(8, 64))[::2], "out": m[1::2, :16]},
    "behind x": lambda: {"x": (m := torch.randn(400))[:256].view(4, 64), "out": m[256:320].view(4, 16)},
    "columns between those of x": lambda: {"x": (m := torch.randn(4, 128))[:, ::2], "out": m[:, 1:32:2]},
    "columns beside the residual": lambda: {"residual": (m := torch.randn(4, 32))[:, :16], "out": m[:, 16:]},
    "behind weight_scale": lambda: {"weight_scale": (m := torch.rand(80))[:16], "out": m[16:].view(4, 16)},
    "behind weight, as bytes": lambda: {
        "weight": (m := torch.zeros(80, 64, dtype=torch.int8))[:16], "out": m[16:20].view(torch.float32)
    },
}  # fmt: skip


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_parts_of_one_tensor_that_do_not_meet_are_taken(make, isa):
    given = shared(make)
    expected = int8_linear(**{**given, "out": None})
    assert torch.equal(int8_linear(**given), expected)


CROSSING = {"rows": ((1, 16), (0, 1)), "columns": ((4, 1), (1, 0)), "rows and columns": ((40,), (7, 1))}


@pytest.mark.parametrize(("size", "strides"), CROSSING.values(), ids=CROSSING)
def test_elements_that_share_memory_are_refused(size, strides):
    out = torch.zeros(size).as_strided((4, 16), strides)
    with pytest.raises(ValueError, match="out: expected elements with memory of their own, got strides"):
        int8_linear(**shared(lambda: {"out": out}))


@pytest.mark.parametrize("kind", ["outliers", "static", "groups of 32"])
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_compiled(activation, kind, isa):
    """What is written is seen before and behind the call, in a view of what the graph was given."""
    choice = {**QUANTIZATIONS[kind], "activation": activation}
    args, residual = arguments(5, 34, QUANTIZATIONS[kind], activation)

    def function(x, buffer):
        before = buffer.sum()
        out = int8_linear(x * 2, *args[1:], residual=residual, out=buffer[:, 1:-1], **choice)
        return before, out.square(), buffer + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given, plain = (torch.ones(5, residual.size(1) + 2) for _ in range(2))
    for _ in range(2):
        found, expected = compiled(args[0], given), function(args[0], plain)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and torch.equal(given, plain)


def test_compiled_returns_what_it_was_given():
    (x, weight, scale, bias), _ = arguments(5, 17, {})
    compiled = torch.compile(
        lambda x, out: int8_linear(x, weight, scale, bias, out=out), fullgraph=True, backend="aot_eager"
    )
    out = torch.empty(5, 17)
    assert compiled(x, out) is out and torch.equal(out, int8_linear(x, weight, scale, bias))
    with pytest.raises(Exception, match="out: expected None where a gradient is recorded"):
        compiled(x.clone().requires_grad_(), torch.empty(5, 17))
    with pytest.raises(Exception, match=r"out: expected \(\.\.\., outputs\)"):
        compiled(x, torch.empty(5, 16))


def test_opcheck():
    (x, weight, scale, bias), residual = arguments(5, 17, {})
    opcheck(OP, (x, weight, scale, bias, *positional(), torch.zeros(5, 17)))
    opcheck(OP, (x, weight, scale, None, *positional(inputs="16bit", activation="relu", residual=residual),
                 torch.zeros(5, 20)[:, 1:18]))  # fmt: skip


@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_vmap_writes_each_sample(activation, isa):
    (x, weight, scale, bias), residual = arguments(12, 34, {}, activation)
    x, residual = x.view(3, 4, -1), residual.view(3, 4, -1)

    def function(x, residual, out):
        return int8_linear(x, weight, scale, bias, residual=residual, activation=activation, out=out)

    expected = int8_linear(x, weight, scale, bias, residual=residual, activation=activation)
    for dim in (0, 1, -1):
        out = torch.empty_like(residual.movedim(0, dim).contiguous())
        found = torch.vmap(function, (0, 0, dim))(x, residual, out)
        assert torch.equal(found, expected) and torch.equal(out.movedim(dim, 0), expected)
    one = torch.zeros_like(residual[0])
    with pytest.raises(ValueError, match=r"out: .*one tensor for all samples"):
        torch.vmap(function, (0, 0, None))(x, residual, one)
    assert not one.any()


def test_inference_mode(isa):
    (x, weight, scale, bias), _ = arguments(5, 17, {})
    expected, plain = int8_linear(x, weight, scale, bias), torch.empty(5, 17)
    version = plain._version
    with torch.inference_mode():
        made_inside = torch.empty(5, 17)
        for out in (plain, made_inside, made_inside[:, :], torch.empty(5, 20)[:, 1:18]):
            out.zero_()
            assert int8_linear(x, weight, scale, bias, out=out) is out and torch.equal(out, expected)
        assert int8_linear(x.clone(), weight, scale.clone(), bias, out=plain) is plain
    assert plain._version > version and torch.equal(plain, expected)
    assert int8_linear(x, weight, scale, bias, out=made_inside) is made_inside
    int8_linear(made_inside[:, :16], weight[:, :16].contiguous(), scale, bias, out=plain)


def test_autocast_casts_nothing_as_for_torchs_functions_with_out():
    (x, weight, scale, bias), _ = arguments(5, 17, {})
    expected = int8_linear(x, weight, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.empty(5, 17)
        assert torch.mm(x, x.t(), out=torch.empty(5, 5)).dtype == torch.float32
        assert torch.equal(int8_linear(x, weight, scale, bias, out=out), expected)


def test_a_buffer_for_all_steps(isa):
    """As a decoding loop has it: sizes and places change from call to call."""
    buffer = torch.empty(40, 70)
    for rows in (1, 3, 40, 2, 33, 1):
        for outputs in (64, 17):
            x, weight, scale, bias = inputs((rows, 32, outputs))
            out = buffer[:rows, 3 : 3 + outputs]
            assert torch.equal(int8_linear(x, weight, scale, bias, out=out), int8_linear(x, weight, scale, bias))
