"""Every example in a docstring runs."""

import doctest
import importlib

import pytest

from tests.test_guards import SOURCES, module_of

WITH_EXAMPLES = [module_of(p) for p in SOURCES if ">>> " in p.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0
