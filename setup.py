"""Builds llmkern._C: every csrc/<family>/cpu.cpp once per instruction set, cuda.cu where there is an nvcc.

The compile commands are written to a ninja file under build/, so that they run in parallel and a changed source
recompiles only its own objects, also under pip's build isolation. torch takes no part in the build. The environment
variables are documented in README.md, "Environment variables".
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# One list per machine: the name in csrc/common/isa.h and the flags it compiles with, nothing of the build machine.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16"
ISA_FLAGS = {
    "x86_64": {"portable": "", "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"portable": "", "neon": ""},
}
# Those that add products of bytes to one above: only the sources below differ.
BYTE_ISA_FLAGS = {
    "x86_64": {"avxvnni": f"{AVX2} -mavxvnni", "amx": f"{AVX512} -mamx-tile -mamx-int8"},
    "aarch64": {"neondot": "-march=armv8.2-a+dotprod"},
}
BYTE_SOURCES = ("common/cpu_roofline.cpp", "int8/cpu.cpp")
CUDA_ARCHITECTURES = "80 86 89 90 100 120"
OLDEST = 80  # mma.sync of bfloat16, cp.async


def wrong(variable: str, expected: str) -> SystemExit:
    return SystemExit(f"llmkern: {variable}: expected {expected}, got {os.environ[variable]!r}")


def cuda_compiler() -> str | None:
    """The nvcc to build with: LLMKERN_CUDA = auto (use it if found), 1 (it must be there), 0 (do without)."""
    choice = os.environ.get("LLMKERN_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise wrong("LLMKERN_CUDA", "auto, 0 or 1")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    named = os.environ.get("LLMKERN_NVCC")
    if named and not shutil.which(named):
        raise wrong("LLMKERN_NVCC", "the path of an nvcc")
    nvcc = named or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if choice == "1" and not nvcc:
        raise SystemExit(
            "llmkern: LLMKERN_CUDA=1, but no nvcc was found: put it on PATH or set LLMKERN_NVCC or CUDA_HOME"
        )
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """Those asked for (LLMKERN_CUDA_ARCHS) or, by default, those of CUDA_ARCHITECTURES that this nvcc knows."""
    if "LLMKERN_CUDA_ARCHS" in os.environ:
        archs = os.environ["LLMKERN_CUDA_ARCHS"].split()
        if not archs or not all(re.fullmatch(r"\d+[af]?", a) for a in archs):
            raise wrong("LLMKERN_CUDA_ARCHS", 'architectures, as in "80 90"')
        if any(int(a.rstrip("af")) < OLDEST for a in archs):
            raise wrong("LLMKERN_CUDA_ARCHS", f"architectures from {OLDEST} on, which the kernels need")
        return archs
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [a for a in CUDA_ARCHITECTURES.split() if f"sm_{a}" in known]
    print(f"llmkern: {nvcc} compiles for sm_{', sm_'.join(archs)} of sm_{CUDA_ARCHITECTURES.replace(' ', ', sm_')}")
    return archs


def compiles_for_hopper(nvcc: str, archs: list[str]) -> bool:
    """Whether csrc/*/cuda_sm90*.cu are built, for sm_90a alone: 90 is asked for, and this nvcc knows sm_90a."""
    if not {"90", "90a"} & set(archs):
        return False
    command = [nvcc, "-arch=sm_90a", "--dryrun", "-x", "cu", "-c", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def compiler() -> list[str]:
    """The C++ compiler to build with and its own flags: CXX, or the first one found."""
    cxx = shlex.split(os.environ.get("CXX", "")) or [c for c in ("g++", "clang++", "c++") if shutil.which(c)][:1]
    if not cxx:
        raise SystemExit("llmkern: no C++ compiler found: install g++ (9 or newer) or clang++, or set CXX")
    if not shutil.which(cxx[0]):
        raise wrong("CXX", "a C++ compiler")
    return cxx


def compiles(cxx: list[str], flags: str) -> bool:
    """Whether the compiler knows these flags."""
    command = [*cxx, *flags.split(), "-x", "c++", "-E", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def quoted(*words: object) -> str:
    return " ".join(shlex.quote(str(w)) for w in words).replace("$", "$$")


def path(p: Path) -> str:  # as ninja reads it outside commands
    return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc, sanitize = cuda_compiler(), os.environ.get("LLMKERN_SANITIZE", "")
        cxx, jobs = compiler(), os.environ.get("LLMKERN_JOBS", "")
        if jobs and not (jobs.isdecimal() and int(jobs)):
            raise wrong("LLMKERN_JOBS", "a positive integer")
        emulate = os.environ.get("LLMKERN_EMULATE_AVX512") == "1"
        variant = [nvcc and "cuda", sanitize.replace(",", "-"), emulate and "emulated"]
        names = [sysconfig.get_platform(), sys.implementation.cache_tag, *variant]
        folder = ROOT / "build" / "-".join(filter(None, names))
        library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.write_ninja(folder, library, cxx, nvcc, sanitize, emulate)
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", folder, *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"llmkern: the kernels did not compile (the first error of {Path(cxx[0]).name} above says why).\n"
                "  A C++17 compiler is needed (g++ 9 or clang++ 12 and newer); CXX=... chooses another.\n"
                "  If the failing file ends in .cu, LLMKERN_CUDA=0 installs without the CUDA part."
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)

    def write_ninja(
        self, folder: Path, library: Path, cxx: list[str], nvcc: str | None, sanitize: str, emulate: bool
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # pip's isolated environment has a new path every time: reached through a link, commands stay the same.
        (folder / "include").mkdir(exist_ok=True)
        link = folder / "include" / "pybind11"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(pybind11.get_include()) / "pybind11")
        flags = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -g1"
        # g++ 12 sees its own AVX-512 headers as uninitialised, at such length that a real error would not be found.
        flags += " -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
        link_flags = ["-shared", "-ldl", "-lpthread"]
        if sanitize:
            flags += f" -fsanitize={sanitize} -fno-omit-frame-pointer -fno-sanitize-recover=undefined"
            link_flags.append(f"-fsanitize={sanitize}")
        if emulate:
            flags += " -DLLMKERN_EMULATE_AVX512 -Wno-psabi"
        byte_isas = BYTE_ISA_FLAGS.get(platform.machine(), {})
        if byte_isas and not compiles(cxx, " ".join(byte_isas.values())):
            byte_isas = {}
            flags += " -DLLMKERN_OLD_COMPILER"
        archs = cuda_architectures(nvcc) if nvcc else []
        # The front end is most of nvcc's time, and the sources ask nowhere what they are compiled for: so it runs once,
        # for the oldest architecture, and its PTX is assembled for each.
        oldest = min((a.rstrip("af") for a in archs), key=int, default="")
        codes = [*(f"sm_{a}" for a in archs), f"compute_{oldest}"]
        gencode = f"-gencode=arch=compute_{oldest},code=[{','.join(codes)}]"
        define = f'-DLLMKERN_CUDA="{" ".join(codes[:-1])} + PTX {oldest}"'
        if not nvcc:
            missing = "LLMKERN_CUDA=0 left them out" if os.environ.get("LLMKERN_CUDA") == "0" else "no nvcc was found"
            define = f'-DLLMKERN_CUDA_MISSING="{missing}"'
        hopper = nvcc is not None and compiles_for_hopper(nvcc, archs)
        sm90 = " -DLLMKERN_SM90" if hopper else ""
        defines = [f'-DPYBIND11_RELEASE="{pybind11.__version__}"', define, *sm90.split()]
        linker = [nvcc, "-cudart", "static"] if nvcc else cxx
        nvcc_flags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -lineinfo{sm90} -MD -MF $out.d"
        lines = [
            "rule cxx",
            f"  command = {quoted(*cxx)} {flags} $flags -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc\n  depfile = $out.d\n  description = C++ $out",
            "rule nvcc",
            f"  command = {quoted(nvcc)} -t 0 {quoted(gencode)} {nvcc_flags} -c $in -o $out",
            "  deps = gcc\n  depfile = $out.d\n  description = CUDA $out",
            "rule nvcc_sm90",
            f"  command = {quoted(nvcc)} -gencode=arch=compute_90a,code=sm_90a {nvcc_flags} -c $in -o $out",
            "  deps = gcc\n  depfile = $out.d\n  description = CUDA for sm_90a $out",
            f"rule link\n  command = {quoted(*linker)} -o $out $in {quoted(*link_flags)}\n  description = link $out",
        ]
        objects = []

        def compile(rule: str, source: Path, name: str, flags: str = "") -> None:
            objects.append(f"{name}.o")
            lines.append(f"build {name}.o: {rule} {path(source)}\n  flags = {flags}")

        for source in sorted(CSRC.glob("*/cpu*.cpp")):
            isas = dict(ISA_FLAGS.get(platform.machine(), {"portable": ""}))
            if str(source.relative_to(CSRC)) in BYTE_SOURCES:
                isas |= byte_isas
            for isa, isa_flags in isas.items():
                if emulate and isa in ("avx512", "amx"):
                    isa_flags = AVX2 + (" -DLLMKERN_EMULATE_AMX" if isa == "amx" else "")
                compile("cxx", source, f"{source.parent.name}.{source.stem}.{isa}", f"-DLLMKERN_ISA={isa} {isa_flags}")
        for source in sorted(CSRC.glob("common/*.cpp")):
            if not source.stem.startswith("cpu"):
                compile("cxx", source, f"common.{source.stem}")
        if nvcc:
            for source in sorted(CSRC.glob("*/cuda*.cu")):
                for_hopper = source.stem.startswith("cuda_sm90")
                if hopper or not for_hopper:
                    rule = "nvcc_sm90" if for_hopper else "nvcc"
                    compile(rule, source, f"{source.parent.name}.{source.stem}")
        include = quoted("-isystem", "include", "-isystem", sysconfig.get_path("include"), *defines)
        compile("cxx", CSRC / "register.cpp", "register", include)
        lines.append(f"build {library.name}: link {' '.join(objects)}\ndefault {library.name}\n")
        (folder / "build.ninja").write_text("\n".join(lines))


setup(ext_modules=[Extension("llmkern._C", ["csrc/register.cpp"])], cmdclass={"build_ext": NinjaBuild})
