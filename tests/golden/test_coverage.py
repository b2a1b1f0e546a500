"""Every golden case is used by some test: its full name stands in a test's source."""

import json
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_case_is_named_in_a_test():
    names = [case["name"] for case in json.loads((TESTS / "golden" / "cases.json").read_text())]
    sources = "\n".join(
        file.read_text(encoding="utf-8") for file in TESTS.rglob("*.py") if file != Path(__file__)
    )
    assert len(names) == len(set(names)) == 153
    assert [name for name in names if f'"{name}"' not in sources] == []
