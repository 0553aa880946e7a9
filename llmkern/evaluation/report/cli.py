"""`python -m llmkern report MODEL --data FILE`: what a model loses and gains on llmkern, as one page.

Writes report.html, report.md, report.json and roofline.svg into a folder.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkern.evaluation import efficiency, running
from llmkern.evaluation.cost import MachineCost
from llmkern.evaluation.report.data import read_data
from llmkern.evaluation.report.loading import load, needs
from llmkern.evaluation.report.making import make_report
from llmkern.evaluation.report.settings import ReportSettings

#: Told one by one; those of the quality are as many as there are models.
STAGES = ("loading", "kernels", "equivalence", "quality", "speed", "cost and roofline")
BOUGHT = ("price", "lifetime_years", "power_watts", "price_per_kwh")
#: What the measures of data of a format import.
MEASURED_BY = {"pairs": ("sacrebleu", "rouge_score"), "labels": ("sklearn",)}
QUICK = {"tokens": 256, "rounds": 5, "prompt_tokens": 32, "max_new_tokens": 8}


def main(arguments: Sequence[str]) -> int:
    """Runs the command with these arguments; 0, or 2 behind a message where an argument is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    progress: Stages | None = None
    try:
        settings = _settings(options)
        # Before a model is loaded and measured, which takes its time.
        data = read_data(options.data)
        needs("jinja2", "tqdm", "transformers", extra="llmkern[report]")
        needs(*MEASURED_BY.get(data.format, ()), extra="llmkern[eval]")
        named = options.output or (_folder(options.name) if options.name else None)
        if named:
            _writable(named)
        progress = Stages()
        progress("loading")
        _quiet()
        loaded = load(options.model, dtype=options.dtype)
        folder = named or _folder(loaded.name)
        if not named:
            _writable(folder)
        report = make_report(
            loaded.model, loaded.tokenizer, data, settings, name=options.name or loaded.name, loading=loaded.code,
            note=loaded.note, command=arguments, stage=progress,
        )  # fmt: skip
        progress.close()
        written = report.save(folder)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if progress is not None:
            progress.close()
        parser.exit(2, f"{parser.prog}: {_by_option(str(error))}\n")
    print(f"report: {', '.join(map(str, written))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llmkern report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that transformers can load, GGUF file, or name in its local cache")
    add(
        "--data",
        required=True,
        metavar="FILE",
        help="text, or lines of JSON: {text}, {prompt, reference}, {text, label}",
    )
    add("--name", help="of the model in the report (default: that of the folder or the file)")
    add("--output", metavar="FOLDER", help="to write to (default report-NAME)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (auto: as saved)",
    )
    add("--schemes", default="outliers", help="of int8, with commas; none (default %(default)s)")
    add("--gradients", action="store_true", help="hold the gradients of all parameters to the contract too")
    add("--tokens", type=int, help="of the data that count (default by the kind of model)")
    add("--window", type=int, help="of a perplexity, tokens (default: the most the model takes, at most 512)")
    add("--stride", type=int, help="of its windows (default: half a window)")
    add("--max-new-tokens", type=int, help="of each generated text (default 64)")
    add("--phases", help=f"with commas, of {', '.join(efficiency.PHASES)} (default: what the model has but training)")
    add("--prompt-tokens", type=int, help="of a prefill (default 128)")
    add("--batch-size", type=int, default=1, help="of what is timed (default %(default)s)")
    add("--rounds", type=int, help="of the measurement (default 21)")
    add("--precision", default="float32", choices=running.PRECISIONS, help="below float32: autocast")
    add("--quick", action="store_true", help="small sizes and few rounds: does it run at all?")
    money = parser.add_argument_group("cost", "of the machine by the hour, or of a bought one by all four of the next")
    for name, what in (
        ("cost-per-hour", "what an hour costs"), ("price", "of the machine"), ("lifetime-years", "in which it is paid"),
        ("power-watts", "that it draws on average"), ("price-per-kwh", "of electric energy"),
        ("tokens-per-day", "to be served"), ("investment", "what the change costs once"),
    ):  # fmt: skip
        money.add_argument(f"--{name}", type=float, help=what)
    money.add_argument("--currency", default="", help="written behind amounts")
    money.add_argument("--utilisation", type=float, default=1.0, help="share of the time at work (default %(default)s)")
    money.add_argument("--years", type=float, default=1.0, help="for which the return is counted (default %(default)s)")
    return parser


