"""What a step costs on this machine: phases, memory, scaling, and the same work done by TRL.

It measures; it decides nothing and is imported by nothing but the command line. Import its modules:
``work`` (what is done; light), ``measure``, ``curves``, ``versus``, ``machine``, ``plot``.
"""
