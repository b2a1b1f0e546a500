"""Ending the processes of a box while another thread waits for them."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gruppo.sandbox.family import Family
from support.boxes import linux

pytestmark = linux
_KILL, _KILL_GROUP = os.kill, os.killpg


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as made:
        yield made
        made.kill()


def is_ours(pid: int) -> bool:
    """Whether the number cannot be another process's: nobody has waited for it yet."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.mark.parametrize("starts_others", [True, False])
def test_no_signal_goes_to_a_number_that_was_freed_meanwhile(
    monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes], starts_others: bool
) -> None:
    """The process ends, and a thread that waits for it runs, when the first signal is due."""
    family = Family(process, starts_others=starts_others)
    waiting = threading.Thread(target=family.reap, args=(60.0,))
    sent: list[tuple[bool, bool]] = []

    def then(send: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def watched(pid: int, number: int) -> None:
            if not sent:
                _KILL(pid, signal.SIGTERM)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                waiting.start()
                waiting.join(0.3)
            sent.append((pid == process.pid, is_ours(pid)))
            send(pid, number)

        return watched

    monkeypatch.setattr(os, "kill", then(_KILL))
    monkeypatch.setattr(os, "killpg", then(_KILL_GROUP))
    family.kill()
    waiting.join(10.0)
    assert len(sent) >= 1
    assert set(sent) == {(True, True)}
    assert (family.reap(0.0), process.returncode) == (-signal.SIGTERM, -signal.SIGTERM)
    told = len(sent)
    family.kill()
    assert len(sent) == told


@pytest.mark.parametrize("starts_others", [True, False])
def test_whoever_waits_does_not_keep_others_from_killing(
    process: subprocess.Popen[bytes], starts_others: bool
) -> None:
    family = Family(process, starts_others=starts_others)
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(family.reap(60.0)))
    waiting.start()
    time.sleep(0.02)
    began = time.monotonic()
    family.kill()
    waiting.join(10.0)
    assert time.monotonic() - began < 5.0
    assert codes == [-signal.SIGKILL]
    assert not is_ours(process.pid)
