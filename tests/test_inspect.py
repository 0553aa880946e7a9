"""The inspector: what it reads from fixed text, its rules by hand, its errors; the kernels against their budgets."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from llmkern import inspect as inspector
from llmkern.inspect import amd, budgets, cli, cuda_source, limits, mix, sass, tools, triton_source
from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row, row
from tests.emulation import compilers

needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KEYS = [
    "kernel", "source", "config", "target", "registers", "spill_bytes", "shared_bytes", "occupancy",
    "matrix_instructions", "bracket_serial", "bracket_bound", "bracket_turns",
]  # fmt: skip

# Two nested loops, the inner one with matrix instructions; behind EXIT a second try of a barrier and the padding.
SASS = """
\tcode for sm_90
\t\tFunction : matrix
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0020*/                   LDSM.16.M88.4 R8, [R5] ;             /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ; /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R16, R4, R8, R16 ; /* 0x0 */
        /*0050*/                   FFMA R1, R2, R3, R1 ;                /* 0x0 */
        /*0060*/                   MUFU.EX2 R1, R1 ;                    /* 0x0 */
        /*0070*/                   IADD3 R5, R5, 0x10, RZ ;             /* 0x0 */
        /*0080*/               @P1 BRA 0x20 ;                           /* 0x0 */
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;      /* 0x0 */
        /*00a0*/              @!P2 BRA 0x10 ;                           /* 0x0 */
        /*00b0*/                   EXIT ;                               /* 0x0 */
        /*00c0*/                   SYNCS.PHASECHK.TRANS64 P0, [R2], R3 ; /* 0x0 */
        /*00d0*/              @!P0 BRA 0x20 ;                           /* 0x0 */
        /*00e0*/                   BRA 0xe0;                            /* 0x0 */
\t\tFunction : straight
        /*0000*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0010*/               @P0 EXIT ;                               /* 0x0 */
        /*0020*/                   UIADD3 UR4, UR4, 0x1, URZ ;          /* 0x0 */
        /*0030*/                   STG.E desc[UR4][R2.64], R4 ;         /* 0x0 */
        /*0040*/                   EXIT ;                               /* 0x0 */
        /*0050*/                   BRA 0x50;                            /* 0x0 */
