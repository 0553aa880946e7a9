"""Tokenizers of each kind, trained in a moment on a small text: nothing is downloaded."""

from __future__ import annotations

import functools

import numpy as np
from scipy.stats import binomtest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (  # noqa: SIM905
    "the cat sat on a mat while rain kept falling outside and nobody wanted to go unbelievable stories were told "
    "until evening came again with its quiet lights somewhere far beyond harbour walls fishermen counted nets"
).split()
TEXT = [" ".join(WORDS[i:] + WORDS[:i]) + ", again! Naïve café. 東京は日本の首都です。" for i in range(len(WORDS))]
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
GPT = {"eos_token": "<|end|>", "mask_token": "<mask>"}


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(BERT.values())))
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **BERT)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(GPT.values()), initial_alphabet=alphabet)
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **GPT)


@functools.cache
def unigram() -> PreTrainedTokenizerFast:
    """As SentencePiece makes it: white space is a letter, ▁."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=list(LLAMA.values()), unk_token="<unk>")
    made.train_from_iterator(TEXT, trainer)
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **LLAMA)


@functools.cache
def one_word() -> PreTrainedTokenizerFast:
    """As Llama's: BPE with ▁ for spaces and no pre-tokenizer, to which a whole text is one word."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=list(LLAMA.values())))
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ids = [("<s>", made.token_to_id("<s>"))]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, **LLAMA)


@functools.cache
def numbered(words: int) -> PreTrainedTokenizerFast:
    """Its tokens are w0, w1, ...; what stands between spaces is a token."""
    vocabulary = {name: i for i, name in enumerate([*BERT.values(), *(f"w{i}" for i in range(words))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **BERT)


KINDS = {"WordPiece": word_piece, "byte-level BPE": byte_level, "Unigram": unigram, "BPE of one word": one_word}


def is_likely(count: int, trials: int, probability: float) -> bool:
    """Whether so many successes, or fewer or more, have a chance of over one in a million."""
    return binomtest(int(count), int(trials), probability).pvalue > 1e-6


def documents(count: int, words: int, seed: int = 0) -> list[str]:
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, draws.integers(words // 2, words + 1))) + "." for _ in range(count)]
