"""The trainer of a whole run: data, steps, checkpoints, resuming, metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler

from llmkern import check
from llmkern.training.batches import Counted
from llmkern.training.checkpoints import Checkpoints, generators, set_generators
from llmkern.training.configuration import PretrainingConfig
from llmkern.training.distributed import DistributedTrainer
from llmkern.training.metrics import Metrics
from llmkern.training.models import build_model
from llmkern.training.objectives.batches import Batches, Collator
from llmkern.training.optimisation import make_scheduler


class Trainer(DistributedTrainer):
    """Pretrains a model: `Trainer(build_model(config), config, data).train()`, on one process or under torchrun.

    model: None builds the config's. data: with collate a dataset of numbered examples, of which `objectives.Batches`
    makes the config's batches, each process its own; without, any iterable of batches (dicts of tensors) of this
    process's own part, gone through num_epochs times; objectives.Batches, which counts epochs itself, once. What has
    state_dict and load_state_dict goes on by them; of anything else, what was seen is drawn again and dropped, so it
    must give the same again from the same generators. An epoch has the steps of the process with the fewest batches.

    A run with an output_dir that has a checkpoint goes on from the last, with the losses that it would have had: bit
    for bit on the same machine with the same number of processes. `path` of the config to metrics: metrics.read.

    config.seed sets torch's generator, of every process another state; not those of Python and numpy.

    Raises ValueError where the number of steps is unknown: data without a length and no max_steps. TypeError for an
    iterator, which cannot begin again.
    """

    def __init__(
        self,
        model: nn.Module | None,
        config: PretrainingConfig,
        data: Any,
        collate: Collator | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not isinstance(config, PretrainingConfig):
            raise TypeError(f"config: expected a PretrainingConfig, got {type(config).__name__}")
        super().__init__(build_model(config) if model is None else model, config, optimizer)
        if collate is not None:
            data = Batches(
                data, collate, config.batch_size, seed=config.seed, epochs=config.num_epochs,
                rank=self.processes.data_rank, world_size=self.processes.data_size, num_workers=config.num_workers,
            )  # fmt: skip
        elif not isinstance(data, Iterable):
            raise TypeError(f"data: expected an iterable of batches without collate, got {type(data).__name__}")
        elif isinstance(data, Iterator):  # what it gave is gone: no epoch and no resumed run could begin again
            expected = "an iterable that begins again for every epoch (a list, a DataLoader)"
            raise TypeError(f"data: expected {expected}, got an iterator, {type(data).__name__}")
        self.data = Counted(data, config.num_epochs)
        self.total = self._total()
        if self.total is None and config.lr_scheduler != "constant":
            raise ValueError(f"max_steps: expected a number with data without a length and {config.lr_scheduler}")
        self.scheduler: LRScheduler = make_scheduler(self.optimizer, config, self.total)
        # Other random numbers on each process that has other data, the same on those that share a model's layers.
        torch.manual_seed(config.seed * 1_000_003 + self.processes.data_rank)
        self.saved: int | None = None  #: the step of this trainer's last checkpoint
        self.checkpoints = (
            None
            if config.output_dir is None
            else Checkpoints(config.output_dir, config.keep_checkpoints, self.processes.rank)
        )

    def _default_scheduler(self, config: PretrainingConfig) -> LRScheduler | None:
        return None  # made when it is known how many steps there are

    def _total(self) -> int | None:
        """The same on every process: the schedule depends on it, and the one with the fewest batches ends the run."""
        try:
            whole = self.data.passes * (len(self.data) // self.config.gradient_accumulation_steps)
        except TypeError:
            whole = -1
        if self.processes.mesh is not None:
            least = torch.tensor(whole, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            whole = int(least)
        if self.config.max_steps is not None:
            return self.config.max_steps
        return None if whole < 0 else whole

    def train(self, steps: int | None = None) -> list[float]:
        """Trains to the end, or only so many steps; the losses of these steps.

        Goes on from the last checkpoint where the output_dir has one beyond where this trainer stands, and writes one
        at the end. Raises NonFiniteLossError as train_step; TypeError and ValueError for steps that are no number of
        them.
        """
        if steps is not None:
            check.integer("steps", steps)
            if steps < 0:
                raise ValueError(f"steps: expected at least 0, got {steps}")
        self.resume()
        end = self.total if steps is None else self.steps + steps
        if end is not None and self.total is not None:
            end = min(end, self.total)
        first = self.processes.rank == 0
        metrics = Metrics(
            self.config.output_dir, self.steps, self.total, self.config.progress, self.config.tensorboard
        ) if first else None  # fmt: skip
        losses: list[float] = []
        began = time.perf_counter()
        try:
            for batches in self._micro_batches(end):
                rate = self.optimizer.param_groups[0]["lr"]
                losses.append(self.train_step(batches))
                tokens = float(self._mean(_tokens(batches).to(self.device))) * self.processes.data_size
                now = time.perf_counter()
                # Drawing the batches and writing a checkpoint count: a run that waits for them is as slow as that.
                seconds, began = now - began, now
                if metrics is not None:
                    metrics.write({
                        "step": self.steps, "loss": losses[-1], "learning_rate": rate,
                        "gradient_norm": self.gradient_norm, "tokens_per_second": tokens / seconds,
                        "seconds": seconds, "skipped_steps": self.skipped_steps,
                    })  # fmt: skip
                if self.steps % self.config.checkpoint_every == 0:
                    self._save_with(metrics)
            if losses:  # the data may end before the last step does; all processes have come as far
                self._save_with(metrics)
        finally:
            if metrics is not None:
                metrics.close()
        return losses

    def _micro_batches(self, end: int | None) -> Iterator[list[Any]]:
        """The batches of each step, epoch after epoch; an epoch ends where any process has no whole step left."""
        while (end is None or self.steps < end) and self.data.epoch < self.data.passes:
            drawn, epoch, whole = self.steps, self.data.epoch, self.data.position == 0
            stream = iter(self.data)
            while end is None or self.steps < end:
                batches = [b for _, b in zip(range(self.config.gradient_accumulation_steps), stream, strict=False)]
                if not self._all(len(batches) == self.config.gradient_accumulation_steps):
                    break
                yield batches
            else:
                return
            if self.data.epoch == epoch:  # another process had no more
                self.data.epoch, self.data.position = epoch + 1, 0
            if whole and self.steps == drawn:
                raise ValueError("data: expected at least one step's batches in an epoch, got fewer")

    def _all(self, here: bool) -> bool:
        """Whether it is so on every process."""
        return float(self._mean(torch.tensor(float(here), device=self.device))) == 1.0

    def _save_with(self, metrics: Metrics | None) -> None:
        """A checkpoint, and before it, on the disk, the metrics of its steps."""
        if metrics is not None:
            metrics.flush()
        self.save()

    def save(self) -> None:
        """Writes a checkpoint of where this trainer stands; nothing without an output_dir."""
        if self.checkpoints is None or self.steps == self.saved:
            return
        shared = {
            "config": self.config.to_dict(), "steps": self.steps, "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(), "processes": self.processes.size,
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
        }  # fmt: skip
        sharded = None
        if self.is_sharded(self.model):
            model, optimizer = get_state_dict(self.model, self.optimizer)
            sharded = {"model": model, "optimizer": optimizer}
        else:
            shared |= {"model": self.inner.state_dict(), "optimizer": self.optimizer.state_dict()}
        own = {"generators": generators(), "data": self.data.state_dict()}
        self.checkpoints.save(self.steps, shared, own, sharded)
        self.saved = self.steps

    def resume(self) -> int | None:
        """Goes on from the last checkpoint of the output_dir; its step, None where there is none beyond this one's.

        Raises ValueError for the checkpoint of another configuration or number of processes, naming what differs.
        """
        step = None if self.checkpoints is None else self.checkpoints.last()
        if self.checkpoints is None or step is None or step <= self.steps:
            return None
        shared, own = self.checkpoints.load(step)
        self._check_same(shared, step)
        assert own is not None  # with as many processes
        if "model" in shared:
            self.inner.load_state_dict(shared["model"])
            self.optimizer.load_state_dict(shared["optimizer"])
        else:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            into: dict[str, Any] = {"model": model, "optimizer": optimizer}
            self.checkpoints.load_sharded(step, into)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"]
            )
        self.scheduler.load_state_dict(shared["scheduler"] | {"lr_lambdas": [None] * len(self.optimizer.param_groups)})
        self.scaler.load_state_dict(shared["scaler"])
        self.steps, self.skipped_steps = shared["steps"], shared["skipped_steps"]
        self.data.load_state_dict(own["data"])
        set_generators(own["generators"])
        self.saved = step
        return step

    def _check_same(self, shared: dict[str, Any], step: int) -> None:
        """Raises where going on would not be going on."""
        free = {"output_dir", "checkpoint_every", "keep_checkpoints", "tensorboard", "progress", "num_workers"}
        then, now = shared["config"], self.config.to_dict()
        for name, value in now.items():
            if name not in free and then.get(name) != value:
                raise ValueError(
                    f"{name}: expected {then.get(name)!r} as in the checkpoint of step {step}, got {value!r}"
                )
        if shared["processes"] != self.processes.size:
            expected = f"{shared['processes']} as for the checkpoint of step {step}"
            raise ValueError(f"processes: expected {expected}, got {self.processes.size}")


def _tokens(batches: list[Any]) -> Tensor:
    """How many tokens the batches have, without padding; 0 where that is not known."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        mask = batch.get("attention_mask", batch.get("document_ids"))
        if isinstance(mask, Tensor):
            total += (mask > 0).sum().cpu() if "attention_mask" in batch else (mask >= 0).sum().cpu()
        elif isinstance(batch.get("input_ids"), Tensor):
            total += batch["input_ids"].numel()
    return total