"""


def test_machine_code_is_read():
    code = sass.functions(SASS)
    assert list(code) == ["matrix", "straight"] and len(code["matrix"]) == 15
    load = code["matrix"][1]
    assert (load.address, load.predicate, load.name, load.opcode) == (0x10, "@!P0", "LDG.E.128", "LDG")
    assert [x.pipe for x in code["matrix"][:9]] == [
        "other", "lsu", "lsu", "tensor", "tensor", "fma", "mufu", "alu", "branch",
    ]  # fmt: skip
    assert [x.bytes for x in code["matrix"] if x.pipe == "lsu"] == [16, 16, 8]
    assert [x.bytes for x in code["straight"] if x.pipe == "lsu"] == [2, 4]
    assert sass.matrix_instructions(code["matrix"]) == {"HMMA.16816.F32.BF16": 2}


def test_the_main_loop_is_the_innermost_with_matrix_instructions():
    code = sass.functions(SASS)
    assert [(b[0].address, b[-1].address) for b in sass.loops(code["matrix"])] == [(0x20, 0x80), (0x10, 0xA0)]
    assert [x.address for x in sass.main_loop(code["matrix"])] == list(range(0x20, 0x90, 0x10))
    assert [x.address for x in sass.main_loop(code["straight"])] == [0x00, 0x10, 0x20, 0x30, 0x40]


def test_the_bracket_by_hand():
    """On sm_90: 2 HMMA of 2048 multiply-adds at 2048 a cycle are 2 cycles, LDSM of 512 bytes 4, FFMA a quarter, MUFU 2,
    IADD3 a half: 8.75 in all, and the 7 instructions issue in 1.75."""
    loop = sass.main_loop(sass.functions(SASS)["matrix"])
    assert mix.cycles(loop, "sm_90a") == {
        "tensor": 2.0, "fma": 0.25, "alu": 0.5, "mufu": 2.0, "lsu": 4.0, "issue": 1.75,
    }  # fmt: skip
    assert mix.bracket(loop, "sm_90") == pytest.approx((2 / 8.75, 2 / 4))
    assert mix.turns(loop, "sm_90") == pytest.approx(2 / (2 + 4))  # while LDSM is the busiest of the others
    assert mix.turns([*loop[:3], *loop[4:], *loop[4:]], "sm_90") == pytest.approx(2 / (2 + 4))
    assert mix.bracket(loop, "sm_80") == pytest.approx((4 / (4 + 0.5 + 0.5 + 2 + 4), 1.0))
    # Without matrix instructions: 2 instructions of memory, a cycle each, among 5 that issue in 1.25.
    straight = sass.main_loop(sass.functions(SASS)["straight"])
    assert mix.bracket(straight, "sm_90") == (1.0, 1.0)
    assert mix.bracket([x for x in straight if x.pipe != "lsu"], "sm_90") == (None, None)
    assert mix.bracket([], "sm_90") == (None, None)
    assert mix.turns(straight, "sm_90") is mix.turns([], "sm_90") is None


def test_of_loops_with_the_same_products_the_one_without_masks_counts():
    """And what is never executed takes a place in the issue alone."""
    text = SASS.replace("FFMA R1, R2, R3, R1", "FSEL R1, R2, R3, P1").replace("@!P2 BRA 0x10 ;  ", "@!P2 BRA 0x90 ;  ")
    text = text.replace("STG.E.64 desc[UR4][R2.64], R4 ;     ", "HMMA.16816.F32.BF16 R12, R4, R8, R12 ;")
    code = sass.functions(text)["matrix"]
    short = [x for x in code if 0x90 <= x.address <= 0xA0]
    assert sass.main_loop(code)[0].address == 0x20  # twice the products
    one = [x for x in code if x.address != 0x40]
    assert sass.main_loop(one) == short
    dummy = sass.Instruction(0, "@!PT", "LDS", "RZ, [RZ]")
    assert dummy.pipe == "branch" and mix.cycles([dummy], "sm_90")["lsu"] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HMMA.1684.F32.TF32", 16 * 8 * 4),
        ("IMMA.16832.S8.S8", 16 * 8 * 32),
        ("IMMA.8816.S8.S8", 8 * 8 * 16),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("IGMMA.64x8x32.S8.S8", 64 * 8 * 32 // 4),
        ("UTCHMMA", None),
    ],
)
def test_multiply_adds_of_matrix_instructions(name, expected):
    x = sass.Instruction(0, "", name, "")
    assert x.pipe == "tensor" and mix.multiply_adds(x) == expected
    if expected is None:
        assert mix.bracket([x], "sm_100") == (None, None)


def test_rates_of_matrix_instructions():
    def tensor(name: str, target: str) -> float:
        return mix.cycles([sass.Instruction(0, "", name, "")], target)["tensor"]

    assert tensor("HMMA.16816.F32", "sm_80") == 2 and tensor("IMMA.16832.S8.S8", "sm_80") == 2
    assert tensor("HMMA.1688.F32.TF32", "sm_80") == 2 and tensor("QMMA.16832.F32.E4M3.E4M3", "sm_120") == 4
    assert set(mix.RATES) == set(limits.LIMITS)


# Each line has one rule that decides, worked out by hand.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "blocks", "share"),
    [
        ("sm_80", 32, 0, 256, 8, 1.0),  # 64 warps by 8 of a block
        ("sm_86", 32, 0, 256, 6, 1.0),  # 48 warps by 8
        ("sm_80", 16, 0, 32, 32, 0.5),  # 32 blocks at most
        ("sm_86", 16, 0, 32, 16, 16 / 48),
        ("sm_89", 16, 0, 32, 24, 0.5),
        ("sm_120", 16, 0, 32, 24, 0.5),
        ("sm_90", 128, 0, 128, 4, 0.25),  # 4096 registers a warp, 4 of them in a partition's 16384: 16 warps
        ("sm_90", 129, 0, 128, 3, 12 / 64),  # 4352 of them, 3 in a partition
        ("sm_90", 33, 0, 1024, 1, 0.5),  # 1280 a warp, 12 in a partition: 48 warps, one block of 32
        ("sm_80", 168, 0, 384, 1, 12 / 64),  # 5376: 3 in a partition
        ("sm_80", 255, 0, 256, 1, 8 / 64),  # 8192: 2 in a partition
        ("sm_80", 32, 48 << 10, 128, 3, 12 / 64),  # 49 KiB of 164
        ("sm_90", 32, 48 << 10, 128, 4, 16 / 64),  # 49 KiB of 228
        ("sm_120", 32, 48 << 10, 128, 2, 8 / 48),  # 49 KiB of 100
        ("sm_120", 32, 1, 32, 24, 0.5),  # 1 + 1024 bytes round up to 1152: 88 would fit, 24 blocks may
        ("sm_80", 32, 163 << 10, 128, 1, 4 / 64),
        ("sm_80", 32, (163 << 10) + 1, 128, 0, 0.0),  # more than a block may have
        ("sm_86", 32, (99 << 10) + 1, 128, 0, 0.0),
        ("sm_90", 32, 227 << 10, 128, 1, 4 / 64),
        ("sm_90", 255, 0, 1024, 0, 0.0),  # 32 warps where 8 fit
        ("sm_90", 32, 0, 1025, 0, 0.0),
        ("sm_100", 32, 0, 100, 16, 1.0),  # 100 threads take 4 warps
    ],
)
def test_occupancy_by_hand(target, registers, shared, threads, blocks, share):
    assert limits.blocks_per_sm(target, registers, shared, threads) == blocks
    assert limits.occupancy(target, registers, shared, threads) == pytest.approx(share)


# The end of an AMD assembly file, and three instructions of it.
AMDGCN = """
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[144:145], v[146:147], v[2:17]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[144:145], v[146:147], a[0:15]
\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
\tv_mac_f32_e32 v0, v1, v2
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 36
    .sgpr_count:     106
    .sgpr_spill_count: 23
    .vgpr_count:     200
    .vgpr_spill_count: 7
    .wavefront_size: 64
