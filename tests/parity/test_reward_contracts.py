"""Functions written for TRL, verl and OpenRLHF give the scores that their own libraries get.

Each test calls the function as its library documents it, and through the adapter.
"""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gruppo.reward import Function, InProcess, Part, RewardSet
from gruppo.reward.contracts import detect
from gruppo.types import Completion, Message, Problem

TEXTS = (("the answer is 4 \\boxed{4}", "5", ""), ("#### 1,000", "#### 7", "#### 1000"))
PROBLEMS = (
    Problem(
        id="a",
        prompt=(Message("system", "Be brief."), Message("user", "2+2?")),
        answer="4",
        info={"level": 1, "tags": ["sum"]},
        source="openai/gsm8k",
    ),
    Problem(id="b", prompt=(Message("user", "10*100?"),), answer="1000", info={"level": 3}),
)


def row(text: str) -> Completion:
    tokens = tuple(text.encode())
    n = len(tokens)
    return Completion(
        tokens=tokens, logp=(0.0,) * n, mask=(True,) * n, version=(0,) * n, text=text,
        finish="stop",
    )  # fmt: skip


GROUPS = [(p, [row(t) for t in texts]) for p, texts in zip(PROBLEMS, TEXTS, strict=True)]
FLAT = [(p, t) for p, texts in zip(PROBLEMS, TEXTS, strict=True) for t in texts]


def totals(reward) -> list[float | None]:
    scores = RewardSet((Part(name="r", reward=reward),)).score_groups(GROUPS)
    return [score.total for group in scores for score in group]


def trl_text(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def trl_chat(prompts, completions, completion_ids, answer, level, **kwargs) -> list[float | None]:
    assert kwargs["trainer_state"] is None
    kwargs["log_metric"]("mean_level", sum(level) / len(level))
    kwargs["log_extra"]("level", level)
    return [
        None
        if not completion[0]["content"]
        else float(gold in completion[0]["content"]) + lv / 10 + len(ids) / 100 + len(prompt)
        for prompt, completion, ids, gold, lv in zip(
            prompts, completions, completion_ids, answer, level, strict=True
        )
    ]


async def trl_async(prompts, completions, solution, **kwargs) -> list[float]:
    async def one(completion: list[dict], gold: str) -> float:
        await asyncio.sleep(0)
        return float(gold in completion[0]["content"])

    pairs = zip(completions, solution, strict=True)
    return await asyncio.gather(*(one(c, s) for c, s in pairs))


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str)
    if not found:
        return 0
    right = found[-1].replace(",", "") == ground_truth
    if data_source == "openai/gsm8k":
        return right
    return {"score": 1.0 if right else -1.0, "acc": right, "level": extra_info["level"]}


def reward_func(queries, prompts, labels, **kwargs):
    found = [float(label in query[len(p) :]) for query, p, label in zip(
        queries, prompts, labels, strict=True)]  # fmt: skip
    rewards = torch.tensor(found) * 2 - 1
    return {"rewards": rewards, "scores": torch.tensor(found), "extra_logs": {"x": rewards}}


def test_trl_text_form() -> None:
    direct = trl_text(completions=[text for _, text in FLAT], prompts=[], completion_ids=[])
    assert direct == [18.0, 1.0, 0.0, 5.0, 3.0, 4.0]
    assert totals(InProcess(trl_text, form="text")) == direct


def test_trl_chat_form_with_columns_and_abstention() -> None:
    nothing = {"trainer_state": None, "log_metric": lambda *a: None, "log_extra": lambda *a: None}
    direct = trl_chat(
        prompts=[[{"role": m.role, "content": m.content} for m in p.prompt] for p, _ in FLAT],
        completions=[[{"role": "assistant", "content": t}] for _, t in FLAT],
        completion_ids=[list(t.encode()) for _, t in FLAT],
        answer=[p.answer for p, _ in FLAT],
        level=[p.info["level"] for p, _ in FLAT],
        tags=[p.info.get("tags") for p, _ in FLAT],
        **nothing,
    )
    assert direct == pytest.approx([3.35, 2.11, None, 1.4, 1.36, 2.39])
    assert totals(InProcess(trl_chat)) == direct


