"""Inside a box: the driver that takes one job and runs it. It knows no expected answer.

First the host's configuration is applied, then the box reports that it is ready and waits; one job
comes, the last rights go, and candidate code runs. What takes rights away is passed in (``process``
does it in a process of the host; around a WASI guest it is done from outside). Kinds of jobs:

- ``script``: the program runs as ``__main__`` with the pipes as its standard streams;
- ``serve``: the program is loaded, then its functions are called one by one; every call carries a
  random id that its reply must carry too, and replies are plain data;
- ``tests``: trusted test code runs here, and the candidate's functions are stand-ins that ask
  the host to call them in another box;
- those that need a process of the host: see ``process``.

Nothing here is a verdict, and nothing that the candidate can reach here is worth reaching. This
file is loaded inside the box and imports the standard library alone, and of that what every job
needs: a program waits for it.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final

from gruppo.sandbox.wire import decode, encode

_TEXT: Final = 300


class Channel:
    """JSON lines with the host: commands come in, replies go out."""

    def __init__(
        self,
        commands: int,
        replies: int,
        pending: bytes,
        *,
        write: Callable[[dict[str, Any]], str],
        read: Callable[[bytes], dict[str, Any]],
        leave: Callable[[int], None] = os.close,
    ) -> None:
        """``write`` and ``read`` make JSON and values of it; ``leave`` gives up a descriptor."""
        self._commands = commands
        self._replies = replies
        self._pending = pending
        self._write = write
        self._read = read
        self._leave = leave

    def receive(self) -> dict[str, Any]:
        """The next command; ends the process where there is none."""
        while b"\n" not in self._pending:
            chunk = os.read(self._commands, 1 << 16)
            if not chunk:
                os._exit(0)
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return self._read(line)

    def take(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes, in pieces."""
        while size:
            piece = self._pending[:size] or os.read(self._commands, min(size, 1 << 20))
            if not piece:
                os._exit(1)
            self._pending = self._pending[len(piece) :]
            size -= len(piece)
            yield piece

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send one reply, whole, and ``data`` after it."""
        view = memoryview(self._write(message).encode() + b"\n" + data)
        while view:
            view = view[os.write(self._replies, view) :]

    def close(self) -> None:
        """A script has standard streams alone."""
        for descriptor in self.descriptors:
            self._leave(descriptor)

    @property
    def descriptors(self) -> tuple[int, int]:
        """Of commands and of replies."""
        return self._commands, self._replies


def work(
    channel: Channel,
    drop: Callable[[dict[str, Any]], None],
    seal: Callable[[dict[str, Any]], None],
    prepare: Callable[[Channel, dict[str, Any]], Callable[[], None]],
) -> None:
    """Apply the configuration, say so, take the job and run it.

    Args:
        channel: with the host.
        drop: takes away what the configuration says.
        seal: takes away the rest, as the job says.
        prepare: of a job what runs it, called after ``seal``.
    """
    config = channel.receive()
    try:
        drop(config)
    except Exception as error:
        channel.send({"failed": f"{type(error).__name__}: {error}"[:_TEXT]})
        os._exit(1)
    # which the site module, left out here, would have made
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    channel.send({"ready": os.getpid()})
    job = channel.receive()
    run = prepare(channel, job)
    seal(job)
    channel.send({"sealed": True})
    run()


def prepared(channel: Channel, job: dict[str, Any]) -> Callable[[], None]:
    """What runs a job of Python code."""
    return lambda: _MODES[job["mode"]](channel, job)


def _script(channel: Channel, job: dict[str, Any]) -> None:
    channel.close()
    sys.argv = ["main.py"]
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(job["source"], "main.py", "exec"), module.__dict__)


def _serve(channel: Channel, job: dict[str, Any]) -> None:
    module = ModuleType("candidate")
    sys.modules["candidate"] = module
    channel.send({"id": job["id"], **_outcome(lambda: _load(job["source"], module))})
    while True:
        call = channel.receive()
        channel.send({"id": call["id"], **_outcome(lambda call=call: _answer(module, call))})


def _load(source: str, module: ModuleType) -> None:
    exec(compile(source, "candidate.py", "exec"), module.__dict__)


def _answer(module: ModuleType, call: dict[str, Any]) -> object:
    """Call ``name`` (``f``, or ``Class.method`` on a fresh object) with the arguments."""
    head, *rest = call["name"].split(".")
    target = module.__dict__[head]
    for name in rest:
        target = getattr(target() if isinstance(target, type) else target, name)
    arguments = {key: decode(value) for key, value in call["kwargs"].items()}
    return target(*(decode(value) for value in call["args"]), **arguments)


def _outcome(action: Callable[[], object]) -> dict[str, Any]:
    """What an action returned, as data, or what it raised (``sys.exit`` too)."""
    try:
        return {"value": encode(action())}
    except BaseException as error:
        return {"error": _describe(error)}


def _describe(error: BaseException) -> dict[str, str]:
    try:
        text = str(error)[:_TEXT]
    except BaseException:
        text = ""
    # the nearest built-in kind, which the other side can raise again
    kind = next((k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins"), "object")
    return {"type": str(type(error).__name__)[:80], "kind": kind, "text": text}


def _tests(channel: Channel, job: dict[str, Any]) -> None:
    """Run every test in a namespace of its own, and report each."""
    for number, test in enumerate(job["tests"]):
        source = f"{job['setup']}\n{test}"
        result = _outcome(lambda source=source: _run_test(channel, source))
        channel.send(
            {"test": number, "passed": "error" not in result, "error": result.get("error")}
        )


def _run_test(channel: Channel, source: str) -> None:
    space: dict[str, Any] = {"__name__": "tests"}
    for name in _foreign(source):
        space[name] = _stand_in(channel, name)
    exec(compile(source, "tests.py", "exec"), space)


def _foreign(source: str) -> list[str]:
    """Names that the test code uses and nowhere makes: the candidate's."""
    import ast  # not above: the other jobs start sooner without it

    tree = ast.parse(source, "tests.py")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return sorted({node.id for node in names} - made - set(dir(builtins)))


def _stand_in(channel: Channel, name: str) -> Callable[..., object]:
    """A function that is called elsewhere."""

    def call(*args: object, **kwargs: object) -> object:
        channel.send(
            {
                "call": name,
                "args": [encode(value) for value in args],
                "kwargs": {key: encode(value) for key, value in kwargs.items()},
            }
        )
        reply = channel.receive()
        if "error" not in reply:
            return decode(reply["value"])
        kind = getattr(builtins, reply["error"]["kind"], None)
        text = f"{reply['error']['type']}: {reply['error']['text']}"
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in _ENDINGS:
            raise _made(kind, text)
        raise RuntimeError(text)

    return call


# In test code that maps or loops they would be no error, but an early and silent end.
_ENDINGS: Final = (StopIteration, StopAsyncIteration)


def _made(kind: type[Exception], text: str) -> Exception:
    """An exception of a built-in kind; some kinds want other arguments."""
    try:
        return kind(text)
    except TypeError:
        return RuntimeError(text)


_MODES: Final = {"script": _script, "serve": _serve, "tests": _tests}