"""


def test_what_amds_metadata_say_is_read():
    used = amd.resources(AMDGCN)
    assert used == amd.Resources(200, 106, 36)
    assert amd.resources(AMDGCN.replace(": 36", ": 0")).local_bytes == 28
    assert amd.matrix_instructions(AMDGCN) == {"v_mfma_f32_32x32x8_bf16": 2, "v_wmma_f32_16x16x16_bf16": 1}
    with pytest.raises(InspectError, match=r"\.vgpr_count 2 times"):
        amd.resources(AMDGCN + "    .vgpr_count: 3\n")
    made = amd.row("k", "x", "gfx942", 1024, 256, AMDGCN)
    assert (made.registers, made.spill_bytes, made.bracket_serial, made.bracket_bound) == (200, 36, None, None)
    told = budgets.over([made], {"k": {"triton": {"x": {"gfx942": [192, 0, 1024, "v_mfma v_wmma"]}}}})
    assert [t.split(": ")[1] for t in told] == [
        "200 registers, the budget is 192", "36 spill bytes, the budget is 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "registers", "scalars", "shared", "threads", "share"),
    [
        ("gfx942", 64, 96, 0, 256, 1.0),  # 8 waves of each of 4 SIMDs
        ("gfx942", 65, 96, 0, 256, 7 / 8),  # 72 of 512: 7
        ("gfx942", 64, 106, 0, 256, 7 / 8),  # 112 of 800 scalar registers
        ("gfx942", 266, 106, 0, 256, 1 / 8),  # 272 of 512
        ("gfx942", 128, 96, 40960, 512, 8 / 32),  # one workgroup by its LDS
        ("gfx942", 513, 96, 0, 256, 0.0),
        ("gfx942", 64, 96, 65537, 256, 0.0),
        ("gfx1100", 97, 106, 0, 256, 12 / 16),  # 120 of 1536: 12 waves of 32 lanes
        ("gfx1100", 97, 106, 65536, 256, 16 / 64),  # two workgroups of 8 waves by their LDS
        ("gfx1100", 257, 106, 0, 256, 0.0),
    ],
)
def test_occupancy_of_amds_by_hand(target, registers, scalars, shared, threads, share):
    assert amd.occupancy(target, amd.Resources(registers, scalars, 0), shared, threads) == pytest.approx(share)


@needs_triton
def test_a_kernel_is_inspected_for_amd():
    (found,) = (r for r in inspector.inspect(["gfx942"], "attention_combine", ("triton",)) if "D=64" in r.config)
    assert found.spill_bytes == 0 and found.registers > 8 and found.bracket_serial is None


def test_what_ptxas_says_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 16384 bytes smem
"""
    assert cuda_source.resources(log) == {
        "first": cuda_source.Resources(48, 0, 0),
        "second": cuda_source.Resources(255, 40, 16384),
    }
    with pytest.raises(InspectError, match="ptxas does not tell what third needs"):
        cuda_source.resources("Compiling entry function 'third' for 'sm_90'\n")


