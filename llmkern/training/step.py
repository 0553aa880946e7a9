"""One optimiser step: autocast, scaling of the loss, accumulation, clipping, and a stop at what is not finite."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from llmkern import check
from llmkern.training.configuration import PretrainingConfig
from llmkern.training.optimisation import clip, make_optimizer, make_scheduler, total_norm

#: Under which scale of the loss a run stops: gradients that still overflow are not too large, they are not finite.
#: fairseq's min_loss_scale.
LEAST_SCALE = 1e-4

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient that is NaN or infinite. path: the file that keeps the batch, to be read by torch.load."""

    def __init__(self, message: str, path: Path | None) -> None:
        super().__init__(message)
        self.path = path


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(v, device) for v in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(v, device) for v in batch)
    return batch


def loss_of(outputs: Any) -> Tensor:
    """The loss among a model's outputs. Raises TypeError where there is none."""
    loss = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"model: expected outputs with a loss of one number, got {type(outputs).__name__}")
    return loss.reshape(())


def takes_names(forward: Callable[..., Any], batch: Mapping[str, Any]) -> bool:
    """Whether a batch's entries are the arguments of a forward; else it takes the batch itself, as its only one."""
    signature = inspect.signature(forward)
    named = [q.name for q in signature.parameters.values() if q.kind not in (q.VAR_POSITIONAL, q.VAR_KEYWORD)]
    try:
        signature.bind(batch)
    except TypeError:
        return True
    return any(name in named for name in batch) or len(named) < len(signature.parameters)


