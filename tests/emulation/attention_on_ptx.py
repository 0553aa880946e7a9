"""The attention on a cache with its CUDA backend, whose kernels' PTX the emulator runs.

Plans are made of what csrc/attention/params.h lays out, and a launch does what the launchers of cuda_decode.cu and
cuda_cache.cu do: choose the kernel, count the blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from llmkern import backend, extension
from llmkern.attention import cuda_decode
from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, Report, find, run

DECODE, CACHE = (compilers.ROOT / f"csrc/attention/{name}.cu" for name in ("cuda_decode", "cuda_cache"))
MANGLED = {1: "NS_4Bf16E", 2: "NS_4Fp16E"}
UNBOUNDED = 1 << 48
ROWS, MOST_BLOCKS = 16, 1 << 20


def struct(name: str, fields: str) -> Any:
    """A ctypes structure. fields: "type name name, type name, ..." in C's order."""
    types = {
        "ptr": ctypes.c_uint64, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "u32": ctypes.c_uint32,
        "f32": ctypes.c_float, "bool": ctypes.c_bool, "tensor": TENSOR, "pages": PAGES, "scales": SCALES,
        "mask": MASK, "bounds": BOUNDS, "lengths": LENGTHS, "tables": TABLES, "steps": ctypes.c_int64 * 3,
    }  # fmt: skip
    listed = []
    for part in fields.split(","):
        kind, *names = part.split()
        listed += [(n, types[kind]) for n in names]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


TENSOR = PAGES = SCALES = MASK = BOUNDS = LENGTHS = TABLES = None
TENSOR = struct("Tensor", "ptr data, i64 b h row")
PAGES = struct("Pages", "ptr data, bool is_64, i64 step size count")
SCALES = struct("Scales", "ptr data, i64 b h row")
BOUNDS = struct("Bounds", "ptr data, bool is_64, i64 total")
LENGTHS = struct("Lengths", "ptr data, bool is_64, i64 step")
MASK = struct(
    "Mask", "ptr data, i32 dtype, i64 b h row key, ptr lengths, bool lengths_64, i64 lengths_step lengths_more left "
    "right, bool bottom_right",
)  # fmt: skip
TABLES = struct("Tables", "ptr cos sin, i32 dtype, i64 length rotated cos_step sin_step, bool interleaved inverse")
ATTENTION = struct(
    "Attention", "tensor query key value output grad_output dquery dkey dvalue weights, ptr logsumexp grad_logsumexp "
    "grad_scores row_sums column_sums, mask mask, i64 batch heads kv_heads queries keys width value_width, f32 scale "
    "softcap, ptr alibi, i64 alibi_b alibi_h, ptr sink, u32 drop_below, f32 keep_scale, ptr seed, bool uniform, i32 "
    "dtype threads, bounds query_bounds key_bounds, pages pages, scales key_scales value_scales",
)  # fmt: skip
CACHE_PARAMS = struct(
    "Cache", "tensor query rotated key value key_cache value_cache, ptr key_scales value_scales, steps key_steps "
    "value_steps, pages pages, lengths lengths, tables rotation, i64 batch heads kv_heads queries added capacity width "
    "value_width, i32 dtype, bool ordered, i32 threads",
)  # fmt: skip


class Plan:
    """What both of the library's plans do with the strides of tensors and with pages."""

    p: Any

    def __getattr__(self, name: str) -> Any:
        if name not in ("query", "rotated", "key", "value", "output", "key_cache", "value_cache"):
            raise AttributeError(name)

        def strides(b: int, h: int, row: int) -> None:
            setattr(self.p, name, TENSOR(0, b, h, row))

        return strides

    def pages(self, is_64: bool, step: int, size: int, count: int) -> None:
        self.p.pages = PAGES(0, is_64, step, size, count)


