"""What tests of the WASI box need: the interpreter, which no test may download."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gruppo.sandbox import NoSandbox
from gruppo.sandbox.interpreter import FETCH, prepared


def missing() -> str:
    """Why the box cannot be tested here; "" if it can."""
    try:
        found = prepared()
    except NoSandbox as error:
        return str(error)
    return "" if found else f"Python for WASI is not in the cache: {FETCH}"


@contextmanager
def shared_cache() -> Iterator[None]:
    """A copy of the interpreter that other users can read, as the cache of child processes.

    Those change ``HOME``, and would download it anew.
    """
    found = prepared()
    assert found is not None
    before = os.environ.get("GRUPPO_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "sandbox", found.parent.name)
        target.mkdir(parents=True)
        for source in (found, found.parent / "python.wasm"):
            shutil.copyfile(source, target / source.name)
        for place in (Path(folder), target.parent, target):
            place.chmod(0o755)
        os.environ["GRUPPO_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["GRUPPO_CACHE"]
            if before is not None:
                os.environ["GRUPPO_CACHE"] = before
