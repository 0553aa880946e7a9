"""One contestant in int8 linear, in a process of its own: what benchmarks/int8_peers.py starts.

Inputs and weights are normal, and a result is right when each of its rows is within a tenth of the product of what was
not quantised, in float64: any 8 bits are, and what multiplies by another weight is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import attention_contestants, int8, peers
from benchmarks.attention import DTYPES
from benchmarks.attention_contestants import BENCH, PEAK, Contestant, Unsupported, Way, job
from llmkern.evaluation import roofline
from llmkern.int8.reference import quantize_weight

__all__ = ["CONTESTANTS", "Problem", "job", "missing"]

ROWS = 64  #: whose results are held to float64, evenly spaced from the first to the last
BLOCK = 32  #: of ONNX Runtime's weights with a scale for every so many values
#: What a library keeps by the address of a weight would be wrong for the next one there: no weight is given up.
_kept: list[Tensor] = []


@dataclass(frozen=True)
class Problem:
    """M,K,N and the dtype of the activations and of the result."""

    shape: tuple[int, int, int]
    short: str
    tolerance: float = 0.1

    @property
    def name(self) -> str:
        return f"{','.join(map(str, self.shape))} {self.short}"

    def floor(self) -> Callable[[], float]:
        m, k, n = self.shape
        measure = roofline.floor(2.0 * m * k * n, torch.int8, float(k * n), PEAK)
        return lambda: min(measure() for _ in range(3))  # one alone may have had to wait for a thread


@lru_cache(maxsize=1)
def inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) in the dtype of the problem, weight (N, K) and bias (N,), float32. Nobody may change them."""
    x, linear = int8.layer(p.shape)
    return x.to(DTYPES[p.short]), linear.weight.detach(), linear.bias.detach()


