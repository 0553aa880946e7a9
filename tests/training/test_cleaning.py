"""Cleaning: characters mended, rules that drop what they should and nothing else, duplicates found."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.training.data import (
    Cleaner,
    ExactDuplicates,
    NearDuplicates,
    QualityFilter,
    read_documents,
    repair,
)
from llmkern.training.data.quality import _repeated_characters
from llmkern.training.data.units import units
from tests.training.scripts import TEXTS

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji of three, joined
REPAIRED = {
    "UTF-8 read as Latin-1": ("The CafÃ© was closed.", "The Café was closed."),
    "twice": ("The CafÃƒÂ© was closed.", "The Café was closed."),
    "UTF-8 read as Windows-1252": ("it was â€œgoodâ€\x9d", "it was “good”"),
    "composed": ("cafe\u0301", "café"),
    "Hangul": ("\u1112\u1161\u11ab", "한"),
    "a byte order mark": ("\ufeffText", "Text"),
    "control characters": ("a\x00b\x08c", "abc"),
    "a pair of surrogates": ("\ud83d\ude00", "\U0001f600"),
    "a lone surrogate": ("a\ud800b", "a\ufffdb"),
    "entities": ("a &amp; b", "a & b"),
    "ligatures": ("ﬁne ﬂow", "fine flow"),
    "line ends": ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
    "soft hyphens": ("un\u00adbeliev\u00adable", "unbelievable"),
    "no characters": ("a\uffffb\ufdd0", "ab"),
    "terminal colours": ("\x1b[36;44mred\x1b[0m", "red"),
    "blank lines": ("a  \n\n\n\n b\t\n", "a\n\n b"),
}
KEPT = {
    "joined emoji": FAMILY,
    "Persian joiners": "می‌خواهم",
    "wide punctuation": "你好\uff0c世界\uff01",
    "quotation marks": "„so“ «so» it\u2019s",
    "direction": "א\u200fב",
    "Greek, that looks wrong to nobody": "Ώρα καλή",
    "accents that might be wrong": "Ângela lives in São Paulo, à beira-mar",
    "no-break spaces": "« oui »",
}


@pytest.mark.parametrize(("broken", "whole"), REPAIRED.values(), ids=REPAIRED)
def test_repaired(broken, whole):
    assert repair(broken) == whole
    repair(broken).encode()


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_left_alone(text):
    assert repair(text) == text


def test_a_megabyte_of_white_space_takes_no_longer_than_one_of_text():
    """A search for white space at line ends that begins anew at each place in it would take hours."""
    code = (
        "from llmkern.training.data import Cleaner\n"
        "texts = [' ' * 10**6, 'a' + ' ' * 10**6 + 'b', ('a' + ' \\t' * 10**5 + '\\n') * 5]\n"
        "print([t[:3] for t in Cleaner(quality=None)(texts)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "['a  ', 'a\\na']\n", done.stderr


NEAR = NearDuplicates(permutations=16)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_can_be_cleaned(text):
    mended = repair(text)
    mended.encode()
    for given_text in (text, mended):
        QualityFilter(min_words=None, min_sentences=None)(given_text)
        exact = ExactDuplicates()
        assert not exact.seen(given_text) and exact.seen(given_text)
        assert (NEAR.signature(given_text).hashvalues == NEAR.signature(given_text).hashvalues).all()


VOCABULARY = [
    a + b + c for a, b, c in itertools.product(("ka", "lo", "mi", "ter"), ("na", "so", "ri"), ("m", "de", "lt"))
]


def prose(words=200, seed=0):
    draws = np.random.default_rng(seed)
    sentences = []
    while words > 0:
        count = int(draws.integers(6, 15))
        sentences.append(" ".join(draws.choice(VOCABULARY, count)).capitalize() + ".")
        words -= count
    return " ".join(sentences)


def chinese(letters=300, seed=0):
    drawn = np.random.default_rng(seed).integers(0x4E00, 0x9000, letters)
    text = "".join(map(chr, drawn))
    return "。".join(text[i : i + 20] for i in range(0, letters, 20)) + "。"


def arabic(seed):
    return "".join(chr(0x0627 + int(c)) for c in np.random.default_rng(seed).integers(0, 30, 5))


LINES = prose(120).split(". ")
DROPPED = {
    "nothing": (" \n ", "empty"),
    "short": (prose(30), "too few words"),
    "long": (prose(300), "too many words", {"max_words": 250}),
    "letters": ("a b c d e. " * 40, "words too short"),
    "chains": (" ".join(["ab" * 20 + "."] * 60), "words too long"),
    "symbols": (prose() + " ☃€™" * 200, "symbols"),
    "replacement characters": (prose() + "\ufffd" * 400, "symbols"),
    "hash signs": (prose(100).replace(" ", " #", 30), "hash signs or ellipses"),
    "ellipses": (prose(100).replace(" ", "… ", 30), "hash signs or ellipses"),
    "numbers": (prose(60) + " 12 345" * 60, "words without letters"),
    "no sentences": (prose(100).replace(".", ""), "too few sentences"),
    "filler": (prose() + " Lorem ipsum dolor sit amet.", "lorem ipsum"),
    "code": (prose() + " {", "braces", {"braces": True}),
    "bullets": ("\n".join(f"- {line}." for line in LINES), "bullets"),
    "cut lines": ("\n".join(f"{line}..." for line in prose(300).split(". ")), "lines that end in ellipses"),
    "lines again": ("\n".join(f"{line}." for line in [*LINES, *LINES[:8]]), "repeated lines"),
    "paragraphs again": ("\n\n".join(f"{a}.\n{a[::-1]}." for a in [*LINES, *LINES]), "repeated lines"),
    "one pair of words": (prose(100) + " salt water." * 30, "one 2-gram over and over"),
    "one phrase": (prose(150) + " and so it goes on and on for ever." * 12, "repeated 5-grams"),
    "Chinese over and over": (chinese(200) + "天地玄黄宇宙洪荒日月盈昃。" * 20, "one 3-gram over and over"),
    "short Chinese": (chinese(60), "too few words"),
    "short Thai": (TEXTS["Thai"][:100], "too few words"),
    "Burmese without sentences": (TEXTS["Burmese"].replace("။", ""), "too few sentences"),
    "Khmer without sentences": (TEXTS["Khmer"].replace("។", ""), "too few sentences"),
    "Tibetan without sentences": (TEXTS["Tibetan"].replace("།", ""), "too few sentences"),
    "Lao over and over": (TEXTS["Lao"] + "ຊາວປະມົງສ້າງເຮືອນໄມ້" * 20, "one 3-gram over and over"),
    "Thai digits": (TEXTS["Thai"] + " ๑๒๓๔๕" * 20, "words without letters"),
}


@pytest.mark.parametrize("case", DROPPED.values(), ids=DROPPED)
def test_dropped(case):
    text, reason, *options = case
    assert QualityFilter(**(options[0] if options else {}))(text) == reason


GOOD = {
    "prose": prose(),
    "long prose": prose(20000, seed=3),
    "Chinese": chinese(),
    "a few bullets": "\n".join([*(f"{line}." for line in LINES), "- one.", "- two."]),
    "code, unless it is not wanted": prose() + " {",
    "English": "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness. " + prose(),
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
    "ニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。しかもあとで聞くと"
    "それは書生という人間中で一番獰悪な種族であったそうだ。",
    **TEXTS,
    "Khmer with spaces of no width": "\u200b".join(units(TEXTS["Khmer"])),
    "Arabic": "؟ ".join(" ".join(arabic(20 * s + n) for n in range(20)) for s in range(5)) + "؟",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_good_texts_stay(text):
    assert QualityFilter()(text) is None


def test_signs_belong_to_their_letters():
    assert units("ที่นี่ ດ້ວຍ") == ["ที่", "นี่", "ດ້", "ວ", "ຍ"]
    assert units("བོད་ཡིན།") == ["བོ", "ད་", "ཡི", "ན།"] and units("မြို့။") == ["မြို့။"]
    assert units("ឆ្នាំ\u200bនេះ។ 12 か\u3099") == ["ឆ្", "នាំ\u200b", "នេះ។", "12", "か\u3099"]


def test_limits_of_none_are_not_looked_at():
    off = {name: None for name, value in vars(QualityFilter()).items() if not isinstance(value, bool)}
    passing = QualityFilter(**off, lorem_ipsum=False, repetition=False)
    assert all(passing(text) is None for text, *_ in list(DROPPED.values())[1:])


def test_exact_duplicates():
    exact = ExactDuplicates()
    assert not exact.seen("The cat  sat.") and exact.seen("the CAT\nsat. ") and exact.seen("\uff54he cat sat.")
    assert not exact.seen("The cat sat!") and len(exact) == 2


def edited(text, share, seed=0):
    """The text with that share of its words put in anew, in one stretch each of ten."""
    draws, words = np.random.default_rng(seed), text.split()
    for start in draws.choice(len(words) // 10, round(share * len(words) / 10), replace=False):
        words[10 * start : 10 * start + 10] = draws.choice(VOCABULARY, 10)
    return " ".join(words)


def jaccard(a, b, n=5):
    first, second = ({tuple(t[i : i + n]) for i in range(len(t) - n + 1)} for t in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_found_and_others_kept():
    near = NearDuplicates(0.8)
    originals = [prose(400, seed=n) for n in range(60)]
    assert not any(near.seen(text) for text in originals)
    close, apart = ([edited(t, share, n) for n, t in enumerate(originals)] for share in (0.03, 0.4))
    assert min(jaccard(a, b) for a, b in zip(originals, close, strict=True)) > 0.87
    assert 0.2 < max(jaccard(a, b) for a, b in zip(originals, apart, strict=True)) < 0.65
    assert sum(near.seen(text) for text in close) >= 59
    assert sum(near.seen(text) for text in apart) == 0


def test_near_duplicates_of_other_scripts_and_short_ones():
    near = NearDuplicates()
    long = chinese(2000, seed=5)
    assert not near.seen(long) and near.seen(long.replace(long[700], "天", 1))
    assert not near.seen(chinese(2000, seed=6))
    assert not near.seen("one two") and near.seen("One  two") and not near.seen("two one") and not near.seen("")


def test_texts_that_fall_into_one_band_are_compared(monkeypatch):
    near = NearDuplicates()
    assert not near.seen(prose(100))
    monkeypatch.setattr(near._tables, "query", lambda made: [0])
    assert not near.seen(prose(100, seed=1)) and near.seen(prose(100))


def test_phrases_of_letters_are_twice_as_long():
    nine = "天地玄黄宇宙洪荒日"
    assert NEAR.signature(nine).jaccard(NEAR.signature(nine + "月")) == 0.0  # each is one phrase


def test_no_character_is_counted_twice():
    assert _repeated_characters(["a"] * 12, 5) == 10


def test_a_cleaner_counts_what_it_drops():
    good = [prose(100, seed=n) for n in range(6)]
    stream = [good[0], "", good[1], "short.", good[0], good[1][:-1] + "!", *good[2:], "CafÃ© " + prose(80, seed=9)]
    cleaner = Cleaner()
    kept = list(cleaner(stream))
    assert kept == [*good, "Café " + prose(80, seed=9)]
    report = cleaner.report
    assert (report.read, report.kept, report.repaired) == (11, 7, 1)
    assert report.dropped == {"empty": 1, "too few words": 1, "exact duplicate": 1, "near duplicate": 1}
    assert report.read == report.kept + sum(report.dropped.values())
    assert report.characters_kept == sum(map(len, kept)) and report.characters_read == sum(map(len, stream))
    printed = str(report)
    assert "dropped: near duplicate" in printed and "63.6 %" in printed
    # A second source: what the first had is known.
    assert list(cleaner([good[3], prose(100, seed=30)])) == [prose(100, seed=30)]
    assert cleaner.report.dropped["exact duplicate"] == 2


def test_parts_can_be_left_out_and_given():
    twice = ["CafÃ©."] * 2
    assert list(Cleaner(repaired=False, quality=None, exact=False, near=False)(twice)) == twice
    shared = ExactDuplicates()
    assert list(Cleaner(quality=None, exact=shared, near=False)(twice)) == ["Café."] and len(shared) == 1
    own = Cleaner(quality=lambda text: "has a g" if "g" in text else None)
    assert list(own(["egg", "ham"])) == ["ham"] and own.report.dropped == {"has a g": 1}


def test_documents_are_taken_one_by_one():
    taken = []

    def stream():
        for n in range(5):
            taken.append(n)
            yield prose(100, seed=n)

    cleaned = Cleaner()(stream(), progress=True)
    next(cleaned)
    assert taken == [0]
    next(cleaned)
    assert taken == [0, 1]


def test_the_ending_says_what_a_file_is(tmp_path):
    (tmp_path / "a.jsonl.txt").write_text("no JSON")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "c.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    with gzip.open(tmp_path / "e.jsonl.gz", "wb") as file:
        file.write(b'\xef\xbb\xbf{"text": "three"}\n')
    assert list(read_documents([tmp_path])) == ["no JSON", "marked", "one", "two", "three"]


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("Café".encode() + b"\xff")
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"body": text}) for text in ("one", "two\u2028three")) + "\n\n")
    assert list(read_documents([tmp_path], field="body")) == ["Café\ufffd", "one", "two\u2028three"]
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    for path, error, words in (
        (tmp_path / "bad.jsonl", ValueError, r"bad\.jsonl:1: expected a string in 'text', got 3"),
        (tmp_path / "deep" / "b.jsonl.gz", ValueError, r"gz:1: expected a JSON object with 'text', got"),
        (tmp_path / "nowhere", FileNotFoundError, "paths: expected files or folders, got"),
        (tmp_path / "deep" / "c.pdf", FileNotFoundError, "paths: expected files or folders, got"),
    ):
        with pytest.raises(error, match=words):
            list(read_documents([path]))
    (tmp_path / "c.pdf").write_text("")
    with pytest.raises(ValueError, match=r"paths: expected files of \.txt"):
        list(read_documents([tmp_path / "c.pdf"]))


WRONG = {
    "a limit": (lambda: QualityFilter(min_words="5"), TypeError, "min_words: expected a number, got '5'"),
    "below nothing": (lambda: QualityFilter(max_symbols=-1), ValueError, "max_symbols: expected 0 or more"),
    "a flag": (lambda: QualityFilter(braces=None), TypeError, "braces: expected True or False, got None"),
    "a threshold": (lambda: NearDuplicates(1.5), ValueError, "threshold: expected a probability"),
    "a threshold of 1": (lambda: NearDuplicates(1.0), ValueError, "threshold: expected one that 128 perm.* got 1.0"),
    "too few for it": (lambda: NearDuplicates(0.99, permutations=16), ValueError, "threshold: .* 16 .* got 0.99"),
    "exact": (lambda: Cleaner(exact=5), TypeError, "exact: expected True, False or what has seen.*, got 5"),
    "near": (lambda: Cleaner(near=0.8), TypeError, "near: expected True, False or what has seen.*, got 0.8"),
    "quality": (lambda: Cleaner(quality=3), TypeError, "quality: expected a function of a text, or None, got 3"),
    "permutations": (lambda: NearDuplicates(permutations=0), ValueError, "permutations: expected a positive"),
    "bytes": (lambda: repair(b"a"), TypeError, "text: expected a string, got b'a'"),
    "one string": (lambda: list(Cleaner()("abc")), TypeError, "documents: expected an iterable of documents"),
    "a number": (lambda: list(Cleaner()([3])), TypeError, "documents: expected a string, got 3"),
    "one path": (lambda: list(read_documents("a.txt")), TypeError, "paths: expected an iterable of paths"),
}


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
