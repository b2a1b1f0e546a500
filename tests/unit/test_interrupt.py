"""Signals: raised at once, held while the state is not whole, the second one is final."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gruppo.interrupt import Interrupted, Interrupts, unwrapped


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


class Interrupting:
    """Gets its signal while a class body gives it its name, as in an import."""

    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_middle_of_an_import_comes_out_as_itself():
    with Interrupts().installed(), pytest.raises(Interrupted) as caught, unwrapped():
        type("Imported", (), {"field": Interrupting()})
    assert caught.value.exit_code == 143


def keep_the_text_alone():
    """What libraries in other languages do to an exception of Python's."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as reason:
        text = str(reason)
    raise ValueError(text)


def test_a_signal_of_which_only_the_text_is_left_comes_out_as_itself():
    with Interrupts().installed(), pytest.raises(Interrupted, match=r"^SIGINT$"), unwrapped():
        keep_the_text_alone()


def find_the_disk_full():
    """A signal, and another error after it."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        raise OSError("the disk is full")


@pytest.mark.parametrize("held", [False, True])
def test_another_error_after_a_signal_stays_what_it_is(held):
    with Interrupts(held=held).installed(), pytest.raises(OSError, match="full"), unwrapped():
        find_the_disk_full()


class Deaf:
    """Gets its signal in a finaliser, whose exceptions Python ignores."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_lost_signal_is_told_on_release():
    interrupts = Interrupts()
    with interrupts.installed():
        Deaf()
        with pytest.raises(Interrupted, match="SIGTERM"):
            interrupts.release()


def test_the_next_signal_raises_what_was_lost():
    with Interrupts().installed():
        Deaf()
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_lost_when_all_is_done_is_told_then():
    with pytest.raises(Interrupted), Interrupts().installed():
        Deaf()


def test_a_signal_lost_outside_is_told_where_the_loop_begins():
    """As in a run's start, while libraries are imported; once, and then a second one is final."""
    program = """
        import os, signal, sys, time
        from gruppo.interrupt import Interrupted, Interrupts, whole_process
        class Deaf:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
        class Broken:
            def __del__(self):
                raise ValueError("as ever")
        with whole_process():
            Deaf()
            Broken()
            try:
                with Interrupts().installed():
                    print("not reached")
            except Interrupted as error:
                print(error, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(words, timeout=30, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "SIGINT\n")
    assert "Interrupted" not in done.stderr
    assert "ValueError: as ever" in done.stderr


def raise_after_a_finaliser():
    Deaf()
    raise ValueError("a defect")


def test_a_defect_after_a_lost_signal_stays_one():
    with Interrupts().installed():
        with pytest.raises(ValueError, match="a defect"), unwrapped():
            raise_after_a_finaliser()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_other_errors_keep_their_cause():
    cause = KeyError("cause")
    with pytest.raises(ValueError, match="error") as caught, unwrapped():
        raise ValueError("error") from cause
    assert caught.value.__cause__ is cause


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


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # killed, but nobody has asked for its exit status yet
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_the_second_signal_takes_a_reward_that_hangs_with_it(tmp_path):
    (tmp_path / "hangs.py").write_text(
        textwrap.dedent("""
            import os, pathlib, time
            def score(problem, completions):
                pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
                while True:
                    time.sleep(1)
        """)
    )
    program = f"""
        import os, pathlib, signal, threading, time
        from gruppo.interrupt import Interrupts, ending_with
        from gruppo.reward import Function
        from gruppo.types import Completion, Problem
        reward = Function(name={str(tmp_path / "hangs.py:score")!r}, contract="gruppo")
        row = Completion(tokens=(), logp=(), mask=(), version=(), text="", finish="stop")
        def ring():
            while not pathlib.Path({str(tmp_path / "pid")!r}).exists():
                time.sleep(0.02)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
        threading.Thread(target=ring, daemon=True).start()
        interrupts = Interrupts()
        with interrupts.installed(), ending_with(reward.close):
            interrupts.hold()
            reward(Problem(id="a", prompt=()), [row])
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(words, timeout=60, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")
    pid = int((tmp_path / "pid").read_text())
    assert not is_there(pid)


def test_a_last_word_that_hangs_does_not_hold_the_process_up():
    program = """
        import os, signal, time
        import gruppo.interrupt
        gruppo.interrupt._KILL_SECONDS = 0.2
        interrupts = gruppo.interrupt.Interrupts()
        with interrupts.installed(), gruppo.interrupt.ending_with(lambda: time.sleep(60)):
            interrupts.hold()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=30, check=False)
    assert done.returncode == 143
