"""How an operator becomes a true operator of torch: one declaration, seen by eager, compile, export and DDP alike.

Two ways lead to the same kernels. `torch.ops.llmkern.<name>` is the operator that tracing sees. A call on plain
tensors in eager mode takes a shorter way past torch's dispatcher, whose Python registration costs more than a small
kernel does: a public function asks `call_key(...)` (csrc/common/call.h) for the metadata of its arguments as one key,
and where there is one finds its launcher in a table: a kernel, or the operator's autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from llmkern import check, extension

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


def refuse_forward_ad(name: str, *tensors: Any) -> None:
    """Raises where a tensor carries a tangent: without a rule, torch would silently return a zero derivative."""
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        # A batch of samples shows its tangent once vmap has taken it apart.
        if (
            isinstance(t, Tensor)
            and not _functorch.is_batchedtensor(t)
            and forward_ad.unpack_dual(t).tangent is not None
        ):
            raise NotImplementedError(f"llmkern.{name}: forward-mode AD is not supported; use reverse mode (backward)")


_signatures: dict[str, list[tuple[str, str]]] = {}
_KINDS = {
    "bool": check.flag, "int": check.integer, "float": check.number, "str": check.text, "Tensor": check.is_tensor,
    "List[bool]": check.flags,
}  # fmt: skip


def check_types(name: str, args: tuple[Any, ...], public: Mapping[str, str] | None = None) -> None:
    """Raises TypeError for the first argument of an operator that its schema does not take, naming it.

    public: the names of arguments in the function that users call, where they are others.
    """
    for (argument, kind), value in zip(_signatures[name], args, strict=False):
        argument = (public or {}).get(argument, argument)
        optional = kind.startswith("Optional[")
        if not (value is None and optional):
            _KINDS[kind.removeprefix("Optional[").removesuffix("]") if optional else kind](argument, value)
        if isinstance(value, Tensor):
            check.has_memory(argument, value)


def dispatch(name: str, *args: Any) -> Any:
    """torch.ops.llmkern.<name>(*args), where what it cannot take is named in the words of llmkern.check."""
    if not is_compiling():
        check_types(name, args)
    return getattr(torch.ops.llmkern, name)(*args)


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Declares torch.ops.llmkern.<name> and returns it.

    schema: torch's schema string, with the name. run: the implementation, for every device. fake: shapes and strides of
    the results. setup_context(ctx, inputs, output) and backward(ctx, *grads), a tuple: as those of an
    autograd.Function; the same two serve the family's own of the short way. Forward-mode derivatives are refused.
    vmap(batch_size, in_dims, *args) -> (output, out_dims): all samples in one call, or NotImplemented, where they run
    one by one, as they do without it.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    _signatures[name] = [(a.name, str(a.type)) for a in torch._C.parse_schema(f"llmkern::{schema}").arguments]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmkern::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.llmkern, name)
    record = _recorder(operator.default, setup_context, backward) if backward is not None else None

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        refuse_forward_ad(name, *args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if record is None:
                raise RuntimeError(f"llmkern::{name} has no gradient: expected no tensor that requires one, got some")
            return record(*args, keys)
        return _below_autograd(operator.default, keys, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"llmkern::{name}", _batching_rule(operator.default, vmap), lib=LIBRARY)
    return operator


def _below_autograd(operator: Any, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _recorder(
    operator: Any, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A function of the operator's arguments and dispatch keys that runs it and records it for autograd.

    As torch.library.register_autograd, but in the transforms of torch.func too. Function.apply refuses these where
    it is called by a user, since it could not tell the levels of transforms apart; here the dispatcher has brought the
    call to one level, and takes the inner call to the next, as for torch's own operators.
    """

    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keys = args
            if _functorch.maybe_current_level() is None:
                output = _below_autograd(operator, keys, *inputs)
            else:
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # for the transforms outside this one
                    output = _below_autograd(operator, keys, *inputs)
            if setup_context is not None:
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *backward(ctx, *grads), None

    apply: Callable[..., Any] = Recorded.apply  # type: ignore[attr-defined]

    def record(*args: Any) -> Any:
        if _functorch.maybe_current_level() is None:
            return apply(*args)
        with enable_single_level_autograd_function():
            return apply(*args)

    return record


def samples(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """An argument under vmap with the samples first; dim: where they are, None for one that all share."""
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def _batching_rule(operator: Any, together: Callable[..., Any] | None) -> Callable[..., Any]:
    """The operator under torch.vmap, in the form of torch.library.register_vmap."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments]
    names = [a.name for a in operator._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        for name, write, dim, arg in zip(names, written, in_dims, args, strict=True):
            if write and isinstance(arg, Tensor) and (dim is None or (arg.stride(dim) == 0 and info.batch_size > 1)):
                came = "one tensor for all samples" if dim is None else "an expanded one, whose samples share memory"
                raise ValueError(f"{name}: expected a tensor of each sample's own to write to under vmap, got {came}")
        if together is not None and (result := together(info.batch_size, in_dims, *args)) is not NotImplemented:
            return result

        in_dims = tuple(d if isinstance(d, int) else None for d in in_dims)  # a list has one for each entry

        def sample(i: int) -> Any:
            return operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        if info.batch_size == 0:  # one of zeros gives the shapes
            args = tuple(
                a if d is None else a.new_zeros((1, *a.movedim(d, 0).shape[1:]))
                for a, d in zip(args, in_dims, strict=True)
            )
            in_dims = tuple(None if d is None else 0 for d in in_dims)
        results = [sample(i) for i in range(max(info.batch_size, 1))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        if results[0] is None or not results[0]:
            return results[0], results[0]
        parts = tuple(torch.stack(part)[: info.batch_size] for part in zip(*results, strict=True))
        return parts, (0,) * len(parts)

    return rule


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
