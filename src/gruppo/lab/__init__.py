"""The reward lab: attacks a reward before a policy does, and says what it pays for.

``examine`` scores golden pairs and made completions, ``judge`` makes findings of that. It needs no
model.
"""

from gruppo.lab.examine import Examination, Trial, Unequal, examine
from gruppo.lab.judge import THRESHOLD, Finding, Row, judge, share, table
from gruppo.lab.layout import Layout
from gruppo.lab.lengths import Lengths, correlate, judge_lengths, made_lengths

__all__ = [
    "THRESHOLD",
    "Examination",
    "Finding",
    "Layout",
    "Lengths",
    "Row",
    "Trial",
    "Unequal",
    "correlate",
    "examine",
    "judge",
    "judge_lengths",
    "made_lengths",
    "share",
    "table",
]
