"""Environments written for TRL: tools of methods, reset, reward, and what cannot be used."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from gruppo.environment import Trl, TrlEnvironment
from gruppo.types import Message
from support.dialogues import problem


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class Counter:
    """An environment as TRL's users write them."""

    made = 0

    def __init__(self, step=1):
        type(self).made += 1
        self.step = step

    def reset(self, limit=10, **row):
        self.value, self.limit = 0, limit
        return f" Count to {limit}."

    def up(self, times: int) -> str:
        """Count up.

        Args:
            times: how often.
        """
        self.value += self._scaled(times)
        if self.value > self.limit:
            raise ValueError("too far")
        return str(self.value)

    async def look(self) -> int:
        """Say the count."""
        return self.value

    async def get_reward(self):
        return float(self.value == self.limit)

    def _scaled(self, times):
        return times * self.step


def test_trl_environments():
    made = TrlEnvironment(factory=Counter)
    assert [tool["function"]["name"] for tool in made.tools] == ["look", "up"]
    task = problem("Please.", limit=3)
    assert made.prompt(task) == (Message("user", "Please. Count to 3."),)
    posed = problem("Please. Count to 3.", limit=3)
    first, second = made.start(posed), made.start(posed)
    text = call("up", times=2) + call("look") + call("up", times=2)
    assert [m.content for m in first.reply(text, ()).messages] == [
        "2",
        "2",
        "error: ValueError: too far",
    ]
    assert [m.content for m in second.reply(call("up", times=3), ()).messages] == ["3"]
    assert (first.reward(), second.reward()) == (0.0, 1.0)


def test_trl_objects_are_reset_and_used_again():
    Counter.made = 0
    made = TrlEnvironment(factory=Counter)
    for _ in range(3):
        episode = made.start(problem("Count to 3. Count to 3.", limit=3))
        assert [m.content for m in episode.reply(call("up", times=1), ()).messages] == ["1"]
        episode.close()
    assert Counter.made == 1


class Fickle(Counter):
    def reset(self, **row):
        Fickle.made += 1
        self.value, self.limit = 0, 9
        return f" {Fickle.made}"


class NoReset:
    def up(self): ...


class NoTool:
    def reset(self): ...


def test_trl_environments_that_are_refused():
    made = TrlEnvironment(factory=Fickle)
    with pytest.raises(ValueError, match="must depend on its arguments alone"):
        made.start(problem(made.prompt(problem("x"))[-1].content))
    with pytest.raises(ValueError, match="NoReset has no method reset"):
        TrlEnvironment(factory=NoReset)
    with pytest.raises(ValueError, match="NoTool has no public method besides reset"):
        TrlEnvironment(factory=NoTool)
    with pytest.raises(ValueError, match=r"factory = 'no\.such:Thing': cannot be imported"):
        Trl(factory="no.such:Thing")


class Waits(Counter):
    """A method that waits for the test."""

    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def wait(self) -> str:
        """Wait."""
        Waits.entered.set()
        Waits.leave.wait(30)
        self.value = 99
        Waits.left.set()
        return "late"


def test_an_object_with_a_call_in_it_is_not_used_again():
    made = TrlEnvironment(factory=Waits)
    task = problem("Please. Count to 10.")
    first = made.start(task)
    turn = call("wait") + call("up", times=1)
    late = []
    thread = threading.Thread(target=lambda: late.append(first.reply(turn, ())))
    thread.start()
    assert Waits.entered.wait(30)
    first.close()
    second = made.start(task)
    assert [m.content for m in second.reply(call("up", times=1), ()).messages] == ["1"]
    Waits.leave.set()
    thread.join(30)
    assert [m.content for m in second.reply(call("look"), ()).messages] == ["1"]
    assert [m.content for m in late[0].messages] == ["late", "error: the episode is over"]


class Asked(Counter):
    seen = ()

    def reset(self, prompt, **row):
        Asked.seen += (prompt[-1]["content"],)
        self.value, self.limit = 0, 1
        return f" ({len(prompt[-1]['content'])})"

    def get_reward(self):
        return np.float32(0.25)


def test_reset_gets_the_same_prompt_both_times():
    made = TrlEnvironment(factory=Asked)
    task = problem("Please.")
    posed = replace(task, prompt=made.prompt(task))
    assert posed.prompt[-1].content == "Please. (7)"
    episode = made.start(posed)
    assert Asked.seen == ("Please.", "Please.")
    assert episode.reward() == 0.25
