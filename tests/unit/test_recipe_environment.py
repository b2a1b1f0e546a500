"""The [environment] section, and the packaged tool-use recipe run on a tiny model."""

import json
import string

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer, tiny_config
from gruppo.cli import lab, main
from gruppo.engine import LocalEngine
from gruppo.environment import Calculator, Reply, TrlEnvironment
from gruppo.environment.calls import Call
from gruppo.preflight import sample
from gruppo.recipe import load
from gruppo.recipe.build import resolve
from gruppo.recipe.describe import describe
from gruppo.recipe.dump import dump
from gruppo.recipe.load import from_table
from gruppo.recipe.source import parse
from gruppo.record import Database
from gruppo.types import Message
from support.dialogues import problem


class Once:
    """An environment of one's own: it answers once."""

    tools = ()
    instructions = ""

    def __init__(self, word="go on"):
        self.word = word

    def prompt(self, problem):
        return problem.prompt

    def start(self, problem):
        return OnceEpisode(self.word)


class OnceEpisode:
    def __init__(self, word):
        self.left = [Message("user", word)]

    def reply(self, text, tokens):
        return Reply(messages=(self.left.pop(),)) if self.left else Reply()

    def reward(self):
        return 1.0

    def close(self): ...


class Game:
    def reset(self, **row):
        return " Go."

    def move(self, to: int) -> str:
        """Move.

        Args:
            to: where.
        """
        return f"at {to}"


def test_without_a_use_completions_are_one_turn():
    recipe = load("quickstart")
    assert recipe.environment.open() is None
    assert "episode" not in describe(recipe)


def test_environments_by_kind_by_path_and_of_trl():
    tool = load("tool_use").environment
    assert tool.open() == Calculator()
    assert (tool.limits().max_turns, tool.limits().max_turn_tokens) == (3, 56)
    own = load("quickstart", [f'environment.use={{kind = "{__name__}:Once", word = "more"}}'])
    episode = own.environment.open().start(problem())
    assert episode.reply("", ()).messages == (Message("user", "more"),)
    trl = load("quickstart", [f'environment.use={{kind = "trl", factory = "{__name__}:Game"}}'])
    opened = trl.environment.open()
    assert isinstance(opened, TrlEnvironment)
    assert opened.prompt(problem("Play.")) == (Message("user", "Play. Go."),)
    again = from_table(parse(dump(own), "dumped"))
    assert again.environment == own.environment


def test_the_recipe_in_words():
    assert "an episode of at most 3 turns with calculator" in describe(load("tool_use"))


