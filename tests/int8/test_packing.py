"""What is kept of a weight, packed, and of scales of groups, transposed, is never stale: not after an update, nor for a
new tensor at an old address, nor in other processes. What torch does not count, `repack()` mends."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch

from llmkern import Int8Linear, backend, extension
from llmkern.functional import int8_linear
from llmkern.int8 import packing, reference
from tests.conftest import BYTE_ISAS
from tests.int8.cases import inputs

SIZE = 64
GROUPS = {"inputs": "symmetric", "group": 32}
SCHEMES = ["outliers", "groups", "static", "rotated"]


def test_updates_in_place_are_seen(one_isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    for change in (lambda: weight.add_(1), lambda: weight[5].zero_(), lambda: weight.t().copy_(weight.t().flip(0))):
        int8_linear(x, weight, scale)
        change()
        assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def others(t):
    """Other values for a weight or for scales."""
    return torch.randint_like(t, -127, 128) if t.dtype == torch.int8 else torch.rand_like(t) + 0.5


def kept_and_fresh(change, what, shape=(SIZE, SIZE), group=32):
    """A result after the change of the weight or of the scales, the same from tensors that were never used, and before.

    The weight or the scales are square, so that a transposed one is of the same shape.
    """
    outputs, depth = shape if what == "weight" else (SIZE, SIZE * group)
    x, options = torch.randn(3, depth), {**GROUPS, "group": group}
    weight = torch.randint(-127, 128, (outputs, depth), dtype=torch.int8)
    scale = torch.rand(outputs, -(-depth // group)) + 0.5
    before = int8_linear(x, weight, scale, **options)
    change(weight if what == "weight" else scale)
    after = int8_linear(x, weight, scale, **options)
    return after, int8_linear(x, weight.clone(), scale.clone(), **options), before


def within(mode, write):
    def change(t):
        with mode():
            write(t)

    return change


def moved_through_data(t):
    t.data = others(t)


def moved_twice_through_data(t):
    values = others(t)
    t.data = t.data.new_empty(0)
    t.data = values


def released_and_filled(t):
    """As sharded training does between uses."""
    values, size = others(t), t.untyped_storage().nbytes()
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(size)
    t.copy_(values)


def by_an_optimizer(t):
    torch._foreach_mul_([t, t.clone()], 2)
    torch._foreach_add_([t], [others(t)])


def by_an_optimizers_copy(t):
    torch._foreach_copy_([t], [others(t)])


def compiled(t):
    torch.compile(lambda t: t.add_(1), backend="aot_eager", fullgraph=True)(t)


def by_index(t):
    t[torch.tensor([0, 3])] = 1


SEEN = {
    "add_": lambda t: t.add_(1),
    "copy_": lambda t: t.copy_(others(t)),
    "zero_": lambda t: t.zero_(),
    "an argument out": lambda t: torch.add(t, 1, out=t),
    "the operator itself": lambda t: torch.ops.aten.mul_.Scalar(t, 2),
    "an item": lambda t: t.__setitem__((0, 0), t[0, 0] // 2 + 3),
    "a row": lambda t: t.__setitem__(2, 1),
    "indices": by_index,
    "a mask": lambda t: t.__setitem__(t > 0, 2),
    "index_put_": lambda t: t.index_put_((torch.tensor([1]),), t.new_tensor(9)),
    "scatter_": lambda t: t.scatter_(0, torch.zeros(1, t.size(1), dtype=torch.long), 3),
    "a view's row": lambda t: t[5:9][1].zero_(),
    "a transposed view": lambda t: t.t().copy_(others(t)),
    "a flat view": lambda t: t.view(-1)[7:].fill_(1),
    "a chunk": lambda t: t.chunk(2, 1)[1].zero_(),
    "a diagonal": lambda t: t.diagonal().fill_(1),
    "a view of its bytes": lambda t: t.view(torch.uint8).bitwise_and_(0x3F),
    "what is detached": lambda t: t.detach().mul_(2),
    "no_grad": within(torch.no_grad, lambda t: t.add_(1)),
    "inference mode": within(torch.inference_mode, lambda t: t.add_(1)),
    "a view in inference mode": within(torch.inference_mode, lambda t: t[3].zero_()),
    "an optimizer": by_an_optimizer,
    "an optimizer's copy": by_an_optimizers_copy,
    "init": lambda t: torch.nn.init.constant_(t, 1),
    "vmap": lambda t: torch.vmap(lambda row: row.mul_(2))(t),
    "compiled": compiled,
    "set_": lambda t: t.set_(others(t)),
    "set_ to another layout of itself": lambda t: t.set_(t.untyped_storage(), 0, t.shape, t.t().stride()),
    "t_": lambda t: t.t_(),
    "as_strided_": lambda t: t.as_strided_(t.shape, t.t().stride()),
    "other memory through .data": moved_through_data,
    "other memory through .data, twice": moved_twice_through_data,
    "released and filled": released_and_filled,
}


@pytest.mark.parametrize("what", ["weight", "scales of groups"])
@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
def test_changes_are_seen(change, what, one_isa):
    after, fresh, before = kept_and_fresh(change, what)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@pytest.mark.parametrize("what", ["weight", "scales of groups"])
def test_another_layout_of_the_same_memory_is_seen(what, one_isa):
    """Neither the version nor the address tells: the strides do."""

    def transpose(t):
        t.data = t.data.t()

    after, fresh, before = kept_and_fresh(transpose, what)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@pytest.mark.parametrize("what", ["weight", "scales of groups"])
@pytest.mark.parametrize("how", [".data", "resize_"])
def test_another_shape_of_the_same_memory_is_seen(how, what, one_isa):
    """As pruning outputs does; torch does not count it through `.data`. A copy of fewer outputs must not be read on."""
    x, many = torch.randn(3, 96), 96
    all_weights, all_scales = torch.randint(-127, 128, (many, 96), dtype=torch.int8), torch.rand(many, 3)
    kept = all_weights[:] if what == "weight" else all_scales[:]
    for outputs in (many, 40, many, 40):
        if how == ".data":
            kept.data = (all_weights if what == "weight" else all_scales)[:outputs]
        else:
            kept.resize_(outputs, kept.size(1))
        weight, scale = all_weights[:outputs], all_scales[:outputs]
        expected = int8_linear(x, weight, scale, **GROUPS)
        given = (kept, scale) if what == "weight" else (weight, kept)
        assert torch.equal(int8_linear(x, *given, **GROUPS), expected), outputs


def to_where_it_was_through_data(t):
    """Freed memory that comes back with other numbers, while the tensor is elsewhere, is no different."""
    before = t.data
    t.data = others(t)
    before.copy_(others(t))
    t.data = before


HIDDEN = {
    "add_ to .data": lambda t: t.data.mul_(2),
    "an item of .data": lambda t: t.data.__setitem__((0, 0), 1),
    "an alias through .data": lambda t: (setattr(t, "data", t.data[:]), t.data.zero_()),
    "to where it was through .data": to_where_it_was_through_data,
    "NumPy": lambda t: t.numpy().__setitem__(0, 1),
    "what comes back from NumPy": lambda t: torch.from_numpy(t.numpy()).zero_(),
    "DLPack": lambda t: torch.from_dlpack(t).zero_(),
    "bytes of the storage": lambda t: t.untyped_storage().__setitem__(0, t.untyped_storage()[0] ^ 2),
    "all of the storage": lambda t: t.untyped_storage().copy_(others(t).untyped_storage()),
    "apply_": lambda t: t.apply_(lambda _: 1),
    "map_": lambda t: t.map_(t, lambda a, b: a / 2),
}


@pytest.mark.parametrize("write", HIDDEN.values(), ids=HIDDEN)
def test_what_torch_does_not_count_is_seen_after_repack(write, one_isa):
    """Version, address and layout are those of before: nothing tells that the numbers are others."""
    for name in ("weight", "weight_scale"):
        layer, x = Int8Linear(256, 48, scheme="groups"), torch.randn(3, 256)
        buffer, before = getattr(layer, name), layer(x)
        known = buffer._version, buffer.data_ptr(), buffer.stride()
        write(buffer)
        assert known == (buffer._version, buffer.data_ptr(), buffer.stride())
        layer.repack()
        assert torch.equal(layer(x), copy.deepcopy(layer)(x)) and not torch.equal(layer(x), before)


def test_a_write_past_torch_is_seen_after_forget(one_isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    weight.data.add_(1)
    packing.forget(weight)
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_fresh_weights_in_a_loop(one_isa):
    """Freed memory comes back at the same address, and the id of a dead tensor with it."""
    x, _, scale, _ = inputs((3, 64, 48))
    for seed in range(40):
        weight = torch.randint(-127, 128, (48, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))
        del weight


def test_fresh_scales_and_layers_in_a_loop(one_isa):
    x, weight, _, _ = inputs((3, 64, 48))
    for _ in range(40):
        scale = torch.rand(48, 2)
        expected = int8_linear(x, weight, scale.clone(), **GROUPS)
        assert torch.equal(int8_linear(x, weight, scale, **GROUPS), expected)
        layer = Int8Linear(64, 48)
        assert torch.equal(layer(x), reference.int8_linear(x, layer.weight, layer.weight_scale, layer.bias))
        del scale, layer


def test_views_and_other_instruction_sets(one_isa):
    x, weight, scale, _ = inputs((3, 64, 96))
    int8_linear(x, weight, scale)
    part = weight[:48]
    assert torch.equal(int8_linear(x, part, scale[:48]), reference.int8_linear(x, part, scale[:48], None))
    part.mul_(-1)
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_one_weight_serves_calls_that_pack_it_differently(one_isa):
    """Each keeps its own copy, and all see an update."""
    x, weight, scale, _ = inputs((3, 64, 48))
    options = [{}, {"inputs": "16bit"}, {"activation": "swiglu"}, GROUPS, {**GROUPS, "group": 64}]

    def call(weight, choice):
        groups = -(-64 // choice["group"]) if "group" in choice else 0
        return int8_linear(x, weight, scale[:, None].expand(48, groups) if groups else scale, **choice)

    for _ in range(3):
        for choice in options + options[::-1]:
            assert torch.equal(call(weight, choice), call(weight.clone(), choice))
        weight.random_(-127, 128)


def test_set_moves_a_tensor_to_other_memory(one_isa):
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    weight.set_(torch.randint(-127, 128, (48, 64), dtype=torch.int8))
    assert torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None))


def test_what_is_kept_goes_with_the_weight():
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    scales = torch.rand(48, 2)
    int8_linear(x, weight, scales, **GROUPS)
    keys = {id(weight), id(scales)}
    assert keys <= set(packing._kept)
    del weight, scales
    gc.collect()
    assert not keys & set(packing._kept)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def capture(monkeypatch):
    """Whether the stream is being captured, as a test sets it; no stream is another's, and none waits."""
    state = {"capturing": False}

    def noted(copy):
        copy._llmkern_written = 0, None
        return copy

    monkeypatch.setattr(packing, "_noted", noted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return state


def test_a_copy_that_a_captured_graph_reads_lives_as_long_as_the_weight(capture):
    weights = [torch.randint(-9, 9, (8, 32), dtype=torch.int8).as_subclass(OnGpu)]
    sums = lambda: packing.sums_over_k(weights[0], packing.layout_of(weights[0]))  # noqa: E731
    eager = weakref.ref(sums())
    capture["capturing"] = True
    first = weakref.ref(sums())
    assert first() is eager() is sums()
    capture["capturing"] = False
    weights[0].add_(1)
    assert first() is not None
    second = weakref.ref(sums())
    assert first() is not None and second() is not first()
    weights[0].add_(1)
    sums()
    gc.collect()
    assert first() is not None and second() is None  # the second, which no graph has seen, went with its values
    key = id(weights[0])
    packing.forget(weights[0])
    assert first() is not None and len(packing._kept[key][2]) == 1
    assert torch.equal(sums(), weights[0].sum(1, dtype=torch.int32))
    weights.clear()
    gc.collect()
    assert first() is None and key not in packing._kept


def test_what_is_made_during_a_capture_is_the_graphs(capture):
    """It holds nothing before the graph has run, so that no other call may meet it."""
    weight = torch.randint(-9, 9, (8, 32), dtype=torch.int8).as_subclass(OnGpu)
    capture["capturing"] = True
    packing.sums_over_k(weight, packing.layout_of(weight))
    assert id(weight) not in packing._kept


def test_an_update_leaves_no_copy_of_before():
    x, weight, scale, _ = inputs((3, 64, 48))
    int8_linear(x, weight, scale)
    int8_linear(x, weight, scale, activation="swiglu")
    weight.add_(1)
    int8_linear(x, weight, scale)
    assert len(packing._kept[id(weight)][1]) == 1


def layers(scheme):
    """A layer that was called, another with other numbers, and an input."""
    one, other, x = Int8Linear(256, 48, scheme=scheme), Int8Linear(256, 48, scheme=scheme), torch.randn(3, 256)
    if scheme == "static":
        other.input_scale.copy_(torch.tensor([0.03, 120.0]))
    assert not torch.equal(one(x), other(x))
    return one, other, x


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_seen(scheme, assign, one_isa):
    one, other, x = layers(scheme)
    for source in (other, Int8Linear(256, 48, scheme=scheme)):
        one.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(one(x), source(x))
        assert (one.weight.data_ptr() == source.weight.data_ptr()) == assign


@pytest.mark.parametrize("scheme", SCHEMES)
def test_moves_are_seen(scheme, one_isa):
    layer, _, x = layers(scheme)
    values, expected = copy.deepcopy(layer.state_dict()), layer(x)
    moves = {
        "to() in place": lambda: layer.to("cpu"),
        "cloned": lambda: layer._apply(torch.clone),
        "changed on the way": lambda: layer._apply(lambda t: t.neg() if t.dtype == torch.int8 else t),
        "shared with other processes": lambda: layer.share_memory(),
        "to meta and back": lambda: layer.to("meta").to_empty(device="cpu"),
        "half": lambda: layer.half(),
    }
    for name, move in moves.items():
        move()
        if name == "changed on the way":
            bias = layer.bias.detach()
            assert torch.allclose(layer(x).detach() - bias, bias - expected, atol=1e-5), name
        layer.float().load_state_dict(values)
        assert torch.equal(layer(x), expected), name
    meta = layer.to("meta")
    assert meta(x.to("meta")).shape == (3, 48)


def test_weights_lent_to_a_call_are_seen(one_isa):
    one, other, x = layers("groups")
    expected = one(x), other(x)
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(one, dict(other.state_dict()), (x,)), expected[1])
        assert torch.equal(one(x), expected[0])


