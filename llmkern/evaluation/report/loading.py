"""Models from the disk: a folder, a GGUF file, or a name in the local cache; and the lines of Python that load them."""

from __future__ import annotations

import copy
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

#: By what the names of transformers' classes end that a report has a measure for, beside those without a head.
SERVED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForSequenceClassification", "ForConditionalGeneration",
          "MTModel")  # fmt: skip
#: What no name of weights that are computed anyway, or not looked at, needs to have: of models without a head.
POOLER = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True)
class Loaded:
    """A published model. code: the lines of Python that load it as `published`, and its tokenizer, again. note: what a
    reader should know of how it was loaded."""

    name: str
    model: Any
    tokenizer: Any
    code: str
    note: str = ""


def load(source: str, *, dtype: str = "auto") -> Loaded:
    """The model of a folder that transformers can load, of a GGUF file, or of a name in its local cache. No network.

    dtype: "auto" leaves the weights as they were saved (those of a GGUF file become float32), or a name of torch's.

    Raises ValueError where there is no such model, or one with another head than those that a report has a measure for,
    or without some of its weights; ImportError without transformers, and for a GGUF file without gguf and accelerate.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'expected transformers, which pip install "llmkern[report]" brings: {error}') from error
    path = Path(source)
    given: dict[str, Any] = {"local_files_only": True}
    place = source
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, got {source!r}, which is none")
        place, given["gguf_file"] = str(path.parent), path.name
        dtype = "float32" if dtype == "auto" else dtype
        needs("gguf", "accelerate", extra="gguf accelerate")
    try:
        config = transformers.AutoConfig.from_pretrained(place, **given)
        kind, of = ("AutoModelForCausalLM", "") if "gguf_file" in given else _class_for(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **given)
        model, found = getattr(transformers, kind).from_pretrained(
            place, dtype=dtype, output_loading_info=True, **given
        )
    except _Refused:
        raise
    except Exception as error:  # of a damaged file, whatever its reader raises
        expected = "a folder that transformers can load, a GGUF file, or a model's name that is in its local cache"
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = "weights are not of the shapes of its configuration" if "mismatched_sizes" in lines[0] else lines[0]
        raise ValueError(f"model: expected {expected}, got {source!r}: {why}") from error
    _complete(model.eval(), found["missing_keys"])
    arguments = ", ".join([repr(place), *(f"{k}={v!r}" for k, v in given.items())])
    code = (
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({arguments})\n"
        f"published = transformers.{kind}.from_pretrained({arguments}, dtype={dtype!r}).eval()"
    )
    if "gguf_file" not in given:
        note = f"The configuration names {of}; measured is {kind}, which has all its weights there." if of else ""
        return Loaded(_name(place), model, tokenizer, code, note)
    note = (
        f"The file's weights, {path.stat().st_size / 1e6:.1f} MB, were widened to {dtype} as they were loaded: that is "
        "the published model here, to whose size and speed all figures refer."
    )
    return Loaded(path.stem, model, tokenizer, code, note)


class _Refused(ValueError):
    """It could be loaded, but nothing could be said of it."""


def needs(*packages: str, extra: str) -> None:
    """Raises ImportError where one of them cannot be imported. extra: what pip installs it by."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'expected {name}, which pip install "{extra}" brings: {error}') from error


def _class_for(config: Any) -> tuple[str, str]:
    """transformers' class for what the configuration says that the model is, without a head where it says nothing; and
    the class it names where that is another."""
    import transformers

    named = next(iter(getattr(config, "architectures", None) or []), "AutoModel")
    masked = named.removesuffix("ForPreTraining") + "ForMaskedLM"
    if named.endswith("ForPreTraining") and hasattr(transformers, masked):
        return masked, named  # of its heads, the one that there is a measure for
    if not hasattr(transformers, named):
        raise _Refused(f"model: expected one of transformers' own classes, got {named}")
    _served(named)
    return named, ""


def _served(named: str) -> None:
    """Raises ValueError for a class with a head that a report has no measure for."""
    if re.search(r"For[A-Z]\w*$", named) and not named.endswith(SERVED):
        heads = "a causal or masked language model's, conditional generation, sequence classification, or none"
        raise _Refused(f"model: expected a head that a report has a measure for ({heads}), got {named}")


def _complete(model: Any, missing: Any) -> None:
    """Raises ValueError where weights were not in the files, and so are random."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    headless = kind_of(model) == "encoder"
    lost = sorted(key for key in missing if key not in tied and not (headless and POOLER.search(key)))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"model: expected all weights of {type(model).__name__}, got files without {', '.join(lost[:3])}{more}"
        )


def _name(place: str) -> str:
    """The last part of a path or of a name that says something."""
    parts = [p for p in Path(place).parts if p.lower() not in ("model", "models", "/", ".", "..")]
    # A snapshot in the cache of the hub stands in a folder models--owner--name.
    hub = next((p for p in parts if p.startswith("models--")), None)
    return hub.split("--")[-1] if hub else parts[-1] if parts else place


def kind_of(model: Any) -> str:
    """ "decoder", "encoder_decoder", "masked" (an encoder with the head of a masked language model), "classifier" (of
    whole texts, by one class each), or "encoder" (whatever has no head).

    Raises ValueError for what a report has no measure for.
    """
    config: Any = getattr(model, "config", None)
    named = type(model).__name__
    _served(named)
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise _Refused(f"model: expected one that reads input_ids, got {named}, which reads {reads}")
    pairs = getattr(config, "is_encoder_decoder", False) is True and not named.endswith("EncoderModel")
    head = callable(getattr(model, "get_output_embeddings", None)) and model.get_output_embeddings() is not None
    if named.endswith("ForSequenceClassification"):
        task = getattr(config, "problem_type", None)
        if pairs:
            raise _Refused(f"model: expected a classifier that is an encoder or a decoder, got {named}")
        if config.num_labels < 2 or task not in (None, "single_label_classification"):
            what = f"num_labels = {config.num_labels}, problem_type = {task!r}"
            raise _Refused(f"model: expected a classifier of one class for each text, got {named} with {what}")
        return "classifier"
    if pairs and not head and hasattr(config, "architectures"):
        raise _Refused(f"model: expected an encoder-decoder with a language model's head, got {named}, without one")
    if pairs:
        return "encoder_decoder"
    if head:
        return "masked" if named.endswith("ForMaskedLM") else "decoder"
    return "encoder"


def twin(model: nn.Module) -> Any:
    """A copy with the same parameters: neither kernelizing nor quantising writes to them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
