"""`python -m llmkern report`: it writes its files without a network, and names what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import llmkern
from llmkern.evaluation import MachineCost
from llmkern.evaluation.report import ReportSettings, cli, load, make_report, read_data
from llmkern.evaluation.report.data import fitting
from tests.evaluation import tiny
from tests.evaluation.conftest import write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "models" / "Tiny-Llama"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_one_command_without_a_network(decoder, tmp_path):
    data = write(tmp_path, "text")
    command = [sys.executable, "-m", "llmkern", "report", str(decoder), "--data", str(data), "--quick",
               "--tokens", "40", "--prompt-tokens", "8", "--cost-per-hour", "2"]  # fmt: skip
    # A proxy that nobody answers at: whatever asked for something outside would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    where = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=where, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "report-Tiny-Llama"
    assert {p.name for p in folder.iterdir()} >= {"report.html", "report.md", "report.json"}
    found = json.loads((folder / "report.json").read_text())
    assert found["model"]["name"] == "Tiny-Llama" and found["settings"]["rounds"] == 5
    assert found["command"].startswith(f"python -m llmkern report {decoder} --data {data} --quick")
    for stage in ("loading", "kernels", "equivalence", "quality, int8", "speed", "cost and roofline"):
        assert f"report: {stage} (at " in done.stderr
    assert str(Path("report-Tiny-Llama") / "report.html") in done.stdout


def run(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code, capsys.readouterr().err


WRONG = {
    "no such folder": (["/no/such"], r"model: expected a folder that transformers can load.*'/no/such'"),
    "no such GGUF file": (["/no/such.gguf"], "model: expected a GGUF file, got '/no/such.gguf', which is none"),
    "a scheme": (["--schemes", "int4"], "int4"),
    "that is calibrated": (["--schemes", "static"], "--schemes: expected those that need no calibration data"),
    "twice": (["--schemes", "row,row"], "--schemes: expected each once"),
    "a phase": (["--phases", "fill"], "--phases: expected one of prefill, decode, training, got 'fill'"),
    "no tokens": (["--tokens", "0"], "--tokens: expected a positive integer, got 0"),
    "a window": (["--window", "1"], "--window: expected at least 2, got 1"),
    "no number": (["--rounds", "many"], "argument --rounds: invalid int value"),
    "no room": (["--prompt-tokens", "60"], "--prompt-tokens: expected at most 37, for which .* got 60"),
    "too many rounds": (["--rounds", "80"], "--rounds: expected at most 57, for which the model has room, got 80"),
    "half a price": (["--price", "9", "--power-watts", "5"], "--lifetime-years: expected it beside the price"),
    "two prices": (["--price", "9", "--cost-per-hour", "5"], "--price: expected --cost-per-hour or the price"),
    "a negative price": (["--cost-per-hour", "-1"], "--cost-per-hour: expected a number above 0, got -1"),
    "service without a price": (["--tokens-per-day", "9"], "--tokens-per-day: expected a machine's cost"),
    "investment without service": (
        ["--cost-per-hour", "1", "--investment", "9"], "--investment: expected --tokens-per-day beside it",
    ),
    "an investment of nothing": (
        ["--cost-per-hour", "1", "--tokens-per-day", "9", "--investment", "0"],
        "--investment: expected an amount above 0, of which there is a return, got 0",
    ),
    "a stride over the window": (["--window", "8", "--stride", "9"], "--stride: expected at most window = 8, got 9"),
    "over the model's": (["--stride", "70"], "--stride: expected at most window = 64, got 70"),
    "no schemes": (["--schemes", ""], "--schemes: expected names with commas between them, or none"),
    "utilisation": (["--utilisation", "1.5"], "--utilisation: expected a share above 0 and up to 1, got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name, decoder, tmp_path, capsys):
    arguments, words = WRONG[name]
    model = [] if arguments[0].startswith("/") else [decoder]
    code, said = run([*model, *arguments, "--data", write(tmp_path, "text"), "--output", tmp_path / "out"], capsys)
    assert code == 2 and re.search(words, said), said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "not UTF-8": (b"good\nb\xffd", "whose line 2 is not UTF-8"),
    "binary": (b"a\0b", "holds bytes of 0"),
    "no JSON": (b'{"text": "a"}\n{"text": ', "line 2: expected an object of JSON"),
    "a list": (b'{"text": "a"}\n\n["a"]', "line 3: expected an object of JSON, got '\\[\"a\"\\]'"),
    "unknown fields": (b'{"txt": "a"}', "line 1: expected the fields .* got 'txt'"),
    "a field too many": (b'{"text": "a", "more": 1}', "line 1: expected the fields .* got 'text', 'more'"),
    "no fields": (b"{}", "line 1: expected the fields .* got none"),
    "mixed": (b'{"text": "a"}\n{"text": "a", "label": 1}', "line 2: expected the fields of the lines before, text"),
    "a number": (b'{"text": 3}', "line 1: expected a text for 'text', got '3'"),
    "no text": (b'{"text": " "}', "line 1: expected a text for 'text'"),
    "a wrong reference": (b'{"prompt": "a", "reference": []}', "expected a text or a list of texts for 'reference'"),
    "deep": (b"[" * 200000, "line 1: expected an object of JSON"),
    "half a character": (b'{"text": "a"}\n{"text": "\\ud800 b"}', "line 2: expected characters for 'text', got"),
    "a wrong label": (b'{"text": "a", "label": true}', "expected a number or a name for 'label', got 'true'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_data(name, decoder, tmp_path, capsys):
    content, words = FILES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    code, said = run([decoder, "--data", path], capsys)
    assert code == 2 and re.search(words, said) and str(path) in said, said


def test_a_list_of_records(decoder, tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "the cat"}, {"text": "a dog"}], indent=1))
    data = read_data(path)
    assert data.format == "texts" and data.column("text") == ["the cat", "a dog"]
    path.write_text('{"text": "the cat"}\n{"text": "a dog"}\n')
    assert read_data(path).records == data.records
    for content, words in (
        ('[{"text": "a"}, {"txt": "b"}]', "record 2: expected the fields .* got 'txt'"),
        ('{"text": "a"\n{"text": "b"}', "line 1: expected an object of JSON"),
        ("the cat", "line 1: expected an object of JSON"),
        ("[]", "line 1: expected an object of JSON"),
    ):
        path.write_text(content)
        code, said = run([decoder, "--data", path], capsys)
        assert code == 2 and re.search(words, said), said


@pytest.mark.parametrize("package", ["tqdm", "jinja2", "transformers", "sacrebleu", "rouge_score"])
def test_a_package_that_is_not_there_is_named_at_the_start(package, decoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, said = run([decoder, "--data", write(tmp_path, "pairs")], capsys)
    assert code == 2 and f'expected {package}, which pip install "llmkern[' in said and "loading" not in said


def test_no_file(decoder, tmp_path, capsys):
    code, said = run([decoder, "--data", tmp_path / "none"], capsys)
    assert code == 2 and "--data: expected a file of text" in said and "No such file" in said


KINDS = {
    "labels for a decoder": (tiny.llama, {"text": "a", "label": 0}, 'lines of {"prompt", "reference"} or text'),
    "text for a translator": (tiny.t5, {"text": "a"}, 'lines of {"prompt", "reference"} for an encoder-decoder'),
    "pairs for an encoder": (tiny.bert, {"prompt": "a", "reference": "b"}, "an encoder with a language model's head"),
    "a class too many": (
        lambda: tiny.bert("BertForSequenceClassification", num_labels=2), {"text": "a", "label": 2},
        "record 1: expected the label 0 to 1, got 2",
    ),
    "an unknown class": (
        lambda: tiny.bert("BertForSequenceClassification", num_labels=2), {"text": "a", "label": "good"},
        "record 1: expected the label one of LABEL_0, LABEL_1, got 'good'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_data_that_says_nothing_of_such_a_model(name, tmp_path):
    build, record, words = KINDS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(words)):
        make_report(build(), tiny.tokenizer(), path)


def test_what_cannot_be_written_is_said_before_anything_is_measured(decoder, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    code, said = run([decoder, "--data", write(tmp_path, "text"), "--output", taken], capsys)
    assert code == 2 and re.search("--output: expected a folder, got '.*taken', which is a file", said)
    assert "report:" in said and "kernels" not in said


@pytest.mark.parametrize("place", ["taken/x", "a\0b", "n" * 300, "/proc/nope/x"])
def test_so_is_a_place_where_nothing_can_be(place, decoder, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    data = write(tmp_path, "text")
    before = sorted(tmp_path.iterdir())
    code, said = run([decoder, "--data", data, "--output", tmp_path / place], capsys)
    assert code == 2 and "--output: expected a folder that can be written to, got" in said and "kernels" not in said
    monkeypatch.chdir(tmp_path)
    long = decoder.parent / ("m" * 250)
    if not long.exists():
        long.symlink_to(decoder)
    code, said = run([long, "--data", data], capsys)  # whose name is known when it is loaded
    assert code == 2 and "--output: expected a folder that can be written to" in said and "kernels" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_probe_leaves_nothing(tmp_path):
    cli._writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_what_make_report_refuses(tmp_path):
    path = write(tmp_path, "text")
    with pytest.raises(TypeError, match=re.escape("model: expected an nn.Module, got str")):
        make_report("gpt2", tiny.tokenizer(), path)
    with pytest.raises(TypeError, match="tokenizer: expected the model's, got None"):
        make_report(tiny.llama(), None, path)
    model = tiny.llama()
    llmkern.kernelize(model)
    with pytest.raises(ValueError, match="model: expected it as published, got one that is kernelized"):
        make_report(model, tiny.tokenizer(), path)
    with pytest.raises(TypeError, match=re.escape("schemes: expected a tuple of names, got 'row'")):
        ReportSettings(schemes="row")
    with pytest.raises(TypeError, match="machine: expected a MachineCost or None, got float"):
        ReportSettings(machine=0.4)


def test_names_of_labels_and_what_is_no_extension(tmp_path):
    path = tmp_path / "data"  # which begins with an object of JSON
    path.write_text('{"text": "the cat", "label": "LABEL_1"}\n\n{"text": "a dog", "label": 0}\n')
    data = read_data(path)
    assert data.format == "labels" and data.column("label") == ["LABEL_1", 0]
    from llmkern.evaluation.report.quality import labels_of

    assert labels_of(tiny.bert("BertForSequenceClassification", num_labels=2), data) == [1, 0]
    path.write_text("\ufeffthe cat {sat}\n")
    assert read_data(path).records == ({"text": "the cat {sat}\n"},)


def test_texts_end_behind_the_last_word_that_fits(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("the cat sat on\nthe  mat\n\na dog ran\n")
    data, tokenizer = read_data(path), tiny.tokenizer()
    assert data.used(tokenizer, 6).column("text") == ["the cat sat on\nthe"]
    assert data.used(tokenizer, 100).column("text") == [path.read_text()]
    lines = data.lines()
    assert lines.column("text") == ["the cat sat on", "the  mat", "a dog ran"]
    assert lines.used(tokenizer, 8).column("text") == ["the cat sat on", "the  mat"]
    assert lines.used(tokenizer, 1).column("text") == ["the cat sat on"]  # at least one
    cut = lines.used(tokenizer, 100, limit=4)
    assert cut.column("text") == ["the cat sat", "the  mat", "a dog ran"] and cut.cut == 1
    for count in range(2, 12):
        text = fitting(tokenizer, path.read_text(), count)
        assert len(tokenizer(text)["input_ids"]) <= count and path.read_text().startswith(text)


UNSPACED = {
    "Chinese": ("今天天气很好我们去公园散步。" * 20, 100),
    "Thai": ("สวัสดีครับที่นี่อากาศดีมาก" * 20, 100),
    "behind one space": ("你好 " + "今天天气很好" * 40, 100),
    "one long word": ("x" * 500, 100),
}


@pytest.mark.parametrize("name", UNSPACED)
def test_texts_without_spaces_end_where_the_tokens_do(name):
    text, tokens = UNSPACED[name]
    for encode in (list, str.encode):  # a token a character, and a token a byte
        found = fitting(lambda t, verbose, encode=encode: {"input_ids": list(encode(t))}, text, tokens)
        assert text.startswith(found) and tokens - 12 <= len(encode(found)) <= tokens
        assert not unicodedata.category(text[len(found)]).startswith("M")


def test_kinds_of_models_and_their_names(decoder, tmp_path):
    loaded = load(str(decoder), dtype="bfloat16")
    assert loaded.name == "Tiny-Llama" and "dtype='bfloat16'" in loaded.code and loaded.note == ""
    assert str(next(loaded.model.parameters()).dtype) == "torch.bfloat16"
    berts = [tiny.bert(kind) for kind in ("BertModel", "BertForMaskedLM", "BertForSequenceClassification")]
    for model in (*berts, tiny.t5(), tiny.gpt2()):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        assert type(load(str(folder)).model) is type(model)


def test_a_bought_machine(capsys):
    options = cli._parser().parse_args(
        [
            "m",
            "--data",
            "d",
            "--price",
            "1000",
            "--lifetime-years",
            "4",
            "--power-watts",
            "100",
            "--price-per-kwh",
            "0.3",
        ]
    )
    assert cli._settings(options).machine == MachineCost.bought(1000, 4, 100, 0.3)
    assert cli._settings(cli._parser().parse_args(["m", "--data", "d"])) == ReportSettings()
