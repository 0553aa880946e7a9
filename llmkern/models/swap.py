"""A module's class exchanged in place: parameters, buffers, hooks and whoever holds the module stay as they are.

What a class is exchanged for is a subclass with another forward and no state of its own; the class before, and the
attributes that were changed, are kept in the module, so that a copy or an unpickled one can be changed back too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_BEFORE = "_llmkern_before"


def exchange(module: nn.Module, into: type[nn.Module], **attributes: Any) -> None:
    """Makes `module`, in place, one of the class `into`, with these attributes set."""
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module)[_BEFORE] = (type(module), before, list(attributes), into.__name__)
    vars(module).update(attributes)
    module.__class__ = into


def exchanged(module: nn.Module) -> type[nn.Module] | None:
    """The class that the module had; None where it is as it was made."""
    before = vars(module).get(_BEFORE)
    return None if before is None else before[0]


def as_exchanged(module: nn.Module) -> bool:
    """Whether an exchanged module still is what `exchange` made it, and no subclass that wraps it (FSDP2 makes one).

    By the name of the class, since some are made at run time and could not be pickled with the module.
    """
    name: str = vars(module)[_BEFORE][3]
    return type(module).__name__ == name


def change_back(module: nn.Module) -> None:
    """Undoes `exchange`."""
    kind, before, added, _ = vars(module).pop(_BEFORE)
    module.__class__ = kind
    for name in added:
        vars(module).pop(name, None)
    vars(module).update(before)
