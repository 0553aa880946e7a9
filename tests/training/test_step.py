"""One step: accumulation, precisions, clipping, decay groups, schedules, and the stop at what is not finite."""

from __future__ import annotations

import math
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from llmkern.training import (
    DistributedTrainer,
    MixedPrecisionTrainer,
    NonFiniteLossError,
    PretrainingConfig,
    Trainer,
    build_model,
)
from llmkern.training.optimisation import factor, make_optimizer, parameter_groups
from llmkern.training.step import moved
from tests.training import tiny


def trainer(**changes):
    config = tiny.config(**changes)
    return MixedPrecisionTrainer(build_model(config), config=config, precision=config.precision)


def rows_of(batch, *numbers):
    return [{k: v[list(part)] for k, v in batch.items()} for part in numbers]


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp", "clm", "seq2seq"])
def test_accumulation_is_the_one_large_batch(objective):
    """Though the micro-batches count other numbers of tokens, and one of them no sentence pair."""
    batch = tiny.batch(objective, range(6))
    parts = rows_of(batch, (0,), (1, 2), (3,), (4, 5))
    whole, pieces = trainer(objective=objective), trainer(objective=objective)
    counts = [whole.model.counted(p) for p in parts]
    assert len({tuple(map(int, c.values())) for c in counts}) > 1
    for _ in range(3):
        assert pieces.train_step(parts) == pytest.approx(whole.train_step(batch), rel=2e-6)
        assert pieces.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)


def test_a_plain_mean_of_micro_batches_would_be_seen():
    """The fault that the test above is there for."""
    batch = tiny.batch("mlm", range(6))
    whole, pieces = trainer(), trainer()
    pieces._shares = lambda batches: [1.0 / len(batches)] * len(batches)
    assert pieces.train_step(rows_of(batch, (0,), (1, 2), (3,), (4, 5))) != pytest.approx(
        whole.train_step(batch), rel=1e-3
    )


