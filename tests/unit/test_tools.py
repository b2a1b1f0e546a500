"""Tools: schemas, calls as families of templates write them, arguments, errors, the examples."""

import json
from typing import Literal

import pytest

from gruppo.environment import (
    Calculator,
    GuessingGame,
    Tool,
    Toolbox,
    ToolError,
    calculate,
)
from gruppo.environment.calls import BadCall, Call, find_calls
from gruppo.environment.schema import mistake_in
from gruppo.errors import ServiceError
from gruppo.types import Message
from support.dialogues import problem


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def fetch(place: str) -> dict:
    """Fetch a record.

    Args:
        place: where from.
    """
    if place == "disk":
        raise OSError("disk full")
    if place == "path":
        raise FileNotFoundError(2, "No such file or directory", "/data/x")
    if place == "web":
        raise ValueError("GET https://me:pw@host/v1?q=1&api_key=abc123&n=2 refused sk-" + "a" * 20)
    if place == "service":
        raise ServiceError("sandbox gone")
    return {"place": {}[place]}


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def reply(text, *functions, **options):
    items = tuple(map(Tool.of, functions or (add, fetch)))
    return Toolbox(items=items, **options).start(problem()).reply(text, ())


def said(text, *functions, **options):
    return [message.content for message in reply(text, *functions, **options).messages]


# Calls ----------------------------------------------------------------------------------------

BODY = '{"name": "add", "arguments": {"a": 1}}'
ADD = Call("add", {"a": 1})
NOT_JSON = BadCall("a tool call must be one JSON object")
CALLS = [
    ("hermes", f"Let me see. <tool_call>\n{BODY}\n</tool_call>", [ADD]),
    ("hermes", f"<tool_call>{BODY}</tool_call><tool_call>{BODY}</tool_call>", [ADD, ADD]),
    ("hermes", f"<tool_call>{BODY}", [ADD]),  # a stop string cut the end off
    ("hermes", f"<think><tool_call>{BODY}</tool_call></think>It is 2.", []),
    ("hermes", f"<think>I <tool_call>{BODY}</tool_call>", []),
    ("hermes", f"</think><tool_call>{BODY}</tool_call>", [ADD]),
    ("hermes", BODY, []),
    ("hermes", "<tool_call>add(1)</tool_call>", [NOT_JSON]),
    ("hermes", "<tool_call>[1]</tool_call>", [NOT_JSON]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', [NOT_JSON]),
    ("hermes", f"<tool_call>{'[' * 9000}</tool_call>", [NOT_JSON]),
    ("hermes", f"<tool_call>{'1' * 9000}</tool_call>", [NOT_JSON]),
    ("hermes", "<tool_call>{}</tool_call>", [BadCall('a tool call needs a "name"')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [Call("f", {})]),
    (
        "hermes",
        f"<tool_call>{' ' * 20_001}</tool_call>",
        [BadCall("a tool call must have at most 20000 characters")],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {"[" * 64}{"]" * 64}}}</tool_call>',
        [Call("add", json.loads("[" * 64 + "]" * 64))],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "add", "arguments": {"[" * 65}{"]" * 65}}}</tool_call>',
        [BadCall("arguments must be nested at most 64 deep")],
    ),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', [ADD]),
    ("llama", f"<|python_tag|>{BODY}; {BODY}", [ADD, ADD]),
    ("llama", f"I would write {BODY}", []),
    ("llama", '{"answer": 4}', []),
    ("llama", '{"name": "add", ', [NOT_JSON]),
    ("fenced", f"```json\n{BODY}\n```", [ADD]),
    ("fenced", '```json\n{"answer": 4}\n```', []),
    ("fenced", "```python\nadd(1)\n```", []),
]


@pytest.mark.parametrize(("form", "text", "wanted"), CALLS, ids=range(len(CALLS)))
def test_calls_of_each_family(form, text, wanted):
    assert find_calls(text, form) == wanted


# Arguments ------------------------------------------------------------------------------------


def every(
    a: int, b: float, c: str, d: bool, e: list[int], f: dict[str, float], g: Literal["x", "y"]
) -> None:
    """Take everything.

    Args:
        a: a.
        b: b.
        c: c.
        d: d.
        e: e.
        f: f.
        g: g.
    """


