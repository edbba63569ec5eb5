"""Reading what a notebook asks for, and the values that people type."""

import json
from pathlib import Path

import pytest

from leaklib.runner.notebook import Parameter, ParameterError, parse_parameters, read_notebook
from leaklib.runner.typed_values import fit_value, read_value

NOTEBOOKS = Path(__file__).parent / "notebooks"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", "int", 3),
        ("-3", "int", -3),
        ("3", "float", 3.0),
        ("-1e-3", "float", -0.001),
        ("inf", "float", float("inf")),
        ("True", "bool", True),
        ("no", "bool", False),
        ("1", "bool", True),
        ("1", "int", 1),
        ("3", "str", "3"),
        ("none", "str", "none"),
        ("", "str", ""),
        ("a, b", "str", "a, b"),
        ("'a'", "str", "'a'"),
        ("none", "int | None", None),
        ("3", "int | None", 3),
        ("None", "Optional[float]", None),
        ("0.5", "Optional[float]", 0.5),
        ("none", "str | None", None),
        ("0.5", "int | float", 0.5),
        ("5", "int | str", 5),
        ("five", "int | str", "five"),
        ("5", "Union[str, int]", 5),
        ("relu", "Literal['relu', 'sigmoid']", "relu"),
        ("2", "Literal[1, 2]", 2),
        ("2", "Literal['2']", "2"),
        ("1,2", "list[int]", [1, 2]),
        ("[1, 2]", "list[int]", [1, 2]),
        ("1", "list[int]", [1]),
        ("", "list[int]", []),
        ("1,2", "list[float]", [1.0, 2.0]),
        ("1,2", "list[str]", ["1", "2"]),
        ("fc, conv", "list[str] | None", ["fc", "conv"]),
        ("none", "list[str] | None", None),
        ("[[1], [2, 3]]", "list[list[int]]", [[1], [2, 3]]),
        ("1,2", "list", [1, 2]),
        ("1,2", "tuple[int, ...]", (1, 2)),
        ("8,0.5", "tuple[int, float]", (8, 0.5)),
        ("{'a': 1}", "dict[str, int]", {"a": 1}),
        ("yes", "typing.Literal['yes']", "yes"),
        ("anything", "SomeClass", "anything"),
    ],
)
def test_a_typed_text_becomes_a_value_of_the_type(text, kind, value):
    got = read_value(text, kind)
    assert got == value
    assert type(got) is type(value)
    assert fit_value(got, kind) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("3.5", "int"),
        ("1e3", "int"),
        ("true", "int"),
        ("two", "float"),
        ("2", "bool"),
        ("maybe", "bool"),
        ("tanh", "Literal['relu', 'sigmoid']"),
        ("1,x", "list[int]"),
        ("1,2,3", "tuple[int, int]"),
        ("none", "int"),
        ("1", "dict[str, int]"),
    ],
)
def test_a_text_of_another_type_is_refused(text, kind):
    with pytest.raises(ValueError, match="expected "):
        read_value(text, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, "int"), (1, "bool"), (1.0, "int"), ("1", "int"), (True, "float"), (1, "str"),
     ("ab", "list[str]"), (None, "int"), (True, "Literal[1]")],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(value, kind):
    with pytest.raises(ValueError, match="expected "):
        fit_value(value, kind)


def test_parameters_are_read_with_type_default_and_meaning():
    source = """
import math
from typing import Literal

# about the run
seed: int = 0  # every random number
# Standard deviation;
# None: no noise.
noise: "float | None" = None

# about the network

layers: list[str] = [
    "fc",  # the last
    "conv",
]  # which layers
kind: Literal["a", "b"] = "a"
steps = 40
rate: float = 10 * 2
nothing: int
a, b = 1, 2
x.y = 3
"""
    assert parse_parameters(source) == [
        Parameter("seed", "int", 0, "every random number"),
        Parameter("noise", "float | None", None, "Standard deviation; None: no noise."),
        Parameter("layers", "list[str]", ["fc", "conv"], "which layers"),
        Parameter("kind", "Literal['a', 'b']", "a", ""),
        Parameter("steps", "int", 40, ""),
        Parameter("rate", "float", "10 * 2", ""),
    ]


def test_a_notebook_has_a_title_parameters_and_code():
    info = read_notebook(NOTEBOOKS / "squares.ipynb")
    assert info.title == "Squares of a few numbers"
    assert list(info.parameters) == [
        "profile", "seed", "device", "out", "scale", "layers", "kind", "sizes", "verbose",
    ]  # fmt: skip
    assert info.parameters["scale"].meaning == "factor of every square; zero makes them all vanish"
    assert "squares = [scale * n * n for n in numbers]" in info.code


def test_unknown_and_ill_typed_parameters_are_refused_with_the_known_ones():
    info = read_notebook(NOTEBOOKS / "squares.ipynb")
    assert info.resolve({"seed": "7", "layers": "fc"}, typed=True) == {"seed": 7, "layers": ["fc"]}
    assert info.resolve({"scale": 2}) == {"scale": 2.0}
    for given, message in (
        ({"sead": "1"}, "has no parameter sead"),
        ({"seed": "x"}, "expected int for parameter 'seed', got 'x'"),
    ):
        with pytest.raises(ParameterError, match=message) as refused:
            info.resolve(given, typed=True)
        assert "known parameters:" in str(refused.value)
        for parameter in info.parameters.values():
            assert parameter.name in str(refused.value)
            assert parameter.meaning.split()[0] in str(refused.value)
    with pytest.raises(ParameterError, match="got '7'"):
        info.resolve({"seed": "7"})  # text is not typed here


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_description_is_aligned_and_fits(width):
    lines = read_notebook(NOTEBOOKS / "squares.ipynb").describe(width).splitlines()
    assert all(len(line) <= max(width, 80) for line in lines)
    columns = {
        line.index(word) for line in lines for word in ("first", "where", "how") if word in line
    }
    assert len(columns) == 1


def test_a_notebook_without_parameters_and_files_that_are_none(tmp_path):
    path = tmp_path / "plain.ipynb"
    cell = {"cell_type": "code", "source": ["x = 1"], "metadata": {}}
    path.write_text(json.dumps({"cells": [cell]}))
    info = read_notebook(path)
    assert info.title == "plain"
    assert info.describe() == "  (none)"
    with pytest.raises(ParameterError, match="no parameter x"):
        info.resolve({"x": "1"}, typed=True)

    cell |= {"source": "seed: int = ", "metadata": {"tags": ["parameters"]}}
    path.write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ParameterError, match="expected plain Python in the parameters cell"):
        read_notebook(path)
    for text in ("", "[]", '{"nbformat": 3, "worksheets": []}'):
        path.write_text(text)
        with pytest.raises(ParameterError, match="expected a notebook"):
            read_notebook(path)
    with pytest.raises(FileNotFoundError):
        read_notebook(tmp_path / "nowhere.ipynb")
