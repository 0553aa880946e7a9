"""Which sources are mutated, and which tests belong to each: one entry for each source of kernels.

The headers of ours that a CUDA source includes are mutated with it, where they hold device code.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


Changes = tuple[tuple[str, str], ...]  # of a source: each old text, which stands there once, becomes the new one


@dataclasses.dataclass(frozen=True)
class Target:
    """A source of kernels. ptx, host, interpreted: arguments of pytest, one string a process, run in this order.

    ptx: tests that execute or read the PTX, which cannot tell a change of the launchers. host: those that run what the
    host's compiler makes of the source. interpreted: those for Triton's interpreter. What fails soonest stands first.
    architectures: for which the PTX is compared, those whose code the tests run. launchers: a family whose launchers
    the tests run (tests/emulation/cuda_launches.py), or a part of one; they are compiled once, but for faults of
    theirs. quick: what is run before all of this, where compiling takes longest, with the kernels alone that the
    changes `only` leave of the source.
    """

    source: str
    ptx: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    interpreted: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ("80",)
    launchers: str = ""
    quick: str = ""
    only: Changes = ()

    def steps(self, ptx_changed: bool) -> list[tuple[str, bool]]:
        """Arguments of pytest, and whether Triton's interpreter is to run."""
        compiled = (*(self.ptx if ptx_changed else ()), *self.host)
        return [(s, False) for s in compiled] + [(s, True) for s in self.interpreted]


INT8, INT8_PTX = "tests/int8/test_cuda.py", "tests/emulation/test_ptx_int8.py"
INT8_SM90 = "tests/emulation/test_ptx_int8_sm90.py"
FORWARD, CACHE, DECODE, SM90 = (
    f"tests/emulation/test_ptx_{name}.py" for name in ("attention", "cache", "decode", "attention_sm90")
)

