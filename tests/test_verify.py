"""The contract itself: what it lets pass, and every kind of planted error that it must catch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import llmkern
from llmkern import verify as verify_of_the_package
from llmkern.verify import plain_version, verify
from llmkern.verify.report import Report, judge_row


def reference(x, w):
    return torch.softmax(x @ w, -1)


@pytest.fixture
def inputs():
    return torch.randn(9, 16), torch.randn(16, 12)


def row(report, name):
    return next(r for r in report.rows if r.name == name)


def test_the_name_in_the_package_is_a_function_and_its_rooms_can_be_imported():
    """llmkern.verify is a package; where llmkern exports the function of that name, both ways of import must work."""
    import sys

    from llmkern.verify.report import Row
    from llmkern.verify.runs import run

    assert Row.__module__ == "llmkern.verify.report" and run.__module__ == "llmkern.verify.runs"
    assert callable(getattr(sys.modules["llmkern.verify"], "verify", None))
    function = verify_of_the_package if callable(verify_of_the_package) else verify_of_the_package.verify
    assert function is verify


# --- what passes


def test_an_exact_copy_passes_with_a_row_for_each_output_and_gradient(inputs):
    report = verify(lambda x, w: reference(x, w), reference, inputs)
    assert report and report.passed
    assert [(r.name, r.kind) for r in report.rows] == [("output", "output"), ("x", "gradient"), ("w", "gradient")]
    report.raise_if_failed()
    assert "PASSED: 3 of 3 rows" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_order_of_summation_passes(dtype):
    x, w = torch.randn(9, 16).to(dtype), torch.randn(16, 12).to(dtype)
    halves = lambda x, w: torch.softmax(x[:, 8:] @ w[8:] + x[:, :8] @ w[:8], -1)  # noqa: E731
    if dtype == torch.float32:
        assert verify(halves, reference, (x, w))
    in_float = lambda x, w: torch.softmax(x.float() @ w.float(), -1).to(dtype)  # noqa: E731
    assert verify(in_float, reference, (x, w))


def test_a_more_accurate_candidate_passes(inputs):
    assert verify(lambda x, w: reference(x.double(), w.double()).float(), reference, inputs)


def test_gradients_false_compares_outputs_only(inputs):
    report = verify(lambda x, w: reference(x, w).detach(), reference, inputs, gradients=False)
    assert report and [r.kind for r in report.rows] == ["output"]


def test_a_single_tensor_and_keyword_arguments():
    assert verify(torch.exp, torch.exp, torch.randn(5))
    report = verify(
        lambda x, *, scale: x * scale, lambda x, *, scale: scale * x, torch.randn(5), {"scale": torch.ones(5)}
    )
    assert report and {r.name for r in report.rows} == {"output", "x", "scale"}


def test_no_elements_pass():
    assert verify(torch.exp, torch.exp, torch.randn(0, 3))


# --- planted errors in the output


def planted(change):
    def candidate(x, w):
        out = reference(x, w)
        return change(out)

    return candidate


def one_element(out):
    wrong = torch.zeros_like(out)
    wrong[3, 4] = 1e-4
    return out + wrong


def swapped_rows(out):
    return out[[1, 0, *range(2, len(out))]]


def one_nan(out):
    wrong = torch.zeros_like(out)
    wrong[2, 2] = torch.nan
    return out + wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_element, ["max error", "(3, 4)"]),
        (swapped_rows, ["max error"]),
        (one_nan, ["nan", "(2, 2)"]),
        (lambda out: out.double(), ["dtype", "float32", "float64"]),
        (lambda out: out[:-1], ["shape", "(9, 12)", "(8, 12)"]),
        (lambda out: out.unsqueeze(0), ["shape"]),
        (lambda out: None, ["expected a tensor", "None"]),
        (lambda out: 0.0 * out, ["max error"]),
    ],
    ids=["element", "rows", "nan", "dtype", "shape", "rank", "none", "zeros"],
)
def test_a_planted_error_in_the_output_fails(inputs, change, words):
    report = verify(planted(change), reference, inputs)
    failed = row(report, "output")
    assert not report and not failed.passed
    assert all(word in failed.reason for word in words), failed.reason
    with pytest.raises(AssertionError, match="FAILED"):
        report.raise_if_failed()


def test_a_bias_within_the_largest_error_fails_by_the_mean():
    """Every element off by as much as the reference's worst: no single one stands out."""
    t = torch.linspace(1.0, 2.0, 4096, dtype=torch.float64)
    r = t.float()
    r[7] += 8 * 2.0**-23  # the reference is far off in one place
    k = t.float() + 6 * 2.0**-23
    assert judge_row("y", "output", r, r, t).passed
    judged = judge_row("y", "output", k, r, t)
    assert not judged.passed and "rms" in judged.reason
    assert judged.max_error < judged.max_allowed


