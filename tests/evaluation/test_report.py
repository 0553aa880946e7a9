"""Every figure of a report is that of another way to it: by hand, by another library, by the lines that it tells."""

from __future__ import annotations

import json
import math

import pytest
import sacrebleu
import torch
from sklearn.metrics import f1_score
from torch.nn import functional as F

import llmkern
from llmkern.evaluation import ModelEvaluator
from llmkern.evaluation.report import EvaluationReport
from tests.evaluation import tiny
from tests.evaluation.conftest import KINDS, LABELS, PAIRS, again
from tests.evaluation.test_efficiency import BATCH, HEAD, LINEAR, PROMPT, attention

SECTIONS = {"format", "model", "data", "settings", "machine", "command", "models", "replaced", "equivalence", "quality",
            "size", "speed", "cost", "roofline", "code"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_missing(made, kind):
    one = made(kind)
    found = json.loads(one.report.to_json())
    assert EvaluationReport.from_json(one.report.to_json()) == one.report
    assert set(found) == SECTIONS
    schemes = one.settings.schemes
    int8 = [] if not schemes else ["int8"] if len(schemes) == 1 else [f"int8 {s}" for s in schemes]
    assert found["models"] == ["published", "kernelized", *int8]
    for section in ("size", "replaced"):
        assert found[section]
    assert set(found["size"]) == set(found["quality"]["models"]) == set(found["models"])
    assert found["quality"]["failed"] == {} and found["equivalence"]["passed"]
    phases = {"decoder": {"prefill", "decode", "training"}, "pairs": {"prefill", "decode"}}
    phases["translator"] = phases["pairs"]
    assert set(found["speed"]["phases"]) == phases.get(kind, {"prefill"})
    for phase, models in found["speed"]["phases"].items():
        assert set(models) | set(found["speed"]["not_measured"].get(phase, {})) == set(found["models"])
        for figures in models.values():
            for spread in ("latency", "tokens_per_second", "speedup"):
                assert 0 < figures[spread]["low"] <= figures[spread]["median"] <= figures[spread]["high"]
    if "failed" not in found["roofline"]:
        assert len(found["roofline"]["points"]) == sum(map(len, found["speed"]["phases"].values()))
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["date"]
    assert found["command"] == "python -m llmkern report 'a b' --x"


def test_perplexity_is_the_evaluators_and_an_independent_one(made):
    one = made("decoder")
    quality, data = one.report.content["quality"], one.report.content["data"]
    text = one.data.read_text()[: data["characters_used"]]
    assert quality["options"] == {"window": 16, "stride": 8}
    own = ModelEvaluator(one.model, tiny.tokenizer()).evaluate_perplexity([text], window=16, stride=8)
    assert quality["models"]["published"]["perplexity"] == own
    tokens = tiny.tokenizer()(text)["input_ids"]
    assert len(tokens) == data["tokens_used"] == 90
    summed, count = tiny.independent(one.model, [tokens], 16, 8)
    assert quality["models"]["published"]["predicted"] == count == 89
    assert own == pytest.approx(math.exp(summed / count), rel=1e-5)
    int8 = quality["models"]["int8 row"]
    assert int8["perplexity_change"] == int8["perplexity"] / own - 1 != 0.0
    assert abs(quality["models"]["kernelized"]["perplexity_change"]) < 1e-5


@torch.no_grad()
def test_pseudo_perplexity_hides_one_token_at_a_time(made):
    one = made("masked")
    texts = one.data.read_text().split("\n\n")
    assert one.report.content["data"]["records_used"] == len(texts) == 18
    found = []
    for text in texts:
        ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
        for place in range(1, ids.size(1)):  # the first is the tokenizer's
            hidden = ids.clone()
            hidden[0, place] = 3
            found.append(-tiny.log_probability(one.model(hidden).logits[0, place], int(ids[0, place])))
    right = math.exp(math.fsum(found) / len(found))
    assert one.report.content["quality"]["models"]["published"]["perplexity"] == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "translator"])
@torch.no_grad()
def test_bleu_is_sacrebleus(made, kind):
    one = made(kind)
    outputs = []
    for record in PAIRS:
        ids = tiny.tokenizer()(record["prompt"], return_tensors="pt")["input_ids"]
        ids_out = one.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0]
        new = ids_out if kind == "translator" else ids_out[ids.size(1) :]
        outputs.append(tiny.tokenizer().decode(new, skip_special_tokens=True))
    found = one.report.content["quality"]["models"]["published"]
    assert found["outputs"] == outputs
    streams = [[r["reference"][0] if i == 0 else r["reference"] for i, r in enumerate(PAIRS)], [None] * len(PAIRS)]
    streams[1][0] = PAIRS[0]["reference"][1]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, streams).score, rel=1e-12)


