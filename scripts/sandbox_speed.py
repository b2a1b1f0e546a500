"""Programs per second in each kind of box: ``python scripts/sandbox_speed.py [PROGRAMS]``.

A program in Python is loaded and one function called; one in C++ reads a number and prints its
square, compiled for each ("with its compilation") or once ("compiled before").
"""

import sys
import time
from collections.abc import Callable

from gruppo.sandbox import (
    CPP,
    Binary,
    Call,
    FreshBox,
    NoSandbox,
    Pool,
    Sandbox,
    boxes,
    choose,
    compile_program,
    try_out,
    workshop,
)

KINDS = ("bubblewrap", "lite", "wasi", "unsafe-none")
SQUARE = "#include <iostream>\nint main() { long n; std::cin >> n; std::cout << n * n; }\n"
COMPILED_FRACTION = 10  # compiling takes some ten times what running does


def in_python(fresh: FreshBox, number: int) -> object:
    box = fresh()
    box.load("def f(n):\n    return n * n")
    return box.call(Call(name="f", args=(number,))).value


def built(maker: Pool, count: int) -> list[Binary]:
    """Different programs, so that nothing could be remembered."""
    sources = [f"{SQUARE}// {number}" for number in range(count)]
    return maker.map(lambda fresh, source: compile_program(fresh, CPP, source), sources)


def ran(runner: Pool, programs: list[Binary]) -> list[int]:
    def one(fresh: FreshBox, item: tuple[int, Binary]) -> int:
        number, program = item
        return int(fresh().native(program, b"%d\n" % number).stdout)

    return runner.map(one, list(enumerate(programs)))


def rate(run: Callable[[int], list], count: int, workers: int) -> float:
    """Programs per second, after some that start the boxes."""
    run(2 * workers)
    began = time.perf_counter()
    results = run(count)
    seconds = time.perf_counter() - began
    assert results == [n * n for n in range(count)]
    return count / seconds


def measure(kind: str, count: int, workers: int) -> None:
    settings = Sandbox(kind=kind)
    choose(settings)
    pool = boxes(settings, workers)

    def told(what: str, run: Callable[[int], list], count: int) -> None:
        speed = rate(run, count, workers)
        print(f"{kind:12} {what:26} {workers} at a time: {speed:6.1f} programs/s", flush=True)

    try:
        told("Python", lambda n: pool.map(in_python, range(n)), count)
        if kind == "wasi":  # Python alone
            return
        try_out(settings, CPP)
        maker = workshop(settings, workers, CPP)
        few = max(1, count // COMPILED_FRACTION)
        told("C++, with its compilation", lambda n: ran(pool, built(maker, n)), few)
        [program] = built(maker, 1)
        maker.close()
        told("C++, compiled before", lambda n: ran(pool, [program] * n), count)
    finally:
        pool.close()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for kind in KINDS:
        for workers in (1, 2):
            try:
                measure(kind, count, workers)
            except NoSandbox as error:
                print(f"{kind}: {error}")
                break


if __name__ == "__main__":
    main()
