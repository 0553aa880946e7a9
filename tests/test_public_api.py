"""The public names: there, typed, documented, and the same in the reference."""

from __future__ import annotations

import inspect

import pytest

import llmkern  # which must bring its rooms along
import llmkern.evaluation
import llmkern.training

MODULES = [
    "MultiHeadAttention", "PositionalEncoding", "RotaryEmbedding", "Int8Linear", "Transformer", "LayerNorm", "RMSNorm",
]  # fmt: skip
FUNCTIONS = ["kernelize", "quantize_like", "quantize_model", "recommend", "report", "restore", "verify"]
FUNCTIONAL = llmkern.functional.__all__
PUBLIC = [
    *((llmkern, name) for name in MODULES + FUNCTIONS),
    # But for torch's own, which documents and types itself.
    *((llmkern.reference, name) for name in [*MODULES, "quantize_model"] if name not in ("LayerNorm", "RMSNorm")),
    *((llmkern.functional, name) for name in FUNCTIONAL),
    # But for a named tuple, whose constructor is not its own.
    *((llmkern.monitoring, name) for name in ("Counts", "start", "stop", "watch")),
    *((llmkern.evaluation, name) for name in llmkern.evaluation.__all__),
    *((llmkern.training, name) for name in llmkern.training.__all__ if name != "ModelOutput"),
]


@pytest.mark.parametrize(("room", "name"), PUBLIC, ids=[f"{room.__name__}.{name}" for room, name in PUBLIC])
def test_public_names_have_docstrings_and_types(room, name):
    public = getattr(room, name)
    assert callable(public), f"{name} is not callable"
    assert inspect.getdoc(public) and len(inspect.getdoc(public)) > 40, f"{name} has no docstring worth the name"
    function = public.__init__ if inspect.isclass(public) else public
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "args", "kwargs"):
            assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name} has no type"
    assert signature.return_annotation is not signature.empty, f"{name} has no return type"


@pytest.mark.parametrize("name", MODULES)
def test_drop_ins_take_what_the_reference_takes(name):
    """The reference's parameters, in the same order with the same defaults, come first; more only by keyword."""
    for method in ("__init__", "forward"):
        plain = inspect.signature(getattr(getattr(llmkern.reference, name), method)).parameters
        fast = inspect.signature(getattr(getattr(llmkern, name), method)).parameters
        positional = [p for p in plain.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        ours = [p for p in fast.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in ours] == [p.name for p in positional], f"{name}.{method}"
        for parameter in plain.values():
            assert fast[parameter.name].default == parameter.default, f"{name}.{method}: {parameter.name}"


def test_all_names_what_is_public():
    assert set(MODULES + FUNCTIONS) <= set(llmkern.__all__)
    for name in llmkern.__all__:
        assert hasattr(llmkern, name)