class MixedPrecisionTrainer:
    """Trains a model in mixed precision: train_step(batch) -> float.

    model: called as model(**batch) for a batch of names that its forward takes, else model(batch); its outputs have a
    loss, or are one.
    optimizer: by default the AdamW of the config. scheduler: is stepped with it; by default, where a config is given
    and no optimizer, the config's, which stays at learning_rate where there is no max_steps to end at. config: the rest
    (PretrainingConfig's defaults without one). precision: "float16" scales the loss and skips steps whose gradients
    overflow, counted in skipped_steps; "bfloat16" and "float32" need no scaling; by default that of a config that is
    given, without one float16 on a GPU, bfloat16 on a CPU.

    A model that has counted(batch) -> {term: how much it counts} and outputs with losses {term: mean}, as those of
    build_model, gets micro-batches weighed by these counts: the step is that of the one large batch. Others are weighed
    alike. The gradients' norm before clipping is kept in gradient_norm.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        config: PretrainingConfig | None = None,
        precision: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if precision is None and config is not None:
            precision = config.precision
        self.config = PretrainingConfig() if config is None else config
        self.model = model
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if precision is None:
            precision = "bfloat16" if self.device.type == "cpu" else "float16"
        check.one_of("precision", precision, tuple(PRECISIONS))
        self.dtype = PRECISIONS[precision]
        self.scaler = GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizer = make_optimizer(model, self.config) if optimizer is None else optimizer
        self.scheduler = scheduler
        if config is not None and optimizer is None and scheduler is None:
            self.scheduler = self._default_scheduler(config)
        self.steps = self.skipped_steps = 0
        self.gradient_norm = 0.0

    def _default_scheduler(self, config: PretrainingConfig) -> LRScheduler | None:
        return make_scheduler(self.optimizer, config, config.max_steps)

    @property
    def inner(self) -> nn.Module:
        """The model without a wrapper."""
        return self.model

    def train_step(self, batch: Any) -> float:
        """One optimiser step on a batch, or on a list of micro-batches; the loss, the mean over what counts in them.

        A list is always one of micro-batches: a batch that is itself a list (as torch's DataLoader makes of tuples) is
        given in a list, `train_step([batch])`. A tuple is a batch.

        Raises NonFiniteLossError, before a parameter is changed, where the loss is not finite, or the gradients are
        not; float16 skips such steps, and stops when its scale has fallen under 1e-4. ValueError where the optimizer's
        parameters got no gradients.
        """
        batches = batch if isinstance(batch, list) else [batch]
        if not batches:
            raise ValueError("batch: expected a batch or a list of them, got an empty list")
        batches = [moved(b, self.device) for b in batches]
        self.model.train()
        shares = self._shares(batches)
        by_name = isinstance(batches[0], Mapping) and takes_names(self.inner.forward, batches[0])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (one, share) in enumerate(zip(batches, shares, strict=True)):
            with self._reducing(i + 1 == len(batches)):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    outputs = self.model(**one) if by_name else self.model(one)
                    loss = self._weighed(outputs, share)
                total += loss.detach()
                self.scaler.scale(loss).backward()
        loss_value = float(self._mean(total))
        if loss_value - loss_value != 0.0:
            self._stop(f"loss: expected a finite number, got {loss_value}", batches)
        self._update(batches)
        return loss_value

    def _update(self, batches: list[Any]) -> None:
        """Gradients into parameters."""
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError("model: expected a loss that depends on the optimizer's parameters, got no gradients")
        # Those that are unscaled and stepped: others of the model may have gradients too, which nobody asked for.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        norm = total_norm(parameters)
        self.gradient_norm = float(norm)
        if not self.scaler.is_enabled() and self.gradient_norm - self.gradient_norm != 0.0:
            self._stop(f"gradients: expected a finite norm, got {self.gradient_norm}", batches)
        if self.config.max_grad_norm:
            clip(parameters, self.config.max_grad_norm, norm)
        # What the scaler itself goes by; the scale does not tell, which ends at 0 and falls no further.
        overflowed = self.scaler.is_enabled() and any(
            bool(found) for found in self.scaler._found_inf_per_device(self.optimizer).values()
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped_steps += overflowed
        if overflowed and self.scaler.get_scale() < LEAST_SCALE:
            found = f"got {self.gradient_norm} though the scale of the loss fell to {self.scaler.get_scale():.1e}"
            self._stop(f"gradients: expected a finite norm, {found},", batches)
        self._drop_gradients()
        self.steps += 1
        if not overflowed and self.scheduler is not None:
            self.scheduler.step()

    def _drop_gradients(self) -> None:
        """The model's too that the optimizer has no part in: they would add up, and memory with them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def _shares(self, batches: list[Any]) -> list[dict[str, Tensor] | float]:
        """The weight of each micro-batch's terms, such that their sum over batches and processes is the mean over all
        that counts, where reducing gradients takes the mean over processes."""
        counted = getattr(self.inner, "counted", None)
        if counted is None or not isinstance(batches[0], Mapping):
            return [1.0 / len(batches)] * len(batches)
        counts = [counted(b) for b in batches]
        terms = sorted({term for c in counts for term in c})
        zero = torch.zeros((), device=self.device)
        table = torch.stack([torch.stack([c.get(t, zero).double() for t in terms]) for c in counts])
        whole = self._mean(table.sum(0)).clamp(min=1e-9)
        return [dict(zip(terms, row, strict=True)) for row in table / whole]

    def _weighed(self, outputs: Any, share: dict[str, Tensor] | float) -> Tensor:
        if isinstance(share, float):
            return loss_of(outputs) * share
        losses = [outputs.losses[term] * weight.float() for term, weight in share.items() if term in outputs.losses]
        if not losses:
            raise ValueError("batch: expected labels, or next_sentence_label where that is learned, got neither")
        return torch.stack(losses).sum()

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes that see other data; here there is one."""
        return value

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch; gradients meet in the last."""
        yield

    @property
    def _rank(self) -> int:
        return 0

    def _stop(self, message: str, batches: list[Any]) -> None:
        """Keeps the batches in a file and raises."""
        self._drop_gradients()
        folder = Path(self.config.output_dir or tempfile.mkdtemp(prefix="llmkern-"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"not-finite-step-{self.steps}-rank-{self._rank}.pt"
        torch.save({"step": self.steps, "batches": moved(batches_of(batches), torch.device("cpu"))}, path)
        raise NonFiniteLossError(f"{message} at step {self.steps}; the batch is kept in {os.fspath(path)}", path)


def batches_of(batches: list[Any]) -> dict[str, Any]:
    """Micro-batches by their number."""
    return {str(i): b for i, b in enumerate(batches)}
