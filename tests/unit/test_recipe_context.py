"""Prompts and completions must fit into the model's context, and that is known before a draw."""

from pathlib import Path

import pytest

from gruppo.cli import main
from gruppo.recipe import load
from gruppo.recipe.problems import prompt_limit


def limit(context: int | None, **settings: int) -> int:
    given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return prompt_limit(load("quickstart", given), context)


def test_a_limit_that_is_given_is_kept_if_it_fits():
    assert limit(512, data__max_prompt_tokens=480) == 480  # 32 for the completion
    assert limit(None, data__max_prompt_tokens=9999) == 9999
    with pytest.raises(
        ValueError, match=r"max_prompt_tokens = 481 and rollout\.max_tokens = 32 are 513"
    ):
        limit(512, data__max_prompt_tokens=481)


def test_without_one_the_context_says_how_long_a_prompt_may_be():
    assert limit(512) == 480
    assert limit(8192) == limit(None) == 1024
    with pytest.raises(ValueError, match=r"rollout\.max_tokens = 512: the context of pypi"):
        limit(512, rollout__max_tokens=512)


def test_longer_completions_in_evaluations_count():
    assert limit(512, eval__max_tokens=100) == 412
    assert limit(512, eval__max_tokens=20) == 480
    with pytest.raises(ValueError, match=r"eval\.max_tokens = 100 are 513"):
        limit(512, data__max_prompt_tokens=413, eval__max_tokens=100)


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
):
    settings = {
        "model.name": str(tiny_folder),
        "record.folder": str(tmp_path / "runs"),
        "data.max_prompt_tokens": "500",
    }
    given = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    assert main([verb, "quickstart", *given]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "data.max_prompt_tokens = 500 and rollout.max_tokens = 32 are 532 tokens" in said
    assert "is 512: lower one of them by 20" in said
    assert not (tmp_path / "runs").exists()
