"""Quantises a language model to int8 and compares what it writes, and its loss, with what it wrote before.

python -m examples.int8_text                     # a small model of bytes, trained here first
python -m examples.int8_text --model FOLDER --scheme outliers --prompt "It was"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import llmkern
from examples.common import add_model_arguments, continuation, language_model, loss_of, positive
from llmkern.int8.scheme import NAMED


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    schemes = [name for name, scheme in NAMED.items() if not scheme.calibrated]
    parser.add_argument("--scheme", choices=schemes, default="outliers", help="default: %(default)s")
    parser.add_argument("--prompt", help="what is continued; default: the beginning of the text")
    parser.add_argument("--new", type=positive, default=60, help="tokens to write (default %(default)s)")
    options = parser.parse_args(arguments)
    found = language_model(options)
    llmkern.kernelize(found.model)
    tokens, prompt = found.encode(options.text), found.encode(options.prompt or options.text[:40])

    before, loss_before = continuation(found, prompt, options.new), loss_of(found.model, tokens)
    # Every layer but the head, also those that int8 would not make faster: here it is the text that counts.
    llmkern.quantize_model(found.model, scheme=options.scheme, skip=("lm_head",), measure=False)
    after, loss_after = continuation(found, prompt, options.new), loss_of(found.model, tokens)

    print(found.model.quantization_report)
    print(f"\nfloating point, loss {loss_before:.5f}: {found.decode(before)!r}")
    print(f"int8,           loss {loss_after:.5f}: {found.decode(after)!r}")
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    print(f"the same for the first {same} of {len(before)} tokens")


if __name__ == "__main__":
    main()