def test_what_ptx_says_is_read():
    ptx = """
.extern .shared .align 16 .b8 tiles[];
.visible .entry known(.param .u64 a)
.maxntid 128, 2, 1
{
\t// begin inline asm
\t// llmkern.shared_bytes 4096
\t// end inline asm
\tmov.u32 %r1, tiles;
}
.entry unknown(.param .u64 a)
.reqntid 384
{
\tmov.u32 %r1, tiles;
}
.entry none()
{
\tmov.u32 %r1, fewtiles;
}
"""
    assert cuda_source.entries(ptx) == {
        "known": cuda_source.Entry(256, 4096),
        "unknown": cuda_source.Entry(384, None),
        "none": cuda_source.Entry(None, 0),
    }


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (
            "_ZN7llmkern39_GLOBAL__N__c4c414ae_7_cuda_cu_c8e02de013rotary_kernelIffLb0ELb1EEEvNS_12RotaryParamsE",
            ("rotary_kernel", "float, float, false, true"),
        ),
        ("_ZN7llmkern1fINS_4Bf16ELi64EEEvPKT_", ("f", "Bf16, 64")),
        ("_Z1fIL5Width3EEvv", ("f", "(Width)3")),  # an enum's bracket is no argument list
        ("gemm_bf16", ("gemm_bf16", "")),
    ],
)
def test_names_are_short(mangled, expected):
    assert tools.short_name(mangled) == expected


def a_row(**changes) -> Row:
    made = row("k", "cuda", "float", "sm_90a", 64, 0, 1024, 128, sass.functions(SASS)["matrix"])
    return dataclasses.replace(made, **changes)


def test_the_table_and_the_json():
    told = json.loads(cli.to_json([a_row(), a_row(shared_bytes=None, occupancy=None, matrix_instructions={})]))
    assert [list(r) for r in told] == [KEYS, KEYS]
    assert told[0]["matrix_instructions"] == {"HMMA.16816.F32.BF16": 2} and told[0]["occupancy"] == 0.5
    assert told[0]["bracket_serial"] == pytest.approx(2 / 8.75, abs=1e-4) and told[1]["shared_bytes"] is None
    head, first, second = cli.table([a_row(), a_row(shared_bytes=None, occupancy=None)]).splitlines()
    assert head.split()[:4] == KEYS[:4]
    assert "23% - 50%" in first and "2 HMMA.16816.F32.BF16" in first and " 50% " in first
    assert second.split()[6:8] == ["?", "?"]


