"""The shape of a transformer, and what its number of parameters alone tells of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmkern import check

TASKS = ("encoder", "decoder", "encoder-decoder")
#: Width for each layer at so many parameters, and between them on the logarithm: that of BERT-base and GPT-2, and of
#: Llama-2 7B.
_WIDTH_PER_LAYER = ((3e8, 64), (7e9, 128))
_HEAD = 64
#: The smallest width of a usual shape.
_LEAST = 2 * _HEAD
#: How far a configuration's sizes may lie from the weights of its model.
_OFF = 0.05


@dataclass(frozen=True)
class Layer:
    """What the products of a layer are made of: elements of their matrices; elements that they take and give for each
    token, counted for each product; their number."""

    weights: int
    inputs: int
    outputs: int
    linears: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer. task: one of TASKS; of an encoder-decoder each half has `layers`. intermediate: the inner
    width of its feed-forward layers, which a gated one (SwiGLU) has twice on the way in. kv_heads: fewer than heads
    where these share keys and values. tied: the output's matrix is that of the embedding. head: the width of a head,
    None where all of them have hidden together. linear: whether its matrices are nn.Linear, which int8 replaces; those
    of GPT-2 are not.

    Raises TypeError and ValueError for what is no positive number, and for an unknown task.
    """

    task: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = False
    tied: bool = True
    head: int | None = None
    linear: bool = True

    def __post_init__(self) -> None:
        check.one_of("task", self.task, TASKS)
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab"):
            check.positive(name, getattr(self, name))

    @classmethod
    def of(cls, config: Any, task: str) -> Shape:
        """That of a transformers configuration, held against the weights of its model, which is made without memory.

        Raises ValueError where it does not name its sizes, and where these do not make its model (experts, shared or
        unequal layers): a Shape of one's own is to be given then.
        """

        def named(*names: str) -> Any:
            found = next((v for n in names if (v := getattr(config, n, None)) is not None), None)
            if found is None:
                raise ValueError(f"config: expected one with {' or '.join(names)}, got {type(config).__name__}")
            return found

        hidden = named("hidden_size", "d_model", "n_embd")
        heads = named("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head")
        layers = named("num_hidden_layers", "encoder_layers", "n_layer")
        inner = next((v for n in _INNER if (v := getattr(config, n, None)) is not None), 4 * hidden)
        matrices, linear = _matrices(config, task)
        wide = sum(1 if n == inner else 2 for n, m in matrices if m == hidden and n in (inner, 2 * inner))
        sides = 2 if task == "encoder-decoder" else 1
        found = cls(
            task, layers, hidden, inner, heads, getattr(config, "num_key_value_heads", None) or heads,
            named("vocab_size"), gated=wide >= 2 * layers * sides,
            tied=bool(getattr(config, "tie_word_embeddings", True)),
            head=getattr(config, "head_dim", None) or getattr(config, "d_kv", None),
            linear=linear,
        )  # fmt: skip
        real = sum(n * m for n, m in matrices)
        if abs(found.parameters - real) > _OFF * real:
            raise ValueError(
                f"config: expected one whose sizes make its matrices, got {type(config).__name__}, of whose "
                f"{real / 1e6:.0f} M weights they make {found.parameters / 1e6:.0f} M: give a Shape"
            )
        return found

    @classmethod
    def from_parameters(cls, parameters: int, task: str, vocab: int = 32000) -> Shape:
        """A usual shape with about so many parameters: heads of 64, an inner width of about 4 times the width,
        and a layer for every 64 of width, beyond 300 M parameters for more, up to 128.

        Raises ValueError for fewer than the smallest of them has.
        """
        check.positive("parameters", parameters)
        check.positive("vocab", vocab)
        sides = 2 if task == "encoder-decoder" else 1

        def usual(hidden: int) -> Shape:
            layers, heads = max(1, round(hidden / _ratio(parameters) / sides)), hidden // _HEAD
            return cls(task, layers, hidden, 4 * hidden, heads, heads, vocab)

        least = usual(_LEAST)
        if parameters < 0.9 * least.parameters:
            raise ValueError(
                f"parameters: expected at least {least.parameters / 1e6:.0f} M for a usual shape with a vocabulary of "
                f"{vocab}, got {parameters}: give a Shape"
            )
        found = min(map(usual, range(_LEAST, 1 << 16, _HEAD)), key=lambda s: abs(s.parameters - parameters))
        # What is left over or missing goes into the inner width: from 20 M on, where the embedding is no longer most of
        # it, more parameters never take less time.
        spare = (parameters - found.parameters) / (2 * found.hidden * found.layers * sides)
        return replace(found, intermediate=max(1, found.intermediate + round(spare)))

    @property
    def wide(self) -> int:
        """The width of queries."""
        return self.heads * self.head if self.head else self.hidden

    @property
    def narrow(self) -> int:
        """The width of keys, and of values."""
        return self.wide * self.kv_heads // self.heads

    def layer(self, across: bool = False) -> Layer:
        """An encoder's layer, a decoder's that attends to itself alone, and across: one that attends to an encoder as
        well, whose keys and values are not made again for each token."""
        into, queries, inner, more = (2 if self.gated else 1), 2 if across else 1, self.intermediate, self.hidden
        return Layer(
            weights=2 * more * (queries * self.wide + self.narrow) + (into + 1) * more * inner,
            inputs=(2 + queries + into) * more + queries * self.wide + inner,
            outputs=queries * (self.wide + more) + 2 * self.narrow + into * inner + more,
            linears=2 * queries + 2 + into + 1,
        )

    @property
    def layer_weights(self) -> int:
        """Of a layer's matrices; of an encoder-decoder those of one on each side."""
        plain = self.layer().weights
        if self.task != "encoder-decoder":
            return plain
        return 2 * plain + 2 * self.hidden * (self.wide + self.narrow)  # an attention more, keys and values among it

    @property
    def head_weights(self) -> int:
        """Of the matrix that gives logits; an encoder is taken without one."""
        return 0 if self.task == "encoder" else self.vocab * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Held beside the layers' and, where it is not the embedding itself, the output's."""
        return self.vocab * self.hidden if self.tied or self.task == "encoder" else 2 * self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of all matrices; biases, norms and positions are left out."""
        return self.layers * self.layer_weights + self.embedding_weights


_INNER = ("n_inner", "intermediate_size", "encoder_ffn_dim", "d_ff")
#: Parts of names of what is no layer's, an embedding's or the output's matrix.
_BESIDE = ("position", "wpe", "token_type", "pooler", "relative_attention")


def _matrices(config: Any, task: str) -> tuple[list[tuple[int, int]], bool]:
    """The sizes of the matrices of a configuration's model, of experts of each, and whether those of its layers are
    nn.Linear's."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError('config: expected transformers (pip install "llmkern[hf]")') from error
    kinds: dict[str, Any] = {
        "encoder": transformers.AutoModel, "decoder": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }  # fmt: skip
    try:
        with torch.device("meta"):
            model = kinds[task].from_config(config)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"config: expected that of an {task} in transformers, got {type(config).__name__}") from error
    held = [p for name, p in model.named_parameters() if p.dim() > 1 and not any(b in name for b in _BESIDE)]
    linear = not any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())
    return [(p.numel() // p.shape[-1], p.shape[-1]) for p in held], linear


def _ratio(parameters: int) -> float:
    (few, low), (many, high) = _WIDTH_PER_LAYER
    place = math.log(parameters / few) / math.log(many / few)
    return low + (high - low) * min(1.0, max(0.0, place))
