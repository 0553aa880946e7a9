"""Which scheme and backend for a model on a machine, from a roofline of that machine: `llmkern.recommend`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmkern import backend, check, extension
from llmkern.evaluation.machines import SCHEMES, Machine, Rates
from llmkern.evaluation.shapes import TASKS, Shape
from llmkern.evaluation.timing import markdown, seconds

#: Operators that a layer costs the host, counted in transformers' models with llmkern: of an encoder and a decoder in
#: floating point, and in int8, where a decoder's layer is one call on the CPU.
CALLS = {("encoder", "float"): 38, ("encoder", "int8"): 20, ("decoder", "float"): 49, ("decoder", "int8"): 28}
ONE_CALL = 2
#: Of a pass, beside its layers.
PASS_CALLS = 23
#: The Python of transformers' models takes about so many times as long as the calls in it of a module and its operator:
#: by it the estimates of benchmarks.recommend for small models and few tokens come near.
PYTHON = 5


@dataclass(frozen=True)
class Part:
    """Seconds of a pass through the model, and what most of them go to: "arithmetic", "weights" (reading them),
    "outputs" (what each of a product costs beside), "cache" (keys and values), "elements" (everything between the
    products) or "calls" (the host's time)."""

    seconds: float
    of: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.of, key=lambda name: self.of[name])


