"""One contestant in attention, in a process of its own: what benchmarks/attention_peers.py starts.

The job comes as JSON on the standard input. What is measured goes, a line of JSON for each event, to the file that the
job names: a library that prints spoils nothing, and of a process that dies what it had measured remains.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention, decode
from benchmarks.attention import DTYPES
from llmkern.evaluation import roofline
from llmkern.evaluation import timing as harness

ROWS = 256  # queries whose results are held to float64, evenly spaced from the first to the last
#: Largest error of a row relative to its length. That of bf16 holds also where scores and weights are rounded to it.
TOLERANCE = {"fp32": 1e-5, "bf16": 2**-5}
PEAK = 0.005  #: seconds that a measurement of the peak lasts
LONG = 0.05  #: a call of so many seconds is timed once a round, after the one whose result was checked


@dataclass(frozen=True)
class Problem:
    """B,H,S,D; with a cache, one query that attends to all S keys of `kv_heads` heads."""

    shape: tuple[int, int, int, int]
    short: str
    causal: bool = False
    kv_heads: int = 0  #: 0: no cache

    @property
    def name(self) -> str:
        b, h, s, d = self.shape
        if self.kv_heads:
            return attention.title((b, h, self.kv_heads, s, d), self.short, "one query")
        return attention.title(self.shape, self.short, "causal" if self.causal else "")

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.short]

    def floor(self) -> Callable[[], float]:
        b, h, s, d = self.shape
        if self.kv_heads:
            cache = 2.0 * b * self.kv_heads * s * d * DTYPES[self.short].itemsize
            return roofline.floor(decode.operations((b, h, self.kv_heads, s, d)), DTYPES[self.short], cache, PEAK)
        return roofline.floor(attention.operations(self.shape, self.causal), DTYPES[self.short], 0.0, PEAK)


@lru_cache(maxsize=1)
def inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, the same ones in every process. Nobody may change them."""
    b, h, s, d = p.shape
    if p.kv_heads:
        return decode.inputs((b, h, p.kv_heads, s, d), DTYPES[p.short])
    return attention.inputs(p.shape, DTYPES[p.short])


@dataclass
class Way:
    """One way to ask a contestant."""

    call: Callable[[], Any]
    read: Callable[[Any], Tensor] = lambda out: out  #: what `call` returned, as (B, H, Sq, D)
    keep: tuple[Any, ...] = field(default=())  #: what must live as long as the calls


class Unsupported(Exception):
    """The contestant has nothing for this problem."""


def llmkern(p: Problem, threads: int) -> dict[str, Way]:
    from llmkern import functional

    q, k, v = inputs(p)
    gqa = q.size(1) != k.size(1)
    return {
        "functional.scaled_dot_product_attention": Way(
            lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=p.causal, enable_gqa=gqa)
        )
    }


def sdpa(p: Problem, threads: int) -> dict[str, Way]:
    q, k, v = inputs(p)
    if p.kv_heads:
        return {n: Way(lambda f=f: f(q, k, v)) for n, f in decode.in_torch(q.size(1) != k.size(1)).items()}
    return {"torch sdpa": Way(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=p.causal))}


def as_rows(q: Tensor, k: Tensor) -> Tensor:
    """Queries of one key head as the rows of one matrix: what a library without grouped heads can serve."""
    return q.view(q.size(0), k.size(1), -1, q.size(3))


def zentorch(p: Problem, threads: int) -> dict[str, Way]:
    """Its operator, which torch.compile(backend="zentorch") would call."""
    import zentorch  # noqa: F401

    q, k, v = inputs(p)
    rows, shape = as_rows(q, k) if p.kv_heads else q, q.shape
    function = torch.ops.zentorch.zentorch_sdpa
    return {"zentorch_sdpa": Way(lambda: function(rows, k, v, is_causal=p.causal), lambda out: out[0].view(shape))}


def openvino(p: Problem, threads: int) -> dict[str, Way]:
    import openvino as ov
    from openvino import opset13

    q, k, v = (t.contiguous() for t in inputs(p))
    shape, half = q.shape, p.short == "bf16"
    args = (as_rows(q, k) if p.kv_heads else q, k, v)
    kind = ov.Type.bf16 if half else ov.Type.f32
    parameters = [opset13.parameter(list(t.shape), kind) for t in args]
    model = ov.Model([opset13.scaled_dot_product_attention(*parameters, causal=p.causal)], parameters)
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
    }  # fmt: skip
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [t.view(torch.uint16).numpy() if half else t.numpy() for t in args]
    for i, (array, t) in enumerate(zip(arrays, args, strict=True)):
        request.set_input_tensor(i, ov.Tensor(array, ov.Shape(list(t.shape)), kind))

    def read(_: Any) -> Tensor:
        out = bytearray(request.get_output_tensor(0).data.tobytes())
        return torch.frombuffer(out, dtype=DTYPES[p.short]).view(shape)

    return {"scaled_dot_product_attention": Way(request.infer, read, (arrays,))}