@torch.no_grad()
def test_classes_are_those_of_the_highest_logit(made):
    one = made("classifier")
    said = []
    for record in LABELS:
        ids = tiny.tokenizer()(record["text"], return_tensors="pt")["input_ids"]
        said.append(int(one.model(ids).logits.argmax()))
    truth = [record["label"] for record in LABELS]
    found = one.report.content["quality"]["models"]["published"]
    assert found["accuracy"] == sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
    assert found["f1_macro"] == f1_score(truth, said, average="macro") and found["count"] == len(truth)


@torch.no_grad()
def test_embeddings_are_compared_by_their_directions(made):
    one = made("encoder")
    quantised = again(one, "quality")["models"]["int8"]
    found = []
    for text in one.data.read_text().split("\n\n"):
        ids = tiny.tokenizer()(text, return_tensors="pt")["input_ids"]
        rows = [m(ids).last_hidden_state[0].double().mean(0) for m in (one.model, quantised)]
        found.append(float(F.cosine_similarity(*rows, dim=0)))
    told = one.report.content["quality"]["models"]["int8"]
    assert told["cosine_mean"] == pytest.approx(sum(found) / len(found), abs=1e-6) and told["cosine_least"] < 1 - 1e-6
    assert told["cosine_least"] == pytest.approx(min(found), abs=1e-6)
    assert one.report.content["quality"]["models"]["kernelized"]["neighbours_kept"] == pytest.approx(1.0, abs=0.1)


