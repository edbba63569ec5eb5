"""The hash of the code moves with everything that can change a result, and with nothing else."""

import functools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from leaklib import code_hash as module
from leaklib.code_hash import code_version, strip_source


def make(source, **around):
    """Define ``f`` as at a prompt, where no source is kept."""
    scope = {"__name__": "study", **around}
    exec(source, scope)
    return scope["f"]


def test_the_hash_is_short_and_the_same_in_every_process():
    assert code_version() == code_version()
    assert len(code_version()) == 12
    module.package_digest.cache_clear()  # the code may have been edited meanwhile
    command = "from leaklib.code_hash import code_version; print(code_version())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == code_version(), done.stderr


def test_comments_docstrings_and_layout_do_not_count():
    first = 'def f(x):\n    """One."""\n    return x + 1  # why\n'
    second = "# a study\ndef f( x ):\n\n    return (x\n        + 1)\n"
    assert strip_source(first) == strip_source(second)
    assert strip_source(first) != strip_source(first.replace("1", "2", 1).replace("+ 1", "+ 2"))
    assert strip_source("%matplotlib inline\nx = 1") == "%matplotlib inline\nx = 1"


def test_the_package_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path)

    def digest(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        module.package_digest.cache_clear()
        return module.package_digest()

    try:
        first = digest(a="x = 1")
        assert digest(a="x = 1  # one") == first
        assert digest(a="x = 2") != first
        assert digest(a="x = 1", b="y = 1") != first
    finally:
        monkeypatch.undo()
        module.package_digest.cache_clear()


def test_texts_and_bytes_count():
    assert len({code_version(), code_version("a"), code_version("b"), code_version("a", "b")}) == 4
    assert code_version("a") == code_version(b"a")


BODY = "def f(s):\n    return s['x'] * factor"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"factor": 1}, {"factor": 2}),
        ({"factor": [1, 2]}, {"factor": [2, 1]}),
        ({"factor": np.zeros(3)}, {"factor": np.ones(3)}),
        ({"factor": np.zeros(3)}, {"factor": np.zeros(3, dtype=np.float32)}),
        ({"factor": None}, {"factor": 0}),
    ],
)
def test_the_values_around_a_function_count(first, second):
    assert code_version(make(BODY, **first)) == code_version(make(BODY, **first))
    assert code_version(make(BODY, **first)) != code_version(make(BODY, **second))


def test_torch_values_around_a_function_count():
    torch = pytest.importorskip("torch")
    values = [torch.zeros(2), torch.ones(2), torch.float64, torch.float32, torch.Size([2])]
    hashes = [code_version(make(BODY, factor=value)) for value in values]
    assert len(set(hashes)) == len(values)
    assert code_version(make(BODY, factor=torch.ones(2))) == hashes[1]


def test_settings_around_a_function_count_field_by_field():
    @dataclass(frozen=True)
    class Settings:
        steps: int
        data: object = None

    def of(*fields):
        return code_version(make(BODY, factor=Settings(*fields)))

    assert of(1) == of(1)
    assert of(1) != of(2)
    assert of(1, np.zeros(2)) != of(1, np.ones(2))
    assert of(1, object()) == of(1, object())  # no stable text: left out, not random


def test_neighbours_defaults_and_closures_count():
    def neighbour(number):
        return make(
            f"def helper(x):\n    return x + {number}\ndef f(s):\n    return [helper(i) for i in s]"
        )

    assert code_version(neighbour(1)) == code_version(neighbour(1))
    assert code_version(neighbour(1)) != code_version(neighbour(2))

    def close(number):
        def f(setting, scale=number):
            return number

        return f

    assert code_version(close(1)) == code_version(close(1))
    assert code_version(close(1)) != code_version(close(2))
    recursive = make("def f(s):\n    return f(s - 1) if s else 0")
    assert code_version(recursive) == code_version(recursive)


def test_bound_arguments_count_and_must_have_a_stable_text():
    f = make(BODY, factor=1)
    versions = {code_version(functools.partial(f, y=y)) for y in (1, 2, "1")}
    assert len(versions | {code_version(f)}) == 4
    with pytest.raises(TypeError, match="code='...'"):
        code_version(functools.partial(f, y=object()))
    with pytest.raises(TypeError, match="expected a function, got int"):
        code_version(3)