def test_an_output_too_many_or_too_few_fails():
    one, two = lambda x: (x,), lambda x: (x, x * 2)
    assert "no such output" in row(verify(two, one, torch.randn(3)), "output[1]").reason
    assert "no such output" in row(verify(one, two, torch.randn(3)), "output[1]").reason


def test_integers_booleans_and_plain_values_must_be_equal():
    first = lambda x: (x.argmax(-1), x > 0, 3, "a", None)  # noqa: E731
    x = torch.randn(4, 5)
    assert verify(first, first, x)
    for wrong in (
        lambda x: (x.argmax(-1) + 1, x > 0, 3, "a", None),
        lambda x: (x.argmax(-1), x <= 0, 3, "a", None),
        lambda x: (x.argmax(-1), x > 0, 4, "a", None),
        lambda x: (x.argmax(-1), x > 0, 3, "b", None),
        lambda x: (x.argmax(-1), x > 0, 3, "a", 0),
    ):
        assert not verify(wrong, first, x)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    all: tuple[torch.Tensor, ...]


def test_nested_outputs_are_named_by_their_path():
    def nested(x):
        return {"a": Output(x * 2, (x, x + 1)), "b": [x.sum()]}

    report = verify(nested, nested, torch.randn(3))
    assert report
    assert [r.name for r in report.rows if r.kind == "output"] == [
        "output.a.hidden", "output.a.all[0]", "output.a.all[1]", "output.b[0]"
    ]  # fmt: skip


def test_something_else_than_tensors_is_refused():
    with pytest.raises(TypeError, match="expected a tensor"):
        verify(lambda x: object(), lambda x: object(), torch.randn(3))
    with pytest.raises(TypeError, match="expected real numbers"):
        verify(torch.fft.fft, torch.fft.fft, torch.randn(3))


def test_exceptions_come_through(inputs):
    def broken(x, w):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        verify(broken, reference, inputs)


# --- chance


def test_infinities_and_nan_belong_where_the_reference_has_them():
    x = torch.tensor([1.0, -1.0, 0.0, 2.0])
    log = lambda x: torch.log(x)  # noqa: E731  (0 -> -inf, -1 -> NaN)
    assert verify(log, log, x, gradients=False)
    for place, value in ((1, 0.0), (2, 0.0), (2, torch.inf), (2, torch.nan), (0, torch.inf), (0, torch.nan)):

        def wrong(x, place=place, value=value):
            out = torch.log(x)
            out[place] = value
            return out

        assert not verify(wrong, log, x, gradients=False), (place, value)


def test_where_only_the_reference_overflows_the_finite_truth_is_right_too():
    def squares(x):
        return (x * x) / 2.0**100

    x = torch.tensor([2.0**80, 1.0])  # x * x overflows float32, the quotient does not
    report = verify(lambda x: (x / 2.0**50) * (x / 2.0**50), squares, x, gradients=False)
    assert report, str(report)
    assert verify(squares, squares, x, gradients=False)
    assert not verify(lambda x: squares(x).nan_to_num(posinf=1.0), squares, x, gradients=False)


def test_a_scale_of_zero_and_of_subnormal_numbers():
    zero = torch.zeros(4)
    assert verify(lambda x: x * 1.0, lambda x: x * 1.0, zero)
    assert not verify(lambda x: x + 1e-30, lambda x: x * 1.0, zero, gradients=False)
    assert verify(lambda x: x * 1.0, lambda x: x * 1.0, torch.full((4,), 1e-42))


# --- gradients


class WithGradient(torch.autograd.Function):
    """x * w forward; the gradients times the given factors, None where the factor is None."""

    @staticmethod
    def forward(ctx, x, w, fx, fw):
        ctx.save_for_backward(x, w)
        ctx.factors = fx, fw
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        fx, fw = ctx.factors
        return None if fx is None else grad * w * fx, None if fw is None else grad * x * fw, None, None


@pytest.mark.parametrize(("fx", "fw", "bad"), [(1.0, 1.0, []), (1.001, 1.0, ["x"]), (1.0, None, ["w"])])
def test_the_gradient_of_each_input_counts_by_itself(fx, fw, bad):
    x, w = torch.randn(3, 4), torch.randn(3, 4)
    report = verify(lambda x, w: WithGradient.apply(x, w, fx, fw), lambda x, w: x * w, (x, w))
    assert [r.name for r in report.rows if not r.passed] == bad


def test_a_missing_gradient_that_is_zero_passes():
    """None and zeros mean the same to an optimiser's step on the loss."""
    x, w = torch.randn(3), torch.randn(3)
    assert verify(lambda x, w: x * 1.0, lambda x, w: x + 0 * w, (x, w))


