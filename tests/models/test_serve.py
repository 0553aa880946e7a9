"""`python -m llmkern serve`: its OpenAI-compatible endpoint, asked by OpenAI's own client."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import llmkern

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from tests.models import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]
WAYS = {"as it is": [], "int8": ["--quantization", "int8"]}
INT8 = {"skip": ("lm_head",), "measure": False}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "llmkern", "serve", *args]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One that runs, with what it printed so far."""

    def __init__(self, folder: Path, log: Path, options: list[str]) -> None:
        port, metrics = free_port(), free_port()
        options = [*options, "--device", "cpu", "--metrics-port", str(metrics)]
        arguments = command(str(folder), "--host", "127.0.0.1", "--port", str(port), *options)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file, env=environment)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            if "Uvicorn running" in self.log.read_text():
                return
            time.sleep(0.1)
        raise AssertionError(f"no server after two minutes\n{self.log.read_text()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.save(path)
    return path


@pytest.fixture(scope="module")
def servers(folder):
    """Both at once: most of the wait is imports."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name, options in WAYS.items():
            made[name] = Server(folder, folder / f"{name}.log", options)
            stack.callback(made[name].stop)
        for server in made.values():
            server.wait()
        yield made


def expected(folder, way):
    """The greedy answer of the plain model, in int8 of ours, in this process."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if way == "int8":
        llmkern.kernelize(model)
        llmkern.quantize_model(model, **INT8, progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(made[0, ids.size(1) :], skip_special_tokens=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_chat_gives_the_models_greedy_text(way, servers, folder):
    asked = {"model": str(folder), "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    client = servers[way].client
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text == expected(folder, way) and len(text.split()) >= 3
    streamed = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
    assert "".join(streamed) == text and len([part for part in streamed if part]) > 1
    with urllib.request.urlopen(servers[way].metrics, timeout=30) as answer:
        counts = answer.read().decode()
    served = "decoder_layer" if way == "int8" else "attention"
    assert re.search(rf'llmkern_calls_total{{backend="cpu",operator="{served}"}} [1-9]', counts), counts
    log = servers[way].log.read_text()
    assert re.search(r"llmkern: (\d+) of \1 modules that kernels might serve replaced", log)
    assert ("llmkern: 14 of 15 linear layers in int8" in log) == (way == "int8")


def test_a_folder_saved_in_int8_is_served_so(servers, folder, tmp_path):
    """By the server that was not told of int8."""
    int8_config = pytest.importorskip("llmkern.models.int8_config")
    config = int8_config.LlmkernInt8Config(**INT8)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, tmp_path / name)
    server = Server(tmp_path, tmp_path / "log", [])
    try:
        server.wait()
        asked = {"model": str(tmp_path), "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        assert server.client.chat.completions.create(**asked).choices[0].message.content == expected(folder, "int8")
    finally:
        server.stop()


def test_several_ask_at_once(servers, folder):
    """And each gets the answer that it would get alone, through the endpoint for plain text too."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(prompt: str) -> str:
        made = servers["as it is"].client.completions.create(
            model=str(folder), prompt=prompt, max_tokens=6, temperature=0
        )
        return made.choices[0].text

    prompts = ["the cat", "a dog ran under the tree", "the bird flew over a house and"]
    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, prompts)) == alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attn-implementation", "sdpa"], "--attn-implementation: expected llmkern"),
        (["--quantization", "bnb-8bit"], "--quantization: expected int8, got bnb-8bit"),
        (["--continuous-batching"], "--continuous-batching: expected it to be left out"),
    ],
)
def test_arguments_that_cannot_be_served_are_named(options, words, folder, monkeypatch):
    from transformers.cli.serving import model_manager

    from llmkern.models.serve import main

    monkeypatch.setattr(model_manager, "ModelManager", model_manager.ModelManager)  # and back after
    with pytest.raises(SystemExit, match=f"^python -m llmkern serve: {words}"):
        main([str(folder), *options])
    with pytest.raises(SystemExit, match=r"^python -m llmkern serve: .*nowhere"):
        main([str(folder / "nowhere")])


def test_missing_packages_are_named(monkeypatch):
    from llmkern.models.serve import main

    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=r'expected the packages .*pip install "llmkern\[serve\]"'):
        main(["model"])


def test_help_names_our_options_and_those_of_transformers():
    done = subprocess.run([sys.executable, "-m", "llmkern", "serve", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--metrics-port PORT" in done.stdout and "--quantization" in done.stdout
