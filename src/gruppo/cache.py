"""Where things that are made once for a user are kept: prepared models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder; it need not exist.

    ``GRUPPO_CACHE``, else ``XDG_CACHE_HOME/gruppo``, else ``~/.cache/gruppo``.
    """
    own, shared = os.environ.get("GRUPPO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gruppo"