def test_only_inputs_that_require_gradients_are_differentiated_where_some_do():
    x, w = torch.randn(3), torch.randn(3, requires_grad=True)
    report = verify(lambda x, w: x * w, lambda x, w: w * x, (x, w))
    assert [r.name for r in report.rows if r.kind == "gradient"] == ["w"]
    assert w.grad is None


class Two(nn.Module):
    def __init__(self, wrong: str = "", detached: bool = False):
        super().__init__()
        self.detached = detached
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)
        self.wrong = wrong

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x).detach() if self.detached else self.a(x)))
        if self.wrong:  # the value stays, the gradient of one parameter does not
            p = self.get_parameter(self.wrong)
            y = y + 0.01 * (p - p.detach()).sum()
        return y


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b.weight", "b.bias"])
def test_the_wrong_gradient_of_one_parameter_is_named(name):
    plain, wrong = Two(), Two(name)
    wrong.load_state_dict(plain.state_dict())
    report = verify(wrong, plain, torch.randn(3, 6))
    assert [r.name for r in report.rows if not r.passed] == [name]
    wrong.wrong = ""
    report = verify(wrong, plain, torch.randn(3, 6))
    assert report and {"a.weight", "a.bias", "b.weight", "b.bias"} <= {r.name for r in report.rows}


def test_a_gradient_that_never_comes_is_called_that():
    plain, cut = Two(), Two(detached=True)
    cut.load_state_dict(plain.state_dict())
    report = verify(cut, plain, torch.randn(3, 6))
    assert [r.name for r in report.rows if not r.passed] == ["x", "a.weight", "a.bias"]
    assert "no gradient came" in row(report, "a.weight").reason


def test_a_frozen_parameter_where_the_reference_trains_it_fails():
    plain, frozen = Two(), Two()
    frozen.load_state_dict(plain.state_dict())
    frozen.a.bias.requires_grad_(False)
    report = verify(frozen, plain, torch.randn(3, 6))
    assert "no such parameter" in row(report, "a.bias").reason


# --- what a run leaves as it was


def test_strides_and_offsets_arrive_as_given():
    x = torch.randn(4, 7, 10)[:, 1:, ::2].transpose(0, 1)
    seen = []

    def look(x):
        seen.append((x.stride(), x.storage_offset()))
        return x * 2

    assert verify(look, look, x)
    assert seen == [(x.stride(), x.storage_offset())] * 3
    expanded = torch.randn(3, 1).expand(3, 5)
    seen.clear()
    assert verify(look, look, expanded) and {s for s, _ in seen} == {expanded.stride()}


def test_functions_in_place_disturb_nobody():
    x = torch.randn(5)
    before = x.clone()

    def in_place(x):
        return x.mul_(2)

    report = verify(in_place, lambda x: x * 2, x)
    assert report and torch.equal(x, before)
    assert row(report, "x").kind == "gradient"
    assert not verify(lambda x: x.mul_(3), lambda x: x * 2, x)


def test_a_tensor_given_twice_is_one_input():
    x = torch.randn(4)
    report = verify(lambda a, b: a * b, lambda a, b: b * a, (x, x))
    assert report and sum(r.kind == "gradient" for r in report.rows) == 1


def test_random_numbers_and_running_statistics_are_the_same_in_each_run():
    assert verify(nn.Dropout(0.5), nn.Dropout(0.5), torch.randn(64))
    a, b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    state = torch.get_rng_state()
    assert verify(a, b, x) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.running_mean, torch.zeros(4)) and int(a.num_batches_tracked) == 0
    assert all(p.grad is None for p in a.parameters())


# --- the truth


def test_half_precision_that_the_reference_cannot_do_falls_back_to_float32():
    def masked(x):
        if x.dtype == torch.float16:
            raise RuntimeError("value cannot be converted to type at::Half without overflow")
        return torch.softmax(x.masked_fill(x < 0, -1e9), -1)

    def candidate(x):
        return torch.softmax(x.float().masked_fill(x < 0, -1e9), -1).half()

    x = torch.randn(4, 9).half()
    report = verify(candidate, masked, x)
    assert report and "cannot run in float16" in report.note and report.note in str(report)
    with pytest.raises(RuntimeError, match="at::Half"):  # in float32 there is nothing to fall back to
        verify(candidate, lambda x: masked(x.half()), torch.randn(3))


def test_a_reference_that_casts_inside_is_computed_in_float64_all_the_same():
    def casts(x):
        return torch.softmax(x.float(), -1).to(x.dtype) + torch.zeros(x.shape[-1], dtype=torch.float32)

    r = row(verify(casts, casts, torch.randn(4, 9)), "output")
    assert 0 < r.max_reference < 1e-6  # a truth of float32 would make this 0


