"""Programs per second in each kind of box: ``python scripts/sandbox_speed.py [PROGRAMS]``."""

import sys
import time

from gruppo.sandbox import Call, FreshBox, NoSandbox, Pool, Sandbox, choose


def program(fresh: FreshBox, number: int) -> object:
    box = fresh()
    box.load("def f(n):\n    return n * n")
    return box.call(Call(name="f", args=(number,))).value


def measure(kind: str, count: int, workers: int) -> float:
    settings = Sandbox(kind=kind)
    pool = Pool(lambda: choose(settings).backend, settings, workers)
    pool.map(program, range(2 * workers))
    began = time.perf_counter()
    results = pool.map(program, range(count))
    seconds = time.perf_counter() - began
    pool.close()
    assert results == [n * n for n in range(count)]
    return count / seconds


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for kind in ("bubblewrap", "lite", "wasi", "unsafe-none"):
        for workers in (1, 2):
            try:
                rate = measure(kind, count, workers)
            except NoSandbox as error:
                print(f"{kind}: {error}")
                break
            print(f"{kind:12} {workers} at a time: {rate:6.1f} programs/s")


if __name__ == "__main__":
    main()