def test_errors_are_one_sentence(monkeypatch, capsys, tmp_path):
    def fails(*arguments: str) -> str:
        assert cli.main([*arguments]) == 1
        out, err = capsys.readouterr()
        assert not out
        return err

    assert fails("--target", "sm_91") == (
        "llmkern inspect: target: expected some of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, gfx1100, "
        "got 'sm_91'\n"
    )
    assert "--json /nowhere/rows: No such file" in fails("--json", "/nowhere/rows")
    if compilers.NVCC:
        assert "rotary_kernel, sinusoidal_add_kernel" in (said := fails("--source", "cuda", "--kernel", "nothing"))
        assert "got 'nothing'" in said
    monkeypatch.setenv("LLMKERN_NVCC", "/nowhere/nvcc")
    tools.nvcc.cache_clear()
    try:
        assert "no nvcc was found" in (said := fails("--source", "cuda")) and "--source triton" in said
    finally:
        tools.nvcc.cache_clear()
    monkeypatch.setattr(triton_source, "installed", lambda: False)
    assert "Triton is not installed" in fails("--source", "triton")
    monkeypatch.setattr(cuda_source, "CSRC", tmp_path)
    assert "run in a clone of the repository" in fails("--source", "cuda")


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    source = tmp_path / "family" / "cuda_broken.cu"
    source.parent.mkdir()
    source.write_text("__global__ void broken() { nothing(); }\n")
    with pytest.raises(InspectError, match=r"family/cuda_broken.cu for sm_80 does not compile:\n.*nothing"):
        cuda_source.compile_file(source, ["sm_80"])


@needs_nvcc
def test_dynamic_shared_memory_and_spills_of_a_compiled_kernel(tmp_path):
    """A kernel that notes its shared memory, one that does not, and one with more values than registers."""
    source = tmp_path / "cuda_made.cu"
    source.write_text(f'''#include "{cuda_source.CSRC}/common/device.cuh"
extern __shared__ float stage[];
template <int kBytes> __global__ void __launch_bounds__(64) noted(float* x) {{
  llmkern::device::note_shared_bytes<kBytes>();
  stage[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = stage[threadIdx.x ^ 33];
}}
template __global__ void noted<2048>(float*);
__global__ void quiet(float* x) {{ stage[threadIdx.x] = *x; __syncthreads(); *x = stage[threadIdx.x ^ 33]; }}
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {{
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; i++) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = y[i] * y[63 - i];
}}
''')
    rows = {r.kernel: r for r in cuda_source.compile_file(source, ["sm_80"])}
    noted = rows["noted"]
    assert (noted.config, noted.shared_bytes, noted.spill_bytes, noted.occupancy) == ("2048", 2048, 0, 1.0)
    assert rows["quiet"].shared_bytes is None and rows["quiet"].occupancy is None
    assert rows["spilling"].spill_bytes > 0 and rows["spilling"].registers <= 32
    (complaint,) = budgets.over(rows.values(), {})
    assert complaint.startswith("spilling (cuda) for sm_80: ") and "the budget is 0" in complaint


def test_budgets_name_what_is_over():
    rows = [a_row(registers=65, shared_bytes=2048)]
    kept = {"k": {"cuda": {"float": {"sm_90": [65, 0, 2048, "HMMA"]}, "double": {"sm_90": [32, 0, 0, ""]}}}}
    assert budgets.over(rows, kept) == [] and budgets.over(rows, {}) == []
    kept["k"]["cuda"]["float"]["sm_90"] = [64, 0, 2047, "HGMMA HMMA"]
    assert budgets.over(rows, kept) == [
        "k (cuda, float) for sm_90a: 65 registers, the budget is 64",
        "k (cuda, float) for sm_90a: 2048 shared bytes, the budget is 2047",
        "k (cuda, float) for sm_90a: no HGMMA, which the budget lists",
    ]
    assert budgets.over([a_row(occupancy=0.0)], {}) == ["k (cuda, float) for sm_90a: no block fits on an SM"]


