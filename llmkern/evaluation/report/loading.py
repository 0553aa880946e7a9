"""Models from the disk: a folder, a GGUF file, or a name in the local cache; and the lines of Python that load them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

#: The heads of transformers by which classes' names end: how each is loaded.
HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


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

    Raises ValueError where there is no such model, ImportError without transformers.
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
    try:
        config = transformers.AutoConfig.from_pretrained(place, **given)
        kind = "AutoModelForCausalLM" if "gguf_file" in given else _class_for(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **given)
        model = getattr(transformers, kind).from_pretrained(place, dtype=dtype, **given).eval()
    except (OSError, ValueError, KeyError) as error:
        expected = "a folder that transformers can load, a GGUF file, or a model's name that is in its local cache"
        raise ValueError(f"model: expected {expected}, got {source!r}: {str(error).splitlines()[0]}") from error
    arguments = ", ".join([repr(place), *(f"{k}={v!r}" for k, v in given.items())])
    code = (
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({arguments})\n"
        f"published = transformers.{kind}.from_pretrained({arguments}, dtype={dtype!r}).eval()"
    )
    if "gguf_file" not in given:
        return Loaded(_name(place), model, tokenizer, code)
    note = (
        f"The file's weights, {path.stat().st_size / 1e6:.1f} MB, were widened to {dtype} as they were loaded: that is "
        "the published model here, to whose size and speed all figures refer."
    )
    return Loaded(path.stem, model, tokenizer, code, note)


def _class_for(config: Any) -> str:
    """transformers' class for what the configuration says that the model is; without a head where it says none."""
    for named in getattr(config, "architectures", None) or []:
        for ending, kind in HEADS.items():
            if named.endswith(ending):
                pairs = (
                    getattr(config, "is_encoder_decoder", False) is True
                )  # some of that name have no encoder of text
                return "AutoModelForCausalLM" if kind == "AutoModelForSeq2SeqLM" and not pairs else kind
    return "AutoModel"


def _name(place: str) -> str:
    """The last part of a path or of a name that says something."""
    parts = [p for p in Path(place).parts if p.lower() not in ("model", "models", "/", ".", "..")]
    # A snapshot in the cache of the hub stands in a folder models--owner--name.
    hub = next((p for p in parts if p.startswith("models--")), None)
    return hub.split("--")[-1] if hub else parts[-1] if parts else place


def kind_of(model: Any) -> str:
    """ "decoder", "encoder_decoder", "masked" (an encoder with the head of a masked language model), "classifier" (of
    whole texts), or "encoder" (whatever else)."""
    config, named = getattr(model, "config", None), type(model).__name__
    if getattr(config, "is_encoder_decoder", False) is True:
        return "encoder_decoder"
    if named.endswith("ForSequenceClassification"):
        return "classifier"
    if callable(getattr(model, "get_output_embeddings", None)) and model.get_output_embeddings() is not None:
        return "masked" if named.endswith(("ForMaskedLM", "ForPreTraining")) else "decoder"
    return "encoder"


def twin(model: nn.Module) -> Any:
    """A copy with the same parameters: neither kernelizing nor quantising writes to them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