def _settings(options: argparse.Namespace) -> ReportSettings:
    given: dict[str, Any] = {}
    for name in ("tokens", "window", "stride", "max_new_tokens", "prompt_tokens", "rounds"):
        value = getattr(options, name)
        if value is None and options.quick:
            value = QUICK.get(name)
        if value is not None:
            given[name] = value
    if not options.schemes:
        raise ValueError("schemes: expected names with commas between them, or none, got ''")
    schemes = () if options.schemes == "none" else tuple(options.schemes.split(","))
    phases = None if options.phases is None else tuple(options.phases.split(","))
    for name in ("gradients", "batch_size", "precision", "currency", "utilisation", "tokens_per_day", "investment",
                 "years"):  # fmt: skip
        given[name] = getattr(options, name)
    return ReportSettings(schemes=schemes, phases=phases, machine=_machine(options), **given)


def _machine(options: argparse.Namespace) -> MachineCost | None:
    bought = {name: getattr(options, name) for name in BOUGHT}
    missing = [name for name, value in bought.items() if value is None]
    if options.cost_per_hour is not None:
        others = [name for name in BOUGHT if name not in missing and name != "power_watts"]
        if others:
            raise ValueError(f"{others[0]}: expected --cost-per-hour or the price of a machine, got both")
        return MachineCost(options.cost_per_hour, bought["power_watts"] or 0.0)
    if len(missing) == len(BOUGHT):
        return None
    if missing:
        raise ValueError(f"{missing[0]}: expected it beside the price of a machine, got none")
    return MachineCost.bought(**bought)


def _by_option(message: str) -> str:
    """A message with its arguments as the command line has them."""
    name, colon, rest = message.partition(":")
    known = name.replace("_", "-")
    rest = re.sub(r"\btokens_per_day\b", "--tokens-per-day", rest)
    return f"--{known}:{rest}" if colon and re.fullmatch(r"[a-z-]+", known) and known != "model" else message


def _folder(name: str) -> str:
    return "report-" + re.sub(r"[^\w.-]+", "-", name)


def _writable(folder: str) -> None:
    """Raises ValueError where a report could not be written there. Leaves nothing behind."""
    place, made = Path(folder), []
    try:
        if place.exists() and not place.is_dir():
            raise ValueError(f"output: expected a folder, got {folder!r}, which is a file")
        for one in (*reversed(place.parents), place):
            if not one.exists():
                one.mkdir()
                made.append(one)
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        if str(error).startswith("output:"):
            raise
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"output: expected a folder that can be written to, got {folder!r}: {why}") from error
    finally:
        for one in reversed(made):
            one.rmdir()


def _quiet() -> None:
    """Loading shows its bars on a terminal alone."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


class Stages:
    """What is being done: a bar where stderr is a terminal, else a line for each."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.began = time.monotonic()
        self.bar = tqdm(total=len(STAGES), disable=None, leave=False, bar_format="{desc:<24}{bar}| {elapsed}")
        self.seen = 0

    def __call__(self, what: str) -> None:
        if self.bar.disable:
            print(f"report: {what} (at {time.monotonic() - self.began:.0f} s)", file=sys.stderr, flush=True)
            return
        self.bar.set_description_str(what)
        if what in STAGES:
            self.bar.update(1 if self.seen else 0)
            self.seen += 1

    def close(self) -> None:
        self.bar.close()