def test_budgets_are_written(tmp_path):
    """Of what was compiled; other targets and kernels stay, and so does the reason of spills."""
    path = tmp_path / "budgets.json"
    before = {
        "k": {"cuda": {"gone": {"sm_90": [8, 0, 0, ""]}, "float": {"sm_80": [16, 0, 0, ""]}, "why": "because"}},
        "other": {"triton": {"float": {"sm_90": [24, 0, 0, ""]}}},
    }
    path.write_text(budgets.text(before))
    budgets.write([a_row(registers=65, spill_bytes=4, shared_bytes=None)], path)
    after = json.loads(path.read_text())
    of_float = {"sm_80": [16, 0, 0, ""], "sm_90": [72, 4, None, "HMMA"]}
    assert after == {"k": {"cuda": {"float": of_float, "why": "because"}}, "other": before["other"]}


def test_budgets_are_well_formed():
    assert budgets.text(budgets.load()) == budgets.FILE.read_text()
    for kernel, sources in budgets.load().items():
        for source, configs in sources.items():
            why = configs.pop("why", "")
            assert source in inspector.SOURCES
            for config, targets in configs.items():
                assert targets and set(targets) <= set(inspector.TARGETS), (kernel, config)
                assert all(len(numbers) == len(budgets.FIELDS) + 1 for numbers in targets.values()), (kernel, config)
            spills = [n for targets in configs.values() for _, n, *_ in targets.values() if n]
            assert bool(spills) == bool(why), (kernel, "spills, or says why and does not")


#: What multiplies in 16 bits and in integers, by target.
MATRIX = {
    "sm_80": ("HMMA", "IMMA"), "sm_86": ("HMMA", "IMMA"), "sm_89": ("HMMA", "IMMA"), "sm_90": ("HGMMA", "IGMMA"),
    "sm_100": ("UTCHMMA", "UTCIMMA"), "sm_120": ("HMMA", "IMMA"), "gfx942": ("v_mfma", "v_mfma"),
}  # fmt: skip


@pytest.mark.parametrize("target", MATRIX)
def test_the_budgets_list_each_architectures_matrix_instructions(target):
    """Which the kernels may not lose then; where a tile is too small for them, the budgets say what it has."""
    floats, integers = MATRIX[target]
    listed = budgets.load()
    found = 0
    for kernel, kind in (("attention_forward_kernel", floats), ("linear_kernel", integers)):
        for config, targets in listed[kernel]["triton"].items():
            wide = any(config.startswith(f"bf16, D={n},") for n in (64, 128)) and "mask" not in config
            if target in targets and (wide or kernel == "linear_kernel"):
                assert kind in targets[target][3].split(), (kernel, config)
                found += 1
    assert found >= 3


ENFORCED = ["sm_80", "sm_90", "sm_120", "gfx942"]


def enforce(source: str) -> None:
    rows = inspector.inspect(ENFORCED, sources=(source,))
    of_source = {t for t in ENFORCED if source == "triton" or t in limits.LIMITS}
    assert {r.target if r.target in amd.LIMITS else limits.base(r.target) for r in rows} == of_source
    listed = budgets.load()
    assert budgets.over(rows, listed) == []
    made = {(r.kernel, r.config, budgets.target_of(r)) for r in rows}
    known = {
        (kernel, config, target) for kernel, sources in listed.items()
        for config, targets in sources.get(source, {}).items() if config != "why" for target in targets
        if target in ENFORCED
    }  # fmt: skip
    assert made == known, "`python -m llmkern inspect --write-budgets` lists what there is"


@needs_nvcc
def test_cuda_kernels_keep_their_budgets():
    enforce("cuda")


@needs_triton
def test_triton_kernels_keep_their_budgets():
    enforce("triton")


def test_importing_the_package_imports_neither_triton_nor_the_inspector():
    code = (
        "import llmkern, sys; import llmkern.positional.triton_launch; "
        "print([m for m in sys.modules if m == 'triton' or m.startswith('llmkern.inspect')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_the_command_line():
    command = [sys.executable, "-m", "llmkern"]
    said = subprocess.run([*command, "inspect", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--target" in said and "--json" in said and "not measured" in " ".join(said.split())
    wrong = subprocess.run([*command, "look"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr == "python -m llmkern: expected nothing, inspect, report or serve, got 'look'\n"
