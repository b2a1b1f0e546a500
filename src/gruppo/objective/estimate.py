"""Estimators for evaluation: pass@k, pass^k, majority vote, standard error.

Plain numbers in, plain numbers out; sampling and grading are elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"c = {c} right answers of n = {n} draws is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} must be between 1 and the number of draws, n = {n}")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k draws is right, given c right ones of n.

    1 − C(n−c, k)/C(n, k), unbiased; computed as 1 − Π_{j=n−c+1}^{n} (1 − k/j), which does not
    overflow. Source: Codex, arXiv 2107.03374, eq. 1.

    >>> round(pass_at_k(10, 3, 5), 6)
    0.916667
    """
    _check(n, c, k)
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / j for j in range(n - c + 1, n + 1))


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Probability that all of k draws are right: C(c, k)/C(n, k). Source: arXiv 2406.12045.

    >>> round(pass_hat_k(10, 7, 2), 6)
    0.466667
    """
    _check(n, c, k)
    return math.prod((c - j) / (n - j) for j in range(k)) if c >= k else 0.0


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer given most often; of equally frequent ones, the one seen first.

    None (no answer could be extracted) does not vote; None is returned if nobody votes.

    >>> majority(["4", "5", "4", None, "5"])
    '4'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def standard_error(p: float, n: int) -> float:
    """√(p(1 − p)/n): standard error of a pass rate over n independent questions.

    >>> round(standard_error(0.3, 200), 6)
    0.032404
    """
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1 question")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p = {p} is not a rate between 0 and 1")
    return math.sqrt(p * (1.0 - p) / n)