class AttentionPlan(Plan):
    """AttentionParams of the library."""

    def __init__(self, sizes: Sequence[int], scale: float, uniform: bool, bottom_right: bool, dtype: int) -> None:
        names = ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width")
        self.p = ATTENTION(**dict(zip(names, sizes, strict=True)), scale=scale, uniform=uniform, dtype=dtype)
        self.p.mask.left = self.p.mask.right = UNBOUNDED
        self.p.mask.bottom_right = bottom_right

    def window(self, left: int, right: int) -> None:
        self.p.mask.left, self.p.mask.right = (UNBOUNDED if x < 0 else min(x, UNBOUNDED) for x in (left, right))

    def softcap(self, softcap: float) -> None:
        self.p.softcap = softcap

    def alibi(self, b: int, h: int) -> None:
        self.p.alibi_b, self.p.alibi_h = b, h

    def lengths(self, is_64: bool, step: int, more: int = 0) -> None:
        mask = self.p.mask
        mask.lengths_64, mask.lengths_step, mask.lengths_more = is_64, step, more

    def scales(self, keys: Sequence[int], values: Sequence[int]) -> None:
        self.p.key_scales, self.p.value_scales = SCALES(0, *keys), SCALES(0, *values)


class CachePlan(Plan):
    """CacheParams of the library."""

    def __init__(self, sizes: Sequence[int], dtype: int, table_dtype: int, ordered: bool) -> None:
        names = ("batch", "heads", "kv_heads", "queries", "added", "capacity", "width", "value_width")
        self.p = CACHE_PARAMS(**dict(zip(names, sizes, strict=True)), dtype=dtype, ordered=ordered)
        self.p.rotation.dtype = table_dtype

    def lengths(self, is_64: bool, step: int) -> None:
        self.p.lengths = LENGTHS(0, is_64, step)

    def scales(self, keys: Sequence[int], values: Sequence[int]) -> None:
        self.p.key_steps, self.p.value_steps = tuple(keys), tuple(values)

    def rotation(self, length: int, rotated: int, cos_step: int, sin_step: int, interleaved: bool) -> None:
        t = self.p.rotation
        t.length, t.rotated, t.cos_step, t.sin_step, t.interleaved = length, rotated, cos_step, sin_step, interleaved


class Memory:
    """The tensors of a launch in the emulator's memory, each storage once."""

    def __init__(self) -> None:
        self.launch, self.storages = Launch(), {}

    def address(self, t: Tensor | None, name: str, written: bool = True) -> int:
        if t is None:
            return 0
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.storages:
            raw = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()) if storage.nbytes() else []
            data = np.frombuffer(raw, np.uint8) if storage.nbytes() else np.zeros(0, np.uint8)
            self.storages[storage.data_ptr()] = self.launch.address(Buffer(data, name, written=written))
        return self.storages[storage.data_ptr()] + t.storage_offset() * t.element_size()


