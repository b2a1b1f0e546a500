"""Every example in a docstring runs and gives what it shows."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import gruppo

# what runs in a worker process imports the library that it is about
NEEDS = {"gruppo.worker.verifiers.": "verifiers"}


def can_import(name):
    missing = {lead for lead, library in NEEDS.items() if not importlib.util.find_spec(library)}
    return not name.startswith(tuple(missing))


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gruppo.__path__, "gruppo.")
    if not module.name.endswith("__main__") and can_import(module.name)
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert failed == 0


def test_there_are_examples():
    parsed = [
        test
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    assert len(parsed) >= 80