def test_neighbours():
    from llmkern.evaluation.report.quality import neighbours_kept

    rows = F.normalize(torch.eye(8, dtype=torch.float64) + 0.1 * torch.arange(8.0)[:, None], dim=-1)
    assert neighbours_kept(rows, rows) == 1.0 and neighbours_kept(rows[:5], rows[:5]) is None
    other = F.normalize(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    right = []
    for i in range(8):
        nearest = [
            set(sorted((j for j in range(8) if j != i), key=lambda j: -float(x[i] @ x[j]))[:5]) for x in (rows, other)
        ]
        right.append(len(nearest[0] & nearest[1]) / 5)
    assert neighbours_kept(rows, other) == pytest.approx(sum(right) / 8)


def test_flops_and_bytes_by_hand(made):
    one = made("decoder").report.content
    phases = {name: models["published"] for name, models in one["speed"]["phases"].items()}
    assert phases["prefill"]["flops"] == 2 * BATCH * PROMPT * LINEAR + attention(PROMPT, PROMPT)
    assert phases["decode"]["flops"] == 2 * BATCH * LINEAR + attention(1, PROMPT + 1)
    assert phases["training"]["flops"] == 6 * BATCH * PROMPT * LINEAR + attention(PROMPT, PROMPT) * 7 // 2
    if "failed" in one["roofline"]:
        pytest.skip(one["roofline"]["failed"])
    read = 4 * (LINEAR + 5 * 32) + 4 * HEAD // 2 * 2  # with norms, and rotary's frequencies, twice
    least = {
        "prefill": read + 4 * 32 * min(16, BATCH * PROMPT),  # rows of the embedding
        "decode": read + 4 * 32 * BATCH + 4 * 2 * 2 * BATCH * 2 * PROMPT * HEAD,  # and two heads' keys and values
        "training": read + 4 * 32 * 16 + 4 * (LINEAR + 5 * 32 + 16 * 32),
    }
    peaks = one["roofline"]["peaks"]
    for point in one["roofline"]["points"]:
        if point["model"] != "published":
            continue
        figures = phases[point["phase"]]
        assert point["least_bytes"] == least[point["phase"]] and point["flops"] == figures["flops"]
        assert point["intensity"] == figures["flops"] / least[point["phase"]]
        assert point["flops_per_second"]["median"] == figures["flops"] / figures["latency"]["median"]
        assert point["flops_per_second"]["low"] == figures["flops"] / figures["latency"]["high"]
        roof = min(peaks["float32"], point["intensity"] * peaks["memory"])
        assert point["roof"] == roof and point["share_of_roof"]["median"] == point["flops_per_second"]["median"] / roof


def test_cost_by_hand(made):
    one = made("decoder").report.content
    rates = {n: f["tokens_per_second"]["median"] for n, f in one["speed"]["phases"]["decode"].items()}
    cost, service = one["cost"]["phases"]["decode"], one["cost"]["service"]
    for name, rate in rates.items():
        assert cost[name]["per_million_tokens"]["median"] == pytest.approx(0.5 / 3600 / (rate * 0.4) * 1e6)
        assert cost[name]["relative"]["median"] == pytest.approx(
            1 / one["speed"]["phases"]["decode"][name]["speedup"]["median"]
        )
        machines = math.ceil(1e9 / (rate * 86400 * 0.4))
        assert service["models"][name]["machines"] == machines
        assert service["models"][name]["cost_per_year"] == pytest.approx(machines * 0.5 * 8760)
    assert set(one["cost"]["phases"]["training"]) == {"published", "kernelized"}  # int8 weights are not trained
    first, other = (service["models"][name]["cost_per_year"] for name in ("published", "int8 row"))
    assert service["return"]["int8 row"]["saved_per_year"] == pytest.approx(first - other)
    assert "published" not in service["return"]


def test_what_was_replaced_is_what_kernelize_says(made):
    one = made("decoder")
    found = one.report.content["replaced"]
    names = again(one, "replaced")
    told = llmkern.report(names["kernelized"])
    assert [m["name"] for m in found["kernelized"]["modules"] if m["by"]] == told.replaced
    assert sum(g["count"] for g in found["kernelized"]["groups"]) == found["kernelized"]["count"] == len(told.modules)
    layers = names["models"]["int8 row"].quantization_report
    assert [e["name"] for e in found["int8"]["int8 row"]["layers"] if not e["left"]] == layers.replaced
    assert {"left": "named in skip", "count": 1, "first": "lm_head"} in found["int8"]["int8 row"]["groups"]


def test_equivalence_is_verifys(made):
    one = made("decoder")
    found = one.report.content["equivalence"]
    rows = again(one, "equivalence")["found"].rows
    assert found["gradients"] and found["count"] == len(rows) == 1 + len(list(one.model.parameters()))
    for told, row in zip(found["rows"], rows, strict=True):
        assert told["kind"] == row.kind and row.name.endswith(told["name"])
        assert (told["max_error"], told["rms_allowed"]) == (row.max_error, row.rms_allowed)
    plain = made("masked").report.content["equivalence"]
    assert not plain["gradients"] and [row["kind"] for row in plain["rows"]] == ["output"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_quality_make_its_figures_again(made, kind):
    one = made(kind)
    told, found = one.report.content["quality"], again(one, "quality")["found"]
    for name in one.report.content["models"]:
        figures, value = told["models"][name], found[name]
        if told["measure"] == "embeddings":
            assert (figures["cosine_mean"], figures["cosine_least"]) == (float(value.mean()), float(value.min()))
        elif told["measure"] in ("generation", "classification"):
            assert all(getattr(value, one["field"]) == figures[one["field"]] for one in told["figures"])
        else:
            assert value == figures["perplexity"]


def test_the_lines_of_the_other_sections_run(made):
    one = made("decoder")
    content = one.report.content
    names = again(one, "speed")
    speed = names["found"]
    assert names["share"] == {name: size["share"] for name, size in content["size"].items()}
    for phase, models in content["speed"]["phases"].items():
        for name, figures in models.items():
            assert speed[name].phases[phase].flops == figures["flops"]
            assert content["size"][name]["weight_bytes"] == speed[name].weight_bytes
    told = again(one, "cost")["told"]
    assert _paths(told) == _paths(content["cost"]) and told["service"]["models"].keys() == set(content["models"])
    if "failed" not in content["roofline"]:
        told = again(one, "roofline")["told"]
        assert _paths(told) == _paths(content["roofline"])
        for point, other in zip(told["points"], content["roofline"]["points"], strict=True):
            assert all(point[f] == other[f] for f in ("model", "phase", "least_bytes", "intensity", "flops"))
    told = again(made("translator"), "cost")["told"]
    assert _paths(told) == _paths(made("translator").report.content["cost"])


def _paths(value, path=""):
    """Where figures stand."""
    if not isinstance(value, (dict, list)):
        return {path}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {found for key, one in entries for found in _paths(one, f"{path}/{key}")}


def test_the_users_model_is_as_it_was(made):
    one = made("decoder")
    fresh = type(one.model).from_pretrained(one.folder / "weights").state_dict()
    assert all(torch.equal(p, fresh[name]) for name, p in one.model.state_dict().items())
    assert not one.model.training and type(one.model.model.norm).__name__ == "LlamaRMSNorm"
    assert all(p.grad is None for p in one.model.parameters())
