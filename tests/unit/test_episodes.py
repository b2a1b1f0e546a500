"""Episodes: what the model sees is what is recorded, every limit, and what breaks."""

import math
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from gruppo.environment import Episodes, Limits, Reply, watched
from gruppo.types import Interaction, Message, Request, Sampling
from support.dialogues import END, Letters, Script, Talk, problem, same

SAMPLING = Sampling(max_tokens=40, stop_tokens=(END,))


def ids(text):
    return tuple(map(ord, text))


def episodes(engine, talk, context=None, **limits):
    return Episodes(
        engine=engine,
        environment=talk,
        encoder=Letters(),
        limits=Limits(**{"max_seconds": 5.0, **limits}),
        context=context,
    )


def draw(turns, answers, *, sampling=SAMPLING, worth=None, context=None, **limits):
    """The completions of one problem "p", their engine and their environment."""
    engine, talk = Script({"p": turns}), Talk(answers, worth)
    request = Request(tokens=ids("p"), num_samples=len(turns), key=(7, 1))
    made = episodes(engine, talk, context, **limits)
    (rows,) = made.draw([problem("p")], [request], sampling)
    return rows, engine, talk


def test_a_completion_is_what_the_model_saw():
    (row, short), engine, _ = draw([["ab", "cd", "e"], ["x"]], {"ab": "one", "cd": "2"})
    first, second, third = engine.asked
    assert first == [Request(tokens=ids("p"), num_samples=2, key=(7, 1))]
    heard = (*ids("ab"), END, 1, *ids("one"), 2)
    assert row.tokens == (*heard, *ids("cd"), END, 1, *ids("2"), 2, *ids("e"), END)
    assert second[0].tokens == (*ids("p"), *heard)
    assert third[0].tokens == (*ids("p"), *row.tokens[: len(row.tokens) - 2])
    own = [True] * 3 + [False] * 5 + [True] * 3 + [False] * 3 + [True] * 2
    assert list(row.mask) == own
    assert [not math.isnan(x) for x in row.logp] == own
    assert row.own_tokens == (*ids("ab"), END, *ids("cd"), END, *ids("e"), END)
    assert row.version == (3,) * 16
    assert (row.text, row.finish) == ("e", "stop")
    assert row.interaction == Interaction(
        messages=(
            Message("assistant", "ab"),
            Message("user", "one"),
            Message("assistant", "cd"),
            Message("user", "2"),
            Message("assistant", "e"),
        ),
        ended="environment",
    )
    assert row.interaction.turns == 3
    assert (short.tokens, short.mask) == ((*ids("x"), END), (True, True))


def test_later_turns_have_streams_of_their_own():
    _, engine, _ = draw([["a", "b"], ["a", "c"], ["x"]], {"a": "!"})
    (again,) = engine.asked[1:]
    assert [(r.key, r.offset, r.num_samples) for r in again] == [
        ((7, 1, 0), 5, 1),
        ((7, 1, 1), 5, 1),
    ]
    assert [r.max_tokens for r in again] == [35, 35]


def test_a_turn_may_take_its_own_limit_or_what_is_left():
    """40 in all; a turn and its answer take 5."""
    _, engine, _ = draw([["a", "b"]], {"a": "!"}, max_turn_tokens=36)
    assert [r.max_tokens for asked in engine.asked for r in asked] == [36, 35]
    _, engine, _ = draw([["a", "b"]], {"a": "!"}, max_turn_tokens=20)
    assert [r.max_tokens for asked in engine.asked for r in asked] == [20, 20]


def test_a_turn_cut_by_a_stop_string_is_closed_for_the_model_but_not_trained():
    (row,), _, _ = draw([["ab|", "c"]], {"ab": "!"})
    assert row.tokens == (*ids("ab"), END, 1, *ids("!"), 2, *ids("c"), END)
    assert row.mask == (True, True, False, False, False, False, True, True)


def test_the_environment_hears_text_and_tokens():
    heard = []
    talk = Talk({})
    talk.start = lambda p: heard.append(p.id) or _Listening(heard)
    request = Request(tokens=ids("p"), num_samples=1, key=(7, 1))
    episodes(Script({"p": [["hi"]]}), talk).draw([problem("p")], [request], SAMPLING)
    assert heard == ["p", ("hi", (*ids("hi"), END)), "reward", "close"]


class _Listening:
    def __init__(self, heard):
        self.heard = heard

    def reply(self, text, tokens):
        self.heard.append((text, tokens))
        return Reply()

    def reward(self):
        self.heard.append("reward")

    def close(self):
        self.heard.append("close")


