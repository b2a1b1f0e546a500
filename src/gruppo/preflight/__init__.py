"""Before a run: a few groups from its model, data and reward, and what they say of it.

``preflight`` makes a ``Report``; ``sample`` draws groups for whoever needs some.
"""

from gruppo.preflight.advice import Advice
from gruppo.preflight.report import GROUPS, Report, preflight
from gruppo.preflight.sampling import Sampled, sample
from gruppo.preflight.statistics import Interval

__all__ = ["GROUPS", "Advice", "Interval", "Report", "Sampled", "preflight", "sample"]
