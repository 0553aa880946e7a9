"""Keys and values of a dynamic cache in memory with room behind them, so that a new token copies itself alone.

transformers' DynamicCache makes a new tensor of all keys for every token. Here a layer of such a cache keeps a block
with room to grow, and its `keys` and `values` are the filled part of it: whoever reads the cache sees what it always
saw. What others did to it in between (cropped, reordered, repeated) shows in that its tensors are other objects; then
they are copied into a new block, as transformers would have copied them. Entries are written only behind those that
some tensor may show.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

_NAME = "_llmkern_room"
_GRAIN = 64  #: the room is a multiple of so many tokens


def layer_of(cache: Any, index: int) -> Any:
    """The layer of a cache that can be given room; None where it is of another kind or not there yet."""
    library: Any = sys.modules["transformers.cache_utils"]
    if type(cache) is not library.DynamicCache or getattr(cache, "offloading", False) or len(cache.layers) <= index:
        return None
    layer = cache.layers[index]
    return layer if type(layer) is library.DynamicLayer else None


def length_of(layer: Any) -> int:
    """How many tokens it holds."""
    keys = layer.keys if layer.is_initialized else None
    return 0 if keys is None or not keys.numel() else int(keys.shape[2])


def room(layer: Any, past: int, added: int, like: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor] | None:
    """The blocks of keys and values, (B, heads, at least past + added, width), with what the layer holds in front.

    like (B, ...): of the dtype that they must have. None where the layer holds other shapes or another dtype.
    """
    batch = like.shape[0]
    if past:
        keys, values = layer.keys, layer.values
        found = vars(layer).get(_NAME)
        if found is not None and found[2] is keys and found[3] is values and found[0].shape[2] >= past + added:
            return found[0], found[1]
        shape = (batch, heads, past, width)
        if keys.shape != shape or values.shape != shape or keys.dtype != like.dtype or values.dtype != like.dtype:
            return None
    size = ((past + added) * 5 // 4 // _GRAIN + 1) * _GRAIN
    blocks = like.new_empty(2, batch, heads, size, width).unbind()
    if past:
        blocks[0].narrow(2, 0, past).copy_(keys)
        blocks[1].narrow(2, 0, past).copy_(values)
    elif not layer.is_initialized:
        layer.lazy_initialization(like, like)
    return blocks[0], blocks[1]


def fill(layer: Any, blocks: tuple[Tensor, Tensor], length: int) -> None:
    """Makes the first `length` tokens of the blocks what the layer holds."""
    layer.keys, layer.values = (b.narrow(2, 0, length) for b in blocks)
    vars(layer)[_NAME] = (*blocks, layer.keys, layer.values)