TARGETS = (
    Target(
        "csrc/positional/cuda.cu",
        ptx=(
            "tests/emulation/test_ptx_positional.py tests/emulation/test_ptx_common.py "
            "-k '(dtype1-80 or positions or more_items or divide) and not triton'",
            "tests/emulation/test_ptx_positional.py -k '(dtype0-80 or dtype2-80) and not triton'",
            "tests/positional/test_cuda.py -k 'compiled_by_nvcc and 80'",
        ),
        host=("tests/positional/test_cuda.py -k 'not nvcc and not (sinusoidal and many)'",),
    ),
    Target(
        "csrc/int8/cuda_quantize.cu",
        ptx=(
            f"{INT8} -k 'integers and 77 and dtype1 or schemes and primes'",
            f"{INT8} -k 'integers or strides or scales_of or half or schemes and not two'",
            f"{INT8_PTX} -k 'schedules or reads_a_row or high_digits'",
        ),
        host=(f"{INT8} -k 'schemes and not no'",),
        launchers="int8",
    ),
    Target(
        "csrc/int8/cuda_few_rows.cu",
        ptx=(
            f"{INT8} -k 'schemes and primes or half and dtype0'",
            f"{INT8} -k 'schemes and not two or half or follows or strides or scales_of'",
            f"{INT8_PTX} -k 'schedules or few_rows'",
        ),
        host=(f"{INT8} -k 'schemes and not two'",),
        launchers="int8",
    ),
    Target(
        "csrc/int8/cuda_tiles.cu",
        ptx=(
            f"{INT8} -k 'schemes and just or both and 64'",
            f"{INT8} -k 'schemes and two or both or half or follows or strides or scales_of'",
            f"{INT8_PTX} -k 'schedules or tiles or high_digits'",
        ),
        host=(f"{INT8} -k 'schemes and (just or two or many) or both or follows and dtype1 and glu'",),
        launchers="int8",
    ),
    Target(
        "csrc/int8/cuda_sm90.cu",
        ptx=(f"{INT8_SM90} -k 'widths or every_kind'", f"{INT8_SM90} -k 'not planted and not registers'"),
        host=(f"{INT8_SM90} -k 'contract or widths'",),
        architectures=("90a",),
        launchers="int8",
    ),
    Target(
        "csrc/attention/cuda_forward.cu",
        ptx=(
            f"{FORWARD} -k 'rules and (everything or sink or causal or lengths) or shapes and fp16 and tails'",
            f"{FORWARD} -k 'not planted'",
        ),
        quick=f"{FORWARD} -k '(shapes and (grouped or primes) or masked) and bf16 or rules and everything and not add'",
        only=(
            (
                "p.dtype == DType::bf16 ? forward_of<Bf16>(p, l, device, stream) : "
                "forward_of<Fp16>(p, l, device, stream);",
                "launch_forward<Bf16, 64, 1, false>(p, l, device, stream);\n"
                "launch_forward<Bf16, 64, 2, false>(p, l, device, stream);\n"
                "launch_forward<Bf16, 64, 1, true>(p, l, device, stream);\n"
                "launch_forward<Bf16, 128, 1, true>(p, l, device, stream);",
            ),
        ),
        host=(f"{FORWARD} -k 'shapes and (fp16 or tails) or scales or misaligned or rules and dropout or hopper'",),
        launchers="attention",
    ),
    Target(
        "csrc/attention/cuda_cache.cu",
        ptx=(f"{CACHE} -k 'rotated and dtype1 or int8 and dtype0'", f"{CACHE} -k 'not planted'"),
        host=(f"{CACHE} -k 'rotated and dtype0 or written or layouts or int8 and dtype0'",),
        launchers="attention_cached",
    ),
    Target(
        "csrc/attention/cuda_decode.cu",
        ptx=(f"{DECODE} -k 'not planted'",),
        quick=f"{DECODE} -k '(shapes and groups or see or int8 and shape0) and dtype0 or rules and (causal or slopes)'",
        only=(
            ("decode_kernel<T, K, 256, false>;", "decode_kernel<T, K, sizeof(K) == 1 ? 128 : 64, true>;"),
            ("  if (vectors && widest > 128) kernel = decode_kernel<T, K, 256, true>;\n", ""),
            ("  if (vectors && widest <= 128) kernel = decode_kernel<T, K, 128, true>;\n", ""),
            ("bf16 ? decode_typed<Bf16, int8_t>(p, workspace, splits, device, stream)\n                :", ""),
            ("bf16 ? decode_typed<Bf16, Bf16>(p, workspace, splits, device, stream)\n              :", ""),
        ),
        host=(f"{DECODE} -k 'shapes and dtype0 or rules and causal or layouts or pieces'",),
        launchers="attention_cached",
    ),
    Target(
        "csrc/attention/cuda_sm90.cu",
        ptx=(
            f"{SM90} -k 'many_tiles and 64 and dtype0'",
            f"{SM90} -k 'layouts or masked and 64 or lengths_of or without or schedules'",
            f"{SM90} -k 'contract or many_tiles or masked or counts'",
        ),
        host=("tests/emulation/test_launch_attention_sm90.py",),
        architectures=("90a",),
    ),
    Target(
        "llmkern/positional/triton_kernels.py",
        ptx=("tests/emulation/test_ptx_positional.py -k 'triton and 80'",),
        interpreted=(
            "tests/positional/interpreted_triton.py -k 'not contract'",
            "tests/positional/interpreted_triton.py -k 'contract and dtype1 and not usual and not 256'",
        ),
    ),
)


def headers(source: str, root: Path = ROOT) -> list[str]:
    """Those of our own that a CUDA source includes, by way of others too, in the order of their names."""
    found: set[str] = set()
    waiting = [root / source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
            header = (path.parent / name).resolve()
            relative = str(header.relative_to(root)) if header.is_relative_to(root) else ""
            if relative and relative not in found and header.exists():
                found.add(relative)
                waiting.append(header)
    return sorted(found)


def files() -> dict[str, list[Target]]:
    """Every file to be mutated, and the targets whose kernels it is part of."""
    found: dict[str, list[Target]] = {}
    for target in TARGETS:
        for file in (target.source, *(headers(target.source) if target.source.endswith(".cu") else ())):
            found.setdefault(file, []).append(target)
    return found
