"""A lexer of CUDA C++: as much as is needed to find device code and the tokens in it that can be changed."""

from __future__ import annotations

import bisect
import dataclasses
import re

TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<directive>(?<![^\n])[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)
    |(?P<string>R"\((?:.|\n)*?\)"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>0[xX][0-9a-fA-F']+[uUlL]*|(?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[uUlLfF]*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<operator>\.\.\.|<<=|>>=|->|::|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.DOTALL,
)
OPEN, CLOSE = {"(": ")", "[": "]", "{": "}"}, {")": "(", "]": "[", "}": "{"}
DEVICE_WORDS = ("__global__", "__device__", "LLMKERN_DEVICE")


@dataclasses.dataclass(frozen=True)
class Token:
    kind: str  # number, word, string, operator
    text: str
    start: int
    spaced: bool  # white space on both sides: what the formatter gives to binary operators, and to nothing else

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function with device code: its name, and its body as a range of tokens, the braces included."""

    name: str
    first: int
    last: int


class Source:
    """The tokens of a source that the GPU's compiler sees: those between `#else` and `#endif` of `#ifdef __CUDACC__`
    are for the host's compiler and missing here."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = list(_tokens(text))
        self._lines = [m.end() for m in re.finditer("\n", text)]
        self.pairs = _pairs(self.tokens)
        self.functions = list(self._functions())

    def line(self, offset: int) -> int:
        return 1 + bisect.bisect_right(self._lines, offset)

    def _functions(self):
        i = 0
        while i < len(self.tokens):
            if self.tokens[i].text in DEVICE_WORDS:
                body = self._body(i)
                if body is not None:
                    yield Function(self._name(i, body), body, self.pairs[body])
                    i = self.pairs[body]
            i += 1

    def _body(self, i: int) -> int | None:
        """The brace that opens the body of the function declared at token i; None for a mere declaration."""
        while i < len(self.tokens):
            text = self.tokens[i].text
            if text == "{":
                return i
            if text in (";", "="):
                return None
            i = self.pairs[i] + 1 if text in "([" else i + 1
        return None

    def _name(self, i: int, body: int) -> str:
        """The last word before a parenthesis that is no attribute."""
        name = ""
        while i < body:
            if self.tokens[i].text == "(" and self.tokens[i - 1].kind == "word":
                word = self.tokens[i - 1].text
                if not word.startswith("__"):
                    name = name or word
                i = self.pairs[i]
            i += 1
        return name


def _tokens(text: str):
    """Without comments, directives and what the GPU's compiler never sees."""
    skipping: list[bool] = []  # one for each open #if: whether its present branch is the host's alone
    gpu: list[bool | None] = []  # whose the first branch was: the GPU's, the host's (False), neither's (None)
    for match in TOKEN.finditer(text):
        kind, found = match.lastgroup, match.group()
        if kind == "directive":
            directive = found.strip().removeprefix("#").split()
            if directive[0] in ("if", "ifdef", "ifndef"):
                asks = directive[1:] == ["__CUDACC__"] and directive[0] != "if"
                gpu.append(directive[0] == "ifdef" if asks else None)
                skipping.append(gpu[-1] is False)
            elif directive[0] in ("else", "elif"):
                skipping[-1] = gpu[-1] is True
            elif directive[0] == "endif":
                skipping.pop(), gpu.pop()
        elif kind != "space" and not any(skipping):
            before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
            yield Token(str(kind), found, match.start(), before.isspace() and after.isspace())


def _pairs(tokens: list[Token]) -> dict[int, int]:
    """The index of each opening bracket's closing one, and the other way round."""
    pairs, stack = {}, []
    for i, token in enumerate(tokens):
        if token.kind != "operator":
            continue
        if token.text in OPEN:
            stack.append(i)
        elif token.text in CLOSE:
            if not stack or tokens[stack[-1]].text != CLOSE[token.text]:
                raise ValueError(f"{token.text!r} at offset {token.start} closes nothing")
            pairs[i] = stack.pop()
            pairs[pairs[i]] = i
    if stack:
        raise ValueError(f"{tokens[stack[-1]].text!r} at offset {tokens[stack[-1]].start} is never closed")
    return pairs