def test_swapping_tensors_is_refused_or_seen(one_isa):
    """Torch swaps no tensor that something refers to weakly, as what is kept of it does; repack() lets go of it."""
    one, other = (Int8Linear(256, 48, bias=False, scheme="groups") for _ in range(2))
    x = torch.randn(3, 256)
    expected = one(x), other(x)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(one.weight, other.weight)
    one.repack(), other.repack()
    for name in ("weight", "weight_scale"):
        torch.utils.swap_tensors(getattr(one, name), getattr(other, name))
    assert torch.equal(one(x), expected[1]) and torch.equal(other(x), expected[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_deep_copies_are_independent(scheme, one_isa):
    layer, _, x = layers(scheme)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    for buffer in (twin.weight, twin.weight_scale):
        buffer.mul_(2)
    changed = twin(x)
    assert torch.equal(layer(x), expected) and not torch.equal(changed, expected)
    layer.weight.zero_()
    assert torch.equal(twin(x), changed)
    shallow = copy.copy(twin)  # of the same tensors
    assert torch.equal(shallow(x), changed)
    twin.weight.zero_()
    assert torch.equal(shallow(x), twin(x)) and not torch.equal(shallow(x), changed)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_as_weights_only(scheme, one_isa):
    one, other, x = layers(scheme)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    for options in ({}, {"mmap": False}, {"map_location": "cpu"}):
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True, **options)
        one.load_state_dict(Int8Linear(256, 48, scheme=scheme).state_dict())
        one(x)
        one.load_state_dict(state)
        assert torch.equal(one(x), other(x))


def test_memory_mapped_checkpoints(tmp_path, one_isa):
    one, other, x = layers("groups")
    torch.save(other.state_dict(), tmp_path / "state")
    one.load_state_dict(torch.load(tmp_path / "state", weights_only=True, mmap=True), assign=True)
    assert torch.equal(one(x), other(x))
    one.weight.add_(1), other.weight.add_(1)  # copied on write
    assert torch.equal(one(x), other(x))


def numbers(pickled, isas, results):
    """In another process, which has neither the copies of this one nor its choice of an instruction set."""
    torch.set_num_threads(1)
    pairs = pickle.loads(pickled)
    for isa in isas:
        extension._C.force_isa(isa)
        backend.forget_plans()
        results.put((isa, [layer(x).detach().numpy() for layer, x in pairs]))


def gathered(method, pickled, isas):
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=numbers, args=(pickled, isas, results))
    process.start()
    try:
        return dict(results.get(timeout=120) for _ in isas)
    finally:
        process.join(10)
        process.kill()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_pickled_to_another_process(method):
    """After fork with one thread, as torch's own functions need too: OpenMP's threads do not come along."""
    pairs = [layers(scheme)[::2] for scheme in SCHEMES]
    found = gathered(method, pickle.dumps(pairs), BYTE_ISAS)
    for isa in BYTE_ISAS:
        extension._C.force_isa(isa)
        backend.forget_plans()
        try:
            for (layer, x), out in zip(pairs, found[isa], strict=True):
                assert torch.equal(layer(x), torch.from_numpy(out)), (isa, layer)
        finally:
            extension._C.force_isa("")
            backend.forget_plans()


def changed_by_another(layer, x, results):
    torch.set_num_threads(1)
    before = layer(x).detach()
    layer.weight.neg_(), layer.weight_scale.mul_(2)
    results.put((before.numpy(), layer(x).detach().numpy()))


def test_a_child_inherits_what_is_kept_and_changes_its_own(one_isa):
    layer, _, x = layers("groups")
    expected, context = layer(x), multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=changed_by_another, args=(layer, x, results))
    process.start()
    before, after = (torch.from_numpy(a) for a in results.get(timeout=120))
    process.join()
    assert torch.equal(before, expected) and torch.equal(layer(x), expected)
    twin = copy.deepcopy(layer)
    twin.weight.neg_(), twin.weight_scale.mul_(2)
    assert torch.equal(twin(x), after)


def test_what_another_process_writes_to_shared_memory_is_seen_after_repack(one_isa):
    layer, _, x = layers("groups")
    expected, context = layer.share_memory()(x), multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=changed_by_another, args=(layer, x, results))
    process.start()
    after = torch.from_numpy(results.get(timeout=120)[1])
    process.join()
    assert layer.weight._version == 0  # each process counts its own
    layer.repack()
    assert torch.equal(layer(x), after) and not torch.equal(after, expected)
