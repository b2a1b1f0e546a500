"""Layout, language and length rewards on hand-made completions."""

import pytest

from gruppo.reward import (
    CosineLength,
    Format,
    KimiLength,
    LanguageConsistency,
    LinearLength,
    ReasoningSteps,
    Repetition,
    SoftOverlong,
)
from gruppo.reward.language import word_scripts
from gruppo.types import Completion, Problem, Score

PROBLEM = Problem(id="p", prompt=())


def row(text: str = "", num_tokens: int = 0) -> Completion:
    return Completion(
        tokens=tuple(range(num_tokens)), logp=(0.0,) * num_tokens, mask=(True,) * num_tokens,
        version=(0,) * num_tokens, text=text, finish="stop",
    )  # fmt: skip


def score(value: float | None) -> Score:
    return Score(total=value, task=value)


@pytest.mark.parametrize(
    ("text", "loose"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> ok", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer></think>", 0.0),
        ("<answer>b</answer>", 0.0),
    ],
)
def test_format_without_newlines(text: str, loose: float) -> None:
    assert Format(newlines=False)(PROBLEM, [row(text)]) == [loose]
    assert Format()(PROBLEM, [row(text)]) == [0.0]


def test_format_of_a_thinking_that_the_prompt_opened() -> None:
    text = "a\n</think>\n<answer>\nb\n</answer>"
    assert Format()(PROBLEM, [row(text)]) == [0.0]
    assert Format(opened=True)(PROBLEM, [row(text), row("<think>\n" + text)]) == [1.0, 0.0]


def test_reasoning_steps_count_up_to_the_target() -> None:
    texts = ["", "First, a. Second, b.", "Step 1: a\n- b\n* c\nFinally, d"]
    assert ReasoningSteps()(PROBLEM, [row(t) for t in texts]) == pytest.approx([0, 2 / 3, 1.0])
    with pytest.raises(ValueError, match=r"reasoning_steps\.target = 0"):
        ReasoningSteps(target=0)


def test_words_are_told_apart_by_script() -> None:
    assert word_scripts("The answer 是 4, so 因此 done") == [
        "LATIN", "LATIN", "CJK", "LATIN", "CJK", "LATIN",
    ]  # fmt: skip
    assert word_scripts(r"$x = \frac{\pi}{2} + 3$ `code` <think> π") == []
    assert word_scripts("中文字符") == ["CJK", "CJK"]
    assert word_scripts("Привет мир") == ["CYRILLIC", "CYRILLIC"]


def test_language_consistency_reads_the_thinking() -> None:
    text = "I think 因此 yes</think> 答案"
    assert LanguageConsistency()(PROBLEM, [row(text), row("1 + 1 = 2")]) == [2 / 3, 1.0]
    assert LanguageConsistency(where="all", language="zh")(PROBLEM, [row(text)]) == [2 / 4]
    assert LanguageConsistency(language="de")(PROBLEM, [row("ganz gut english too")]) == [1.0]


def test_soft_overlong_factor_scales_and_caps() -> None:
    overlong = SoftOverlong(max_tokens=10, buffer=4, factor=0.5)
    values = overlong(PROBLEM, [row(num_tokens=n) for n in (6, 8, 10, 12)])
    assert values == [0.0, -0.25, -0.5, -0.5]
    with pytest.raises(ValueError, match=r"soft_overlong\.buffer = 11"):
        SoftOverlong(max_tokens=10, buffer=11)
    with pytest.raises(ValueError, match=r"soft_overlong\.factor = -1"):
        SoftOverlong(max_tokens=10, buffer=1, factor=-1)


def test_group_length_terms_skip_unscored_rows() -> None:
    group = [row(num_tokens=n) for n in (100, 900, 300)]
    scores = [score(1.0), score(None), score(0.0)]
    assert KimiLength().shape(PROBLEM, group, scores) == [0.5, None, -0.5]
    assert LinearLength().shape(PROBLEM, group, scores) == pytest.approx([-1 / 6, None, -0.5])
    cosine = CosineLength(max_tokens=200).shape(PROBLEM, group, scores)
    assert cosine == pytest.approx([0.75, None, -0.5])
    nothing = [score(None)] * 3
    assert LinearLength().shape(PROBLEM, group, nothing) == [None] * 3
    assert KimiLength().shape(PROBLEM, group, nothing) == [None] * 3
    empty = [row(), row()]
    assert LinearLength().shape(PROBLEM, empty, [score(1.0), score(0.0)]) == [0.0, 0.0]


def test_length_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"repetition\.n = 0"):
        Repetition(n=0)
    with pytest.raises(ValueError, match=r"repetition\.max_penalty = 1"):
        Repetition(max_penalty=1.0)
    with pytest.raises(ValueError, match=r"cosine_length\.max_tokens = 0"):
        CosineLength(max_tokens=0)
