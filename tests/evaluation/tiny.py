"""Seeded models of two layers of 32 and a tokenizer of their words; nothing is downloaded."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<s>", "</s>", "<mask>", "the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "mat",
         "tree"]  # fmt: skip
SHAPE = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = [
    "the cat sat on the mat", "a dog ran", "the bird flew over a tree on the mat and sat", "cat",
    "a cat ran over the dog on a mat on a mat on a tree the bird sat on", "the dog",
]  # fmt: skip


@functools.cache
def tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<mask>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


def seeded(kind: type, config: Any) -> Any:
    torch.manual_seed(1)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():  # so that tokens are far from equally likely
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def llama(**changes: Any) -> Any:
    fields = {**SHAPE, **SPECIAL, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**fields, **changes}))


def gpt2() -> Any:
    """Its positions are learned, so that a shift of them shows."""
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    return seeded(transformers.GPT2LMHeadModel, config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = seeded(transformers.T5ForConditionalGeneration, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
        model.lm_head.weight[:4] *= 0.1  # words rather than special tokens
    return model


def bert(kind: str = "BertForMaskedLM", **changes: Any) -> Any:
    fields = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, **changes}
    return seeded(getattr(transformers, kind), transformers.BertConfig(**fields))


def log_probability(logits: torch.Tensor, token: int) -> float:
    """Of one row of logits, in Python's own floats."""
    row = logits.tolist()
    highest = max(row)
    return row[token] - highest - math.log(math.fsum(math.exp(x - highest) for x in row))


@torch.no_grad()
def independent(model: Any, texts: list[list[int]], window: int, stride: int) -> tuple[float, int]:
    """Negative log-likelihood and count: for every token one forward pass of nothing but its context."""
    total, count = [], 0
    for tokens in texts:
        for place in range(1, len(tokens)):
            # The first window that reaches it. None but the first begins before it where the stride is a window.
            number = max(0, math.ceil((place + 1 - window) / stride))
            begin = number * stride
            if begin == place:
                continue
            context = torch.tensor([tokens[begin:place]])
            total.append(-log_probability(model(input_ids=context).logits[0, -1], tokens[place]))
            count += 1
    return math.fsum(total), count
