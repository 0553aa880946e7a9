"""Launches that fail, each in words; launchers that neither allocate nor wait, so that CUDA graphs may hold them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern.functional as F
from llmkern import backend, cuda, extension
from llmkern.attention.cuda import CUDA_ATTENTION_BACKWARD
from llmkern.attention.mask import Mask
from tests.emulation import cuda_on_cpu

ROOT = Path(__file__).resolve().parents[1]
HAS_CUDA = extension._C is not None and bool(extension._C.cuda_architectures)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    if cuda_on_cpu.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return cuda_on_cpu.build(tmp_path_factory.mktemp("launches"))


@pytest.fixture
def fail(module):
    """A function that makes the runtime fail at the next launch, and gives what the launcher says."""

    def said(
        error: int, *, driver=13000, toolkit=13000, devices=1, capability=(8, 0), built="sm_80 + PTX 80", device=0
    ) -> str:
        module.runtime(error, driver, toolkit, devices, *capability, built)
        with pytest.raises(RuntimeError, match=f"sinusoidal_add: the launch on CUDA device {device} failed: ") as told:
            sinusoidal_add(module.sinusoidal_add_cuda, device)
        return str(told.value)

    yield said
    module.runtime(0, 13000, 13000, 1, 8, 0, "")


def sinusoidal_add(kernel, device: int = 0, length: int = 1) -> None:
    x = torch.zeros(1, 1, 4)
    arguments = (length, 1, 4, 4, 4, 4, 4, 4, 1.0, 0)
    kernel(x.data_ptr(), x.data_ptr(), x.data_ptr(), *arguments, device, 0, 0, 1.0, 0)


def test_no_driver(fail):
    for error in (35, 100, 34):
        assert "no NVIDIA driver is installed: the kernels were compiled by CUDA 13.2" in fail(
            error, driver=0, toolkit=13020
        )


def test_an_old_driver(fail):
    for error in (35, 222):
        said = fail(error, driver=12040)
        assert "the driver serves CUDA up to 12.4, the kernels were compiled by CUDA 13.0" in said
        assert "install a newer driver, or build llmkern again" in said
    assert "restart" in fail(803)


def test_no_gpu(fail):
    assert "shows no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES" in fail(100)


@pytest.mark.parametrize("error", [209, 98])
def test_another_architecture(error, fail):
    said = fail(error, capability=(12, 1), built="sm_80 sm_90a + PTX 90a")
    assert "the device is an sm_121, the library holds sm_80 sm_90a + PTX 90a" in said
    assert 'LLMKERN_CUDA_ARCHS="121" pip install -e .' in said
    said = fail(error, capability=(7, 5))
    assert "sm_75, the kernels need sm_80 or newer" in said and "pip install" not in said


def test_a_device_that_is_not_there(fail):
    said = fail(0, device=3, devices=2)
    assert "invalid device ordinal" in said and "visible: 2 " in said


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((1, 9, 701), "asks for more than the device has: please report it"),
        ((2, 46), "another process may hold the device or its memory"),
        ((700, 710, 715, 716, 719), "an earlier kernel of this process failed.*CUDA_LAUNCH_BLOCKING=1"),
    ],
)
def test_other_failures_say_what_to_do(errors, words, fail):
    for error in errors:
        assert re.search(words, fail(error)), error


def test_a_failure_without_advice_is_cudas_own_message(fail):
    assert fail(999).endswith("failed: what CUDA says")


def test_a_launch_asks_the_runtime_for_nothing_else(module):
    module.runtime(0, 13000, 13000, 2, 8, 0, "")
    sinusoidal_add(module.sinusoidal_add_cuda)
    assert module.calls() == ["cudaGetDevice", "cudaLaunchKernelEx"]
    sinusoidal_add(module.sinusoidal_add_cuda, device=1)
    assert module.calls() == ["cudaGetDevice", "cudaSetDevice", "cudaLaunchKernelEx", "cudaSetDevice"]
    sinusoidal_add(module.sinusoidal_add_cuda, length=0)
    assert module.calls() == []


@pytest.mark.skipif(not HAS_CUDA, reason="the library has no CUDA part")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_library_without_a_driver():
    """The compiled library loads on a machine without a driver, and says so when a kernel is launched."""
    with pytest.raises(RuntimeError, match=r"sinusoidal_add: the launch on CUDA device 0 failed: .*driver"):
        sinusoidal_add(extension._C.sinusoidal_add_cuda)


# Of the runtime, what a stream that is being captured into a graph allows and what nothing waits for.
ALLOWED = re.compile(
    r"cuda(LaunchKernelExC|LaunchKernel|GetDevice|SetDevice|GetErrorString|GetErrorName|GetLastError|PeekAtLastError"
    r"|FuncSetAttribute|FuncGetAttributes|DeviceGetAttribute|GetDeviceCount|DriverGetVersion|RuntimeGetVersion"
    r"|GetDriverEntryPoint\w*|OccupancyMaxActiveBlocksPerMultiprocessor\w*|MemsetAsync)$|__cuda\w+$"
)


def forbidden(symbols: list[str]) -> list[str]:
    """Functions of CUDA's runtime and driver among the undefined symbols of an object that may wait or allocate."""
    of_cuda = [s for s in symbols if re.match(r"(__)?cuda[A-Z]\w*$|cu[A-Z]\w*$", s)]
    return [s for s in of_cuda if not ALLOWED.match(s)]


