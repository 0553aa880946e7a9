"""Puts a model on the kernels, holds its outputs to the numerical contract, and changes it back.

python -m examples.kernelize_model                      # torch's nn.Transformer, seeded
python -m examples.kernelize_model --model FOLDER       # a Hugging Face model, on a sentence of --text
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import llmkern
from examples.common import add_model_arguments, language_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    options = parser.parse_args(arguments)
    model, inputs = given(options)

    print("What would be replaced:")
    print(llmkern.kernelize(model, dry_run=True))
    # The contract: errors against float64 of at most twice those of the plain model.
    print("\nReplaced, and its outputs held to the contract:")
    print(llmkern.kernelize(model, verify=inputs))
    llmkern.restore(model)
    print("\nChanged back.")


def given(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """A model and inputs of it."""
    if options.model is not None:
        found = language_model(options)
        return found.model, {"input_ids": found.encode(options.text[:200])[None], "use_cache": False}
    torch.manual_seed(0)
    model = nn.Transformer(128, 4, 2, 2, 256, batch_first=True).eval()
    source, target = torch.randn(2, 20, 128), torch.randn(2, 12, 128)
    padding = torch.arange(20) >= torch.tensor([[20], [13]])
    return model, {"src": source, "tgt": target, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}


if __name__ == "__main__":
    main()
