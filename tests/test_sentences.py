"""Sentences: the embedded ones, a user's own, and the words they are cut into."""

import re
from pathlib import Path

import pytest
import sklearn
import torch

from leaklib.data import load_sentences, split_words
from leaklib.data.embedded import embedded_folder


def lines():
    text = (embedded_folder() / "sentences.txt").read_text(encoding="utf-8")
    header, *rows = text.splitlines()
    return header, [row.split("\t") for row in rows]


def test_embedded_file_is_balanced_plain_and_without_repetition():
    header, rows = lines()
    assert header.startswith("# from scikit-learn ")
    assert len({sentence for _, _, sentence in rows}) == len(rows) == 640
    for split, count in (("train", 64), ("test", 16)):
        topics = [topic for part, topic, _ in rows if part == split]
        assert {topics.count(topic) for topic in topics} == {count}
        assert len(set(topics)) == 8
    for _, _, sentence in rows:
        assert 8 <= len(sentence.split()) <= 24
        assert sentence.isascii()
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "Notes " not in sentence


def test_embedded_sentences_stand_in_scikit_learn():
    header, rows = lines()
    if sklearn.__version__ not in header:
        pytest.skip("made from another version of scikit-learn")
    folder = Path(sklearn.__file__).parent / "ensemble"
    source = " ".join(" ".join(p.read_text().split()) for p in sorted(folder.rglob("*.py")))
    source = re.sub(r"\s*\[\d+\]_", "", source)  # citations
    for _, topic, sentence in rows:
        if topic == "ensembles":
            assert sentence in source


def test_windows_are_the_words_of_the_file():
    _, rows = lines()
    sentences = load_sentences(length=8, vocabulary=10_000)
    long = [r for r in rows if r[0] == "test" and len(split_words(r[2])) >= 8]
    assert len(sentences) == len(long) > 100
    for tokens, label, (_, topic, sentence) in zip(
        sentences.tokens, sentences.labels, long, strict=True
    ):
        assert sentences.words(tokens) == split_words(sentence)[:8]
        assert sentences.topics[label] == topic
    assert len(set(sentences.vocabulary)) == len(sentences.vocabulary)


def test_all_windows_slide_by_one_word():
    first = load_sentences(split="train", length=9)
    every = load_sentences(split="train", length=9, windows="all")
    _, rows = lines()
    counts = [len(split_words(r[2])) - 8 for r in rows if r[0] == "train"]
    assert len(every) == sum(max(0, count) for count in counts)
    assert torch.equal(every.tokens[0], first.tokens[0])
    assert torch.equal(every.tokens[1, :-1], first.tokens[0, 1:])


def test_rare_words_become_unknown_and_the_vocabulary_is_that_of_both_splits():
    small = load_sentences(length=8, vocabulary=50)
    assert small.vocabulary[0] == "<unk>"
    assert len(small.vocabulary) == 50
    assert 0 < small.tokens.max() < 50
    assert (small.tokens == 0).any()
    assert small.vocabulary == load_sentences(split="train", length=8, vocabulary=50).vocabulary


def test_a_seed_draws_without_replacement():
    every = {tuple(t) for t in load_sentences().tokens.tolist()}
    drawn = load_sentences(count=20, seed=3)
    again = load_sentences(count=20, seed=3)
    assert torch.equal(drawn.tokens, again.tokens)
    assert {tuple(t) for t in drawn.tokens.tolist()} <= every
    assert not torch.equal(drawn.tokens, load_sentences(count=20, seed=4).tokens)
    assert torch.equal(load_sentences(count=5).tokens, load_sentences().tokens[:5])


def test_own_text_is_one_topic_and_a_folder_one_a_file(tmp_path):
    for name in ("sea", "hill"):
        text = " ".join(f"The {name} number {i}\nis not very far away." for i in range(10))
        (tmp_path / f"{name}.txt").write_text(text)
    alone = load_sentences(tmp_path / "sea.txt", length=4)
    assert alone.topics == ("sea",)
    assert [alone.words(t) for t in alone.tokens] == [
        ["the", "sea", "number", "4"], ["the", "sea", "number", "9"]
    ]  # fmt: skip
    both = load_sentences(tmp_path, length=4, split="train")
    assert both.topics == ("hill", "sea")
    assert both.labels.tolist() == [0] * 8 + [1] * 8
    assert both.checksum != alone.checksum


def test_words():
    assert split_words("Zürich's well-known 3.14 — O'Neill, e.g. x_y") == [
        "zürich's", "well-known", "3", "14", "o'neill", "e", "g", "x", "y"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"length": 0}, "length >= 1"),
        ({"vocabulary": 1}, "vocabulary >= 2"),
        ({"count": 0}, "count >= 1"),
        ({"split": "dev"}, "'train' or 'test'"),
        ({"windows": "some"}, "'first' or 'all'"),
        ({"length": 100}, "got 0; ask for fewer or shorter"),
        ({"count": 1000}, "expected 1000 windows of 8 words"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        load_sentences(**settings)


def test_missing_and_damaged_text(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"folder with \*.txt"):
        load_sentences(tmp_path)
    for file in ("SHA256SUMS", "sentences.txt"):
        (tmp_path / file).write_bytes((embedded_folder() / file).read_bytes())
    monkeypatch.setenv("LEAKLIB_EMBEDDED", str(tmp_path))
    assert len(load_sentences(count=1)) == 1
    (tmp_path / "sentences.txt").write_text("train\ta\tChanged sentence.\n")
    with pytest.raises(ValueError, match="damaged or changed"):
        load_sentences()