class Regression(nn.Module):
    """A model of others: called with a tensor, its output is the loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return (self.linear(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", None])
def test_any_model_with_a_loss_is_trained(precision):
    torch.manual_seed(1)
    model = Regression()
    step = MixedPrecisionTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision).train_step
    x = torch.randn(16, 3)
    losses = [step(x) for _ in range(60)]
    assert isinstance(losses[0], float) and losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("objective", ["mlm_nsp", "clm", "seq2seq"])
def test_mixed_precision_follows_float32(objective, precision):
    mixed, exact = trainer(objective=objective, precision=precision), trainer(objective=objective)
    batch = tiny.batch(objective)
    pairs = [(mixed.train_step(batch), exact.train_step(batch)) for _ in range(8)]
    assert pairs[-1][1] < 0.9 * pairs[0][1] and mixed.skipped_steps == 0
    assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs) and any(a != b for a, b in pairs)


def test_a_float16_step_whose_gradients_overflow_is_skipped_and_counted():
    stepper = trainer(precision="float16")
    stepper.scheduler = torch.optim.lr_scheduler.LambdaLR(stepper.optimizer, lambda step: 1.0 / (1 + step))
    stepper.train_step(tiny.batch())
    before = [p.detach().clone() for p in stepper.model.parameters()]
    handle = stepper.model.tokens.weight.register_hook(lambda g: g * torch.inf)
    stepper.train_step(tiny.batch())
    assert stepper.skipped_steps == 1 and stepper.steps == 2 and stepper.scheduler.last_epoch == 1
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))
    handle.remove()
    stepper.train_step(tiny.batch())
    assert stepper.skipped_steps == 1 and not torch.equal(before[0], next(stepper.model.parameters()))


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_float16_gradients_that_are_never_finite_stop_the_run(factor, tmp_path):
    """Every step is counted until then, and no parameter is changed."""
    stepper = trainer(precision="float16", output_dir=str(tmp_path))
    stepper.model.tokens.weight.register_hook(lambda g: g * factor)
    before = [p.detach().clone() for p in stepper.model.parameters()]
    with pytest.raises(NonFiniteLossError, match=r"gradients: expected a finite norm, got (nan|inf) though the scale"):
        for _ in range(60):
            stepper.train_step(tiny.batch())
            assert stepper.skipped_steps == stepper.steps
    assert stepper.skipped_steps == stepper.steps + 1 == 30  # 65536 halved to under 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))


def test_skipped_steps_are_counted_where_the_scale_cannot_fall():
    stepper = trainer(precision="float16")
    stepper.model.tokens.weight.register_hook(lambda g: g * torch.nan)
    stepper.scaler.set_backoff_factor(1 - 1e-9)  # 65536 in float32, as 0 would stay 0
    stepper.train_step(tiny.batch())
    assert stepper.skipped_steps == 1


def test_the_config_decides_the_precision_where_one_is_given():
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for precision, dtype in dtypes.items():
        assert MixedPrecisionTrainer(Regression(), config=tiny.config(precision=precision)).dtype == dtype
    assert MixedPrecisionTrainer(Regression(), config=tiny.config(), precision="bfloat16").dtype == torch.bfloat16
    assert MixedPrecisionTrainer(Regression()).dtype == torch.bfloat16


class Pairs(Regression):
    """Called with inputs and targets in a tuple, or in the list that a DataLoader makes of tuples."""

    def forward(self, pair):
        x, y = pair
        return (self.linear(x) - y).square().mean()


def test_a_tuple_is_one_batch():
    torch.manual_seed(1)
    pair = (torch.randn(4, 3), torch.randn(4, 1))
    losses = [MixedPrecisionTrainer(Pairs(), precision="float32") for _ in range(3)]
    for stepper in losses[1:]:
        stepper.model.load_state_dict(losses[0].model.state_dict())
    found = [s.train_step(batch) for s, batch in zip(losses, (pair, [pair], [list(pair)]), strict=True)]
    assert found == [found[0]] * 3
    loader = DataLoader(TensorDataset(*pair), batch_size=2)
    config = tiny.config(max_steps=4, batch_size=2)
    assert len(Trainer(Pairs(), config, loader).train()) == 4


def test_what_lies_in_lists_and_tuples_is_moved():
    Two = namedtuple("Two", "a b")
    meta = torch.device("meta")
    made = moved({"x": [torch.zeros(1), (torch.zeros(2), "y")], "z": Two(torch.zeros(3), 5)}, meta)
    assert made["x"][0].device == made["x"][1][0].device == made["z"].a.device == meta
    assert made["x"][1][1] == "y" and made["z"].b == 5 and isinstance(made["z"], Two)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_without_gradients_is_refused(precision):
    class Apart(Regression):
        def forward(self, x):
            return torch.zeros((), requires_grad=True) * 1.0

    with pytest.raises(ValueError, match="model: expected a loss that depends on the optimizer's parameters, got no"):
        MixedPrecisionTrainer(Apart(), precision=precision).train_step(torch.ones(3))


@pytest.mark.parametrize("fused", [True, False])
def test_sentence_pairs_alone_are_trained_and_weighed(fused):
    """One micro-batch of hidden tokens, one of pairs, is the step of both."""
    pairs = tiny.batch("mlm_nsp")
    tokens = {k: pairs[k] for k in pairs if k != "next_sentence_label"}
    pairs = {k: pairs[k] for k in pairs if k != "labels"}
    alone = trainer(objective="mlm_nsp", fused=fused)
    counts = alone.model.counted(pairs)
    assert counts["mlm"] == 0 and counts["nsp"] == 2
    losses = [alone.train_step(pairs) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    whole, pieces = trainer(objective="mlm_nsp", fused=fused), trainer(objective="mlm_nsp", fused=fused)
    assert pieces.train_step([tokens, pairs]) == pytest.approx(whole.train_step(tiny.batch("mlm_nsp")), rel=2e-6)
    with pytest.raises(ValueError, match="batch: expected labels, or next_sentence_label where that is learned"):
        alone.train_step({"input_ids": pairs["input_ids"]})


def test_gradients_are_unscaled_before_they_are_clipped():
    """With a scale of 65536, a norm that was clipped first would be that much smaller."""
    mixed, exact = trainer(precision="float16"), trainer()
    for stepper in (mixed, exact):
        stepper.train_step(tiny.batch())
    assert mixed.scaler.get_scale() == 65536.0
    assert mixed.gradient_norm == pytest.approx(exact.gradient_norm, rel=0.02)


def test_clipping_leaves_the_direction():
    model = Regression()
    config = tiny.config(max_grad_norm=1e-3)
    stepper = MixedPrecisionTrainer(
        model, torch.optim.SGD(model.parameters(), lr=1.0), config=config, precision="float32"
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    stepper.train_step(torch.randn(8, 3))
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert stepper.gradient_norm > 1e-2 and moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_batch(where, tmp_path):
    stepper = trainer(output_dir=str(tmp_path))
    batch = tiny.batch()
    stepper.train_step(batch)
    if where == "loss":
        with torch.no_grad():
            stepper.model.head_bias[0] = torch.nan
    else:
        stepper.model.tokens.weight.register_hook(lambda g: g * torch.nan)
    before = [p.detach().clone() for p in stepper.model.parameters()]
    with pytest.raises(NonFiniteLossError, match=r"expected a finite .*, got nan at step 1; the batch is kept in") as e:
        stepper.train_step(batch)
    assert str(e.value.path) in str(e.value) and e.value.path.parent == tmp_path
    kept = torch.load(e.value.path)
    assert kept["step"] == 1 and all(torch.equal(kept["batches"]["0"][k], v) for k, v in batch.items())
    after = stepper.model.parameters()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_matrices_decay_and_vectors_do_not():
    model = build_model(tiny.config(objective="mlm_nsp"))
    groups = parameter_groups(model, 0.1)
    names = {p: n for n, p in model.named_parameters()}
    decaying, others = ({names[p] for p in g["params"]} for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and len(decaying | others) == len(names)
    assert others == {n for n in names.values() if "norm" in n or n.endswith("bias")}
    assert {"tokens.weight", "layers.0.attention.w_q.weight"} <= decaying
    optimizer = make_optimizer(model, PretrainingConfig(adam_beta1=0.8, adam_epsilon=1e-6, learning_rate=3e-4))
    assert all((g["betas"], g["eps"], g["lr"]) == ((0.8, 0.999), 1e-6, 3e-4) for g in optimizer.param_groups)


@pytest.mark.parametrize("kind", [MixedPrecisionTrainer, DistributedTrainer])
def test_the_config_decides_the_schedule_where_one_is_given(kind):
    def rates(*args, steps=5, **kwargs):
        stepper, found = kind(*args, **kwargs, precision="float32"), []
        for _ in range(steps):
            found.append(stepper.optimizer.param_groups[0]["lr"])
            stepper.train_step(torch.ones(2, 3))
        return found

    fields = dict(warmup_steps=2, learning_rate=0.1, lr_scheduler="linear")
    assert rates(Regression(), config=tiny.config(max_steps=4, **fields)) == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.0])
    assert rates(Regression(), config=tiny.config(max_steps=None, **fields)) == [0.05, 0.1, 0.1, 0.1, 0.1]
    assert rates(Regression()) == [5e-5] * 5
    model = Regression()
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    assert rates(model, config=tiny.config(max_steps=4, **fields), optimizer=own) == [0.5] * 5


def test_schedules():
    at = [factor(s, "linear", 4, 12) for s in (0, 1, 3, 4, 8, 12, 99)]
    assert at == [0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    at = [factor(s, "cosine", 4, 12) for s in (3, 4, 6, 8, 12)]
    assert at == pytest.approx([1.0, 1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.0])
    assert [factor(s, "constant", 2, None) for s in (0, 1, 2, 999)] == [0.5, 1.0, 1.0, 1.0]


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        MixedPrecisionTrainer("bert")
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16, float16, got 'fp8'"):
        MixedPrecisionTrainer(Regression(), precision="fp8")
    with pytest.raises(ValueError, match="batch: expected a batch or a list of them, got an empty list"):
        trainer().train_step([])
    with pytest.raises(TypeError, match="model: expected outputs with a loss of one number, got Tensor"):
        MixedPrecisionTrainer(nn.Linear(3, 3)).train_step(torch.randn(2, 3))


class Halves(nn.Module):
    """Of which an optimizer may know one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_of_what_the_optimizer_does_not_train_have_no_part_in_a_step(precision):
    """Neither in the norm by which the others are clipped, nor by adding up."""
    found = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model, x = Halves(), torch.randn(64, 4)
        model.body.requires_grad_(not frozen)
        trainer = MixedPrecisionTrainer(model, torch.optim.SGD(model.head.parameters(), lr=0.1), precision=precision)
        for _ in range(3):
            trainer.train_step(x)
        assert all(p.grad is None for p in model.parameters())
        found.append((trainer.gradient_norm, trainer.skipped_steps, *model.head.weight.flatten().tolist()))
    assert found[0] == found[1]


def test_a_model_that_takes_the_batch_itself():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return (batch["x"] * self.weight).sum().reshape(1)

    model = Whole()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = MixedPrecisionTrainer(model, optimizer, precision="float32").train_step({"x": torch.tensor([1.0, 2.0, 3.0])})
    assert loss == 6.0


def test_names_that_a_forward_does_not_take_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        MixedPrecisionTrainer(Halves(), precision="float32").train_step({"x": torch.ones(2, 4), "y": torch.ones(2)})
