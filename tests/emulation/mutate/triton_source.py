"""Mutants of Triton kernels, made from the syntax tree of the functions decorated with triton.jit."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.emulation.mutate.mutant import Mutant, make

BINARY = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.LShift: ">>",
    ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|",
}  # fmt: skip
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
NAMES = {
    "maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "exp2": "exp", "exp": "exp2",
    "zeros_like": "ones_like",
}  # fmt: skip


def mutants(file: str, text: str) -> Iterator[Mutant]:
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line.encode()))
    encoded = text.encode()

    def place(node: ast.AST) -> tuple[int, int]:
        start, end = offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset
        return len(encoded[:start].decode()), len(encoded[:end].decode())

    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef) or "jit" not in " ".join(
            map(ast.unparse, function.decorator_list)
        ):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                for whole, new, operator in _changes(node):
                    yield make(file, text, *place(whole), new, operator, function.name)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    source = ast.unparse
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        # The left side keeps its brackets in the tree alone: unparse puts them back.
        yield node, f"({_wrap(node.left)} {BINARY[type(node.op)]} {_wrap(node.right)})", "arithmetic"
    elif isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
        yield node, f"{source(node.target)} {BINARY[type(node.op)]}= {source(node.value)}", "arithmetic"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        left, right = _wrap(node.left), _wrap(node.comparators[0])
        yield node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})", "comparison"
    elif isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield node, f"({word.join(map(_wrap, node.values))})", "arithmetic"
    elif isinstance(node, ast.UnaryOp):
        yield node, _wrap(node.operand), "sign"
    elif isinstance(node, ast.Constant):
        yield from ((node, new, "constant") for new in _constants(node.value))
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield node.test, f"(not ({source(node.test)}))", "condition"
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield node, f"{source(node.value)}.{NAMES[node.attr]}", "word"
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass", "statement"
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        yield node, f"{source(node.value)}[{', '.join(map(source, reversed(node.slice.elts)))}]", "index"


def _calls(node: ast.Call) -> Iterator[tuple[ast.AST, str, str]]:
    def with_arguments(args: list[ast.expr], keywords: list[ast.keyword]) -> str:
        return ast.unparse(ast.Call(node.func, args, keywords))

    for keyword in node.keywords:
        if keyword.arg == "mask":
            rest = [k for k in node.keywords if k.arg not in ("mask", "other")]
            yield node, with_arguments(node.args, rest), "mask"
    if len(node.args) == 2 and ast.unparse(node.func) in ("tl.join", "tl.dot", "tl.cdiv", "tl.where"):
        yield node, with_arguments(node.args[::-1], node.keywords), "arguments"


def _constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1)] + ["0"] * (value == 1)
    if isinstance(value, float):
        return ["1.0"] if value == 0 else [str(-value), "0.0"]
    return ["0"] if value == "nan" else []


def _wrap(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if isinstance(node, (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript)) else f"({text})"
