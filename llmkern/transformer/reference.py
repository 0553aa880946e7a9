"""The encoder-decoder in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern import autocast, check


class Transformer(nn.Module):
    """An encoder and a decoder of torch's own layers, sequence first.

    d_model: the width. nhead: attention heads, a divisor of d_model. num_layers: layers of each stack. The feed-forward
    width is 2048 and dropout 0.1. Raises ValueError where nhead does not divide d_model or a number is not positive.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.
    """

    def __init__(self, d_model: int = 512, nhead: int = 8, num_layers: int = 6) -> None:
        for name, value in (("d_model", d_model), ("nhead", nhead), ("num_layers", num_layers)):
            check.positive(name, value)
        if d_model % nhead:
            raise ValueError(f"nhead: expected a divisor of d_model = {d_model}, got {nhead}")
        super().__init__()
        self.d_model, self.nhead, self.num_layers = d_model, nhead, num_layers
        encoder_layer = nn.TransformerEncoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1)
        decoder_layer = nn.TransformerDecoderLayer(d_model, nhead, dim_feedforward=2048, dropout=0.1)
        # Nested tensors serve batch-first layers alone.
        self.encoder = nn.TransformerEncoder(encoder_layer, num_layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, num_layers)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's output, (T, B, d_model) or without batches (T, d_model).

        src (S, B, d_model), tgt (T, B, d_model), or both without B; masks and flags as torch.nn.Transformer has them: a
        boolean mask is True where attention is forbidden, a floating one is added to the scores. A flag says that the
        mask is causal; None finds it out.

        Raises TypeError for what is no tensor or of another dtype than the parameters (under autocast, which casts
        them, src and tgt may be float32, bfloat16 or float16) and for flags that are none, ValueError for a wrong shape
        or device and for a flag without its mask; masks are bool or of src's dtype.
        """
        self._check_sequences(src, tgt)
        for name, flag, mask, choices in (
            ("src", src_is_causal, src_mask, (True, False, None)),
            ("tgt", tgt_is_causal, tgt_mask, (True, False, None)),
            ("memory", memory_is_causal, memory_mask, (True, False)),
        ):
            self._check_hint(name, flag, mask, choices)
        lengths = {"src": src.size(0), "tgt": tgt.size(0), "memory": src.size(0)}
        for name, mask, rows in (("src", src_mask, "src"), ("tgt", tgt_mask, "tgt"), ("memory", memory_mask, "tgt")):
            self._check_mask(f"{name}_mask", mask, src, (lengths[rows], lengths[name]))
        for name, mask in (
            ("src", src_key_padding_mask), ("tgt", tgt_key_padding_mask), ("memory", memory_key_padding_mask),
        ):  # fmt: skip
            self._check_padding(f"{name}_key_padding_mask", mask, src, lengths[name])
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )  # fmt: skip
        output: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return output

    def _check_sequences(self, src: Tensor, tgt: Tensor) -> None:
        weight = self.encoder.layers[0].norm1.weight  # a parameter also where the linear layers are quantised
        for name, value in (("src", src), ("tgt", tgt)):
            check.is_tensor(name, value)
            if value.dim() not in (2, 3) or value.size(-1) != self.d_model:
                expected = f"(length, batch, d_model) or (length, d_model) with d_model = {self.d_model}"
                raise ValueError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")
            check.same_device(name, value, "the parameters", weight)
            check.parameters_dtype(name, value, (weight.dtype,), autocast.is_on(weight.device))
        if src.dim() != tgt.dim() or (src.dim() == 3 and src.size(1) != tgt.size(1)):
            raise ValueError(f"tgt: expected the batch of src, {tuple(src.shape)}, got shape {tuple(tgt.shape)}")

    def _check_hint(self, name: str, flag: bool | None, mask: Tensor | None, choices: tuple[bool | None, ...]) -> None:
        if all(flag is not choice for choice in choices):
            expected = " or ".join(map(str, choices))
            raise TypeError(f"{name}_is_causal: expected {expected}, got {flag!r}")
        if flag and mask is None:
            raise ValueError(
                f"{name}_mask: expected a mask with {name}_is_causal=True, which says that the mask is causal, got None"
            )

    def _check_mask(self, name: str, mask: Tensor | None, src: Tensor, sizes: tuple[int, int]) -> None:
        if mask is None:
            return
        check.dtype(name, mask, (torch.bool, src.dtype))
        check.same_device(name, mask, "src", src)
        heads = (src.size(1) if src.dim() == 3 else 1) * self.nhead
        if tuple(mask.shape) not in (sizes, (heads, *sizes)):
            expected = f"(queries, keys) = {sizes} or (batch * nhead, queries, keys) = {(heads, *sizes)}"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(mask.shape)}")

    def _check_padding(self, name: str, mask: Tensor | None, src: Tensor, keys: int) -> None:
        if mask is None:
            return
        check.dtype(name, mask, (torch.bool, src.dtype))
        check.same_device(name, mask, "src", src)
        dimensions, shape = ("(batch, keys)", (src.size(1), keys)) if src.dim() == 3 else ("(keys,)", (keys,))
        check.shape(name, mask, dimensions, shape)
