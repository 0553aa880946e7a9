"""What is called in each phase of a model's work: prefill, decode, a training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmkern.evaluation import running


def of_pairs(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder, of transformers or of llmkern.training."""
    config = getattr(model, "config", None)
    architecture = getattr(config, "architecture", "")
    return getattr(config, "is_encoder_decoder", False) is True or architecture == "encoder_decoder"


def _prefill(model: nn.Module, ids: Tensor, precision: str) -> Callable[[], Any]:
    more = {"decoder_input_ids": ids[:, :1]} if of_pairs(model) else {}

    def call() -> Any:
        with running.cast(ids.device, precision):
            return model(input_ids=ids, **more)

    return call


def _decode(model: nn.Module, ids: Tensor, precision: str) -> Callable[[], Any]:
    """Each call appends a token to the cache that the prompt has left."""
    cache, encoded = prompted(model, ids, precision)
    last = ids[:, -1:]
    given = {"input_ids": last} if encoded is None else {"decoder_input_ids": last, "encoder_outputs": (encoded,)}

    def call() -> Any:
        with running.cast(ids.device, precision):
            return model(**given, past_key_values=cache, use_cache=True)

    return call


def prompted(model: nn.Module, ids: Tensor, precision: str) -> tuple[Any, Tensor | None]:
    """The cache that a prompt leaves, and of an encoder-decoder what the encoder made of it.

    Raises TypeError for a model without one.
    """
    pairs = of_pairs(model)
    more = {"decoder_input_ids": ids[:, :1]} if pairs else {}
    try:
        with running.cast(ids.device, precision):
            output = model(input_ids=ids, use_cache=True, **more)
    except TypeError as error:  # it takes no use_cache
        raise TypeError(f"expected a decoder whose output has past_key_values: {error}") from error
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise TypeError("expected a decoder whose output has past_key_values, got none")
    return cache, output.encoder_last_hidden_state if pairs else None


def _training(model: nn.Module, ids: Tensor, precision: str) -> Callable[[], Any]:
    takes_labels = "labels" in inspect.signature(model.forward).parameters

    def call() -> None:
        model.zero_grad(set_to_none=True)
        with running.cast(ids.device, precision):
            output = model(input_ids=ids, labels=ids) if takes_labels else model(input_ids=ids)
            loss = output.loss if takes_labels else _first(output).float().mean()
        loss.backward()

    return call


@contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """In training mode, which afterwards is as it was, as gradients are."""
    evaluated = [module for module in model.modules() if not module.training]
    grads = [(p, p.grad) for p in model.parameters()]
    model.train()
    try:
        yield
    finally:
        for module in evaluated:
            module.training = False
        for p, grad in grads:
            p.grad = grad


def _first(output: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            found: Tensor = getattr(output, name)
            return found
    return running.logits_of(output)


CALLS = {"prefill": _prefill, "decode": _decode, "training": _training}
