"""English sentences as numbered words: the embedded ones, or any text of the user.

A word is a run of letters, with inner hyphens and apostrophes, or a run of digits; case is dropped.
The vocabulary is `<unk>` and the most frequent words of both splits: a tokeniser is public. Every
example is a window of consecutive words of one sentence, so there is no padding: padded positions
would have a gradient of their own and tell the length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from leaklib.data.embedded import embedded_folder, verified_files
from leaklib.data.sources import listing_sha256

UNKNOWN = "<unk>"
LOST = "<lost>"
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")
_TEST_EVERY = 5

Line = tuple[str, str, str]  # split, topic, sentence


@dataclass(frozen=True, eq=False)
class SentenceSet:
    """Windows of words of one split, as token numbers.

    Attributes:
        tokens: `(sentences, length)` int64, positions in the vocabulary.
        labels: `(sentences,)` int64, topic of each sentence.
        vocabulary: Words by number; number 0 is `<unk>`.
        topics: Name of each topic.
        split: "train" or "test".
        name: Name of the set.
        checksum: SHA-256 of the listing of the files that were read.
    """

    tokens: Tensor
    labels: Tensor
    vocabulary: tuple[str, ...]
    topics: tuple[str, ...]
    split: str
    name: str
    checksum: str

    def __len__(self) -> int:
        return len(self.tokens)

    def words(self, tokens: Tensor) -> list[str]:
        """Words of token numbers `(tokens,)`; `<lost>` for -1, where an attack diverged."""
        return [self.vocabulary[n] if n >= 0 else LOST for n in tokens.tolist()]


def split_words(text: str) -> list[str]:
    """Words of a text, lower-cased, without punctuation.

    >>> split_words("The K-means centres aren't 12 points.")
    ['the', 'k-means', 'centres', "aren't", '12', 'points']
    """
    return _WORD.findall(text.lower())


def load_sentences(
    path: str | Path = "",
    count: int | None = None,
    *,
    split: Literal["train", "test"] = "test",
    length: int = 8,
    vocabulary: int = 1000,
    windows: Literal["first", "all"] = "first",
    seed: int | None = None,
) -> SentenceSet:
    """Load sentences of at least `length` words and cut them to windows of that many.

    Args:
        path: Empty: the embedded sentences, 8 topics, 512 to train and 128 to test. A text file:
            its sentences, one topic. A folder: its `*.txt` files, each a topic. Every fifth
            sentence of a user's file is for test.
        count: Windows to return; None returns all.
        split: "train" or "test".
        length: Words of a window.
        vocabulary: Most words to number, `<unk>` included; ties go to the earlier word.
        windows: "first" keeps each sentence's first words; "all" slides by one word, which is
            what training on little text wants.
        seed: None takes the first windows; a number draws them without replacement.

    Returns:
        The windows in the order of the file, or as drawn.

    Raises:
        FileNotFoundError: No text there.
        ValueError: Settings out of range, a damaged embedded file, or too few sentences.

    >>> sentences = load_sentences(count=2, length=8)
    >>> sentences.tokens.shape, len(sentences.topics)
    (torch.Size([2, 8]), 8)
    """
    if length < 1 or vocabulary < 2 or (count is not None and count < 1):
        raise ValueError(
            "expected length >= 1, vocabulary >= 2 and count >= 1 or None, got "
            f"length={length}, vocabulary={vocabulary}, count={count}"
        )
    if split not in ("train", "test") or windows not in ("first", "all"):
        raise ValueError(
            "expected split 'train' or 'test' and windows 'first' or 'all', got "
            f"{split!r} and {windows!r}"
        )
    lines, files = _read(path)
    sentences = [split_words(sentence) for _, _, sentence in lines]
    words = _most_frequent(sentences, vocabulary - 1)
    number = {word: i for i, word in enumerate(words)}
    topics = tuple(dict.fromkeys(topic for _, topic, _ in lines))
    tokens, labels = [], []
    for (part, topic, _), sentence in zip(lines, sentences, strict=True):
        if part != split or len(sentence) < length:
            continue
        last = 1 if windows == "first" else len(sentence) - length + 1
        for start in range(last):
            tokens.append([number.get(w, 0) for w in sentence[start : start + length]])
            labels.append(topics.index(topic))
    if len(tokens) < (count or 1):
        raise ValueError(
            f"expected {count or 1} windows of {length} words in the {split} split of "
            f"{path or 'the embedded sentences'}, got {len(tokens)}; ask for fewer or shorter ones"
        )
    chosen = torch.arange(len(tokens))
    if seed is not None:
        chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[:count]
    return SentenceSet(
        tokens=torch.tensor(tokens)[chosen],
        labels=torch.tensor(labels)[chosen],
        vocabulary=words,
        topics=topics,
        split=split,
        name=Path(path).name if path else "sentences",
        checksum=listing_sha256(files),
    )


def _read(path: str | Path) -> tuple[list[Line], dict[str, Path]]:
    """Lines of a text and the files they stand in."""
    if not path:
        files = verified_files(embedded_folder(), ["sentences.txt"])
        text = files["sentences.txt"].read_text(encoding="utf-8")
        rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
        return [(split, topic, sentence) for split, topic, sentence in rows], files
    place = Path(path).expanduser()
    found = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"expected a text file or a folder with *.txt files, got {place}")
    lines = []
    for file in found:
        text = " ".join(file.read_text(encoding="utf-8").split())
        sentences = [part for part in re.split(r"(?<=[.?!])\s+", text) if part]
        for i, sentence in enumerate(sentences):
            split = "test" if i % _TEST_EVERY == _TEST_EVERY - 1 else "train"
            lines.append((split, file.stem, sentence))
    return lines, {file.name: file for file in found}


def _most_frequent(sentences: Sequence[Sequence[str]], count: int) -> tuple[str, ...]:
    """`<unk>` and the most frequent words; a Counter keeps the order of first occurrence."""
    counts = Counter(word for sentence in sentences for word in sentence)
    return (UNKNOWN, *(word for word, _ in counts.most_common(count)))
