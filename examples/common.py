"""What several examples need: a text, and a language model that either is given or is trained here within seconds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class LanguageModel:
    """A causal model of transformers, and how text becomes its tokens (N,) and back."""

    model: Any
    encode: Callable[[str], torch.Tensor]
    decode: Callable[[torch.Tensor], str]


def text_file(path: str) -> str:
    """The text of a file, as the type of an argument."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"expected a file of text, got {path!r}: {error}") from error


def positive(word: str) -> int:
    """A positive integer, as the type of an argument."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {word!r}")
    return int(word)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or name of a Hugging Face causal model; default: one of bytes, trained")
    parser.add_argument("--steps", type=positive, default=200, help="steps of that training (default %(default)s)")
    parser.add_argument(
        "--text", type=text_file, default=str(ROOT / "README.md"), help="text to train on and to continue"
    )


def language_model(options: argparse.Namespace) -> LanguageModel:
    """The model that is asked for. Ends the program with a message where there is none of that name."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("This example needs transformers: pip install transformers") from error
    if options.model is None:
        return _model_of_bytes(options.text, options.steps)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model).eval()
    except OSError as error:
        raise SystemExit(f"--model: expected a folder or name of a Hugging Face model: {error}") from error
    return LanguageModel(model, lambda text: tokenizer(text, return_tensors="pt").input_ids[0], tokenizer.decode)


def _model_of_bytes(text: str, steps: int) -> LanguageModel:
    """A small Llama whose tokens are bytes, trained on the text: no network is needed, and its text means something."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found = LanguageModel(transformers.LlamaForCausalLM(config), as_bytes, from_bytes)
    fit(found.model, found.encode(text), steps, 3e-3, "training a model of bytes")
    return found


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def from_bytes(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def batch_of(tokens: torch.Tensor, rows: int = 8, length: int = 64) -> torch.Tensor:
    """Pieces of the text at random, (rows, length); shorter where the text is."""
    length = min(length, tokens.numel())
    starts = torch.randint(tokens.numel() - length + 1, (rows,))
    return torch.stack([tokens[start : start + length] for start in starts])


def fit(model: Any, tokens: torch.Tensor, steps: int, rate: float, title: str) -> list[float]:
    """Trains what requires gradients to predict the next token; returns the loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    with tqdm(range(steps), title) as bar:
        for _ in bar:
            batch = batch_of(tokens)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def loss_of(model: Any, tokens: torch.Tensor, length: int = 256) -> float:
    """The mean loss over the beginning of a text, by which models are compared."""
    piece = tokens[None, :length]
    return float(model(input_ids=piece, labels=piece).loss)


@torch.no_grad()
def continuation(found: LanguageModel, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """The tokens that the model itself adds to the prompt, the most probable each time."""
    made = found.model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=new, do_sample=False
    )
    return made[0, prompt.numel() :]