def test_another_truth_holds_two_kernels_against_each_other():
    kernel = lambda x: torch.exp(x.float())  # noqa: E731
    kernel_b = lambda x: 1 / torch.exp(-x.float())  # noqa: E731
    assert verify(kernel_b, kernel, torch.randn(64), truth=torch.exp)
    assert not verify(lambda x: kernel_b(x) * 1.00001, kernel, torch.randn(64), truth=torch.exp)


def test_a_reference_far_from_the_truth_is_said():
    report = verify(torch.sin, torch.sin, torch.randn(64), truth=torch.cos)
    assert report and "says little about output" in str(report)


# --- plain versions


def test_plain_version_says_what_it_needs():
    with pytest.raises(ValueError, match="reference: expected a module or function"):
        verify(torch.exp, None, torch.randn(3))


def test_plain_version_has_the_arguments_the_state_and_the_mode(monkeypatch):
    import sys
    import types

    class Scaled(nn.Module):
        def __init__(self, width: int, bias: bool = True):
            super().__init__()
            self.width = width
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width)) if bias else None

        def forward(self, x):
            y = x * self.weight
            return y if self.bias is None else y + self.bias

    Fast = type("Scaled", (Scaled,), {"forward": lambda self, x: torch.addcmul(self.bias, x, self.weight)})
    rooms = types.ModuleType("llmkern.reference")
    rooms.Scaled = Scaled
    monkeypatch.setitem(sys.modules, "llmkern.reference", rooms)
    fast = Fast(5).eval()
    nn.init.normal_(fast.weight)
    fast.bias.requires_grad_(False)
    plain = plain_version(fast)
    assert type(plain) is Scaled and not plain.training
    assert torch.equal(plain.weight, fast.weight) and plain.weight is not fast.weight
    assert plain.weight.requires_grad and not plain.bias.requires_grad
    assert verify(fast, None, torch.randn(3, 5))
    assert plain_version(Fast(3, bias=False)).bias is None
    assert plain_version(Fast(3).bfloat16()).weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no plain version named Linear"):
        plain_version(nn.Linear(2, 2))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_modules_are_judged_in_every_dtype_of_state_and_input(state, dtype):
    x = torch.randn(5, 2, 16).to(dtype)
    layers = [(llmkern.Int8Linear(16, 4), (x,)), (llmkern.Int8Linear(16, 4, bias=False), (x,))]
    layers.append((llmkern.PositionalEncoding(16, 32), (x,)))
    if state in (dtype, torch.float32):  # what rotary's tables may be
        layers.append((llmkern.RotaryEmbedding(8, 32), (x.view(1, 2, 5, 16), x.view(1, 2, 5, 16))))
    for module, inputs in layers:
        verify(module.to(state), inputs=inputs).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_models_are_judged(dtype):
    fast = llmkern.MultiHeadAttention(64, 4).to(dtype)
    plain = plain_version(fast)
    llmkern.quantize_model(fast), llmkern.reference.quantize_model(plain)
    x = torch.randn(2, 5, 64).to(dtype)
    verify(fast, plain, (x, x, x)).raise_if_failed()
    wrong = fast.w_v.weight_scale.clone()
    wrong[3] *= 2
    fast.w_v.weight_scale = wrong
    assert not verify(fast, plain, (x, x, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_versions_of_quantised_modules_are_quantised_likewise(dtype):
    x = torch.randn(2, 5, 16).to(dtype)
    for skip in ((), ("w_k",)):
        fast = llmkern.quantize_model(llmkern.MultiHeadAttention(16, 2).to(dtype), skip=skip)
        plain = plain_version(fast)
        assert isinstance(plain.w_k, nn.Linear) == bool(skip) and type(plain.w_q) is llmkern.reference.Int8Linear
        verify(fast, inputs=(x, x, x)).raise_if_failed()
    model = llmkern.quantize_model(llmkern.Transformer(32, 4, 1).eval().to(dtype))
    verify(model, inputs=(torch.randn(9, 2, 32).to(dtype), torch.randn(7, 2, 32).to(dtype))).raise_if_failed()


def test_a_word_for_a_flag_is_named():
    with pytest.raises(TypeError, match="gradients: expected True or False, got 'a'"):
        verify(torch.exp, torch.exp, torch.randn(3), gradients="a")


def test_plain_version_takes_each_tensor_in_its_own_dtype_also_those_not_saved():
    rotary = llmkern.RotaryEmbedding(8, 32)
    rotary.cos.mul_(2)
    rotary.sin = rotary.sin.bfloat16()
    plain = plain_version(rotary)
    assert torch.equal(plain.cos, rotary.cos) and torch.equal(plain.sin, rotary.sin)
    layer = plain_version(llmkern.Int8Linear(8, 4).bfloat16())
    assert (layer.weight_scale.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)


def test_an_empty_report_did_not_pass():
    assert not Report(()) and "FAILED" in str(Report(()))