@dataclass(frozen=True)
class Estimate:
    """One way to run the model. backends: what serves each of our operators. prompt: the pass over all prompts (an
    encoder's only one). token: that of one more token, None for encoders. latency: seconds of the whole request.
    memory: bytes of weights and keys and values. fits: whether the machine has it."""

    scheme: str
    backends: dict[str, str]
    prompt: Part
    token: Part | None
    latency: float
    memory: float
    fits: bool


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` proposes.

    scheme: one of float32, bfloat16, int8. backend: what serves its products: "torch", or for int8 a backend of
    llmkern. latency: estimated seconds of a request. low, high: within which the measured one is expected; the latency
    itself where nobody has measured such a machine. meets: "yes" (high is within the bound), "perhaps" (latency is) or
    "no". estimates: all candidates, the most accurate scheme first. reasons: how it came to it, in sentences.
    """

    scheme: str
    backend: str
    latency: float
    low: float
    high: float
    meets: str
    machine: Machine
    shape: Shape
    estimates: list[Estimate]
    reasons: list[str]

    @property
    def chosen(self) -> Estimate:
        return next(e for e in self.estimates if e.scheme == self.scheme)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The candidates as Markdown."""
        lines = [["scheme", "products", "request", "prompt", "bound by", "a token", "bound by", "memory", "fits"]]
        for e in self.estimates:
            token = [seconds(e.token.seconds), e.token.bound] if e.token else ["", ""]
            lines.append([
                e.scheme, _products(e), seconds(e.latency), seconds(e.prompt.seconds), e.prompt.bound, *token,
                _gigabytes(e.memory), "yes" if e.fits else "no",
            ])  # fmt: skip
        return markdown(lines)

    def __str__(self) -> str:
        return "\n".join([*self.reasons, "", self.table()])


def recommend(
    parameters: int | None,
    task: str,
    latency: float,
    machine: Machine | str | None = None,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    shape: Shape | None = None,
) -> Recommendation:
    """Proposes how to run a model: in float32, bfloat16 or int8, and on which backend.

    parameters: how many the model has; a usual shape is taken for them. None with a shape. task: "encoder"
    (classification, understanding, embeddings), "decoder" (dialogue, writing) or "encoder-decoder" (translation,
    summaries). latency: seconds that a request may take: `batch_size` prompts of `prompt_tokens` in one pass, and, but
    for encoders, `new_tokens` behind each. machine: None for this one, measured now (Machine.here()), the name of a
    published GPU, or a Machine. shape: the model's own, as Shape.of(config, task) reads it.

    The most accurate scheme that fits the memory and meets the bound as estimated is proposed, else the fastest that
    fits; the reasons name one that meets it also where the estimate is too short by the machine's error. Each pass
    costs, for every scheme, its multiply-adds and the reading of its weights at the rates of the machine (on a GPU the
    longer of the two, on a CPU both: there they do not overlap), besides keys and values, all elements between the
    products, and the host's time.

    Raises TypeError and ValueError for arguments of other types and out of bounds, for neither parameters nor a shape
    or both, and where no scheme fits the memory. Source: Williams, Waterman and Patterson 2009, "Roofline",
    Communications of the ACM 52(4).
    """
    check.one_of("task", task, TASKS)
    check.finite("latency", latency)
    if latency <= 0:
        raise ValueError(f"latency: expected seconds above 0, got {latency}")
    for name, value in (("batch_size", batch_size), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        check.positive(name, value)
    if (parameters is None) == (shape is None):
        raise ValueError(f"parameters: expected a number or a shape, got {'neither' if shape is None else 'both'}")
    if shape is None:
        assert parameters is not None
        shape = Shape.from_parameters(parameters, task)
    elif not isinstance(shape, Shape):
        raise TypeError(f"shape: expected a Shape, got {type(shape).__name__}")
    elif shape.task != task:
        raise ValueError(f"shape: expected that of an {task}, got that of an {shape.task}")
    if machine is None or isinstance(machine, str):
        machine = Machine.here() if machine is None else Machine.published(machine)
    elif not isinstance(machine, Machine):
        raise TypeError(f"machine: expected None, a name or a Machine, got {type(machine).__name__}")
    new = 0 if task == "encoder" else new_tokens
    schemes = [s for s in SCHEMES if s in machine.rates and (s != "int8" or shape.linear)]
    estimates = [estimate(s, shape, machine, batch_size, prompt_tokens, new) for s in schemes]
    return _chosen(estimates, shape, machine, latency, f"{batch_size} x {prompt_tokens} tokens", new)


def estimate(scheme: str, shape: Shape, machine: Machine, batch: int, prompt: int, new: int) -> Estimate:
    """The time and memory of one scheme: new tokens behind each of `batch` prompts, none for an encoder."""
    size = SCHEMES[scheme]
    # In int8 everything but the linear layers, and the output's matrix, stays in floating point.
    held = 2 if scheme == "bfloat16" or (scheme == "int8" and machine.device == "cuda") else 4
    prompt_part = _pass(scheme, shape, machine, batch, prompt, 0, "encoder" if shape.task != "decoder" else "decoder")
    token = None
    latency = prompt_part.seconds
    if new:
        # The cache grows from the prompt by all new tokens; its middle stands for all.
        token = _pass(scheme, shape, machine, batch, 1, _behind(shape, prompt, new), "decoder")
        # The prompt's pass gives a decoder's first token; an encoder-decoder's first needs one of its decoder's.
        latency += token.seconds * (new if shape.task == "encoder-decoder" else new - 1)
    memory = (
        shape.layers * shape.layer_weights * size + shape.embedding_weights * held
        + 2 * batch * (prompt + new) * shape.layers * shape.narrow * held * bool(new)
    )  # fmt: skip
    backends = _backends(scheme, shape, machine, held, batch if new else batch * prompt)
    return Estimate(scheme, backends, prompt_part, token, latency, memory, memory <= machine.memory)


def _behind(shape: Shape, prompt: int, new: int) -> int:
    return prompt + new // 2 if shape.task == "decoder" else prompt


def _pass(scheme: str, shape: Shape, machine: Machine, batch: int, rows: int, cached: int, side: str) -> Part:
    """A pass of `rows` new tokens in each of `batch`, which attend to those and to `cached` ones."""
    floating = "float32" if scheme == "int8" and machine.device == "cpu" else "bfloat16" if scheme == "int8" else scheme
    held, tokens, on_cpu = SCHEMES[floating], batch * rows, machine.device == "cpu"
    across = shape.task == "encoder-decoder" and side == "decoder"  # attends to the encoder as well
    of = dict.fromkeys(("arithmetic", "weights", "outputs", "cache", "elements", "calls"), 0.0)

    def products(rates: Rates, size: int, tokens: int, weights: int, inputs: int, outputs: int, calls: int) -> None:
        """On a CPU weights are read before they are multiplied; a GPU does both at once, and the longer one counts."""
        flops, read = 2.0 * tokens * weights / rates.flops, weights * size / rates.bytes
        if on_cpu or flops >= read:
            of["arithmetic"] += flops
        if on_cpu or flops < read:
            of["weights"] += read
        of["outputs"] += outputs * rates.output
        of["elements"] += tokens * inputs * rates.input
        of["calls"] += calls * rates.call

    # Of the keys and values of what the encoder has read there is nothing to compute again.
    more = (2 * shape.hidden * shape.wide, shape.hidden + shape.wide, 2) if across else (0, 0, 0)
    weights, outputs, calls = shape.encoder_weights, shape.encoder_outputs, shape.encoder_linears
    products(
        machine.rates[scheme], SCHEMES[scheme], tokens, shape.layers * (weights + more[0]),
        shape.layers * (shape.encoder_inputs + more[1]), shape.layers * (outputs + more[1]),
        shape.layers * (calls + more[2]),
    )  # fmt: skip
    if side == "decoder":
        # Of a prompt, the last token's logits alone are needed.
        products(machine.rates[floating], held, batch, shape.head_weights, shape.hidden, shape.vocab, 1)
    seen = cached + (rows / 2 if side == "decoder" else rows)  # a decoder's tokens see those before them
    of["arithmetic"] += 4.0 * tokens * seen * shape.wide * shape.layers / machine.rates[floating].flops
    of["cache"] = 2.0 * batch * cached * shape.narrow * shape.layers * held / machine.rates[floating].bytes
    # Two sums, two norms, an activation; the product with a gate, and the rotation of queries and keys.
    between = 4 * shape.hidden + shape.intermediate
    if shape.gated:
        between += shape.intermediate + shape.wide + shape.narrow
    of["elements"] += float(tokens) * between * shape.layers / machine.elements
    one = scheme == "int8" and on_cpu and shape.task == "decoder" and shape.gated
    kind = "int8" if scheme == "int8" else "float"
    layer = ONE_CALL if one else CALLS[side, kind] * 3 // 2 if across else CALLS[side, kind]
    of["calls"] += (PASS_CALLS + shape.layers * layer) * PYTHON * machine.call
    if not on_cpu:  # the host runs ahead of the device
        of["calls"] = max(0.0, of["calls"] - sum(value for name, value in of.items() if name != "calls"))
    return Part(sum(of.values()), of)


def _backends(scheme: str, shape: Shape, machine: Machine, held: int, rows: int) -> dict[str, str]:
    """What serves attention and, in int8, products of so many rows: the first of the backends that the machine has."""
    operators = ["attention"] + (["int8_linear"] if scheme == "int8" else [])
    if machine.device == "cpu":
        return dict.fromkeys(operators, "reference" if extension._C is None else "cpu")
    if machine.capability is None:  # AMD, which Triton serves
        return dict.fromkeys(operators, "triton")
    dtype = torch.float32 if held == 4 else torch.bfloat16
    query = torch.empty(1, shape.heads, 64, shape.wide // shape.heads, dtype=dtype, device="meta")
    no_rules = (None, None, None, None, True, 0, 0, 0.0, 0.0, 0.0)
    calls: dict[str, tuple[Any, ...]] = {
        "attention": (query, query, query, *no_rules),
        "int8_linear": (torch.empty(rows, shape.hidden, dtype=dtype, device="meta"),),
    }
    preferred = {name: backend.preference(name, machine.capability, calls[name]) for name in operators}
    return {name: "triton" if line is None else line.backend for name, line in preferred.items()}


def _products(e: Estimate) -> str:
    return e.backends.get("int8_linear", "torch")


def _chosen(
    estimates: list[Estimate], shape: Shape, machine: Machine, bound: float, request: str, new: int
) -> Recommendation:
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        least = min(e.memory for e in estimates)
        raise ValueError(
            f"machine: expected memory of at least {_gigabytes(least)} for {shape.parameters / 1e6:.0f} M parameters, "
            f"got {_gigabytes(machine.memory)}"
        )
    error = machine.error or 1.0
    likely = [e for e in fitting if e.latency <= bound]
    e = (likely or sorted(fitting, key=lambda e: e.latency))[0]  # they stand in the order of accuracy
    sure = machine.error is not None and e.latency * error <= bound
    meets = "yes" if sure else "perhaps" if likely else "no"
    reasons = _reasons(e, fitting, estimates, shape, machine, bound, request, new, meets)
    span = (e.latency, e.latency / error, e.latency * error)
    return Recommendation(e.scheme, _products(e), *span, meets, machine, shape, estimates, reasons)


def _reasons(
    e: Estimate, fitting: list[Estimate], estimates: list[Estimate], shape: Shape, machine: Machine, bound: float,
    request: str, new: int, meets: str,
) -> list[str]:  # fmt: skip
    layers = f"{shape.layers} layers" + (" on each side" if shape.task == "encoder-decoder" else "")
    came = (
        "Its rates were measured with linear layers"
        if machine.error
        else "Its rates are shares of the vendor's figures, or were never compared with whole models"
    )
    rates = (f"{s} {r.flops / 1e9:.0f} GFLOP/s, {r.bytes / 1e9:.3g} GB/s of weights" for s, r in machine.rates.items())
    found = [
        f"The model: {shape.task}, {shape.parameters / 1e6:.0f} M parameters in {layers} of width {shape.hidden}, "
        f"vocabulary {shape.vocab}. {_scale(shape.parameters)}",
        f"The machine: {machine.name}. {came}: {'; '.join(rates)}.",
    ]
    for dropped in estimates:
        if dropped not in fitting:
            needs, has = _gigabytes(dropped.memory), _gigabytes(machine.memory)
            found.append(f"{dropped.scheme} needs {needs}, and the machine has {has}.")
    for slower in fitting:
        if slower is e:
            break
        found.append(f"{slower.scheme}, more accurate, would take about {seconds(slower.latency)}.")
    of = f"{request}" + (f" and {new} more each" if new else "")
    parts = f"the prompt's pass is bound by {e.prompt.bound}" + (f", a token's by {e.token.bound}" if e.token else "")
    found.append(f"{e.scheme}: a request of {of} takes about {seconds(e.latency)}; {parts}.")
    verdict = {
        "yes": f"It meets the bound of {seconds(bound)}, also where the estimate is {machine.error} times too short.",
        "perhaps": f"It meets the bound of {seconds(bound)} as estimated; "
        + (f"estimates are within {machine.error} times of what was measured." if machine.error else
           "how far estimates lie off on such a machine has not been measured."),
        "no": f"Nothing that fits meets the bound of {seconds(bound)}: this is the fastest. A smaller model, fewer "
        "tokens or a faster machine is needed.",
    }  # fmt: skip
    found.append(verdict[meets])
    if meets == "perhaps" and machine.error is not None:
        error = machine.error
        surer = next((f for f in fitting if f.latency * error <= bound), None)
        if surer is not None:
            found.append(f"{surer.scheme}, at about {seconds(surer.latency)}, would meet it even then.")
    if not shape.linear:
        found.append("Int8 is left out: the model's matrices are not nn.Linear, which quantize_model replaces.")
    return found


def _scale(parameters: int) -> str:
    if parameters < 1e9:
        return "Under a billion parameters: for phones and answers in real time."
    if parameters <= 1e10:
        return "One to ten billion: for applications of companies and services behind an API."
    return "Over ten billion: for complex tasks and research."


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


__all__ = ["Estimate", "Machine", "Part", "Recommendation", "Shape", "estimate", "recommend"]
