"""Which scheme and backend for a model on a machine, from a roofline of that machine: `llmkern.recommend`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmkern import backend, check, extension
from llmkern.evaluation.machines import SCHEMES, Machine
from llmkern.evaluation.shapes import TASKS, Layer, Shape
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

    @property
    def products(self) -> str:
        """What serves those of linear layers."""
        return self.backends.get("int8_linear", "torch")


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` proposes: `chosen` of the estimates, the most accurate scheme of which comes first.

    bound: seconds that the request may take. batch_size, prompt_tokens, new_tokens: the request; no new ones for an
    encoder.
    """

    chosen: Estimate
    estimates: list[Estimate]
    machine: Machine
    shape: Shape
    bound: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def scheme(self) -> str:
        """One of float32, bfloat16, int8."""
        return self.chosen.scheme

    @property
    def backend(self) -> str:
        """What serves its products: "torch", or for int8 a backend of llmkern."""
        return self.chosen.products

    @property
    def latency(self) -> float:
        """Estimated seconds of the request."""
        return self.chosen.latency

    @property
    def low(self) -> float:
        """Not less is expected to be measured; the latency itself where nobody has measured such a machine."""
        return self.latency / (self.machine.error or 1.0)

    @property
    def high(self) -> float:
        """Not more is expected to be measured; the latency itself where nobody has measured such a machine."""
        return self.latency * (self.machine.error or 1.0)

    @property
    def meets(self) -> str:
        """Whether it meets the bound: "yes" where high does, "perhaps" where the latency does, or "no"."""
        if self.latency > self.bound:
            return "no"
        return "yes" if self.machine.error is not None and self.high <= self.bound else "perhaps"

    @property
    def reasons(self) -> list[str]:
        """How it came to it, in sentences."""
        return [_model(self.shape), _rates_of(self.machine), *self._others(), self._request(), *self._verdict()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        derived = ("scheme", "backend", "latency", "low", "high", "meets", "reasons")
        return {name: getattr(self, name) for name in derived} | asdict(self)

    def table(self) -> str:
        """The candidates as Markdown."""
        lines = [["scheme", "products", "request", "prompt", "bound by", "a token", "bound by", "memory", "fits"]]
        for e in self.estimates:
            token = [seconds(e.token.seconds), e.token.bound] if e.token else ["", ""]
            lines.append([
                e.scheme, e.products, seconds(e.latency), seconds(e.prompt.seconds), e.prompt.bound, *token,
                _gigabytes(e.memory), "yes" if e.fits else "no",
            ])  # fmt: skip
        return markdown(lines)

    def __str__(self) -> str:
        return "\n".join([*self.reasons, "", self.table()])

    def _others(self) -> list[str]:
        """Why it is not one of the others."""
        has = _gigabytes(self.machine.memory)
        found = [
            f"{e.scheme} needs {_gigabytes(e.memory)}, and the machine has {has}." for e in self.estimates if not e.fits
        ]
        before = self.estimates[: self.estimates.index(self.chosen)]
        return found + [f"{e.scheme}, more accurate, would take about {seconds(e.latency)}." for e in before if e.fits]

    def _request(self) -> str:
        e, of = self.chosen, f"{self.batch_size} x {self.prompt_tokens} tokens"
        of += f" and {self.new_tokens} more each" if self.new_tokens else ""
        parts = f"the prompt's pass is bound by {e.prompt.bound}" + (
            f", a token's by {e.token.bound}" if e.token else ""
        )
        return f"{e.scheme}: a request of {of} takes about {seconds(e.latency)}; {parts}."

    def _verdict(self) -> list[str]:
        bound, error, meets = seconds(self.bound), self.machine.error, self.meets
        if meets == "no":
            found = [
                f"Nothing that fits meets the bound of {bound}: this is the fastest. A smaller model, fewer "
                "tokens or a faster machine is needed."
            ]
        elif error is None:
            found = [
                f"It meets the bound of {bound} as estimated; how far estimates lie off on such a machine has not been "
                "measured."
            ]
        elif meets == "yes":
            found = [f"It meets the bound of {bound}, also where the estimate is {error} times too short."]
        else:
            found = [
                f"It meets the bound of {bound} as estimated; estimates are within {error} times of what was measured."
            ]
            surer = next((e for e in self.estimates if e.fits and e.latency * error <= self.bound), None)
            if surer is not None:
                found.append(f"{surer.scheme}, at about {seconds(surer.latency)}, would meet it even then.")
        if not self.shape.linear:
            found.append("Int8 is left out: the model's matrices are not nn.Linear, which quantize_model replaces.")
        return found


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
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        least = min(e.memory for e in estimates)
        raise ValueError(
            f"machine: expected memory of at least {_gigabytes(least)} for {shape.parameters / 1e6:.0f} M parameters, "
            f"got {_gigabytes(machine.memory)}"
        )
    # They stand in the order of accuracy.
    chosen = next((e for e in fitting if e.latency <= latency), None) or min(fitting, key=lambda e: e.latency)
    return Recommendation(chosen, estimates, machine, shape, latency, batch_size, prompt_tokens, new)


def estimate(scheme: str, shape: Shape, machine: Machine, batch: int, prompt: int, new: int) -> Estimate:
    """The time and memory of one scheme: new tokens behind each of `batch` prompts, none for an encoder."""
    held = SCHEMES[_floating(scheme, machine)]
    prompt_part = _pass(scheme, shape, machine, batch, prompt, 0, "encoder" if shape.task != "decoder" else "decoder")
    token = None
    latency = prompt_part.seconds
    if new:
        # A decoder's cache grows from the prompt by all new tokens; its middle stands for all.
        cached = prompt + new // 2 if shape.task == "decoder" else prompt
        token = _pass(scheme, shape, machine, batch, 1, cached, "decoder")
        # The prompt's pass gives a decoder's first token; an encoder-decoder's first needs one of its decoder's.
        latency += token.seconds * (new if shape.task == "encoder-decoder" else new - 1)
    memory = (
        shape.layers * shape.layer_weights * SCHEMES[scheme] + shape.embedding_weights * held
        + 2 * batch * (prompt + new) * shape.layers * shape.narrow * held * bool(new)
    )  # fmt: skip
    backends = _backends(scheme, shape, machine, held, batch if new else batch * prompt)
    return Estimate(scheme, backends, prompt_part, token, latency, memory, memory <= machine.memory)


def _floating(scheme: str, machine: Machine) -> str:
    """In what everything but the linear layers is: in int8 the output's matrix, too."""
    if scheme != "int8":
        return scheme
    return "float32" if machine.device == "cpu" else "bfloat16"


def _pass(scheme: str, shape: Shape, machine: Machine, batch: int, rows: int, cached: int, side: str) -> Part:
    """A pass of `rows` new tokens in each of `batch`, which attend to those and to `cached` ones."""
    floating, on_cpu, tokens = _floating(scheme, machine), machine.device == "cpu", batch * rows
    across = shape.task == "encoder-decoder" and side == "decoder"  # attends to the encoder as well
    of = dict.fromkeys(("arithmetic", "weights", "outputs", "cache", "elements", "calls"), 0.0)

    def products(of_scheme: str, tokens: int, layer: Layer, layers: int = 1) -> None:
        """On a CPU weights are read before they are multiplied; a GPU does both at once, and the longer one counts."""
        rates, weights = machine.rates[of_scheme], layers * layer.weights
        flops, read = 2.0 * tokens * weights / rates.flops, weights * SCHEMES[of_scheme] / rates.bytes
        if on_cpu or flops >= read:
            of["arithmetic"] += flops
        if on_cpu or flops < read:
            of["weights"] += read
        of["outputs"] += layers * layer.outputs * rates.output
        of["elements"] += tokens * layers * layer.inputs * rates.input
        of["calls"] += layers * layer.linears * rates.call

    products(scheme, tokens, shape.layer(across), shape.layers)
    if side == "decoder":
        # Of a prompt, the last token's logits alone are needed.
        products(floating, batch, Layer(shape.head_weights, shape.hidden, shape.vocab, 1))
    rates, held = machine.rates[floating], SCHEMES[floating]
    seen = cached + (rows / 2 if side == "decoder" else rows)  # a decoder's tokens see those before them
    of["arithmetic"] += 4.0 * tokens * seen * shape.wide * shape.layers / rates.flops
    of["cache"] = 2.0 * batch * cached * shape.narrow * shape.layers * held / rates.bytes
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


def _model(shape: Shape) -> str:
    layers = f"{shape.layers} layers" + (" on each side" if shape.task == "encoder-decoder" else "")
    return (
        f"The model: {shape.task}, {shape.parameters / 1e6:.0f} M parameters in {layers} of width {shape.hidden}, "
        f"vocabulary {shape.vocab}. {_scale(shape.parameters)}"
    )


def _rates_of(machine: Machine) -> str:
    came = (
        "Its rates were measured with linear layers"
        if machine.error
        else "Its rates are shares of the vendor's figures, or were never compared with whole models"
    )
    rates = (f"{s} {r.flops / 1e9:.0f} GFLOP/s, {r.bytes / 1e9:.3g} GB/s of weights" for s, r in machine.rates.items())
    return f"The machine: {machine.name}. {came}: {'; '.join(rates)}."


def _scale(parameters: int) -> str:
    if parameters < 1e9:
        return "Under a billion parameters: for phones and answers in real time."
    if parameters <= 1e10:
        return "One to ten billion: for applications of companies and services behind an API."
    return "Over ten billion: for complex tasks and research."


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


__all__ = ["Estimate", "Machine", "Part", "Recommendation", "Shape", "estimate", "recommend"]
