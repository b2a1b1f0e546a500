"""What a step costs on this machine: phases, memory, scaling, and the same work done by TRL.

It measures; it decides nothing and is imported by nothing but the command line.
"""

from gruppo.bench.curves import CURVES, curve
from gruppo.bench.machine import Machine, machine
from gruppo.bench.measure import Measured, measure
from gruppo.bench.versus import versus_trl
from gruppo.bench.work import Work

__all__ = [
    "CURVES",
    "Machine",
    "Measured",
    "Work",
    "curve",
    "machine",
    "measure",
    "versus_trl",
]