def objects(root: Path = ROOT) -> list[Path]:
    """Those that the latest build with CUDA made of its sources; those for sm_90a alone may have been left out, all of
    them. Empty where there was no such build."""
    folders = sorted((p.parent for p in root.glob("build/*cuda*/build.ninja")), key=lambda p: p.stat().st_mtime)
    if not folders:
        return []
    sources = sorted(root.glob("csrc/*/cuda*.cu"))
    made = {s: folders[-1] / f"{s.parent.name}.{s.stem}.o" for s in sources}
    missing = [s.name for s, path in made.items() if not path.exists()]
    for_hopper = [s.name for s in sources if s.stem.startswith("cuda_sm90")]
    assert missing in ([], for_hopper), f"{folders[-1]} has no object of {', '.join(missing)}: build again"
    return [path for path in made.values() if path.exists()]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_the_objects_call_nothing_that_waits_or_allocates():
    if not objects():
        pytest.skip("the CUDA part was not built here")
    for path in objects():
        text = subprocess.run(["nm", "-u", str(path)], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-1] for line in text.splitlines()]
        assert any(s.startswith("cudaLaunchKernel") for s in symbols), path.name
        assert forbidden(symbols) == [], path.name


def test_an_object_that_is_missing_is_no_reason_to_skip(tmp_path):
    assert objects(tmp_path) == []
    for name in ("csrc/a/cuda.cu", "csrc/a/cuda_sm90.cu", "build/x-cuda/build.ninja", "build/x-cuda/a.cuda.o"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert objects(tmp_path) == [tmp_path / "build/x-cuda/a.cuda.o"]
    (tmp_path / "csrc/a/cuda_other.cu").touch()
    with pytest.raises(AssertionError, match=r"no object of cuda_other.cu"):
        objects(tmp_path)


def test_what_is_forbidden_is_found():
    """Those that a launcher might be tempted to call."""
    bad = ["cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy",
           "cudaEventSynchronize", "cuCtxSynchronize", "cudaMallocHost", "cudaMemset"]  # fmt: skip
    assert forbidden([*bad, "cudaLaunchKernelExC", "__cudaRegisterFatBinary", "malloc", "current"]) == bad


#: Methods of a tensor, and functions of torch, that wait for the device.
WAITING = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "unique", "masked_select", "is_nonzero", "equal"}