def error(p: Problem, got: Tensor) -> float:
    """The largest error of a row relative to the row's length in float64, of up to ROWS rows."""
    x, weight, bias = inputs(p)
    if got.shape != (x.size(0), weight.size(0)):
        raise ValueError(f"result: expected the shape {[x.size(0), weight.size(0)]}, got {list(got.shape)}")
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), dtype=torch.float64).round().long()
    if not bool(got.isfinite().all()):
        return math.inf
    truth = x[rows].double() @ weight.double().t() + bias.double()
    return float(((got[rows].double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


def layer(p: Problem) -> nn.Linear:
    """A copy, in the dtype of the problem."""
    _, weight, bias = inputs(p)
    linear = nn.Linear(weight.size(1), weight.size(0), device="meta").requires_grad_(False).eval()
    linear.weight, linear.bias = (nn.Parameter(t.to(DTYPES[p.short], copy=True), False) for t in (weight, bias))
    return linear


def only_fp32(p: Problem) -> None:
    if p.short != "fp32":
        raise Unsupported("takes float32 alone")


def llmkern(way: int8.Way) -> Callable[[Problem, int], dict[str, Way]]:
    """With a fresh result, and into a given one, as ONNX Runtime and OpenVINO write theirs."""

    def ways(p: Problem, threads: int) -> dict[str, Way]:
        x, weight, bias = inputs(p)
        _, values, scale, _ = way.arguments(x, weight, bias)
        fresh, into = (replace(way, into=into).call(x, values, scale, bias) for into in (False, True))
        return {"functional.int8_linear": Way(fresh), "functional.int8_linear, out": Way(into)}

    return ways


def plain(p: Problem, threads: int) -> dict[str, Way]:
    """Nothing quantised."""
    x, linear = inputs(p)[0], layer(p)
    weight, bias = linear.weight, linear.bias
    y = x.new_empty(x.size(0), weight.size(0))
    return {
        "F.linear": Way(lambda: F.linear(x, weight, bias)),
        "addmm, out": Way(lambda: torch.addmm(bias, x, weight.t(), out=y)),
    }


def quantised(p: Problem, threads: int) -> dict[str, Way]:
    only_fp32(p)
    x, linear = inputs(p)[0], layer(p)
    made = {e: peers.quantized_linear(linear, e) for e in int8.engines(2.0 * math.prod(p.shape))[0]}
    return {engine: Way(partial(module, x)) for engine, module in made.items()}


def torchao(config: str) -> Callable[[Problem, int], dict[str, Way]]:
    """Step by step, compiled, and compiled with weights as constants and products timed against each other."""

    def ways(p: Problem, threads: int) -> dict[str, Way]:
        from torchao import quantization

        x, module = inputs(p)[0], nn.Sequential(layer(p))
        quantization.quantize_(module, getattr(quantization, config)())
        found = {"eager": Way(lambda: module(x))}
        if peers.compile_missing() is None:
            torch.compiler.reset()
            compiled = peers.compiled(module)
            tuned = torch.compile(module, dynamic=False, options={"max_autotune": True, "freezing": True})
            found["compiled"] = Way(lambda: compiled(x))
            found["compiled, frozen, tuned"] = Way(lambda: tuned(x))
        return found

    return ways


def zentorch(p: Problem, threads: int) -> dict[str, Way]:
    """Its operator, which torch.compile(backend="zentorch") would call."""
    import zentorch  # noqa: F401

    x, weight, bias = inputs(p)
    values, scale = quantize_weight(weight)
    bias = bias.to(x.dtype)
    _kept.extend((values, scale))
    function = torch.ops.zentorch.zentorch_dynamic_qlinear
    return {"zentorch_dynamic_qlinear": Way(lambda: function(x, values, scale, bias))}


def openvino(p: Problem, threads: int) -> dict[str, Way]:
    """Rows quantised as they come, with a scale for each row, and for every 128 values of one."""
    import numpy
    import openvino as ov
    from openvino import opset13

    x, weight, bias = inputs(p)
    half, (m, k, n) = p.short == "bf16", p.shape
    kind = ov.Type.bf16 if half else ov.Type.f32
    values, scale = quantize_weight(weight)
    array = x.view(torch.uint16).numpy() if half else x.numpy()
    taken = ov.Tensor(array, ov.Shape([m, k]), kind)

    def constant(t: Tensor) -> Any:
        made = opset13.constant(t.numpy())
        return opset13.convert(made, "bf16") if half else made

    def way(group: int) -> Way:
        parameter = opset13.parameter([m, k], kind)
        widened = opset13.convert(opset13.constant(values.numpy()), "bf16" if half else "f32")
        scaled = opset13.multiply(widened, constant(scale[:, None]))
        product = opset13.add(opset13.matmul(parameter, scaled, False, True), constant(bias[None]))
        settings = {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }  # fmt: skip
        request = ov.Core().compile_model(ov.Model([product], [parameter]), "CPU", settings).create_infer_request()
        request.set_input_tensor(0, taken)

        def read(_: Any) -> Tensor:
            out = bytearray(request.get_output_tensor(0).data.astype(numpy.dtype("V2") if half else "f4").tobytes())
            return torch.frombuffer(out, dtype=DTYPES[p.short]).view(m, n)

        return Way(request.infer, read, (array, taken))

    return {f"group of {g}": way(g) for g in dict.fromkeys((k, 128))}


def onnxruntime(p: Problem, threads: int) -> dict[str, Way]:
    """Each of its ways to multiply by int8 weights: which one is the quickest depends on M."""
    from onnx import TensorProto, helper

    only_fp32(p)
    _, weight, bias = inputs(p)
    n, k = weight.shape
    values, scale = quantize_weight(weight)
    transposed = {"B": values.t(), "b_scale": scale, "bias": bias}
    zero = torch.zeros(n, dtype=torch.int8)
    parts, scales = quantize_weight(weight, BLOCK)
    parts = F.pad(parts, (0, -k % BLOCK)).view(n, -1, BLOCK).int() + 128

    def node(kind: str, taken: list[str], made: list[str], domain: str = "", **attributes: Any) -> Any:
        return helper.make_node(kind, taken, made, domain=domain, **attributes)

    step_by_step = [
        node("DynamicQuantizeLinear", ["x"], ["a", "a_scale", "a_zero"]),
        node("MatMulInteger", ["a", "B", "a_zero"], ["sum"]),
        node("Cast", ["sum"], ["widened"], to=TensorProto.FLOAT),
        node("Mul", ["a_scale", "b_scale"], ["scale"]),
        node("Mul", ["widened", "scale"], ["product"]),
        node("Add", ["product", "bias"], ["y"]),
    ]
    ours = "com.microsoft"
    fused = [node("DynamicQuantizeMatMul", ["x", "B", "b_scale", "b_zero", "bias"], ["y"], ours)]
    blocks = [
        node(
            "MatMulNBits", ["x", "B", "b_scale", "", "", "bias"], ["y"], ours,
            K=k, N=n, bits=8, block_size=BLOCK, accuracy_level=4,
        )
    ]  # fmt: skip
    return {
        "DynamicQuantizeMatMul": onnx_way(p, threads, fused, {**transposed, "b_zero": zero}),
        "MatMulInteger": onnx_way(p, threads, step_by_step, transposed),
        f"MatMulNBits in blocks of {BLOCK}": onnx_way(
            p, threads, blocks, {"B": parts.to(torch.uint8), "b_scale": scales, "bias": bias}
        ),
    }


def onnxruntime_fp32(p: Problem, threads: int) -> dict[str, Way]:
    from onnx import helper

    only_fp32(p)
    _, weight, bias = inputs(p)
    nodes = [helper.make_node("Gemm", ["x", "B", "bias"], ["y"], transB=1)]
    return {"Gemm": onnx_way(p, threads, nodes, {"B": weight, "bias": bias})}


def onnx_way(p: Problem, threads: int, nodes: list[Any], constants: Mapping[str, Tensor]) -> Way:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    x, y = inputs(p)[0], torch.empty(p.shape[0], p.shape[2])
    given = [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in constants.items()]
    described = [helper.make_tensor_value_info(s, TensorProto.FLOAT, list(t.shape)) for s, t in (("x", x), ("y", y))]
    graph = helper.make_graph(nodes, "linear", described[:1], described[1:], given)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()  # without it, every call pays for fresh pages
    binding.bind_input("x", "cpu", 0, x.numpy().dtype, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, y.numpy().dtype, list(y.shape), y.data_ptr())
    return Way(lambda: session.run_with_iobinding(binding), lambda _: y, (x, y))


AO = 'pip install "torchao>=0.18"'
CONTESTANTS = {
    "llmkern": Contestant(llmkern(int8.Way()), (), ""),
    "llmkern, row": Contestant(llmkern(int8.Way("row")), (), ""),
    "torch": Contestant(plain, (), ""),
    "torch quantised": Contestant(quantised, (), ""),
    "torchao W8A8": Contestant(torchao("Int8DynamicActivationInt8WeightConfig"), ("torchao",), AO),
    "torchao weight-only": Contestant(torchao("Int8WeightOnlyConfig"), ("torchao",), AO),
    "zentorch": Contestant(
        zentorch, ("zentorch",), attention_contestants.CONTESTANTS["zentorch"].install
    ),
    "OpenVINO": Contestant(openvino, ("openvino",), BENCH),
    "ONNX Runtime": Contestant(onnxruntime, ("onnxruntime", "onnx"), BENCH),
    "ONNX Runtime fp32": Contestant(onnxruntime_fp32, ("onnxruntime", "onnx"), BENCH),
}  # fmt: skip


def missing(name: str) -> str | None:
    """Why a contestant cannot run here, and the command that changes it; None where its packages are installed."""
    return attention_contestants.missing(name, CONTESTANTS)


if __name__ == "__main__":
    attention_contestants.main(CONTESTANTS, Problem, error)
