"""The numerical contract as a function: is this about as accurate as the plain version, in each output and gradient?

The truth t is the reference computed in float64, r is the reference in the dtype of the inputs, k the candidate. The
error of k may be at most twice the error of r, plus one unit in the last place of the output's scale; for the largest
error and for the root mean square, for each output and each gradient by itself. There is no tolerance to choose: the
plain version's own rounding is the measure. docs/numerics.md explains the rule and its corners.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.check import short
from llmkern.verify.report import MISSING, Report, Row, gradient_row, judge_row
from llmkern.verify.runs import Arguments, in_dtype, run

__all__ = ["Report", "Row", "plain_version", "verify"]


def verify(
    candidate: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    inputs: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    gradients: bool = True,
    truth: Callable[..., Any] | None = None,
) -> Report:
    """Compares `candidate` with `reference` and both with the reference in float64: a table with the verdict.

    candidate, reference: modules or functions that take the same arguments and return a tensor, or any nesting of
        tuples, lists, mappings and dataclasses (transformers' ModelOutput) of tensors, None, plain numbers and strings.
        Modules run in the mode (train, eval) that they are in; every run starts from the same random seed. Without a
        reference, the plain version of a llmkern module is made: the class of the same name in llmkern.reference, its
        arguments read from the module, the state_dict loaded.
    inputs, kwargs: the arguments of both, in the dtype under test; any shape, strides and nesting. Each run gets copies
        with the same strides and storage offset; an operation in place disturbs neither the caller nor another run.
    gradients: also compare the gradients of every floating input that requires one (of all floating inputs, where none
        does), and of every parameter that requires one, where candidate, reference and truth are modules. Every
        floating output receives a random cotangent, the same in each run. False runs under no_grad.
    truth: what to run in float64 instead of the reference, where that one has no float64, because it is a kernel too:
        `verify(cuda_kernel, triton_kernel, inputs, truth=plain)` holds two backends against each other.

    A row passes where shape, dtype and device are the reference's; where NaN, +inf and -inf stand where they stand in
    the reference and nowhere else; and where the errors are within the allowed ones. Where the reference overflows its
    dtype though the truth does not, the finite truth is accepted too. Integers and booleans must be equal. Where the
    reference cannot run in the half precision of the inputs (masked_fill with -1e9 in float16), it runs in float32
    and its results are rounded; the report's note says so.

    Raises TypeError for what is no function or no sequence of inputs, and where something else than the above is
    returned; ValueError where reference=None and there is no plain version to be made; and lets every exception of
    candidate and reference through.
    """
    for name, function in (("candidate", candidate), ("reference", reference), ("truth", truth)):
        if not callable(function) and (function is not None or name == "candidate"):
            raise TypeError(f"{name}: expected a module or function, got {type(function).__name__}")
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise TypeError(f"inputs: expected a tensor or a sequence of arguments, got {type(inputs).__name__}")
    if reference is None:
        reference = plain_version(candidate)
    arguments = Arguments(reference, tuple(inputs), dict(kwargs or {}), gradients)
    note = ""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        try:
            r = run(reference, arguments)
        except RuntimeError as error:
            half = arguments.half_precision(reference)
            if half is None:
                raise
            try:
                r = run(in_dtype(reference, torch.float32), arguments, cast=torch.float32, rounded=half)
            except RuntimeError:
                raise error from None
            name = short(half)
            note = f"The reference cannot run in {name} ({error}): it ran in float32, its results rounded to {name}."
        exact = truth or reference
        t = run(in_dtype(exact, torch.float64), arguments, cast=torch.float64, cotangents=r.cotangents)
        k = run(candidate, arguments, cotangents=r.cotangents)
    rows = [
        judge_row(
            name, "output", k.outputs.get(name, MISSING), r.outputs.get(name, MISSING), t.outputs.get(name, MISSING)
        )
        for name in dict.fromkeys([*r.outputs, *k.outputs])
    ]
    by_name = {name: gradient_row(name, k.inputs, r.inputs, t.inputs) for name in r.inputs}
    if gradients and all(isinstance(f, nn.Module) for f in (candidate, reference, exact)):
        names = dict.fromkeys([*r.parameters, *k.parameters])
        by_name |= {name: gradient_row(name, k.parameters, r.parameters, t.parameters) for name in names}
    rows += [row for row in by_name.values() if row is not None]
    return Report(tuple(rows), note)


def plain_version(module: Callable[..., Any]) -> nn.Module:
    """The module of llmkern.reference with the class name, the arguments, the state and the mode of `module`.

    Raises ValueError where there is none, naming what was expected.
    """
    expected = "reference: expected a module or function to compare with"
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{expected}, since the candidate is a {type(module).__name__} and no module of llmkern; got None"
        )
    plain_modules = importlib.import_module("llmkern.reference")
    name = type(module).__name__
    plain_class = getattr(plain_modules, name, None)
    if plain_class is None:
        raise ValueError(f"{expected}, since llmkern.reference has no plain version named {name}; got None")
    if isinstance(module, plain_class) and type(module) is plain_class:
        return copy.deepcopy(module)
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(plain_class).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(module, parameter.name):
            value = getattr(module, parameter.name)
            # A layer keeps its `bias` argument as the parameter that it asked for.
            is_flag = isinstance(parameter.default, bool) and not isinstance(value, bool)
            arguments[parameter.name] = value is not None if is_flag else value
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{expected}, since {name} has no attribute {parameter.name} to make its plain version from; got None"
            )
    plain: nn.Module = plain_class(**arguments)
    _take_state(plain, module)
    return plain.train(module.training)


def _take_state(plain: nn.Module, module: nn.Module) -> None:
    """Gives each parameter and buffer of `plain` the device, dtype, values and flag of its namesake in `module`."""
    theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ours = [*plain.named_parameters(), *plain.named_buffers()]
    for name, tensor in ours:
        if name in theirs:
            # Each by itself: a half-precision model may keep some in float32, and may have buffers alone.
            tensor.data = tensor.data.to(theirs[name].device, theirs[name].dtype)
    plain.load_state_dict(module.state_dict())
    for name, tensor in ours:
        if name in theirs:
            with torch.no_grad():
                tensor.copy_(theirs[name])  # a buffer that is not saved is not in the state_dict
            tensor.requires_grad_(theirs[name].requires_grad)
