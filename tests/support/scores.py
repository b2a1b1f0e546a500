"""What reward tests ask of scores."""

from collections import Counter
from collections.abc import Iterable

from gruppo.types import Score


def count_failures(scores: Iterable[Score]) -> dict[str, int]:
    """Number of rows per failure, as ``{"grader/exception": 3, "completion/timeout": 1}``."""
    errors = (score.error for score in scores)
    return dict(Counter(f"{error.fault}/{error.kind}" for error in errors if error is not None))