def maybe(a: int | None = None, b: int | str = 0) -> None:
    """Take little.

    Args:
        a: a.
        b: b.
    """


GOOD = {"a": 1, "b": 2, "c": "3", "d": True, "e": [4], "f": {"k": 0.5}, "g": "x"}
WRONG = [
    ({"a": 1.0}, "argument 'a' must be of type integer, not number"),
    ({"a": True}, "argument 'a' must be of type integer, not boolean"),
    ({"b": "2"}, "argument 'b' must be of type number, not string"),
    ({"b": float("inf")}, "argument 'b' must be of type number, not number"),
    ({"c": None}, "argument 'c' must be of type string, not null"),
    ({"d": 1}, "argument 'd' must be of type boolean, not integer"),
    ({"e": [4, "5"]}, "argument 'e'[1] must be of type integer, not string"),
    ({"f": {"k": "v"}}, "argument 'f'['k'] must be of type number, not string"),
    ({"g": "z"}, "argument 'g' must be one of x, y"),
    ({"h": 1}, "argument 'h' is unknown; there are: a, b, c, d, e, f, g"),
]


def test_arguments_that_fit():
    assert mistake_in(GOOD, Tool.of(every).parameters) is None
    for good in ({}, {"a": None}, {"a": 2, "b": "x"}, {"b": 3}):
        assert mistake_in(good, Tool.of(maybe).parameters) is None


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_arguments_that_do_not_fit(change, words):
    assert mistake_in(GOOD | change, Tool.of(every).parameters) == words


def test_missing_and_shapeless_arguments():
    schema = Tool.of(every).parameters
    assert mistake_in({}, schema) == "argument 'a' is missing"
    assert mistake_in([1], schema) == "arguments must be a JSON object, not array"
    wrong = mistake_in({"b": 0.5}, Tool.of(maybe).parameters)
    assert wrong == "argument 'b' must be of type integer or string, not number"


def bare(a):
    return a


def test_a_function_that_cannot_be_a_tool_is_refused():
    with pytest.raises(ValueError, match=r"bare.*cannot be a tool.*type hint and a line under"):
        Tool.of(bare)
    with pytest.raises(ValueError, match="two tools of one name"):
        Toolbox.of(add, add)
    with pytest.raises(ValueError, match="at least one tool"):
        Toolbox(items=())
    with pytest.raises(ValueError, match="max_result = 3: must be at least 20"):
        Toolbox(items=(Tool.of(add),), max_result=3)


# Replies --------------------------------------------------------------------------------------


def test_calls_are_answered_in_order():
    answer = reply(call("add", a=1) + call("add", a=1, b=5))
    assert answer.messages == (Message("tool", "2"), Message("tool", "6"))
    assert (answer.calls, answer.failed_calls) == (2, 0)


def test_a_turn_without_a_call_ends_the_episode():
    assert reply("It is 2.").messages == ()


def test_mistakes_of_the_policy_are_told_to_it():
    text = (
        "<tool_call>add</tool_call>" + call("sub") + call("add", a="1") + call("fetch", place="x")
    )
    answer = reply(text)
    assert [m.content for m in answer.messages] == [
        "error: a tool call must be one JSON object",
        "error: there is no tool 'sub'; there are: add, fetch",
        "error: argument 'a' must be of type integer, not string",
        "error: KeyError: 'x'",
    ]
    assert (answer.calls, answer.failed_calls) == (4, 4)


def test_what_fails_behind_a_tool_is_the_environments_fault():
    with pytest.raises(OSError, match="disk full"):
        reply(call("fetch", place="disk"))
    with pytest.raises(ServiceError, match="sandbox gone"):
        reply(call("fetch", place="service"))


def test_what_an_argument_can_bring_about_is_the_policys():
    assert said(call("fetch", place="path")) == [
        "error: FileNotFoundError: [Errno 2] No such file or directory: '/data/x'"
    ]


def test_errors_give_no_secret_away():
    assert said(call("fetch", place="web")) == [
        "error: ValueError: GET https://[redacted]@host/v1?q=1&[redacted]&n=2 refused [redacted]"
    ]


def half(n: int) -> str:
    """Say half a character.

    Args:
        n: how often.
    """
    return "a\ud800" * n


def test_half_a_surrogate_pair_is_told_as_a_question_mark():
    assert said(call("half", n=2), half) == ["a?a?"]