def onnxruntime(p: Problem, threads: int) -> dict[str, Way]:
    """Each of its operators that serves the problem: which one is the quickest depends on the length."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if p.short != "fp32":
        raise Unsupported("its attention on the CPU takes no bf16")
    q, k, v = (t.contiguous() for t in inputs(p))
    b, h, _, d = q.shape
    s, hkv = k.size(2), k.size(1)

    def way(node: Any, taken: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Way:
        kinds = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}

        def described(named: Mapping[str, Tensor]) -> list[Any]:
            return [helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in named.items()]

        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", described(taken), described(outputs))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()  # without it, every call pays for fresh pages
        for bind, named in ((binding.bind_input, taken), (binding.bind_output, outputs)):
            for n, t in named.items():
                bind(n, "cpu", 0, t.numpy().dtype, list(t.shape), t.data_ptr())
        result = outputs["y"]

        def read(_: Any) -> Tensor:
            return result if result.dim() == 4 else result.view(b, -1, h, d).transpose(1, 2)

        return Way(lambda: session.run_with_iobinding(binding), read, (taken, outputs))

    def flat(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2).contiguous()

    lengths = {"last": torch.full((b,), s - 1, dtype=torch.int32), "total": torch.tensor([s], dtype=torch.int32)}
    if p.kv_heads:
        # It writes the new key and value, here those that stand there already, into the cache before it attends.
        node = helper.make_node(
            "GroupQueryAttention", ["q", "k", "v", "pk", "pv", "last", "total"], ["y", "ok", "ov"],
            domain="com.microsoft", num_heads=h, kv_num_heads=hkv,
        )  # fmt: skip
        new = {"q": flat(q), "k": flat(k[:, :, -1:]), "v": flat(v[:, :, -1:])}
        y = torch.empty(b, 1, h * d)
        return {"GroupQueryAttention": way(node, {**new, "pk": k, "pv": v, **lengths}, {"y": y, "ok": k, "ov": v})}
    rows = {"q": flat(q), "k": flat(k), "v": flat(v)}
    found = {
        "MultiHeadAttention": way(
            helper.make_node(
                "MultiHeadAttention", ["q", "k", "v"], ["y"],
                domain="com.microsoft", num_heads=h, unidirectional=int(p.causal),
            ),
            rows, {"y": torch.empty(b, s, h * d)},
        ),
        "Attention": way(
            helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(p.causal)),
            {"q": q, "k": k, "v": v}, {"y": torch.empty_like(q)},
        ),
    }  # fmt: skip
    if p.causal:
        node = helper.make_node(
            "GroupQueryAttention", ["q", "k", "v", "", "", "last", "total"], ["y", "ok", "ov"],
            domain="com.microsoft", num_heads=h, kv_num_heads=hkv,
        )  # fmt: skip
        cache = {"ok": torch.empty_like(k), "ov": torch.empty_like(v)}
        found["GroupQueryAttention"] = way(node, {**rows, **lengths}, {"y": torch.empty(b, s, h * d), **cache})
    return found


@dataclass(frozen=True)
class Contestant:
    ways: Callable[[Any, int], dict[str, Way]]  #: of a problem and a number of threads
    packages: tuple[str, ...]
    install: str


def _zentorch_install() -> str:
    return f'pip install "zentorch=={".".join(torch.__version__.split(".")[:2])}.*"'


BENCH = 'pip install -e ".[bench]"'
CONTESTANTS = {
    "llmkern": Contestant(llmkern, (), ""),
    "torch sdpa": Contestant(sdpa, (), ""),
    "zentorch": Contestant(zentorch, ("zentorch",), _zentorch_install()),
    "OpenVINO": Contestant(openvino, ("openvino",), BENCH),
    "ONNX Runtime": Contestant(onnxruntime, ("onnxruntime", "onnx"), BENCH),
}


def missing(name: str, contestants: Mapping[str, Contestant] = CONTESTANTS) -> str | None:
    """Why a contestant cannot run here, and the command that changes it; None where its packages are installed."""
    contestant = contestants[name]
    absent = [p for p in contestant.packages if not version(p)]
    return f"not installed: {' and '.join(absent)}; {contestant.install}" if absent else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def error(p: Problem, got: Tensor) -> float:
    """The largest error of a row relative to the row's length in float64, of up to ROWS queries of each head."""
    q, k, v = inputs(p)
    if got.shape != q.shape:
        raise ValueError(f"result: expected the shape {list(q.shape)}, got {list(got.shape)}")
    places = torch.linspace(0, q.size(2) - 1, min(q.size(2), ROWS), dtype=torch.float64).round().long()
    k, v = (t.double().repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    scores = q[:, :, places].double() @ k.transpose(2, 3) * q.size(3) ** -0.5
    if p.causal:
        scores.masked_fill_(torch.arange(k.size(2)) > places[:, None], float("-inf"))
    truth = torch.softmax(scores, -1) @ v
    if not bool(got.isfinite().all()):
        return math.inf
    return float(((got[:, :, places].double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


def settle() -> None:
    """Waits until the threads of this process have stopped waiting actively, those of ONNX Runtime for some 40 ms.

    Until then they would slow the next to be measured.
    """
    quiet, end = 0, time.perf_counter() + 0.5
    while quiet < 2 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.005)
        quiet = quiet + 1 if time.process_time() - before < 0.0005 else 0


def figure(
    ways: Mapping[str, Way], p: Any, samples: int, sample_seconds: float, error: Callable[[Any, Tensor], float] = error
) -> dict[str, Any]:
    """Times the quickest way that is right, with the floor measured before and after each sample.

    error: of a problem and a result, to be at most p.tolerance. Raises ArithmeticError where none is right.
    """
    tried: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, way in ways.items():
        start = time.perf_counter()
        out = way.call()
        once = time.perf_counter() - start
        errors[name] = error(p, way.read(out))
        if errors[name] <= p.tolerance:
            # The first call of a short one says little of the others.
            tried[name] = once if once > LONG else min(harness.sample(way.call, 1) for _ in range(2))
    if not tried:
        raise ArithmeticError(
            f"wrong, so not timed: error {min(errors.values()):.1e} of a row, {p.tolerance:.1e} is right"
        )
    name = min(tried, key=lambda n: tried[n])
    call, once = ways[name].call, tried[name]
    floor = p.floor()
    settle()
    beside, times = [floor()], []
    for _ in range(1 if once > LONG else samples):
        settle()
        if once < LONG:
            call()  # its threads are asleep
        times.append(harness.sample(call, max(1, math.ceil(sample_seconds / once))))
        settle()
        beside.append(floor())
    floors = [(a + b) / 2 for a, b in pairwise(beside)]
    return {
        "way": name,
        "error": errors[name],
        "seconds": median(times),
        "floor_seconds": median(floors),
        "share": median(f / t for f, t in zip(floors, times, strict=True)),
    }


def job(name: str, problems: Sequence[Any], report: Path, samples: int, sample_seconds: float) -> str:
    """What `main` reads."""
    return json.dumps({
        "contestant": name, "problems": [asdict(p) for p in problems], "threads": torch.get_num_threads(),
        "report": str(report), "samples": samples, "sample_seconds": sample_seconds,
    })  # fmt: skip


def main(
    contestants: Mapping[str, Contestant] = CONTESTANTS,
    problem: Callable[..., Any] = Problem,
    error: Callable[[Any, Tensor], float] = error,
) -> None:
    """Does the job on the standard input. problem: makes one of the fields as they come, its shape as a tuple."""
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    torch.set_grad_enabled(False)
    contestant = contestants[work["contestant"]]
    with open(work["report"], "a", buffering=1) as file:

        def say(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")

        say(event="up", versions={p: version(p) for p in contestant.packages})
        before, start = harness.busy(), time.perf_counter()
        for entry in work["problems"]:
            p = problem(**{**entry, "shape": tuple(entry["shape"])})
            say(event="start", problem=p.name)
            try:
                ways = contestant.ways(p, work["threads"])
                found = figure(ways, p, work["samples"], work["sample_seconds"], error)
            except Exception as failure:  # whatever a peer raises is its result
                reason = str(failure).split("\n", 1)[0]
                known = isinstance(failure, Unsupported | ArithmeticError)
                say(event="failed", problem=p.name, reason=reason if known else f"{type(failure).__name__}: {reason}")
            else:
                say(event="figure", problem=p.name, **found)
        after, took = harness.busy(), time.perf_counter() - start
        others = (after[0] - before[0]) - (after[1] - before[1]) if before and after else 0.0
        say(event="end", disturbance=max(0.0, others) / (work["threads"] * took))


if __name__ == "__main__":
    main()
