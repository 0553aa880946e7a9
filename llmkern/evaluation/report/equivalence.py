"""Whether the kernelized model is the published one: the numerical contract, on texts of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.check import short
from llmkern.models.huggingface import without_caches
from llmkern.verify import verify

#: Texts, and tokens of each: the truth is computed in float64.
TEXTS, TOKENS = 2, 64


class AtTokens(nn.Module):
    """A model's outputs at tokens: at padding, implementations differ rightly. Caches hold what outputs come from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, **batch: Tensor) -> dict[str, Any]:
        output = without_caches(self.model(**batch))
        mask = batch["attention_mask"].bool()
        found = output if isinstance(output, Mapping) else {"output": output}

        def seen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                return value[mask]
            return tuple(map(seen, value)) if isinstance(value, (tuple, list)) else value

        return {name: seen(value) for name, value in found.items()}


def batch_of(tokenizer: Any, texts: list[str], pairs: bool = False) -> dict[str, Tensor]:
    """The beginnings of the first texts, padded right: input_ids and attention_mask, (B, S) int64."""
    from llmkern.evaluation import generation

    rows = [row[:TOKENS] for row in generation.encoded(tokenizer, texts[:TEXTS], "texts")]
    batch = generation.padded(rows, generation.pad_token(tokenizer), left=False)
    if pairs:  # the decoder's inputs, of which all are seen
        batch["decoder_input_ids"] = batch["input_ids"][:, : min(map(len, rows))]
    return batch


@torch.no_grad()
def finite(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether outputs at tokens have no NaN, and something that is finite: an infinite logit can be meant."""

    def every(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value] if value.is_floating_point() else []
        if isinstance(value, Mapping):
            value = value.values()
        return [t for one in value for t in every(one)] if hasattr(value, "__iter__") else []

    found = every(AtTokens(model)(**batch))
    return not any(t.isnan().any() or (t.numel() and not t.isfinite().any()) for t in found)


def measure(published: nn.Module, kernelized: nn.Module, batch: dict[str, Tensor], gradients: bool) -> dict[str, Any]:
    """The contract's table; or, where it cannot be made, why."""
    device = next((p.device for p in published.parameters()), torch.device("cpu"))
    given = {name: t.to(device) for name, t in batch.items()}
    result: dict[str, Any] = {
        "gradients": gradients,
        "inputs": {"shape": list(batch["input_ids"].shape), "tokens": int(batch["attention_mask"].sum())},
    }
    try:
        result["finite"] = finite(published, given)
        found = verify(AtTokens(kernelized), AtTokens(published), (), given, gradients=gradients)
    except Exception as error:  # whatever a model cannot do is its result
        return {**result, "failed": f"{type(error).__name__}: {error}".split("\n", 1)[0]}
    fields = ("max_error", "max_reference", "max_allowed", "rms_error", "rms_reference", "rms_allowed", "scale")
    rows = [
        {"name": r.name.removeprefix("output.").removeprefix("model."), "kind": r.kind, "shape": list(r.shape),
         "dtype": None if r.dtype is None else short(r.dtype), **{f: getattr(r, f) for f in fields},
         "passed": r.passed, "reason": r.reason, "draws": r.draws}
        for r in found.rows
    ]  # fmt: skip
    notes = found.notes()
    for told, row in zip(rows, found.rows, strict=True):
        notes = [note.replace(f"{row.name} (", f"{told['name']} (") for note in notes]
    return {
        **result, "passed": found.passed, "rows": rows, "count": len(rows), "kept": sum(r["passed"] for r in rows),
        "notes": notes,
    }  # fmt: skip


def code(texts: str, pairs: bool, gradients: bool) -> str:
    more = ", pairs=True" if pairs else ""
    return (
        "from llmkern.evaluation.report.equivalence import AtTokens, batch_of\n"
        f"batch = batch_of(tokenizer, {texts}{more})\n"
        f"found = llmkern.verify(AtTokens(kernelized), AtTokens(published), (), batch, gradients={gradients})\n"
        "print(found)"
    )