def test_too_many_calls_in_a_turn():
    answer = reply(call("add", a=1) * 10)
    assert [m.content for m in answer.messages] == ["2"] * 8 + ["error: at most 8 calls a turn"]
    assert (answer.calls, answer.failed_calls) == (10, 2)


def flood(n: int) -> str:
    """Say much.

    Args:
        n: how much.
    """
    return "x" * n


def test_a_long_result_is_cut():
    assert said(call("flood", n=30), flood, max_result=30) == ["x" * 30]
    assert said(call("flood", n=31), flood, max_result=30) == ["x" * 24 + "\n[cut]"]


def test_instructions_name_tools_and_show_a_call():
    box = Toolbox.of(add, calls="fenced")
    assert '"name": "add"' in box.instructions
    assert '```json\n{"name": NAME, "arguments": {...}}\n```' in box.instructions
    assert [tool["function"]["name"] for tool in box.tools] == ["add"]


# The examples ---------------------------------------------------------------------------------

SUMS = [
    ("12345678 * 87654321", "1082152022374638"),
    ("2 ** 100", str(2**100)),
    ("2^10 =", "1024"),
    ("0.1 + 0.2", "0.3"),
    ("1/3", "0.333333333333"),
    ("-7 // 2", "-4"),
    ("-7 % 3", "2"),
    ("(1 + 2) * -(3 - 5)", "6"),
    ("1e3 * 2", "2000"),
    ("1 ** 999999999999", "1"),
    ("(-1) ** 999999999999999999999", "-1"),
    ("2 ** -2", "0.25"),
]


@pytest.mark.parametrize(("expression", "value"), SUMS)
def test_calculator(expression, value):
    assert calculate(expression) == value


REFUSED = [
    ("9**9**9", "too large"),
    ("9" * 190, "too large"),
    ("(9**99)**99", "too large"),
    ("1e999", "too large"),
    ("1e-999999999", "too large"),
    ("10**61", "too large"),
    ("1/0", "division by zero"),
    ("0 ** -1", "division by zero"),
    ("1 % 0", "division by zero"),
    ("2 ** 0.5", "an exponent must be a whole number"),
    ("__import__('os')", "is no arithmetic"),
    ("e", "is no arithmetic expression"),
    ("1,234 + 1", "is no arithmetic"),
    ("1 +", "is no arithmetic expression"),
    ("", "is no arithmetic"),
    ("(" * 150 + "1" + ")" * 10, "is no arithmetic"),
    ("1 + " * 60, "at most 200 characters"),
    ("1(2)", "is no arithmetic expression"),
]


@pytest.mark.parametrize(("expression", "reason"), REFUSED)
def test_calculator_refuses(expression, reason):
    with pytest.raises(ToolError, match=reason):
        calculate(expression)


def test_the_calculator_as_an_environment():
    episode = Calculator().start(problem())
    answer = episode.reply(call("calculator", expression="4817 * 356"), ())
    assert answer.messages == (Message("tool", "1714852"),)
    refused = episode.reply(call("calculator", expression="9**9**9"), ())
    assert refused.messages[0].content == "error: the number is too large"
    assert (refused.calls, refused.failed_calls) == (1, 1)
    assert episode.reward() is None


def play(game, secret, *turns):
    episode = game.start(problem(answer=secret))
    heard = [[m.content for m in episode.reply(turn, ()).messages] for turn in turns]
    return heard, episode.reward()


def test_guessing_game():
    game = GuessingGame(turn_cost=0.25)
    heard, reward = play(game, "7", "5", "<think>8?</think> I say 10, no, 9.", "what", "7!")
    assert heard == [["higher"], ["lower"], ["Guess a whole number."], []]
    assert reward == 0.25
    assert play(game, "7", "7") == ([[]], 1.0)
    assert play(game, "7", "5", "6") == ([["higher"], ["higher"]], 0.0)
    assert play(game, "7", "9" * 5000)[0] == [["Guess a whole number."]]
    assert play(GuessingGame(), "-3", "-3") == ([[]], 1.0)
    with pytest.raises(ValueError, match="no whole number to guess"):
        game.start(problem(answer="seven"))
    with pytest.raises(ValueError, match=r"turn_cost = 2\.0: must be between 0 and 1"):
        GuessingGame(turn_cost=2.0)
