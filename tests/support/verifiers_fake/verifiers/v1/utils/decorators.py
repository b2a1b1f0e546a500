def discover_decorated(thing, mark):
    names = {n for kind in type(thing).__mro__ for n, f in vars(kind).items() if mark in _dict(f)}
    return [getattr(thing, name) for name in sorted(names)]


def _dict(value):
    return vars(value) if callable(value) and hasattr(value, "__dict__") else {}
