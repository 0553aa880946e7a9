"""A quantised layer is the same on every machine: saved, loaded, copied and moved, under each instruction set."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import llmkern
from llmkern import Int8Linear, backend, extension
from llmkern import reference as plain_modules
from llmkern.int8 import reference, scheme
from llmkern.int8.scheme import NAMED, Int8Scheme
from llmkern.verify.report import judge_row
from tests.conftest import BYTE_ISAS
from tests.int8.cases import FLOATS, QUANTIZATIONS, row_kinds, with_outliers

NAMES = [name for name, chosen in NAMED.items() if chosen.smooth is None]
SCHEMES = {
    **{name: NAMED[name] for name in NAMES},
    "groups of 32": Int8Scheme("symmetric", group=32),
    "groups, rotated": Int8Scheme("symmetric", group=64, rotate=True),
    "outliers, rotated": Int8Scheme(rotate=True),
    "static, rotated": Int8Scheme("static", rotate=True),
    "16bit, rotated": Int8Scheme("16bit", rotate=True),
}
EVERY = pytest.mark.parametrize("chosen", SCHEMES.values(), ids=SCHEMES)
ROOMS = pytest.mark.parametrize("room", [llmkern, plain_modules], ids=["llmkern", "reference"])


class under:
    """The instruction set `name` while it lasts, then the one of before."""

    def __init__(self, name: str) -> None:
        self.name, self.before = name, extension._C.active_isa()

    def __enter__(self) -> None:
        extension._C.force_isa(self.name)
        backend.forget_plans()

    def __exit__(self, *_: object) -> None:
        extension._C.force_isa(self.before)
        backend.forget_plans()


def made(chosen, kind=Int8Linear, inputs=192, outputs=67):
    """A layer of an nn.Linear, calibrated where it must be."""
    layer = kind.from_linear(nn.Linear(inputs, outputs), scheme=chosen)
    if layer.input_scale is not None:
        layer.input_scale.copy_(torch.tensor([0.03, 117.0]))
    return layer


def batches(depth=192):
    """Batches of each size that takes another way, with usual rows and special ones."""
    for rows, dtype in ((1, torch.float32), (4, torch.bfloat16), (17, torch.float16), (100, torch.float32)):
        yield with_outliers(torch.randn(rows, depth)).to(dtype)
    yield torch.stack(list(row_kinds(depth).values()))


def same(out, expected):
    return out.dtype == expected.dtype and torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@EVERY
def test_saved_under_one_instruction_set_and_loaded_under_another(chosen, isa):
    """Bitwise, but for sums over groups, whose order is each one's own."""
    layer, file = made(chosen), io.BytesIO()
    found = [(x, layer(x).detach()) for x in batches()]
    torch.save(layer.state_dict(), file)
    for other_isa in BYTE_ISAS:
        with under(other_isa):
            other = Int8Linear(192, 67, scheme=chosen)
            other(found[0][0])  # packs what is then replaced
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            for x, out in found:
                if not chosen.group:
                    assert same(other(x), out), other_isa
                    continue
                args = layer.weight, layer.weight_scale, layer.bias.detach(), None, *layer.arguments()
                plain, truth = reference.int8_linear(x, *args), reference.int8_linear(x.double(), *args)
                assert judge_row("", "output", other(x).detach(), plain, truth).passed, other_isa


@EVERY
def test_one_layer_under_each_instruction_set_in_turn(chosen, isa):
    """Each packs for itself; back under the first, the bits are those of before."""
    layer, xs = made(chosen), list(batches())
    expected = [layer(x) for x in xs]
    for other_isa in BYTE_ISAS:
        with under(other_isa):
            found = [layer(x) for x in xs]
        if not chosen.group:
            assert all(map(same, found, expected)), other_isa
        assert all(map(same, [layer(x) for x in xs], expected)), other_isa