def test_trl_async() -> None:
    assert totals(InProcess(trl_async)) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_trl_async_inside_a_running_event_loop() -> None:
    async def main() -> list[float | None]:
        return totals(InProcess(trl_async))

    assert asyncio.run(main()) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_verl_floats_booleans_and_dicts() -> None:
    direct = [compute_score(p.source, t, p.answer, dict(p.info)) for p, t in FLAT]
    assert direct[:3] == [0, 0, 0]
    scores = RewardSet((Part(name="r", reward=InProcess(compute_score)),)).score_groups(GROUPS)
    assert [s.total for s in scores[1]] == [d["score"] for d in direct[3:]] == [1.0, -1.0, 1.0]
    assert [s.task for s in scores[1]] == [1.0, 0.0, 1.0]
    assert [s.total for s in scores[0]] == [0.0, 0.0, 0.0]
    gsm = Problem(id="c", prompt=(), answer="7", source="openai/gsm8k")
    assert InProcess(compute_score)(gsm, [row("#### 7"), row("#### 8")]) == [1.0, 0.0]


def test_verl_parquet_columns_take_precedence() -> None:
    seen: list[tuple] = []

    def compute(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return 1.0

    info = {
        "data_source": "math",
        "reward_model": {"style": "rule", "ground_truth": ["1", "2"]},
        "extra_info": {"index": 3},
    }
    InProcess(compute)(Problem(id="a", prompt=(), answer="x", info=info), [row("t")])
    assert seen == [("math", "t", ["1", "2"], {"index": 3})]


def test_openrlhf_dict_and_plain_tensor() -> None:
    scores = RewardSet((Part(name="r", reward=InProcess(reward_func)),)).score_groups(GROUPS)
    assert [s.total for g in scores for s in g] == [1.0, -1.0, -1.0, -1.0, -1.0, 1.0]
    assert [s.task for g in scores for s in g] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]

    def plain(queries, prompts, labels):
        return torch.tensor([float(len(q) - len(p)) for q, p in zip(queries, prompts, strict=True)])

    assert totals(InProcess(plain)) == [float(len(t)) for _, t in FLAT]


def test_numpy_results_are_numbers() -> None:
    def by_numpy(prompts, completions, **kwargs):
        return np.arange(len(completions), dtype=np.float32)

    assert totals(InProcess(by_numpy)) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_contracts_are_detected_only_where_they_are_clear() -> None:
    assert detect(trl_text) == detect(trl_async) == "trl"
    assert detect(compute_score) == "verl"
    assert detect(reward_func) == "openrlhf"
    assert detect(lambda problem, completions: []) == "gruppo"
    for unclear in (lambda completions: [], lambda x: x, lambda prompts, completions: []):
        with pytest.raises(ValueError, match="name its contract"):
            detect(unclear)


FILE = """
import re
from helper import DIGITS  # a file beside this one

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    found = re.findall(DIGITS, solution_str)
    return {"score": float(bool(found) and found[-1] == ground_truth), "acc": bool(found)}

def trl(prompts, completions, level, **kwargs):
    return [lv + len(c[0]["content"]) / 100 for c, lv in zip(completions, level)]
"""


def test_the_same_functions_by_file_and_by_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper.py").write_text('DIGITS = r"[0-9]+"\n')
    (tmp_path / "my_rewards.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    by_file = Function(name=str(tmp_path / "my_rewards.py"))
    by_module = Function(name="my_rewards:trl")
    try:
        assert by_file.open() == "verl"
        assert totals(by_file) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        levels = (1, 1, 1, 3, 3, 3)
        expected = [lv + len(t) / 100 for lv, (_, t) in zip(levels, FLAT, strict=True)]
        assert totals(by_module) == expected
    finally:
        by_file.close()
        by_module.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("no/such/file.py:f", "no file no/such/file.py"),
        ("json:no_such", "json has no function 'no_such'"),
        ("json", "name the function"),
        ("json:dumps", "name its contract"),
    ],
)
def test_a_function_that_cannot_be_found_is_told_before_training(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Function(name=name).open()


def test_function_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"function\.name is empty"):
        Function(name="")
    with pytest.raises(ValueError, match=r"function\.timeout_s = 0"):
        Function(name="a:b", timeout_s=0)