@pytest.mark.parametrize(
    ("turns", "options", "ended", "finish", "size"),
    [
        (["a", "b"], {"max_turns": 1}, "turns", "limit", 2),
        (["a", "a", "a"], {"max_turns": 2}, "turns", "limit", 7),
        (["abc…"], {}, "length", "length", 3),
        (["a", "bc…"], {}, "length", "length", 7),
        (["abcd", "b"], {"max_turn_tokens": 3}, "length", "length", 3),
        (["a", "bcdef"], {"max_turn_tokens": 3}, "length", "length", 8),
        # two of the turn, three of the answer: five leave no token for the next turn
        (["a", "b"], {"sampling": Sampling(max_tokens=5)}, "tokens", "limit", 2),
        (["a", "b"], {"sampling": Sampling(max_tokens=6)}, "length", "length", 6),
        (["a", "b"], {"sampling": Sampling(max_tokens=7)}, "environment", "stop", 7),
        (["a", "b"], {"context": 6}, "tokens", "limit", 2),
        (["a", "b"], {"context": 8}, "environment", "stop", 7),
    ],
)
def test_every_limit(turns, options, ended, finish, size):
    (row,), _, talk = draw([turns], {"a": "!"}, **options)
    assert (row.interaction.ended, row.finish, len(row.tokens)) == (ended, finish, size)
    assert row.truncated == (finish == "length")
    assert talk.closed == ["p"]


def test_what_the_environment_says_of_an_episode_is_kept_however_it_ended():
    rows, _, _ = draw([["a", "b"], ["abc…"]], {"a": "!"}, worth=0.5)
    assert [row.interaction.reward for row in rows] == [0.5, 0.5]


def crash():
    raise KeyError("lost")


BROKEN = [
    ({"answers": {"a": crash}}, "reply: KeyError: 'lost'"),
    ({"answers": {"a": lambda: sys.exit(3)}}, "reply: SystemExit: 3"),
    ({"answers": {}, "worth": crash}, "reward: KeyError: 'lost'"),
    ({"answers": {}, "worth": math.nan}, "reward: gave float nan, not a finite number or None"),
    ({"answers": {}, "worth": "1"}, "reward: gave str '1', not a finite number or None"),
]


@pytest.mark.parametrize(("options", "error"), BROKEN)
def test_a_broken_environment_ends_its_completion_alone(options, error):
    (row, other), _, talk = draw([["a", "b"], ["x"]], **options)
    assert (row.finish, row.interaction.error) == ("error", error)
    assert len(talk.closed) == 2
    if "worth" not in options:
        assert (other.finish, other.interaction.error) == ("stop", None)


def test_an_environment_that_answers_nonsense_is_broken():
    talk = Talk({})
    talk.start = lambda p: _Nonsense()
    request = Request(tokens=ids("p"), num_samples=1, key=(7, 1))
    ((row,),) = episodes(Script({"p": [["hi"]]}), talk).draw([problem("p")], [request], SAMPLING)
    assert row.interaction.error == "reply: gave str 'hello', not a Reply"


class _Nonsense:
    def reply(self, text, tokens):
        return "hello"

    def reward(self):
        return None

    def close(self): ...


def test_an_environment_that_hangs_is_left_behind():
    release = threading.Event()
    rows, _, _ = draw([["a", "b"], ["x"]], {"a": release.wait}, max_seconds=0.2)
    assert [row.finish for row in rows] == ["error", "stop"]
    assert rows[0].interaction.error == "reply: timeout: no answer in time"
    release.set()


def test_every_call_has_all_its_seconds(monkeypatch):
    """Two at once, begun at 100, 107 and 114 s: each may take 30 s from there."""
    clock, deadlines = [100.0], []

    class Instant:
        def __init__(self, function):
            self.value = function()

        def wait(self, deadline):
            deadlines.append(deadline)
            clock[0] += 3.5
            return self.value

    monkeypatch.setattr(watched, "_Call", Instant)
    monkeypatch.setattr(watched, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    functions = [partial(int, n) for n in range(5)]
    assert watched.call_all(functions, seconds=30.0, workers=2) == [0, 1, 2, 3, 4]
    assert deadlines == [130.0, 130.0, 137.0, 137.0, 144.0]


def test_workers_are_asked_at_once():
    both = threading.Barrier(2, timeout=10)  # passes when two wait at it

    def meet():
        both.wait()

    rows, _, _ = draw([["a"], ["b"]], {"a": meet, "b": meet}, workers=2)
    assert [row.finish for row in rows] == ["stop", "stop"]


def test_what_is_drawn_does_not_depend_on_the_company():
    turns = {"p": [["a", "b"], ["x"]], "q": [["a", "a", "y"], ["abc…"]]}
    names = ["p", "q"]

    def together(chosen):
        asked = [Request(tokens=ids(n), num_samples=2, key=(7, names.index(n))) for n in chosen]
        made = episodes(Script(turns), Talk({"a": "!"}), workers=3)
        return dict(
            zip(chosen, made.draw([problem(n) for n in chosen], asked, SAMPLING), strict=True)
        )

    whole = together(names)
    for chosen in (["p"], ["q"], ["q", "p"]):
        for name, rows in together(chosen).items():
            assert all(same(a, b) for a, b in zip(rows, whole[name], strict=True))


def test_limits_out_of_range_are_refused():
    for field, value in [("max_turns", 0), ("workers", 0), ("max_turn_tokens", 0)]:
        with pytest.raises(ValueError, match=f"{field} = 0: must be at least 1"):
            Limits(**{field: value})
    with pytest.raises(ValueError, match=r"max_seconds = 0\.0: must be above 0"):
        Limits(max_seconds=0.0)
