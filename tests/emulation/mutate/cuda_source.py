"""Mutants of CUDA C++, made from the tokens of its device code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.emulation.mutate.lexer import Function, Source, Token
from tests.emulation.mutate.mutant import Mutant, make

#: Each binary operator's replacement. Where white space is on both sides, it is no bracket, pointer or sign.
BINARY = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&",
    "+=": "-=", "-=": "+=", "*=": "+=", "/=": "*=", "<<=": ">>=", ">>=": "<<=", "&=": "|=", "|=": "&=", "^=": "|=",
}  # fmt: skip
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
#: Words, and members after a dot.
WORDS = {"true": "false", "false": "true", "min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf"}
MEMBERS = {"x": "y", "y": "x", "z": "w", "w": "z"}
NO_CALLS = ("if", "for", "while", "switch", "return", "static_assert", "asm", "constexpr", "using", "sizeof")


def mutants(file: str, text: str) -> Iterator[Mutant]:
    source = Source(text)
    for function in source.functions:
        for start, end, new, operator in _changes(source, function):
            yield make(file, text, start, end, new, operator, function.name)


def _changes(source: Source, function: Function) -> Iterator[tuple[int, int, str, str]]:
    tokens, i, header = source.tokens, function.first, 0
    while i < function.last:
        token, before = tokens[i], tokens[i - 1]
        if token.text == "static_assert":
            i = source.pairs[i + 1] + 1
            continue
        if token.text == "for":  # a loop that never ends is no fault to look for
            header = source.pairs[i + 1]
        if i > header and before.text in (";", "{", "}", ")", "else") and token.kind == "word":
            yield from _dropped(source, i)
        if token.kind == "operator":
            yield from _operator(source, i)
        elif token.kind == "number":
            yield from ((token.start, token.end, new, "constant") for new in constants(token.text))
        elif token.kind == "word":
            if before.text == ".":
                if token.text in MEMBERS and tokens[i + 1].text not in (".", "("):
                    yield token.start, token.end, MEMBERS[token.text], "member"
            elif token.text in WORDS:
                yield token.start, token.end, WORDS[token.text], "word"
            elif token.text == "if" and tokens[i + 1].text == "(":
                inside = tokens[i + 2].start, tokens[source.pairs[i + 1]].start
                yield *inside, f"!({source.text[slice(*inside)]})", "condition"
        i += 1


def constants(text: str) -> list[str]:
    """One more; for a 1 also 0; another sign or value of a float."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F']+|\d[\d']*)([uUlL]*)", text)
    if match is None:  # a float
        value, suffix = text.rstrip("fF"), text[len(text.rstrip("fF")) :]
        return [f"1.0{suffix}"] if float(value) == 0 else [f"-{text}", f"0.0{suffix}"]
    digits, suffix = match.groups()
    value = int(digits.replace("'", ""), 0)
    more = [value ^ 1] if digits[:2] in ("0x", "0X") else [value + 1] + [0] * (value == 1)
    return [f"{hex(n) if digits[:2] in ('0x', '0X') else n}{suffix}" for n in more]


def _operator(source: Source, i: int) -> Iterator[tuple[int, int, str, str]]:
    tokens, token = source.tokens, source.tokens[i]
    if token.spaced and token.text in BINARY:
        kind = "comparison" if token.text in COMPARISONS else "arithmetic"
        yield token.start, token.end, BINARY[token.text], kind
    elif token.text in "-~!" and tokens[i - 1].text in ("(", ",", "=", "?", ":", "return", "[", "{", "+", "*", "&&"):
        yield token.start, token.end, "", "sign"
    elif token.text == "?" and token.spaced:
        first = _condition(source, i)
        inside = tokens[first].start, tokens[i - 1].end
        yield *inside, f"!({source.text[slice(*inside)]})", "condition"
    elif token.text == "[" and source.pairs[i] == i + 2 and tokens[i + 1].kind == "word" and _indexes(tokens, i):
        yield tokens[i + 1].start, tokens[i + 1].end, f"{tokens[i + 1].text} ^ 1", "index"


def _indexes(tokens: list[Token], i: int) -> bool:
    """Whether the bracket takes an element: in a declaration (`float y[N]`) a type stands before the name."""
    return tokens[i - 1].kind == "word" and tokens[i - 2].kind != "word" and tokens[i + 1].text not in ("N",)


def _condition(source: Source, i: int) -> int:
    """The first token of the condition before the question mark at i."""
    j = i - 1
    while True:
        if source.tokens[j].text in (")", "]"):
            j = source.pairs[j]
        elif source.tokens[j].text in ("(", "[", "{", ",", ";", "=", "return", "?", ":"):
            return j + 1
        j -= 1


def _dropped(source: Source, i: int) -> Iterator[tuple[int, int, str, str]]:
    """The statement that begins at token i, taken out, where it is a call or an assignment: barriers, waits, stores."""
    tokens, j = source.tokens, i
    if tokens[i].text in NO_CALLS:
        if tokens[i].text != "asm":
            return
    elif tokens[i + 1].kind == "word" or tokens[i + 1].text in ("*", "&"):  # a declaration
        return
    while tokens[j].text not in (";", "{", "}"):
        j = source.pairs[j] + 1 if tokens[j].text in ("(", "[", "{") else j + 1
    if tokens[j].text != ";" or j == i + 1:
        return
    whole = source.text[tokens[i].start : tokens[j].start]
    if re.match(r"[\w:]+(<[^;=]*>)?\s+[\w*&]+\s*(=|\[|\{|,|$)", whole) or re.match(r"[\w:]+(<[^;=]*>)?[*&]", whole):
        return
    yield tokens[i].start, tokens[j].start, "", "statement"