@EVERY
def test_the_same_weights_are_made_under_each_instruction_set(chosen):
    linear, states = nn.Linear(192, 67), []
    for isa in BYTE_ISAS:
        with under(isa):
            states.append(Int8Linear.from_linear(linear, scheme=chosen).state_dict())
    for state in states:
        assert list(state) == list(states[0])
        assert all(torch.equal(a, b) for a, b in zip(state.values(), states[0].values(), strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_same_integers_under_each_instruction_set(kind, dtype):
    """And scales and zero points, bit by bit: of groups too, and of rows that hold NaN or infinity."""
    choice, found = QUANTIZATIONS[kind], {}
    code = scheme.INPUTS[choice.get("inputs", "outliers")]
    group, rotate = choice.get("group", 0), choice.get("rotate", 1)
    given = choice.get("input_scale", torch.zeros(2))
    for depth in (64, 192, 4096 + 64) if rotate > 1 else (1, 7, 65, 192, 4096 + 64):
        rows = [
            torch.randn(9, depth) * 10.0 ** torch.randint(-20, 20, (9, 1)),
            *(r[None] for r in row_kinds(depth).values()),
        ]
        x = with_outliers(torch.cat(rows)).to(dtype)
        for isa in BYTE_ISAS:
            with under(isa):
                integers, scale = (
                    torch.empty(x.shape, dtype=torch.int32),
                    torch.empty(len(x), -(-depth // (group or depth))),
                )
                zero = torch.empty(scale.shape, dtype=torch.int32)
                quantization = extension._C.Quantization(code, "inputs" not in choice, group, rotate)
                extension._C.quantize_rows(
                    x.data_ptr(), integers.data_ptr(), scale.data_ptr(), zero.data_ptr(), given.data_ptr(),
                    len(x), depth, depth, quantization, extension.DTYPE_CODES[dtype],
                )  # fmt: skip
                found[isa] = integers, scale, zero
        whole = found[BYTE_ISAS[0]][1].isfinite()
        first = found[BYTE_ISAS[0]]
        for isa in BYTE_ISAS:
            integers, scale, zero = found[isa]
            assert same(scale, first[1]), (isa, depth)
            assert torch.equal(integers[whole.all(1)], first[0][whole.all(1)]), (isa, depth)
            assert torch.equal(zero[whole.all(1)], first[2][whole.all(1)]), (isa, depth)


@ROOMS
@EVERY
def test_round_trips(chosen, room, isa):
    """Through a state_dict, copies and pickles, with the scheme and without what is packed."""
    layer = made(chosen, room.Int8Linear)
    xs = [x for x in batches() if x.isfinite().all()]
    expected = [layer(x) for x in xs]
    buffers = ["weight", "weight_scale", "saved_scheme", *(["input_scale"] if chosen.inputs == "static" else [])]
    assert sorted(layer.state_dict()) == sorted([*buffers, "bias"])
    loaded, assigned = (room.Int8Linear(192, 67, scheme=chosen) for _ in range(2))
    loaded.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    for other in (loaded, assigned, whole, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.scheme == chosen and other.rotation == layer.rotation and type(other) is type(layer)
        assert all(same(other(x), out) for x, out in zip(xs, expected, strict=True))
        assert repr(other) == repr(layer)


@EVERY
def test_to_and_from_the_plain_version(chosen, isa):
    layer, plain = made(chosen), made(chosen, plain_modules.Int8Linear)
    for one, other in ((layer, plain), (plain, made(chosen))):
        other.load_state_dict(one.state_dict())
        for x in batches():
            if not chosen.group:
                assert same(other(x), one(x))
            truth = reference.int8_linear(
                x.double(), one.weight, one.weight_scale, one.bias.detach(), None, *one.arguments()
            )
            fast, slow = (layer, plain) if one is layer else (other, plain)
            assert judge_row("", "output", fast(x).detach(), slow(x).detach(), truth).passed


@ROOMS
@EVERY
def test_moves_keep_the_dtypes_of_integers_and_scales(chosen, room):
    changes = {
        "half": lambda layer: layer.half(),
        "bfloat16": lambda layer: layer.bfloat16(),
        "to(dtype)": lambda layer: layer.to(torch.float16),
        "to(device, dtype)": lambda layer: layer.to("cpu", torch.bfloat16),
        "to meta": lambda layer: layer.to("meta").half(),
        "double and back": lambda layer: layer.double().half(),
        "in a model": lambda layer: nn.Sequential(nn.LayerNorm(192), layer).half()[1],
    }
    for name, change in changes.items():
        layer = made(chosen, room.Int8Linear)
        scale, given = layer.weight_scale.clone(), None if layer.input_scale is None else layer.input_scale.clone()
        changed = change(layer)
        assert changed is layer, name
        dtypes = {key: value.dtype for key, value in layer.state_dict().items()}
        expected = {"weight": torch.int8, "weight_scale": torch.float32}
        assert expected.items() <= dtypes.items() and dtypes["bias"] in (torch.float16, torch.bfloat16), name
        assert dtypes.get("input_scale", torch.float32) == torch.float32, name
        if "meta" not in name:
            assert torch.equal(layer.weight_scale, scale), name
            assert given is None or torch.equal(layer.input_scale, given), name
            x = torch.randn(5, 192)
            assert layer(x).dtype == torch.float32 and layer(x.half()).dtype == torch.float16, name


@ROOMS
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "chosen", [Int8Scheme(), NAMED["groups"], NAMED["static"]], ids=["outliers", "groups", "static"]
)
def test_a_checkpoint_in_half_precision_gives_float32_scales(chosen, assign, room):
    """As whole models are cast before they are saved; the numbers are then those of the rounded scales."""
    layer, other = made(chosen, room.Int8Linear), room.Int8Linear(192, 67, scheme=chosen)
    state = {name: t.half() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    for name in ("weight_scale", *(["input_scale"] if chosen.inputs == "static" else [])):
        assert getattr(other, name).dtype == torch.float32
        assert torch.equal(getattr(other, name), state[name].float())
    assert other(torch.randn(5, 192)).isfinite().all()


@ROOMS
@EVERY
def test_the_checkpoint_of_a_linear_loads(chosen, room):
    """A static layer keeps the input scale that it has, for the caller to set, as from_linear gives it."""
    linear, x = nn.Linear(192, 67), torch.randn(5, 192)
    layer = room.Int8Linear(192, 67, scheme=chosen)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer(x), room.Int8Linear.from_linear(linear, scheme=chosen)(x))


def test_a_checkpoint_of_other_groups_is_refused():
    for name, other in (("outliers", "groups"), ("groups", "outliers"), ("groups", "groups of 32")):
        with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
            Int8Linear(192, 67, scheme=SCHEMES[other]).load_state_dict(made(SCHEMES[name]).state_dict())
    rotated, groups = Int8Linear(192, 67, scheme="rotated"), Int8Linear(160, 67, scheme="groups")
    with pytest.raises(RuntimeError, match=r"weight: expected the integers of .*rotate=False.* got those of .*=True"):
        Int8Linear(192, 67).load_state_dict(rotated.state_dict())
    with pytest.raises(RuntimeError, match=r"weight: expected the integers of .*group=96.* got those of .*group=128"):
        Int8Linear(160, 67, scheme=Int8Scheme("symmetric", group=96)).load_state_dict(groups.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*input_scale"):
        Int8Linear(192, 67).load_state_dict(made(SCHEMES["static"]).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*input_scale"):
        Int8Linear(192, 67, scheme="static").load_state_dict(made(SCHEMES["outliers"]).state_dict())
