"""How an operator becomes a true operator of torch: one declaration, seen by eager, compile, export and DDP alike.

Two ways lead to the same kernels. `torch.ops.llmkern.<name>` is the operator that tracing sees. A call on plain
tensors in eager mode takes a shorter way past torch's dispatcher, whose Python registration costs more than a small
kernel does: a public function asks `call_key(...)` (csrc/common/call.h) for the metadata of its arguments as one key,
and where there is one finds its launcher in a table: a kernel, or the operator's autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llmkern import extension

LIBRARY = torch.library.Library("llmkern", "DEF")


def _no_key(*args: Any) -> bytes | None:
    return None


#: call_key(*args) -> the key of a call that may take the short way: its first byte says whether autograd must record
#: it, the rest is the arguments' metadata. None where `is_plain` is False, or an argument is nothing that a plan can
#: depend on. Not to be called under torch.compile: ask `is_compiling()` first.
call_key: Callable[..., bytes | None] = extension._C.call_key if extension.SHORT_CALLS else _no_key
is_compiling = torch.compiler.is_compiling


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors in ordinary eager mode, so that nothing would be lost past the dispatcher.

    False under torch.compile and export, in any torch dispatch or function mode, in torch.func transforms, in
    forward-mode AD, under autocast and torch.jit.trace, for tensor subclasses (fake tensors, DTensor) and for views
    that are negated only when they are read.
    """
    return not is_compiling() and call_key(*tensors) is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raises where a tensor carries a tangent: without a rule, torch would silently return a zero derivative."""
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"llmkern.{name}: forward-mode AD is not supported; use reverse mode (backward)")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Declares torch.ops.llmkern.<name> and returns it.

    schema: torch's schema string, with the name. run: the implementation, for every device. fake: shapes and strides of
    the results. setup_context(ctx, inputs, output) and backward(ctx, *grads): as torch.library.register_autograd has
    them; the same two serve the family's autograd.Function of the short way.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def checked(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_forward_ad(name, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        return run(*args, **kwargs)

    LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmkern::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"llmkern::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.llmkern, name)


def short_autograd(
    run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd.Function of eager calls, from the two functions that `define` registers.

    The context is set up inside forward: a Function with a setup_context of its own inspects its signature at every
    call, which costs some 30 us.
    """

    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Short.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Short
