"""`python -m llmkern serve MODEL`: transformers' server, every model that it loads on the kernels (extra: serve).

Arguments and endpoints are those of `transformers serve`, among them OpenAI's /v1/chat/completions; --quantization
takes int8 as well, which quantises every linear layer but the head of a model as it is loaded. --metrics-port gives
Prometheus the counts of llmkern.monitoring at /metrics of that port (extra: eval), on --metrics-host (127.0.0.1).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llmkern import monitoring
from llmkern.models.huggingface import head
from llmkern.models.kernelize import kernelize
from llmkern.models.quantize import quantize_model
from llmkern.models.transformers import register

_NAME = "python -m llmkern serve"
_NEEDS = f'{_NAME}: expected the packages of transformers\' server (pip install "llmkern[serve]")'


def main(args: list[str]) -> None:
    """Runs the server with these arguments of the command line until it is stopped.

    Ends the process with a message where packages are missing or an argument is wrong.
    """
    try:
        import transformers.cli.serving.model_manager as served
        from transformers.cli.transformers import app
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise SystemExit(f"{_NEEDS}, and transformers 5: {error}") from error
    if not is_serve_available():
        raise SystemExit(_NEEDS)
    args = _with_metrics(args)
    register()  # what a folder's own configuration may name is then known here
    # The server makes its manager by this name, and its command line knows no other way to exchange what loads models.
    manager: Any = served
    manager.ModelManager = _manager(manager.ModelManager)
    try:
        app(args=["serve", *args], prog_name="python -m llmkern")
    except OSError as error:  # so transformers says that there is no such model
        raise SystemExit(f"{_NAME}: {error}") from error


def _with_metrics(args: list[str]) -> list[str]:
    """Answers Prometheus, where these arguments ask for it; the rest of them."""
    parser = argparse.ArgumentParser(
        prog=_NAME, add_help=False, allow_abbrev=False, usage="%(prog)s MODEL [options]",
        description="transformers' server on llmkern's kernels: its own options follow these.",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="gives Prometheus the kernels' counts at /metrics there"
    )
    parser.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="default %(default)s")
    if "--help" in args:
        parser.print_help()
    options, rest = parser.parse_known_args(args)
    if options.metrics_port is None:
        return rest
    if not 0 < options.metrics_port < 65536:
        raise SystemExit(f"{_NAME}: --metrics-port: expected 1 to 65535, got {options.metrics_port}")
    where = f"{options.metrics_host}:{options.metrics_port}"
    try:
        monitoring.start().serve(options.metrics_port, options.metrics_host)
    except ImportError as error:
        raise SystemExit(
            f'{_NAME}: --metrics-port: expected prometheus-client (pip install "llmkern[eval]")'
        ) from error
    except OSError as error:
        raise SystemExit(f"{_NAME}: --metrics-port: expected a free port, got {where}: {error}") from error
    print(f"llmkern: counts at http://{where}/metrics", file=sys.stderr, flush=True)
    return rest


def _manager(plain: Any) -> type[Any]:
    """The manager of the server's models, a subclass of transformers' own, which cannot be imported without it."""

    class KernelizedModels(plain):
        attn_implementation: str | None

        def __init__(self, *args: Any, continuous_batching: bool = False, **kwargs: Any) -> None:
            if continuous_batching:
                raise SystemExit(
                    f"{_NAME}: --continuous-batching: expected it to be left out, since llmkern's attention reads no "
                    "cache in transformers' pages; `transformers serve` has it with other attentions"
                )
            super().__init__(*args, **kwargs)

        def _validate_args(self) -> None:
            if self.attn_implementation not in (None, "llmkern"):
                raise SystemExit(
                    f"{_NAME}: --attn-implementation: expected llmkern, as without it, got {self.attn_implementation}; "
                    "`transformers serve` has others"
                )
            if self.quantization not in (None, "int8"):
                raise SystemExit(f"{_NAME}: --quantization: expected int8, got {self.quantization}")
            self.attn_implementation = None  # kernelize sets it, where the model has an interface for it

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs)
            told: list[Any] = [kernelize(model)]
            if self.quantization == "int8":
                told.append(quantize_model(model, skip=head(model), measure=False).quantization_report)
            for report in told:
                print(f"llmkern: {str(report).splitlines()[-1]}", file=sys.stderr, flush=True)
            return model

    return KernelizedModels
