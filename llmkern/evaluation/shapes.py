"""The shape of a transformer, and what its number of parameters alone tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkern import check

TASKS = ("encoder", "decoder", "encoder-decoder")
#: Width for each layer, up to so many parameters: about that of BERT-base and GPT-2, and of Llama-2 7B.
_WIDTH_PER_LAYER = ((1e9, 64), (float("inf"), 128))
_HEAD = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer. task: one of TASKS; of an encoder-decoder each half has `layers`. intermediate: the inner
    width of its feed-forward layers, which a gated one (SwiGLU) has twice on the way in. kv_heads: fewer than heads
    where these share keys and values. tied: the output's matrix is that of the embedding.

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

    def __post_init__(self) -> None:
        check.one_of("task", self.task, TASKS)
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab"):
            check.positive(name, getattr(self, name))

    @classmethod
    def of(cls, config: Any, task: str) -> Shape:
        """That of a transformers configuration. Raises ValueError where it does not name its sizes."""

        def named(*names: str) -> Any:
            found = next((v for n in names if (v := getattr(config, n, None)) is not None), None)
            if found is None:
                raise ValueError(f"config: expected one with {' or '.join(names)}, got {type(config).__name__}")
            return found

        hidden = named("hidden_size", "d_model", "n_embd")
        heads = named("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head")
        activation = str(getattr(config, "hidden_act", "")) + str(getattr(config, "feed_forward_proj", ""))
        return cls(
            task, named("num_hidden_layers", "encoder_layers", "n_layer"), hidden,
            getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
            or getattr(config, "encoder_ffn_dim", None) or getattr(config, "d_ff", None) or 4 * hidden,
            heads, getattr(config, "num_key_value_heads", None) or heads, named("vocab_size"),
            gated="silu" in activation or "gated" in activation,
            tied=bool(getattr(config, "tie_word_embeddings", True)),
        )  # fmt: skip

    @classmethod
    def from_parameters(cls, parameters: int, task: str, vocab: int = 32000) -> Shape:
        """A usual shape with about so many parameters: heads of 64, an inner width of 4 times the width, and a layer
        for every 64 of width (128 beyond a billion parameters)."""
        check.positive("parameters", parameters)
        check.positive("vocab", vocab)
        ratio = next(r for most, r in _WIDTH_PER_LAYER if parameters <= most)

        def of_width(hidden: int) -> Shape:
            whole = max(1, round(hidden / ratio / (2 if task == "encoder-decoder" else 1)))
            heads = hidden // _HEAD
            return cls(task, whole, hidden, 4 * hidden, heads, heads, vocab)

        widths = range(_HEAD, 1 << 16, _HEAD)
        best = min(widths, key=lambda h: abs(of_width(h).parameters - parameters))
        found = of_width(best)
        # The number of layers that comes nearest at this width.
        spare = parameters - found.parameters
        layers = max(1, found.layers + round(spare / found.layer_weights))
        return cls(task, layers, best, 4 * best, found.heads, found.kv_heads, vocab)

    @property
    def attention_weights(self) -> int:
        """Of an attention's four matrices."""
        return 2 * self.hidden * self.hidden * (self.heads + self.kv_heads) // self.heads

    @property
    def encoder_weights(self) -> int:
        """Of a layer's matrices: an encoder's, and a decoder's that attends to itself alone."""
        return self.attention_weights + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        """Of a layer's matrices; of an encoder-decoder those of one on each side."""
        pairs = self.task == "encoder-decoder"
        return 2 * self.encoder_weights + self.attention_weights if pairs else self.encoder_weights

    @property
    def attention_outputs(self) -> int:
        """Elements that an attention's four products give for a token."""
        return 2 * self.hidden * (self.heads + self.kv_heads) // self.heads

    @property
    def encoder_outputs(self) -> int:
        """Elements that a layer's products give for a token, as encoder_weights has them."""
        return self.attention_outputs + (2 if self.gated else 1) * self.intermediate + self.hidden

    @property
    def encoder_inputs(self) -> int:
        """Elements that a layer's products take for a token, those that several of them take counted for each."""
        return (4 + (2 if self.gated else 1)) * self.hidden + self.intermediate

    @property
    def encoder_linears(self) -> int:
        return 7 if self.gated else 6

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