class Emulated:
    """Runs the kernels in place of the library's; `reports`: of the kernels run, by name."""

    def __init__(self, architecture: str = "80", schedule: str = "lockstep", counts: bool = False) -> None:
        self.architecture, self.schedule, self.counts = architecture, schedule, counts
        self.changes: tuple[tuple[str, str], ...] = ()
        self.reports: dict[str, Report] = {}
        self.splits: int | None = None  # instead of the backend's

    def kernel(self, name: str) -> Any:
        return {"attention_decode_cuda": self.decode, "cache_append_cuda": self.append}[name]

    def _run(self, source: Any, name: str, grid: int, threads: int, args: Sequence[Any], memory: Memory) -> None:
        ptx = compilers.nvcc(source, self.architecture, self.changes)
        report = run(
            ptx, find(ptx, name), grid, threads, args, launch=memory.launch, schedule=self.schedule, counts=self.counts
        )  # fmt: skip
        self.reports[name.split("I", 1)[0]] = report
        report.raise_if_faulty()

    def decode(
        self, plan: AttentionPlan, device: int, stream: int, splits: int, workspace: Tensor | None,
        *tensors: Tensor | None,
    ) -> None:  # fmt: skip
        p, memory = ATTENTION.from_buffer_copy(plan.p), Memory()
        names = ("table", "key scales", "value scales", "lengths", "logsumexp", "slopes", "sink", "query", "keys",
                 "values", "output")  # fmt: skip
        named = dict(zip(names, tensors, strict=True))
        query, keys, values = named["query"], named["keys"], named["values"]
        fresh = ("logsumexp", "output")
        at = {name: memory.address(t, name, name not in fresh) for name, t in named.items()}
        p.pages.data, p.mask.lengths, p.logsumexp = at["table"], at["lengths"], at["logsumexp"]
        p.key_scales.data, p.value_scales.data = at["key scales"], at["value scales"]
        p.alibi, p.sink = at["slopes"], at["sink"]
        p.query.data, p.key.data, p.value.data, p.output.data = (at[n] for n in names[7:])
        vectors = aligned(p.key, keys, p.width) and aligned(p.value, values, p.value_width)
        width = max(p.width, p.value_width)
        widths = (64, 128, 256) if keys.element_size() == 2 else (128, 256)
        width = next(w for w in widths if width <= w) if vectors else 256
        elements = "S2_" if keys.element_size() == 2 else "a"  # S2_: the same type again, as names are mangled
        rows = p.queries * p.heads // p.kv_heads
        blocks = p.batch * p.kv_heads * -(-rows // ROWS) * splits
        work = memory.address(workspace, "workspace", written=False)
        name = f"decode_kernelI{MANGLED[p.dtype]}{elements}Li{width}ELb{int(vectors)}E"
        arguments = [bytes(p), work, splits, int(aligned(p.query, query, p.width))]
        self._run(DECODE, name, blocks, 128, arguments, memory)
        if splits > 1:
            all_rows = p.batch * p.heads * p.queries
            self._run(
                DECODE, f"join_pieces_kernelI{MANGLED[p.dtype]}", min(all_rows, MOST_BLOCKS), 128,
                [bytes(p), work, splits], memory,
            )  # fmt: skip

    def append(self, plan: CachePlan, device: int, stream: int, *tensors: Tensor | None) -> None:
        p, memory = CACHE_PARAMS.from_buffer_copy(plan.p), Memory()
        names = ("lengths", "table", "key scales", "value scales", "cos", "sin", "query", "rotated", "key", "value",
                 "key cache", "value cache")  # fmt: skip
        named = dict(zip(names, tensors, strict=True))
        rotates = named["cos"] is not None
        fresh = ("rotated",) if rotates else ()
        at = {name: memory.address(t, name, name not in fresh) for name, t in named.items()}
        p.lengths.data, p.pages.data, p.key_scales, p.value_scales = (at[n] for n in names[:4])
        p.rotation.cos, p.rotation.sin = at["cos"], at["sin"]
        for field, name in zip(
            ("query", "rotated", "key", "value", "key_cache", "value_cache"), names[6:], strict=True
        ):
            getattr(p, field).data = at[name]
        written = p.batch * p.added * 2 * p.kv_heads
        rows = written + (p.batch * p.queries * p.heads if rotates else 0)
        half = p.rotation.rotated // 2 if rotates else 0
        lanes = max(-(-half // 8) + -(-(p.width - 2 * half) // 16), -(-p.value_width // 16), 1)
        lanes = 1 << (lanes - 1).bit_length()
        sixteen = named["key"]
        checked = [(p.key, sixteen), (p.value, sixteen)]
        checked += [(p.query, sixteen), (p.rotated, sixteen)] if rotates else []
        checked += [] if p.key_scales else [(p.key_cache, sixteen), (p.value_cache, sixteen)]
        vectors = p.width % 8 == p.value_width % 8 == 0 and all(aligned(t, like, 0) for t, like in checked)
        if rotates:
            size, t = named["cos"].element_size(), p.rotation
            vectors = vectors and not any((t.rotated % 16, t.cos % 16, t.sin % 16, t.cos_step * size % 16))
        name = f"cache_kernelI{MANGLED[p.dtype]}Lb{int(vectors)}E"
        grid = -(-rows // (128 // lanes))
        work = np.array([written, rows], np.int64).tobytes() + np.array([lanes, 0], np.int32).tobytes()
        self._run(CACHE, name, grid, 128, [bytes(p), work], memory)


def aligned(t: Any, like: Tensor, width: int) -> bool:
    """As the launchers find out whether 16 bytes can be read at once."""
    per = 16 // like.element_size()
    return t.data % 16 == 0 and not any(x % per for x in (t.b, t.h, t.row, width))


def serve(monkeypatch: Any, emulated: Emulated, processors: int) -> None:
    """Calls of attention_with_kvcache on CPU tensors are served by the CUDA backend, on the emulator."""
    monkeypatch.setattr("llmkern.cuda.kernel", emulated.kernel)
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    monkeypatch.setattr(cuda_decode, "processors", lambda device: processors)
    monkeypatch.setattr(extension._C, "AttentionParams", AttentionPlan)
    monkeypatch.setattr(extension._C, "CacheParams", CachePlan)
    operator = backend.Operator.all["attention_kvcache"]
    served = backend.Backend("cuda", cuda_decode.CUDA_KVCACHE.plan, lambda *args: None)
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [served]})
    backend.forget_plans()
