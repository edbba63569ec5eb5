"""Every example in a docstring runs as written."""

import doctest
import importlib
import pkgutil

import pytest

import leaklib

MODULES = [m.name for m in pkgutil.walk_packages(leaklib.__path__, "leaklib.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    tried = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES)
    assert tried > 30
