"""Signals: raised at once, held while the state is not whole, the second one is final."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from gruppo.interrupt import Interrupted, Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_raises_at_once(number, code):
    interrupts = Interrupts()
    with interrupts.installed(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_a_held_signal_is_raised_on_release():
    interrupts = Interrupts()
    reached = []
    with interrupts.installed():
        interrupts.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("whole again")
        with pytest.raises(Interrupted):
            interrupts.release()
    assert reached == ["whole again"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def careless():
    """Code that catches every ordinary exception."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        pytest.fail("swallowed")


def test_no_except_exception_swallows_it():
    with Interrupts().installed(), pytest.raises(Interrupted):
        careless()


def test_the_second_signal_ends_the_process_at_once():
    program = """
        import os, signal, time
        from gruppo.interrupt import Interrupts
        interrupts = Interrupts()
        with interrupts.installed():
            interrupts.hold()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=30, check=False)
    assert done.returncode == 143
