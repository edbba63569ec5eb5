"""Make the embedded sentences from the prose of scikit-learn: descriptions and doc strings.

`data/make_embedded.py` calls this. Nothing is fetched: every sentence stands in a file of the
installed wheel. The topic of a sentence is the part of the library that it describes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import sklearn

TOPICS = {
    "cluster": "clustering",
    "datasets": "data sets",
    "decomposition": "decomposition",
    "ensemble": "ensembles",
    "linear_model": "linear models",
    "metrics": "metrics",
    "model_selection": "model selection",
    "preprocessing": "preprocessing",
}
PER_TOPIC = 80
TEST_EVERY = 5  # every fifth sentence of a topic is for test
WORDS = (8, 24)  # shortest and longest sentence, in words
HEADER = "# from scikit-learn "

# an abbreviation or an initial ends no sentence
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|et al|vs|Dr|cf|pp|Vol|No|Proc)|\b[A-Z])\.$")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,.;:()'-]*[a-z]\.")  # no markup, formula or quotation


def make_sentences() -> bytes:
    """Return the file: a header, then one line `split<TAB>topic<TAB>sentence` per sentence."""
    root = Path(sklearn.__file__).parent
    lines = [f"{HEADER}{sklearn.__version__}, BSD-3-Clause, the scikit-learn developers"]
    seen: set[str] = set()
    for package, topic in TOPICS.items():
        found = []
        for text in _texts(root / package):
            for sentence in _sentences(text):
                if sentence not in seen:  # the same parameter is described in many places
                    seen.add(sentence)
                    found.append(sentence)
        if len(found) < PER_TOPIC:
            raise RuntimeError(f"expected {PER_TOPIC} sentences of {package}, got {len(found)}")
        for i in range(PER_TOPIC):  # evenly spaced, so that the whole package has its say
            split = "test" if i % TEST_EVERY == TEST_EVERY - 1 else "train"
            lines.append(f"{split}\t{topic}\t{found[i * len(found) // PER_TOPIC]}")
    return ("\n".join(lines) + "\n").encode()


def same_source(made: bytes, there: bytes) -> bool:
    """Whether two files come from the same version of scikit-learn; else they may differ."""
    return made.split(b"\n", 1)[0] == there.split(b"\n", 1)[0]


def _texts(package: Path) -> Iterator[str]:
    """Yield descriptions of data sets, then doc strings in the order of files and lines."""
    for path in sorted(package.rglob("*.rst")):
        yield path.read_text(encoding="utf-8")
    for path in sorted(package.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _sentences(text: str) -> Iterator[str]:
    for paragraph in _paragraphs(text):
        plain = re.sub(r"\s*\[\d+\]_", "", paragraph)  # citations
        plain = re.sub(r"`([^`<]+?)\s*<[^>]*>`_+", r"\1", plain)  # links keep their words
        parts: list[str] = []
        for part in re.split(r"(?<=[.?!])\s+(?=[A-Z])", plain):
            if parts and _ABBREVIATION.search(parts[-1]):
                parts[-1] += " " + part
            else:
                parts.append(part)
        for part in parts:
            if WORDS[0] <= len(part.split()) <= WORDS[1] and _PLAIN.fullmatch(part):
                yield part


def _paragraphs(text: str) -> list[str]:
    """Join consecutive lines of one indentation; headings and lists end a paragraph."""
    found: list[str] = []
    last = -1
    for line in text.splitlines():
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if words and set(words) <= set("-=~ "):  # the line below a heading
            indent = -1
        elif words and indent == last:
            found[-1] += " " + words
        elif words:
            found.append(words)
        last = indent if words else -1
    return found