def waiting(source: str) -> list[str]:
    """Calls in Python source that wait for the device, with their lines."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [f"line {n.lineno}: {n.func.attr}" for n in calls if n.func.attr in WAITING]


def test_pythons_side_of_the_launchers_does_not_wait():
    files = [*ROOT.glob("llmkern/*/cuda*.py"), *ROOT.glob("llmkern/*/triton_*.py"), ROOT / "llmkern/int8/packing.py"]
    files += [ROOT / "llmkern/cuda.py", ROOT / "llmkern/triton.py"]
    assert len(files) > 1
    for path in files:
        assert waiting(path.read_text()) == [], path
    assert waiting("def f(x):\n    torch.cuda.synchronize()\n    return x.max().item()\n") == [
        "line 2: synchronize", "line 3: item",
    ]  # fmt: skip


class Waits(AssertionError):
    """The value of a tensor was asked for."""


class _OnHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu", "__array__"):
            raise Waits(function.__name__)
        return function(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Raises `Waits` where a GPU would be waited for: bool(t), int(t), float(t), `if t:`, t.item(), a shape that
    depends on values. host: tensors that lie on the host, whose values may be read."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique", "_unique2", "unique_dim")

    def __init__(self, host=()):
        super().__init__()
        self.host, self.functions = [t.data_ptr() for t in host], _OnHost()

    def __enter__(self):
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        masked = masks and any(t is not None and t.dtype == torch.bool for t in args[1])
        if (name in self.WAITS and args[0].data_ptr() not in self.host) or masked:
            raise Waits(name)
        return function(*args, **(kwargs or {}))


def _condition(t):
    return 1 if t else 2


@pytest.mark.parametrize(
    "wait",
    [bool, int, float, _condition, range, lambda t: t.item(), lambda t: t.tolist(), lambda t: t.cpu(),
     lambda t: t.numpy(), lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: torch.equal(t, t), lambda t: t.unique(),
     lambda t: t.reshape(1, 1)[t.reshape(1, 1) > 0], lambda t: 1 in t, lambda t: max(t, t)],
)  # fmt: skip
def test_what_waits_is_seen(wait):
    with NoWaiting(), pytest.raises(Waits):
        wait(torch.tensor(3))
    with NoWaiting():
        assert (torch.tensor(3).max() + 1).shape == ()


def _attention(kernel_backward):
    q, k, v = (torch.randn(1, 2, 5, 64, dtype=torch.float16, requires_grad=kernel_backward) for _ in range(3))
    rules = {"key_lengths": torch.tensor([3]), "learnable_sink": torch.randn(2), "dropout_p": 0.5, "dropout_seed": 7}
    out = F.scaled_dot_product_attention(q, k, v, torch.rand(1, 2, 5, 5) > 0.5, alibi_slopes=torch.rand(2), **rules)
    if kernel_backward:
        out.sum().backward()


def _cached():
    q, k, v = (torch.randn(2, 1, 2, 64, dtype=torch.float16) for _ in range(3))
    caches = [torch.randint(-9, 9, (8, 16, 2, 64), dtype=torch.int8) for _ in range(2)]
    scales = [torch.rand(8, 16, 2) for _ in range(2)]
    angles, table = torch.rand(64, 32), torch.arange(8).view(2, 4)
    F.attention_with_kvcache(
        q, *caches, k, v, angles, angles, torch.tensor([3, 40]), table, causal=True, alibi_slopes=torch.rand(2),
        learnable_sink=torch.randn(2), k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip


def _linear():
    x, weight = torch.randn(3, 40, dtype=torch.bfloat16), torch.randint(-9, 9, (8, 40), dtype=torch.int8)
    bias, residual = torch.randn(8).bfloat16(), torch.randn(3, 8).bfloat16()
    F.int8_linear(x, weight, torch.rand(8), bias, residual=residual)
    F.int8_linear(x, weight, torch.rand(8), inputs="static", input_scale=torch.rand(2))
    F.int8_linear(x, weight, torch.rand(8, 2), inputs="symmetric", group=32)
    F.int8_linear(x.requires_grad_(), weight, torch.rand(8)).sum().backward()


def _positional():
    q, k = torch.randn(1, 2, 5, 64), torch.randn(1, 1, 5, 64)
    F.rotary(q, k, torch.rand(9, 32), torch.rand(9, 32), position_ids=torch.arange(5)[None])
    x, pe = torch.randn(5, 2, 16, requires_grad=True), torch.rand(9, 1, 16)
    F.sinusoidal_add(x, pe, dropout_p=0.5, seed=torch.tensor(3)).sum().backward()


def _weights(*, sums: bool):
    q, k = torch.randn(1, 4, 5, 64, requires_grad=True), torch.randn(1, 2, 7, 64)
    logsumexp = torch.randn(1, 4, 5, dtype=torch.float64)
    rules = (*Mask().arguments(), 0.125, False)
    if sums:
        return torch.ops.llmkern.attention_column_sums(q.detach(), k, logsumexp, *rules)
    return torch.ops.llmkern.attention_weights(q, k, logsumexp, *rules).sum().backward()


def _end_to_end():
    q, k = torch.randn(9, 4, 64, requires_grad=True), torch.randn(9, 2, 64)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    F.attention_varlen(q, k, k, bounds, bounds, max_seqlen_q=5, max_seqlen_k=5).sum().backward()


def _integers():
    q, k = torch.randn(1, 4, 5, 64).bfloat16(), torch.randn(1, 2, 7, 64).bfloat16()
    F.attention_int8(q, k, k, enable_gqa=True)


def _rows():
    x = torch.randn(5, 16, requires_grad=True)
    sum(F.layer_norm(x, torch.rand(16), residual=x * 2)).sum().backward()
    F.swiglu(x, x * 2).sum().backward()


def _losses():
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((5, 6), (9, 6), (9,)))
    targets, logits = torch.tensor([3, 0, -100, 8, 3]), torch.randn(5, 9, requires_grad=True)
    F.cross_entropy(logits, targets, label_smoothing=0.1).backward()
    F.distillation(logits, logits * 2, targets).backward()
    for reduction in ("mean", "none"):
        F.linear_cross_entropy(hidden, weight, targets, bias, reduction=reduction).sum().backward()
    F.linear_distillation(hidden, weight, hidden, weight, targets, bias).backward()


LOSSES = ("cross_entropy", "distillation", "linear_cross_entropy")
CALLED = {
    **dict.fromkeys((*LOSSES, *(f"{name}_backward" for name in LOSSES), "linear_distillation"), _losses),
    "attention_weights": lambda: _weights(sums=False), "attention_weights_backward": lambda: _weights(sums=False),
    "attention_column_sums": lambda: _weights(sums=True), "attention_varlen": _end_to_end,
    "attention_varlen_backward": _end_to_end, "attention_int8": _integers, "norm": _rows, "norm_backward": _rows,
    "gated": _rows, "gated_backward": _rows,
    "attention": lambda: _attention(False), "attention_backward": lambda: _attention(True),
    "attention_kvcache": _cached, "int8_linear": _linear, "int8_linear_backward": _linear, "rotary": _positional,
    "sinusoidal_add": _positional, "sinusoidal_dropout": _positional,
}  # fmt: skip
LAUNCHERS = [
    (name, found) for name, operator in sorted(backend.Operator.all.items())
    for found in operator.by_device.get("cuda", ()) if found.name in ("cuda", "triton")
]  # fmt: skip


def without_waiting(found, planned):
    """A backend that plans and launches as `found`, with an error where it waits."""

    def plan(*args):
        host = [t for t in args if isinstance(t, torch.Tensor) and t.dim() == 0 and t.dtype == torch.int64]  # seeds
        with NoWaiting(host):
            launch = found.plan(*args)

        def run(*args):
            planned.append(found.name)
            with NoWaiting([t for t in args if isinstance(t, torch.Tensor) and t.dim() == 0]):
                return launch(*args)

        return run

    return backend.Backend(found.name, plan, lambda *args: None)


@pytest.mark.parametrize(("name", "found"), LAUNCHERS, ids=[f"{name}-{found.name}" for name, found in LAUNCHERS])
def test_planning_and_launching_wait_for_nothing(name, found, monkeypatch):
    """Each launcher is run to its end on tensors of the CPU, with nothing in the kernels' place."""
    if found is CUDA_ATTENTION_BACKWARD:
        assert found.unsupported(torch.zeros(1))
        return
    if found.name == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr("llmkern.cuda.kernel", lambda name: lambda *args: 0)
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    monkeypatch.setattr("llmkern.triton.run", lambda launch: None)
    monkeypatch.setattr("llmkern.triton.family", lambda device: "sm_80")
    launchers = ("launch", "decode_launch", "int8_launch", "varlen_launch", "weights_launch")
    for module in (f"triton_{name}" for name in launchers):
        monkeypatch.setattr(f"llmkern.attention.{module}.family_of", lambda device: "sm_80")
    for module in ("cuda_decode", "triton_decode_launch"):
        monkeypatch.setattr(f"llmkern.attention.{module}.processors", lambda device: 64)
    operator, planned = backend.Operator.all[name], []
    stands = without_waiting(found, planned)
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()
    try:
        CALLED[name]()
    finally:
        backend.forget_plans()
    assert planned, "the launcher was not run"


@pytest.mark.parametrize("waits", [bool, int, float, _condition])
def test_a_launcher_that_waits_is_an_error(waits):
    launcher = backend.Backend("cuda", lambda x: lambda x: waits(x.max()), lambda x: None)
    with pytest.raises(Waits):
        without_waiting(launcher, []).plan(torch.ones(2))(torch.ones(2))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80 sm_90 + PTX 90", (8, 0), True), ("sm_80 sm_90 + PTX 90", (8, 9), True),
        ("sm_80 sm_90 + PTX 90", (9, 0), True), ("sm_80 sm_90 + PTX 90", (12, 0), True),
        ("sm_90", (8, 0), False), ("sm_90", (10, 0), False), ("sm_86", (8, 0), False), ("sm_90a", (9, 0), True),
    ],
)  # fmt: skip
def test_code_for_another_device_leaves_the_call_to_the_next_backend(architectures, capability, runs):
    assert cuda.runs_on(architectures, capability) == runs
