"""The numerical contract as a function: is this about as accurate as the plain version, in each output and gradient?

The truth t is the reference computed in float64, r is the reference in the dtype of the inputs, k the candidate. The
error of k may be at most twice the error of r, plus one unit in the last place of the output's scale; for the largest
error and for the root mean square, for each output and each gradient by itself. Where it is more, chance is ruled out:
both errors are drawn again, from inputs nearby. There is no tolerance to choose: the plain version's own rounding
is the measure. docs/numerics.md explains the rule and its corners.
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

from llmkern import check
from llmkern.check import short
from llmkern.int8 import reference as int8
from llmkern.int8.replace import replace_linears
from llmkern.verify.report import MISSING, Draws, Report, Row, draw_errors, gradient_row, judge_row
from llmkern.verify.runs import Arguments, Run, in_dtype, neighbour, run, same_parameters

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
    the reference and nowhere else; and where the errors are within the allowed ones, at once or as the quadratic means
    of up to 65 draws, from arguments and parameters that moved a little by chance. Where the reference
    overflows its dtype though the truth does not, the finite truth is accepted too. Integers and booleans must be
    equal. Where the reference cannot run in the half precision of the inputs (masked_fill with -1e9 in float16), it
    runs in float32 and its results are rounded; the report's note says so.

    Raises TypeError for what is no function, no sequence of inputs or no flag, and where something else than the above
    is returned; ValueError where reference=None and there is no plain version to be made; and lets every exception of
    candidate and reference through.

    Source of the draws: Parker, Pierce and Eggert 2000, "Monte Carlo arithmetic: how to gamble with floating point and
    win", Computing in Science & Engineering 2(4); here arguments are moved, not every result inside. The rest is ours.
    """
    for name, function in (("candidate", candidate), ("reference", reference), ("truth", truth)):
        if not callable(function) and (function is not None or name == "candidate"):
            raise TypeError(f"{name}: expected a module or function, got {type(function).__name__}")
    check.flag("gradients", gradients)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise TypeError(f"inputs: expected a tensor or a sequence of arguments, got {type(inputs).__name__}")
    if reference is None:
        reference = plain_version(candidate)
    arguments = Arguments(reference, tuple(inputs), dict(kwargs or {}), gradients)
    exact = truth or reference
    note, rounded = "", None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        try:
            r = run(reference, arguments)
        except RuntimeError as error:
            rounded = arguments.half_precision(reference)
            if rounded is None:
                raise
            try:
                r = run(in_dtype(reference, torch.float32), arguments, cast=torch.float32, rounded=rounded)
            except RuntimeError:
                raise error from None
            name = short(rounded)
            note = f"The reference cannot run in {name} ({error}): it ran in float32, its results rounded to {name}."
        t = run(in_dtype(exact, torch.float64), arguments, cast=torch.float64, cotangents=r.cotangents)
        k = run(candidate, arguments, cotangents=r.cotangents)
        parameters = gradients and all(isinstance(f, nn.Module) for f in (candidate, reference, exact))
        errors: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        rows = _rows(k, r, t, parameters, errors)
        draw = 0
        for until in _DRAWS:
            if not any(row.inaccurate for row in rows.values()):
                break
            try:
                while draw < until:
                    draw += 1
                    near = _near(candidate, reference, exact, arguments, rounded, r.cotangents, draw)
                    for key in rows:
                        errors.setdefault(key, []).append(draw_errors(*(_found(run, key) for run in near)))
            except Exception:  # arguments that are refused once they are moved: no more can be known
                break
            judged = _rows(k, r, t, parameters, errors)
            rows = {key: judged[key] if row.inaccurate else row for key, row in rows.items()}
            if draw >= 16 and any(row.inaccurate and _in_every_draw(row, errors[key]) for key, row in rows.items()):
                break  # after 4, it may still be chance where all of a tensor's errors come from a few numbers
    return Report(tuple(rows.values()), note)


#: After how many further draws a row that failed is judged again. Where candidate and reference err alike, by chance
#: alone, the first are enough; where an activation lies so near the middle between two integers that either may come
#: out, it may take long until that happens to the reference.
_DRAWS = (4, 16, 64)


def _in_every_draw(row: Row, draws: Draws) -> bool:
    """Each of the candidate's errors is too large beside each of the reference's: no draw will change that."""
    max_k, rms_k, max_r, rms_r = zip(*draws, strict=True)
    ulp = row.max_allowed - 2 * row.max_reference
    return min(max_k) > 2 * max(max_r) + ulp or min(rms_k) > 2 * max(rms_r) + ulp


def _near(
    candidate: Callable[..., Any],
    reference: Callable[..., Any],
    exact: Callable[..., Any],
    arguments: Arguments,
    rounded: torch.dtype | None,
    cotangents: Mapping[str, Tensor],
    draw: int,
) -> tuple[Run, Run, Run]:
    """Candidate, reference and truth from arguments and parameters that moved by chance."""
    if exact is reference and same_parameters(candidate, reference):
        candidate, reference = neighbour(candidate, draw), neighbour(reference, draw)
        exact = reference
    plain, cast = (in_dtype(reference, torch.float32), torch.float32) if rounded else (reference, None)
    k = run(candidate, arguments, cotangents=cotangents, draw=draw)
    r = run(plain, arguments, cast=cast, rounded=rounded, cotangents=cotangents, draw=draw)
    t = run(in_dtype(exact, torch.float64), arguments, cast=torch.float64, cotangents=cotangents, draw=draw)
    return k, r, t


def _rows(
    k: Run, r: Run, t: Run, parameters: bool, draws: Mapping[tuple[str, str], Draws]
) -> dict[tuple[str, str], Row]:
    """The row of each output and gradient, by group and name."""
    rows: dict[tuple[str, str], Row | None] = {}
    for name in dict.fromkeys([*r.outputs, *k.outputs]):
        k_out, r_out, t_out = (_found(run, ("outputs", name)) for run in (k, r, t))
        rows["outputs", name] = judge_row(name, "output", k_out, r_out, t_out, draws.get(("outputs", name), ()))
    for group in ("inputs", "parameters") if parameters else ("inputs",):
        runs = [getattr(run, group) for run in (k, r, t)]
        for name in dict.fromkeys([*runs[1], *runs[0]]):
            rows[group, name] = gradient_row(name, *runs, draws=draws.get((group, name), ()))
    return {key: row for key, row in rows.items() if row is not None}


def _found(run: Run, key: tuple[str, str]) -> Any:
    group, name = key
    return getattr(run, group).get(name, MISSING)


def plain_version(module: Callable[..., Any]) -> nn.Module:
    """The module of llmkern.reference with the class name, the arguments, the state and the mode of `module`.

    Where layers of `module` are in int8, the same layers of the plain version are.
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
    quantized = {n: layer.scheme for n, layer in module.named_modules() if n and isinstance(layer, int8.Int8Linear)}
    if quantized:
        left = [n for n, layer in plain.named_modules() if isinstance(layer, nn.Linear) and n not in quantized]
        plain = replace_linears(plain, int8.Int8Linear, quantized, skip=left)
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
