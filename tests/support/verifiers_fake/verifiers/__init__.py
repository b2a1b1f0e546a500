"""The part of verifiers 0.4 that gruppo speaks to, for machines without it. Not its code."""
