"""Looks that no instruction is executed which the tests of single instructions and small kernels leave out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.emulation.ptx import launch  # noqa: F401  (registers the instructions)
from tests.emulation.ptx.operands import HANDLERS

TESTS = (
    "integer", "floating", "modifiers", "matrix", "wgmma", "copies", "asynchronous", "threads", "together", "messages",
    "faults",
)  # fmt: skip
#: At the beginning of a statement, or alone in its string: `and.b32`, `ret;`, "cvt." of an f-string, "and".
OPCODE = re.compile(r"(?:^|[;}{\n:]|@!?%\w+\s)\s*([a-z]\w*)(?=\.[a-z]|\.$|\s*;|$)")


def opcodes(source: str) -> set[str]:
    """Of the PTX in the strings of Python code, without its docstrings and comments."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in told]
    return {opcode for text in strings if isinstance(text, str) for opcode in OPCODE.findall(text)}


def test_every_instruction_is_tested():
    folder = Path(__file__).parent
    tested = set().union(*(opcodes((folder / f"test_ptx_{name}.py").read_text()) for name in TESTS))
    assert [name for name in HANDLERS if name not in tested] == []


def test_words_that_are_no_instructions_do_not_count():
    text = '''
def test_and():
    """or: a set; exit."""
    not_this = x and y or not z  # red.global
    assert run("the words and, or and not match.", match="in a set of lanes")
    run(f"@!%p cvt.{mode}.f32 %d, %x; again: add.u32 %r, %r, 1; {other} ret;", {"xor": 1})
'''
    assert opcodes(text) == {"cvt", "add", "ret", "xor"}
