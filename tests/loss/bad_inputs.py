"""Calls that must raise before any kernel runs: the changed arguments, the exception, words of its message."""

from __future__ import annotations

import torch


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


LONG = t(3, dtype=torch.int64)
#: Of what every one of the four functions takes.
OPTIONS = {
    "a word for ignore_index": ({"ignore_index": "a"}, TypeError, ["ignore_index", "an integer", "'a'"]),
    "targets of another dtype": ({"targets": t(3, dtype=torch.int32)}, TypeError, ["targets", "int64", "int32"]),
    "probabilities": ({"targets": t(3)}, TypeError, ["targets", "int64", "float32"]),
    "a list for targets": ({"targets": [1, 2, 3]}, TypeError, ["targets", "torch.Tensor", "list"]),
    "shape of targets": ({"targets": t(4, dtype=torch.int64)}, ValueError, ["targets", "(3,)", "(4,)"]),
    "device of targets": ({"targets": t(3, dtype=torch.int64, device="meta")}, ValueError, ["targets", "cpu", "meta"]),
}
SMOOTHING = {
    "reduction": ({"reduction": "average"}, ValueError, ["reduction", "none, mean, sum", "'average'"]),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "[0, 1]", "1.5"]),
    "a word for label_smoothing": ({"label_smoothing": "a"}, TypeError, ["label_smoothing", "a number", "'a'"]),
    "z_loss": ({"z_loss": float("inf")}, ValueError, ["z_loss", "a finite number", "inf"]),
}
TEMPERATURE = {
    "temperature": ({"temperature": 0.0}, ValueError, ["temperature", "positive", "0.0"]),
    "a flag for temperature": ({"temperature": True}, TypeError, ["temperature", "a number", "True"]),
    "alpha": ({"alpha": float("nan")}, ValueError, ["alpha", "a finite number", "nan"]),
}
CROSS_ENTROPY = {
    **OPTIONS,
    **SMOOTHING,
    "dtype": ({"logits": t(3, 8, dtype=torch.int64)}, TypeError, ["logits", "float32", "int64"]),
    "no tensor": ({"logits": None}, TypeError, ["logits", "torch.Tensor", "NoneType"]),
    "no dimensions": ({"logits": t()}, ValueError, ["logits", "(..., V)", "()"]),
    "no classes": ({"logits": t(3, 0)}, ValueError, ["logits", "(N, V)", "at least 1", "(3, 0)"]),
    "torch's layout": (
        {"logits": t(3, 8, 5), "targets": t(3, 5, dtype=torch.int64)}, ValueError,
        ["targets", "(3, 8)", "(3, 5)", "movedim(1, -1)"],
    ),
    "sparse": ({"logits": t(3, 8).to_sparse()}, TypeError, ["logits: expected a dense tensor", "sparse"]),
}  # fmt: skip
LINEAR = {
    **OPTIONS,
    **SMOOTHING,
    "dtype": ({"hidden": t(3, 8, dtype=torch.int64)}, TypeError, ["hidden", "float32", "int64"]),
    "dtype of the weight": ({"weight": t(5, 8, dtype=torch.float16)}, TypeError, ["weight", "float32", "float16"]),
    "shape of the weight": ({"weight": t(8, 5)}, ValueError, ["weight", "(V, D) = (V, 8)", "(8, 5)"]),
    "no classes": ({"weight": t(0, 8), "bias": None}, ValueError, ["weight", "V at least 1", "(0, 8)"]),
    "shape of the bias": ({"bias": t(8)}, ValueError, ["bias", "(V,) = (5,)", "(8,)"]),
    "dtype of the bias": ({"bias": t(5, dtype=torch.bfloat16)}, TypeError, ["bias", "float32", "bfloat16"]),
    "device of the weight": ({"weight": t(5, 8, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
    "no width": ({"hidden": t(3, 0), "weight": t(5, 0)}, ValueError, ["hidden", "(N, D)", "(3, 0)"]),
}
DISTILLATION = {
    **OPTIONS,
    **TEMPERATURE,
    "dtype": ({"student_logits": t(3, 8, dtype=torch.int64)}, TypeError, ["student", "float32", "int64"]),
    "shape of the teacher": ({"teacher_logits": t(3, 9)}, ValueError, ["teacher_logits", "(3, 8)", "(3, 9)"]),
    "dtype of the teacher": (
        {"teacher_logits": t(3, 8, dtype=torch.float16)}, TypeError, ["teacher", "float32", "float16"],
    ),
    "device of the teacher": ({"teacher_logits": t(3, 8, device="meta")}, ValueError, ["teacher", "cpu", "meta"]),
    "no tensor": ({"teacher_logits": None}, TypeError, ["teacher_logits", "torch.Tensor", "NoneType"]),
}  # fmt: skip
LINEAR_DISTILLATION = {
    **OPTIONS,
    **TEMPERATURE,
    "rows of the teacher": ({"teacher_hidden": t(4, 6)}, ValueError, ["teacher_hidden", "(4,)", "(3,)"]),
    "classes of the teacher": ({"teacher_weight": t(6, 6)}, ValueError, ["teacher_weight", "classes", "5", "6"]),
    "width of the teacher": ({"teacher_weight": t(5, 8)}, ValueError, ["teacher_weight", "(V, 6)", "(5, 8)"]),
    "dtype of the teacher": (
        {"teacher_hidden": t(3, 6, dtype=torch.float16)}, TypeError, ["teacher_hidden", "float32", "float16"],
    ),
    "bias of the student": ({"student_bias": t(6)}, ValueError, ["student_bias", "(5,)", "(6,)"]),
}  # fmt: skip
#: The good arguments, by function.
ARGUMENTS = {
    "cross_entropy": {"logits": t(3, 8), "targets": LONG},
    "linear_cross_entropy": {"hidden": t(3, 8), "weight": t(5, 8), "targets": LONG, "bias": t(5)},
    "distillation": {"student_logits": t(3, 8), "teacher_logits": t(3, 8), "targets": LONG},
    "linear_distillation": {
        "student_hidden": t(3, 8), "student_weight": t(5, 8), "teacher_hidden": t(3, 6), "teacher_weight": t(5, 6),
        "targets": LONG,
    },
}  # fmt: skip
TABLES = {
    "cross_entropy": CROSS_ENTROPY,
    "linear_cross_entropy": LINEAR,
    "distillation": DISTILLATION,
    "linear_distillation": LINEAR_DISTILLATION,
}
#: (function, name, changed arguments, exception, words)
EVERY = [(function, name, *row) for function, table in TABLES.items() for name, row in table.items()]
