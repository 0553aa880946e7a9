"""Each operator within a CUDA graph and within torch.compile(fullgraph=True): the same bits as without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.calls import Call, Case, cases
from benchmarks.gpu.steps import Setting, Skipped, Step
from llmkern import backend


def part(setting: Setting) -> Iterator[Step]:
    seen = set()
    for case in cases(setting, small=True):
        # One case of each operator is enough, and one of each form of the cache.
        kind = (case.operator, case.name.split(" ", 2)[-1] if case.operator == "decode" else "")
        if kind in seen or "fp32" in case.name:
            continue
        seen.add(kind)
        for name in setting.backends:
            what = f"{case.operator} {case.name} on {name}"
            yield Step(f"graph {what}", lambda case=case, name=name: captured(setting, case, name))
            yield Step(f"compile {what}", lambda case=case, name=name: compiled(case, name))


def _tensors(result: Any) -> list[Tensor]:
    return [t.detach().clone() for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def _run(call: Call, function: Any) -> list[Tensor]:
    """Outputs, and gradients where the call has them."""
    args = [x.detach().clone() if isinstance(x, Tensor) else x for x in call.args]
    if not call.gradients:
        return _tensors(function(*args))
    leaves = [x.requires_grad_() for x in args if isinstance(x, Tensor)]
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return _tensors((*outputs, *torch.autograd.grad([y.float().sum() for y in outputs], leaves)))


def _equal(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a, b):
            far = (a.double() - b.double()).abs().max().item()
            raise AssertionError(f"result {i} {what} is not the one without: largest difference {far:.3g}")


def captured(setting: Setting, case: Case, name: str) -> dict[str, Any]:
    call = case.make()
    with backend.use(name):
        expected = _run(call, call.function)
        if setting.tiny:
            _equal(_run(call, call.function), expected, "of a second run")
            raise Skipped("there are no CUDA graphs on a CPU; it ran twice, with the same bits")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # Triton compiles and copies of weights are made before the capture
            for _ in range(2):
                _run(call, call.function)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = _run(call, call.function)
        for result in got:
            result.view(torch.uint8).fill_(0xFF)  # of which the replay must leave nothing
        graph.replay()
        torch.cuda.synchronize()
    _equal(got, expected, "of the graph")
    return {"line": "the same bits"}


def compiled(case: Case, name: str) -> dict[str, Any]:
    missing = peers.compile_missing()
    if missing:
        raise Skipped(missing)
    torch.compiler.reset()
    call = case.make()
    with backend.use(name):
        expected = _run(call, call.function)
        got = _run(call, torch.compile(call.function, fullgraph=True))
    _equal(got, expected, "of torch.compile")
    return {"line": "one graph, the same bits"}
