"""What a pretraining run is: the shape of the model, the objective, the optimiser, where and how it runs."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from llmkern import check

#: Which model learns by which objective.
ARCHITECTURES = {"mlm": "encoder", "mlm_nsp": "encoder", "clm": "decoder", "seq2seq": "encoder_decoder"}

_CHOICES: dict[str, tuple[str, ...]] = {
    "model_type": ("transformer",),
    "objective": tuple(ARCHITECTURES),
    "optimizer": ("adamw",),
    "lr_scheduler": ("cosine", "linear", "constant"),
    "precision": ("float32", "bfloat16", "float16"),
    "parallelism": ("ddp", "fsdp"),
}
_POSITIVE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "max_seq_length", "batch_size", "num_epochs", "vocab_size", "type_vocab_size", "gradient_accumulation_steps",
    "tensor_parallel_size", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "learning_rate", "weight_decay", "warmup_steps", "layer_norm_eps", "adam_epsilon", "max_grad_norm", "z_loss",
    "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainingConfig:
    """The configuration of a pretraining run; unchangeable, checked when it is made.

    Model: hidden_size, num_hidden_layers (an encoder-decoder has as many in either stack), num_attention_heads,
    intermediate_size, max_position_embeddings, vocab_size, type_vocab_size, dropout (of embeddings, attention weights
    and of what layers add), layer_norm_eps, pad_token_id (which begins an encoder-decoder's output too).
    fused: llmkern's kernels; False gives the same model in plain PyTorch, with the same parameters.

    Objective: "mlm", "mlm_nsp" (encoder), "clm" (decoder), "seq2seq" (encoder-decoder); label_smoothing and z_loss of
    its loss. A model in training refuses rows of more than max_seq_length tokens, padding left out; evaluated, it takes
    as many as it has positions.

    Optimisation: batch_size sequences per process and forward pass, gradient_accumulation_steps passes per step.
    learning_rate rises over warmup_steps, then follows lr_scheduler to 0 ("constant": stays) at the last step, which is
    max_steps, or the end of num_epochs. max_grad_norm: 0 leaves gradients as they are. precision: the dtype of
    autocast, "float32" for none; "float16" scales the loss.

    Run: seed; parallelism "ddp" (whole parameters everywhere) or "fsdp" (shards); tensor_parallel_size processes share
    every layer; activation_checkpointing computes layers again in the backward. output_dir: where checkpoints, one
    every checkpoint_every steps, keep_checkpoints of them, and metrics go; None writes nothing. num_workers of the
    DataLoader. tensorboard writes for it too.

    Raises TypeError for a value of another type and ValueError for one out of its range, naming the field.
    """

    model_type: str = "transformer"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    max_seq_length: int = 512
    batch_size: int = 32
    learning_rate: float = 5e-5
    num_epochs: int = 10
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr_scheduler: str = "cosine"
    warmup_steps: int = 1000
    dropout: float = 0.1
    layer_norm_eps: float = 1e-12

    objective: str = "mlm"
    vocab_size: int = 30522
    type_vocab_size: int = 2
    pad_token_id: int = 0
    fused: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: str = "float32"

    seed: int = 0
    parallelism: str = "ddp"
    tensor_parallel_size: int = 1
    activation_checkpointing: bool = False
    num_workers: int = 0
    output_dir: str | None = None
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if value is None and kind not in (int, float, str, bool):
                continue
            if kind is bool:
                check.flag(name, value)
            elif kind is float:
                check.finite(name, value)
                object.__setattr__(self, name, float(value))
            elif kind in (int, int | None):
                check.integer(name, value)
            else:
                check.text(name, value)
        for name, choices in _CHOICES.items():
            check.one_of(name, getattr(self, name), choices)
        for name in _POSITIVE:
            check.positive(name, getattr(self, name))
        if self.max_steps is not None:
            check.positive("max_steps", self.max_steps)
        for name in (*_AT_LEAST_ZERO, "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("dropout", "label_smoothing"):
            check.probability(name, getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected one below vocab_size = {self.vocab_size}, got {self.pad_token_id}"
            )
        if self.objective == "mlm_nsp" and self.type_vocab_size < 2:
            raise ValueError(f"type_vocab_size: expected 2 or more with mlm_nsp, got {self.type_vocab_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected one in [0, 2**32), got {self.seed}")
        if self.output_dir == "":
            raise ValueError("output_dir: expected a folder or None, got ''")
        if self.hidden_size % self.num_attention_heads:
            expected = f"a divisor of hidden_size = {self.hidden_size}"
            raise ValueError(f"num_attention_heads: expected {expected}, got {self.num_attention_heads}")
        if self.architecture == "decoder" and self.hidden_size // self.num_attention_heads % 2:
            width = self.hidden_size // self.num_attention_heads
            raise ValueError(f"num_attention_heads: expected heads of an even width (rotary positions), got {width}")
        if self.max_seq_length > self.max_position_embeddings:
            expected = f"at most max_position_embeddings = {self.max_position_embeddings}"
            raise ValueError(f"max_seq_length: expected {expected}, got {self.max_seq_length}")
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(self, name) % self.tensor_parallel_size:
                expected = f"a divisor of {name} = {getattr(self, name)}"
                raise ValueError(f"tensor_parallel_size: expected {expected}, got {self.tensor_parallel_size}")

    @property
    def architecture(self) -> str:
        """ "encoder", "decoder" or "encoder_decoder", as the objective needs it."""
        return ARCHITECTURES[self.objective]

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainingConfig:
        """The configuration with these fields, the others at their defaults.

        Raises ValueError for a key that is no field, naming the nearest that is; a file's, for one given twice.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected the fields by name, got {type(values).__name__}")
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
                raise ValueError(f"{key}: expected a field of PretrainingConfig, the nearest is {near}; got {key!r}")
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the fields to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> PretrainingConfig:
        """Reads them back. Raises as `from_dict`."""
        return cls.from_dict(json.loads(Path(path).read_text(), object_pairs_hook=_once))

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes the fields to a file. Needs pyyaml, of the extra [training]."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> PretrainingConfig:
        """Reads them back. YAML 1.1 takes 5e-5 for a string: it is a number here. Raises as `from_dict`."""
        import yaml

        class Loader(yaml.SafeLoader):
            """YAML's own takes the last of several values of a key without a word."""

            def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
                made: dict[Any, Any] = super().construct_mapping(node, deep)
                _once([(self.construct_object(key, deep), None) for key, _ in node.value])
                return made

        values = yaml.load(Path(path).read_text(), Loader) or {}
        kinds = get_type_hints(cls)
        if isinstance(values, Mapping):
            values = {k: _number(v) if kinds.get(k) is float else v for k, v in values.items()}
        return cls.from_dict(values)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of these. Raises ValueError for a key that comes twice."""
    made: dict[Any, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key}: expected one value, got more than one")
        made[key] = value
    return made


def _number(value: Any) -> Any:
    """A number where a string spells one; what does not stays, and is refused by its field."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
