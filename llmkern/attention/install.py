"""torch.nn.functional.scaled_dot_product_attention served by llmkern in code that knows nothing of it."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkern.attention import sdpa
from llmkern.attention.compiled import CPU_ATTENTION
from llmkern.attention.mask import Mask
from llmkern.operator import call_key, is_compiling, is_plain

_NAME = "scaled_dot_product_attention"


class Installed:
    """What `install` gives: the report of the calls so far, and the way back.

    served: how many calls llmkern served. left: for each reason, how many went to torch's own function. modules: the
    names of the modules where the function was replaced. Printed, it is a table.
    """

    def __init__(self) -> None:
        self.served = 0
        self.left: Counter[str] = Counter()
        self.modules: list[str] = []
        self._original: Any = getattr(F, _NAME)
        self._places: list[tuple[ModuleType, str]] = []
        self._reasons: dict[bytes, str | None] = {}

        def scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            return self._call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

        scaled_dot_product_attention.__doc__ = self._original.__doc__
        self._replacement = scaled_dot_product_attention
        for name, module in list(sys.modules.items()):
            # Inside torch only the public name: its tables of operators must keep knowing their own function.
            if not isinstance(module, ModuleType) or (name.split(".")[0] == "torch" and module is not F):
                continue
            for attribute, held in list(vars(module).items()):
                if held is self._original:
                    setattr(module, attribute, self._replacement)
                    self._places.append((module, attribute))
                    self.modules.append(name)

    def undo(self) -> None:
        """Gives every module torch's own function back; a second time does nothing."""
        global _active
        for module, attribute in self._places:
            if getattr(module, attribute, None) is self._replacement:
                setattr(module, attribute, self._original)
        self._places.clear()
        if _active is self:
            _active = None

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [(str(self.served), "llmkern", ""), *((str(n), "torch", why) for why, n in self.left.most_common())]
        lines = [f"{'calls':>8}  {'served by':<10}why not llmkern", *(f"{n:>8}  {by:<10}{why}" for n, by, why in rows)]
        return "\n".join(line.rstrip() for line in lines)

    def _call(self, *args: Any) -> Tensor:
        tracing = is_compiling()
        key = None if tracing else call_key(*args)
        if key is None:
            reason = _reason(*args)
        elif key in self._reasons:
            reason = self._reasons[key]
        else:
            reason = _reason(*args)
            if len(self._reasons) < 4096:
                self._reasons[key] = reason
        output = None
        if reason is None:
            try:
                output = sdpa.scaled_dot_product_attention(*args)
            except (TypeError, ValueError) as error:  # from the checks; torch may take it, or say so in its own way
                reason = str(error)
        if not tracing:
            if reason is None:
                self.served += 1
            else:
                self.left[reason] += 1
        return self._original(*args[:5], **dict(zip(_KEYWORDS, args[5:], strict=True))) if output is None else output


_KEYWORDS = ("is_causal", "scale", "enable_gqa")
_active: Installed | None = None


def install() -> Installed:
    """From now on, torch.nn.functional.scaled_dot_product_attention is served by llmkern, in unchanged code.

    Returns the report, whose undo() gives torch its function back; as a context manager, `with install() as report:`,
    leaving the block does. `print(report)` shows how many calls were served and, for each reason, how many were not:
    those go to torch's own function. A call is served where one of this package's kernels can serve it: plain tensors
    on the CPU, float32, bfloat16 or float16, outside of autocast, of forward-mode derivatives and of torch.func's
    transforms. Calls inside torch.compile are served and not counted. Dropout, where it is served, draws its own seed
    from torch's CPU generator, and so other numbers than torch's.

    Modules that imported the function by name ("from torch.nn.functional import ...") hold it themselves: those among
    sys.modules are found, replaced and restored too, but not what a class, a closure or a container holds, nor a module
    that is being imported. torch's compiled fast paths (nn.TransformerEncoderLayer in eval mode without gradients) and
    TorchScript never call the Python function, and stay as they are.

    Raises RuntimeError where it is installed already.
    """
    global _active
    if _active is not None:
        raise RuntimeError("llmkern.functional.install: expected it not to be installed, but it is: undo() that first")
    _active = Installed()
    return _active


def _reason(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
) -> str | None:
    """Why llmkern should leave a call to torch, or None."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is no tensor"
    if not is_compiling() and not is_plain(*tensors):
        return "no plain tensors in ordinary eager mode (a subclass, autocast, a torch.func transform or mode)"
    if any(t.layout is not torch.strided for t in tensors):
        return "a tensor that is not dense"
    if query.device.type != "cpu":
        return f"there is no kernel for {query.device.type} yet"
    if not 2 <= query.dim() == key.dim() == value.dim():
        return "tensors of different ranks"
    if not isinstance(dropout_p, (int, float)):
        return "dropout_p is no number"
    rules = Mask(None, window_right=0 if is_causal else -1, dropout_p=float(dropout_p)).arguments()
    missing = CPU_ATTENTION.unsupported(query, key, value, *rules, 1.0, False)
    return None if missing is None else f"cpu: {missing}"
