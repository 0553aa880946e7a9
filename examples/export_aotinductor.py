"""Exports a kernelized encoder to a package of AOTInductor, loads it and compares: a model without its Python code.

python -m examples.export_aotinductor --int8 --output encoder.pt2

The process that loads the package imports llmkern first, since the kernels' operators are called by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import llmkern
from examples.common import positive


def main(arguments: Sequence[str] | None = None) -> float:
    """Returns the largest difference between the outputs of the package and the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/encoder.pt2"), help="default: %(default)s")
    parser.add_argument("--int8", action="store_true", help="linear layers in int8")
    parser.add_argument("--layers", type=positive, default=2, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".pt2":
        parser.error(f"--output: expected a file that ends in .pt2, got {options.output}")

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False).eval()
    print(llmkern.kernelize(model))
    if options.int8:
        llmkern.quantize_model(model, measure=False)
        print(model.quantization_report)

    x = torch.randn(2, 10, 64)
    # Sizes that may differ later; all others are those of the example.
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=1024)}
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        print("compiling; this takes a while")
        torch._inductor.aoti_compile_and_package(exported, package_path=str(options.output))
        loaded = torch._inductor.aoti_load_package(str(options.output))
        more = torch.randn(3, 17, 64)
        difference = float((loaded(more) - model(more)).abs().max())
    print(f"{options.output}: outputs differ from the model's by {difference:.1e} at most")
    return difference


if __name__ == "__main__":
    main()
