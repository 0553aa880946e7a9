"""Fine-tunes a language model in int8 with LoRA adapters of peft, saves them, and merges them into the integers.

python -m examples.lora_int8 --new-text FILE --output adapters     # needs peft
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import llmkern
from examples.common import ROOT, add_model_arguments, fit, language_model, loss_of, positive, text_file


def main(arguments: Sequence[str] | None = None) -> tuple[float, float, float]:
    """Returns the loss on the new text before, with the adapters, and merged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--new-text", type=text_file, default=str(ROOT / "docs/a_call.md"), help="text to adapt to")
    parser.add_argument("--adapter-steps", type=positive, default=100, help="default: %(default)s")
    parser.add_argument("--rank", type=positive, default=8, help="of the adapters (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for the adapters")
    options = parser.parse_args(arguments)
    try:
        from peft import LoraConfig, get_peft_model

        from llmkern.models.lora import for_int8
    except ImportError as error:
        raise SystemExit('This example needs peft: pip install "llmkern[peft]"') from error

    found = language_model(options)
    llmkern.kernelize(found.model)
    llmkern.quantize_model(found.model, skip=("lm_head",), measure=False)
    tokens = found.encode(options.new_text)
    before = loss_of(found.model, tokens)

    layers = {name.split(".")[-1] for name, m in found.model.named_modules() if isinstance(m, llmkern.Int8Linear)}
    if not layers:
        raise SystemExit(f"--model: expected one with layers in int8, got {options.model!r}, whose were all left")
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=sorted(layers))
    model = get_peft_model(found.model, for_int8(config))
    model.print_trainable_parameters()
    fit(model, tokens, options.adapter_steps, 5e-3, "training adapters")
    adapted = loss_of(model, tokens)
    if options.output is not None:
        model.save_pretrained(options.output)
        print(f"adapters: {options.output}")
    merged = loss_of(model.merge_and_unload(), tokens)
    print(f"loss on the new text: {before:.4f} before, {adapted:.4f} adapted, {merged:.4f} merged into int8")
    return before, adapted, merged


if __name__ == "__main__":
    main()
