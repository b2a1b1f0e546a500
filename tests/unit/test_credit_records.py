"""Credit records as configuration: needs, refusals with the fix, loading, printing, pickling."""

import pickle
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from gruppo.objective.credit import (
    BatchStd,
    Credit,
    DrGrpo,
    Gdpo,
    Gpg,
    Grpo,
    KLInReward,
    MaxRl,
    PasskAnalytic,
    PasskBest,
    PlainCredit,
    Process,
    ReinforcePP,
    Remax,
    Reweight,
    Rloo,
    outcome,
    reads_total,
)
from gruppo.types import Evidence

RECORD: TypeAdapter = TypeAdapter(PlainCredit | KLInReward | Reweight)


def test_what_estimators_need() -> None:
    kl = KLInReward(credit=Remax(), beta=0.05)
    assert kl.needs == {"greedy", "old_logp", "ref_logp"}
    assert (kl.min_group, kl.centred) == (1, False)
    assert ReinforcePP().needs == frozenset()
    assert ReinforcePP(beta=0.01).needs == {"old_logp", "ref_logp"}
    assert [PasskAnalytic(k=k).min_group for k in (1, 2, 4)] == [2, 2, 4]
    assert Reweight(credit=Rloo(), pos_scale=0.5, neg_scale=0.5).centred
    assert not Reweight(credit=Rloo(), clip=1.0).centred
    assert not Reweight(credit=Rloo(), pos_scale=0.1).centred
    assert not Reweight(credit=PasskBest()).centred
    assert Reweight(credit=kl).needs == kl.needs


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Grpo(ddof=2), "ddof = 2"),
        (lambda: Grpo(eps=-1.0), "eps = -1.0"),
        (lambda: Grpo(zero_tol=float("nan")), "zero_tol = nan"),
        (lambda: Gpg(f_norm=0.0), "f_norm = 0"),
        (lambda: PasskAnalytic(k=0), "k = 0"),
        (lambda: ReinforcePP(gamma=0.0), "gamma = 0.0"),
        (lambda: ReinforcePP(beta=-0.1), "beta = -0.1"),
        (lambda: Reweight(credit=Rloo(), clip=0.0), "clip = 0.0"),
        (lambda: KLInReward(credit=Rloo(), beta=-1.0), "beta = -1.0"),
        (lambda: KLInReward(credit=Gdpo(), beta=0.1), "credit = Gdpo.* has no effect; .*KL term"),
        (lambda: KLInReward(credit=Process(), beta=0.1), "credit = Process.* has no effect"),
        (
            lambda: KLInReward(credit=Reweight(credit=Gdpo(), clip=2.0), beta=0.1),
            "credit = Reweight.* has no effect",
        ),
        (lambda: KLInReward(credit=PasskAnalytic(k=2), beta=0.1), "needs rewards of 0 and 1"),
        (lambda: KLInReward(credit=MaxRl(), beta=0.1), "needs rewards ≥ 0, and a KL penalty"),
    ],
)
def test_bad_settings_are_refused(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("credit", "total", "text"),
    [
        (MaxRl(), [1.0, -0.5], "rewards ≥ 0, but got -0.5"),
        (PasskAnalytic(k=1), [1.0, 0.25], "rewards of 0 and 1, but got 0.25"),
        (Remax(), [1.0, 0.0], "rollout.baseline"),
        (ReinforcePP(beta=0.1), [1.0, 0.0], "evidence.old_logp"),
        (KLInReward(credit=Rloo(), beta=0.1), [1.0, 0.0], "evidence.old_logp"),
    ],
)
def test_wrong_input_is_refused(credit: Credit, total: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        credit(outcome(total, [0, 0]), Evidence())


def test_signed_binary_rewards_equal_zero_and_one() -> None:
    credit = PasskAnalytic(k=2)
    plain = credit(outcome([1.0, 0.0, 0.0, 1.0], [0] * 4), Evidence())
    signed = credit(outcome([1.0, -1.0, -1.0, 1.0], [0] * 4), Evidence())
    assert torch.equal(plain, signed)


def test_a_total_that_is_not_read_changes_nothing() -> None:
    """Why those credits refuse a KL penalty: another total, the same advantages."""
    rollout = replace(
        outcome([1.0, 0.0], [0, 0]),
        parts=torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        part_names=("a",),
        part_weights=torch.ones(1, dtype=torch.float64),
        steps=(((1, 1.0),), ((1, 0.0),)),
    )
    changed = replace(rollout, total=torch.tensor([-3.0, 7.0], dtype=torch.float64))
    for credit, reads in ((Gdpo(), False), (Process(), False), (Grpo(), True), (Rloo(), True)):
        same = torch.equal(credit(rollout, Evidence()), credit(changed, Evidence()))
        assert reads_total(credit) == reads == (not same)
        assert reads_total(Reweight(credit=credit)) == reads


def test_a_missing_greedy_score_gives_zero() -> None:
    rollout = outcome([1.0, 1.0], [0, 1], baseline=[float("nan"), 0.25])
    assert Remax()(rollout, Evidence()).tolist() == [0.0, 0.75]


def test_large_offsets_keep_the_group_centred() -> None:
    rollout = outcome([1e9 + 1.0, 1e9, 1e9, 1e9 + 1.0], [0] * 4)
    assert DrGrpo()(rollout, Evidence()).tolist() == [0.5, -0.5, -0.5, 0.5]


def test_infinite_reward_counts_as_unscored() -> None:
    rollout = outcome([float("inf"), 1.0, 0.0], [0, 0, 0])
    assert DrGrpo()(rollout, Evidence()).tolist() == [0.0, 0.5, -0.5]


def test_kl_is_summed_over_trained_tokens_and_clamped() -> None:
    rollout = outcome([1.0, 0.0], [0, 0], mask=torch.tensor([[True, False], [True, True]]))
    old = torch.tensor([[0.0, float("nan")], [-0.5, 1000.0]])
    evidence = Evidence(old_logp=old, ref_logp=torch.zeros(2, 2))
    # Row 0: 1 − 0; row 1: 0 − .1(−.5 + 20) = −1.95; half their difference is 1.475.
    advantage = KLInReward(credit=DrGrpo(), beta=0.1)(rollout, evidence)
    assert advantage.tolist() == pytest.approx([1.475, -1.475], abs=1e-12)


def test_records_load_from_plain_data() -> None:
    data = {
        "kind": "reweight",
        "neg_scale": 0.5,
        "credit": {"kind": "kl_in_reward", "beta": 0.05, "credit": {"kind": "rloo"}},
    }
    expected = Reweight(credit=KLInReward(credit=Rloo(), beta=0.05), neg_scale=0.5)
    assert RECORD.validate_python(data) == expected
    assert RECORD.validate_python({"kind": "batch_std", "of": "advantages"}) == BatchStd(
        of="advantages"
    )
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        RECORD.validate_python({"kind": "grpo", "epsilon": 1e-6})


def test_records_print_compare_and_pickle() -> None:
    credit = Reweight(credit=Grpo(eps=1e-6), clip=5.0)
    assert pickle.loads(pickle.dumps(credit)) == credit
    assert "Grpo(kind='grpo', ddof=1, eps=1e-06" in repr(credit)
    assert credit != replace(credit, clip=4.0)


def test_own_estimators_fit_the_protocol_and_the_wrappers() -> None:
    class Constant:
        needs = frozenset({"old_logp"})
        min_group = 1
        centred = False

        def __call__(self, rollout, evidence):
            return torch.full_like(rollout.total, -2.0)

    own = Constant()
    assert isinstance(own, Credit)
    wrapped = Reweight(credit=own, neg_scale=0.25)
    assert wrapped.needs == {"old_logp"}
    assert wrapped(outcome([1.0], [0]), Evidence()).tolist() == [-0.5]