MISTAKES = [
    ({"environment.use": "calculater"}, r"environment\.use\.kind.*did you mean .calculator"),
    ({"environment.max_turns": "0"}, r"max_turns = 0: must be at least 1"),
    ({"environment.use": "{kind = 'calculator', calls = 'xml'}"}, r"calls.*must be one of"),
    ({"environment.use": "{kind = 'verifiers', taskset = 'x', timeout_s = 26}"}, r"5 more than"),
    ({"environment.use": "no.such:Thing"}, r"cannot import 'no\.such'"),
    ({"data.chat": "false"}, r"data\.chat.*needs a chat template"),
    ({"environment.use": "none"}, r"reward\.parts.*set environment\.use"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_mistakes_are_told(change, words):
    with pytest.raises(ValueError, match=words):
        load("tool_use", [f"{key}={value}" for key, value in change.items()])


def test_an_object_that_is_no_environment_is_refused():
    recipe = load("quickstart", ["environment.use=math:pi"])
    with pytest.raises(ValueError, match=r"environment\.use = 'math:pi': float is no environment"):
        recipe.environment.open()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that reads the long prompts of tools in bytes."""
    made = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    config = tiny_config(max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


def test_the_tool_use_recipe_takes_a_step(folder, tmp_path):
    settings = {
        "model.name": str(folder),
        "record.folder": str(tmp_path),
        "record.name": "run",
        "data.held_out": "2",
        "data.train.0.size": "40",
        "rollout.prompts_per_step": "2",
        "rollout.group_size": "2",
        "rollout.max_tokens": "8",
        "train.steps": "1",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert main(["train", "tool_use", *given]) == 0
    with Database(tmp_path / "run" / "run.sqlite", read_only=True) as database:
        metrics, evaluations = database.metrics(), database.evaluations()
        rows = list(database.iterate())
    assert metrics["env/turns"] == [(1, 1.0)]
    assert metrics["env/tool_use_frac"] == [(1, 0.0)]
    assert evaluations["tool_use"] == [(0, 0.0), (1, 0.0)]
    assert all(row.interaction.turns == 1 for row in rows)
    assert len(rows) == 4


def small(folder, **more):
    """The quickstart on a tiny model whose turns end at any letter, with `Once` to answer them."""
    settings = {
        "model.name": str(folder),
        "data.held_out": "0",
        "data.train.0.size": "20",
        "rollout.prompts_per_step": "2",
        "rollout.group_size": "2",
        "rollout.max_tokens": "200",
        "rollout.stop": str(list(string.ascii_letters)),
        "environment.use": f'{{kind = "{__name__}:Once"}}',
    }
    return load("quickstart", [f"{key}={value}" for key, value in (settings | more).items()])


def test_calls_of_another_form_than_the_templates_are_told_once(folder, tmp_path):
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
        "{% endfor %}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    for calls, times in (("hermes", 1), ("llama", 0)):
        use = f'{{kind = "calculator", calls = "{calls}"}}'
        said = []
        resolve(small(tmp_path, **{"environment.use": use}), said.append).close()
        told = [line for line in said if line.startswith("warning: the model's chat template")]
        assert len(told) == times
        assert all('set calls = "llama" (environment.use.calls' in line for line in told)


def test_a_preflight_draws_episodes(folder):
    """An environment that answers once sees two turns."""
    parts = resolve(small(folder), lambda text: None)
    try:
        drawn = sample(parts.recipe, parts.opened, parts.reward, parts.problems, groups=2)
    finally:
        parts.close()
    rows = [row for group in drawn.groups for row in group.completions]
    assert [row.interaction.turns for row in rows] == [2] * 4
    assert [row.interaction.ended for row in rows] == ["environment"] * 4


def test_the_reward_test_asks_the_environment_for_prompts(folder, tmp_path, capsys):
    output = tmp_path / "lab.json"
    recipe = small(
        folder,
        **{
            "environment.use": f'{{kind = "trl", factory = "{__name__}:Game"}}',
            "reward.parts.lenient": '{name = "tools", kind = "tool_use", weight = 0.1}',
        },
    )
    said = []
    lab.run(
        recipe, threshold=0.5, problems=2, samples=2, output=output,
        console=Console(quiet=True), report=said.append,
    )  # fmt: skip
    found = json.loads(output.read_text())
    assert found["skipped"] == ["tools"]
    assert [f["rule"] for f in found["findings"] if f["severity"] == "note"][-1] == "skipped"
    assert found["length"]["count"] == 2
    prompt = next(made for made in found["attacks"] if made["attack"] == "the prompt")
    assert prompt["text"].endswith(" Go.")


def chat_with(folder, monkeypatch, typed, use, limit="40"):
    """The exit code of a chat in which ``typed`` is typed, and what the model was given."""
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, ""))
    given, generate = [], LocalEngine.generate

    def recording(self, requests, sampling):
        given.extend(byte_tokenizer().decode(r.tokens) for r in requests)
        return generate(self, requests, sampling)

    monkeypatch.setattr(LocalEngine, "generate", recording)
    settings = [f"environment.use={use}", f"rollout.max_tokens={limit}"]
    settings.append(f"rollout.stop={list(string.ascii_letters)}")
    code = main(["chat", str(folder), *(x for value in settings for x in ("--set", value))])
    return code, given


def test_a_chat_with_an_environment_is_answered_by_it(folder, monkeypatch, capsys):
    """Each typed line is a first turn, an answer and a second turn; the next one sees them all."""
    use = f'{{kind = "{__name__}:Once", word = "go 1"}}'
    code, given = chat_with(folder, monkeypatch, ["one", "two"], use, limit="400")
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.count("[user] go 1\n") == 2
    assert [text.count("go 1") for text in given] == [0, 1, 1, 2]
    assert [text.count("assistant\n") for text in given] == [1, 2, 3, 4]
    assert [(text.count("one"), text.count("two")) for text in given] == [(1, 0)] * 2 + [(1, 1)] * 2


def test_a_chat_shows_what_tools_answer(folder, monkeypatch, capsys):
    """The template takes no tools: their results go back to it as they do in training."""
    monkeypatch.setattr(
        "gruppo.environment.tools.find_calls",
        lambda text, form: [] if calls.pop() else [Call("calculator", {"expression": "2**64"})],
    )
    calls = [True, True, False]  # a call, an answer; then an answer
    code, given = chat_with(folder, monkeypatch, ["one", "two"], '{kind = "calculator"}', "400")
    assert code == 0
    assert capsys.readouterr().out.count("[tool] 18446744073709551616\n") == 1
    told = "user\n<tool_response>\n18446744073709551616\n</tool_response><|im_end|>\n"
    assert [text.count(told) for text in given] == [0, 1, 1]
    assert "user\ntwo<|im_end|>\n" in given[2]


def test_a_chat_that_an_environment_cannot_hold_is_refused(folder, monkeypatch, capsys):
    code, _ = chat_with(folder, monkeypatch, ["7"], '{kind = "guessing_game"}')
    assert code == 2
    assert "answer None is no whole number to guess" in capsys.readouterr().err
