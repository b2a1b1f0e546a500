"""All hostile programs. They are never run outside a box, but for those that ``HARMLESS`` names."""

from support.attacks_host import FILES, KERNEL, PROCESSES
from support.attacks_reward import RESOURCES, RESULTS

ATTACKS = (*FILES, *PROCESSES, *KERNEL, *RESOURCES, *RESULTS)
# What shows that the tests can fail: these succeed without a box, and do no harm.
HARMLESS = ("read a file", "chmod", "own environ file", "memfd", "udp")
