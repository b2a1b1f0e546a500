"""What an Objective asks for, what it refuses, and what the presets say about themselves."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from gruppo.objective import (
    PLANNED,
    PRESETS,
    AdaptiveEntropy,
    AdaptiveKL,
    Cispo,
    ClipCov,
    Coefficients,
    DppoKl,
    DppoTv,
    DrGrpo,
    Dro,
    EntropyTerm,
    GeometricMask,
    Gmpo,
    Grpo,
    Gspo,
    GspoToken,
    Importance,
    KlCov,
    KlCovTokens,
    KLInReward,
    KLTerm,
    Live,
    Luspo,
    Objective,
    OffPolicySequenceMask,
    PpoClip,
    Process,
    Reinforce,
    ReinforcePP,
    Remax,
    Reweight,
    Rloo,
    RlooSeq,
    Sapo,
    SeqMeanTokenMean,
    SequenceMask,
    SequenceTruncate,
    TokenMask,
    TokenMean,
    TokenTruncate,
    TopEntropy,
    Totals,
    Vespo,
    compute_loss,
    k1,
    make_rows,
    outcome,
)


class NeedsValues:
    needs, min_group, centred = frozenset({"values", "old_logp"}), 1, False

    def __call__(self, rollout, evidence):
        raise AssertionError("refused before it is asked")


def plain(**parts: object) -> Objective:
    base = Objective(credit=Grpo(), surrogate=PpoClip(), weights=TokenMean())
    return replace(base, **parts)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PpoClip(eps_low=0.0), "eps_low = 0.0"),
        (lambda: PpoClip(eps_high=-0.1), "eps_high = -0.1"),
        (lambda: PpoClip(delta=1.28), "exceed 1 \\+ eps_high = 1.28"),
        (lambda: PpoClip(dual_clip=1.0), "dual_clip = 1.0: must exceed 1"),
        (lambda: PpoClip(dual_clip=3.0, delta=4.0), "same bound as dual_clip"),
        (lambda: Cispo(w_max=0.5), "w_max = 0.5"),
        (lambda: Cispo(w_min=1.5), "w_min = 1.5"),
        (lambda: Sapo(tau_neg=0.0), "tau_neg = 0.0"),
        (lambda: Gspo(eps_low=0.0), "Gspo.eps_low"),
        (lambda: GspoToken(eps_high=0.0), "GspoToken.eps_high"),
        (lambda: Luspo(eps_high=-1.0), "Luspo.eps_high"),
        (lambda: RlooSeq(eps_low=2.0), "RlooSeq.eps_low"),
        (lambda: Gmpo(eps_low=0.0), "log space"),
        (lambda: Vespo(k_pos=-1.0), "Vespo.k_pos"),
        (lambda: DppoTv(delta_low=0.0), "DppoTv.delta_low"),
        (lambda: DppoTv(w_max=0.5), "DppoTv.w_max"),
        (lambda: DppoKl(kl_tau=-1.0), "kl_tau = -1.0"),
        (lambda: KlCov(kappa=0.0), "kappa = 0.0"),
        (lambda: Dro(b=0.0), "Dro.b = 0.0"),
        (lambda: TopEntropy(fraction=1.0), "leave the selection out"),
        (lambda: ClipCov(fraction=0.0), "ClipCov.fraction"),
        (lambda: ClipCov(low=5.0), "below high"),
        (lambda: KlCovTokens(fraction=2.0), "KlCovTokens.fraction"),
        (lambda: OffPolicySequenceMask(delta=0.0), "delta = 0.0"),
        (lambda: TokenTruncate(max=0.5), "TokenTruncate.max = 0.5"),
        (lambda: TokenMask(min=2.0), "TokenMask.min = 2.0"),
        (lambda: GeometricMask(min=-0.1), "GeometricMask.min"),
        (lambda: SequenceMask(veto=2.0), "SequenceMask.veto"),
        (lambda: SequenceTruncate(veto=0.0), "SequenceTruncate.veto"),
        (lambda: KLTerm(beta=-0.1), "beta = -0.1: must not be negative"),
        (lambda: KLTerm(beta=0.0, adaptive=AdaptiveKL(target=0.1)), "only scales it"),
        (lambda: KLTerm(beta=0.1, estimator=k1), "expected gradient 0"),
        (lambda: EntropyTerm(coef=-0.01), "coef = -0.01"),
    ],
)
def test_parts_refuse_senseless_settings(make, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"surrogate": Gspo()}, "SeqMeanTokenMean"),
        ({"surrogate": Luspo()}, "one loss per completion"),
        (
            {"surrogate": Gspo(), "weights": SeqMeanTokenMean(), "select": TopEntropy()},
            "it chooses tokens",
        ),
        (
            {"surrogate": Gspo(), "weights": SeqMeanTokenMean(), "credit": Process()},
            "GspoToken",
        ),
        (
            {
                "surrogate": Gmpo(),
                "weights": SeqMeanTokenMean(),
                "credit": Reweight(credit=ReinforcePP(beta=0.01)),
            },
            "average over the completion",
        ),
        ({"surrogate": PpoClip(bypass=True), "correction": TokenTruncate()}, "counted twice"),
        ({"surrogate": DppoKl(), "correction": TokenMask()}, "counted twice"),
        ({"surrogate": Vespo(), "correction": TokenTruncate()}, "Vespo\\(bypass=True\\)"),
        ({"surrogate": Reinforce(), "select": ClipCov()}, "use PpoClip"),
        ({"select": ClipCov()}, "clip range differs"),
        ({"surrogate": KlCov()}, "KlCovTokens"),
        ({"surrogate": KlCov(), "select": TopEntropy()}, "something must select"),
        ({"select": KlCovTokens()}, "surrogate=KlCov"),
        ({"credit": NeedsValues()}, "needs values, which no pass gives; there are old_logp"),
    ],
)
def test_combinations_are_refused_with_the_reason(parts: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plain(**parts)


def test_combinations_that_look_odd_but_mean_something() -> None:
    both = plain(credit=KLInReward(credit=Rloo(), beta=0.05), kl=KLTerm(beta=0.01))
    assert both.needs_reference
    constant = ReinforcePP(beta=0.0, gamma=1.0)
    row = plain(surrogate=Gspo(), weights=SeqMeanTokenMean(), credit=constant)
    assert row.credit.min_group == 1
    eps = {"eps_low": 0.3, "eps_high": 0.5}
    assert plain(surrogate=PpoClip(**eps), select=ClipCov(**eps)).select.role == "drop"


def test_what_is_needed() -> None:
    assert not plain().needs_reference
    assert not plain(kl=KLTerm(beta=0.0)).needs_reference
    assert plain(kl=KLTerm(beta=0.1)).needs_reference
    assert plain(credit=ReinforcePP(beta=0.01)).needs_reference
    remax = plain(credit=Remax())
    assert remax.needs_greedy
    assert not remax.needs_reference


def test_when_an_old_pass_is_needed() -> None:
    assert not plain().needs_old(1)
    assert plain().needs_old(2)
    assert not plain(surrogate=Cispo(bypass=True)).needs_old(4)
    assert plain(credit=KLInReward(credit=Rloo(), beta=0.05)).needs_old(1)
    assert not plain(correction=TokenTruncate()).needs_old(1)
    assert plain(correction=TokenTruncate(batch_normalize=True)).needs_old(1)


def test_which_losses_act_without_an_advantage() -> None:
    acting = {n for n, p in PRESETS.items() if p.objective.acts_without_advantage}
    assert acting == {"prime_default", "kl_cov", "dro"}
    # The reason: off-policy, their penalty has a gradient where A = 0.
    old = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    for surrogate, slope in ((DppoKl(kl_tau=0.1), 0.1), (Dro(b=0.2), 0.1), (PpoClip(), 0.0)):
        objective = plain(surrogate=surrogate)
        rows = replace(rows_for(objective, old_logp=old, engine_logp=old), advantage=0 * old)
        logp = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
        live = Live(logp=logp, entropy=None, mask=rows.mask)
        compute_loss(objective, live, rows, Coefficients()).value.backward()
        torch.testing.assert_close(logp.grad, torch.full_like(logp, slope))


def test_start_coefficients() -> None:
    assert plain().coefficients == Coefficients(kl=0.0, entropy=0.0)
    adaptive = EntropyTerm(coef=0.3, adaptive=AdaptiveEntropy())
    assert plain(entropy=adaptive).coefficients.entropy == 0.0
    kl = KLTerm(beta=0.2, adaptive=AdaptiveKL(target=6.0))
    assert plain(kl=kl).coefficients == Coefficients(kl=0.2, entropy=0.0)


def rows_for(objective: Objective, **given: torch.Tensor):
    rollout = outcome([1.0, 0.0], [0, 0])
    return make_rows(
        objective,
        advantage=torch.tensor([0.5, -0.5], dtype=torch.float64),
        mask=rollout.mask,
        group=rollout.group,
        scored=torch.tensor([True, True]),
        old_logp=given.get("old_logp"),
        engine_logp=given.get("engine_logp"),
        ref_logp=given.get("ref_logp"),
        totals=Totals.of(rollout.mask, rollout.group),
        selected=given.get("selected"),
    )


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"kl": KLTerm(beta=0.1)}, "ref_logp = None"),
        ({"select": TopEntropy()}, "selected = None"),
        ({"correction": TokenMask(batch_normalize=True)}, "old_logp = None"),
    ],
)
def test_missing_inputs_are_named(parts: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rows_for(plain(**parts))


def test_no_reference_is_read_when_beta_is_zero() -> None:
    objective = plain(kl=KLTerm(beta=0.0))
    rows = rows_for(objective)
    live = Live(logp=torch.zeros(2, 1, dtype=torch.float64), entropy=None, mask=rows.mask)
    loss = compute_loss(objective, live, rows, objective.coefficients)
    assert loss.tokens.kl is None
    assert loss.kl.item() == 0.0


def test_random_choice_is_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, advantage = (torch.randn(20, 30, generator=generator) for _ in range(2))
    mask = torch.rand(20, 30, generator=generator) < 0.9
    select = ClipCov(fraction=0.05, low=0.0)

    def choose(seed: int) -> torch.Tensor:
        return select(logp, None, old_logp=logp, advantage=advantage, mask=mask, seed=seed)

    first, second, other = choose(1), choose(1), choose(2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert int(first.sum()) == int(other.sum()) == int(0.05 * int(mask.sum()))
    assert not (first & ~mask).any()


def test_quantile_interpolates_as_torch_does() -> None:
    entropy = torch.rand(13, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(13, 11, dtype=torch.bool)
    for fraction in (0.01, 0.2, 0.5, 0.99):
        kept = TopEntropy(fraction=fraction)(
            entropy, entropy, old_logp=entropy, advantage=entropy, mask=mask, seed=0
        )
        assert torch.equal(kept, entropy >= entropy.quantile(1 - fraction))


def test_dppo_cap_limits_the_ratio_and_keeps_its_direction() -> None:
    rows = rows_for(plain(), old_logp=torch.tensor([[-9.0], [-9.0]], dtype=torch.float64))
    logp = torch.tensor([[-2.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    live = Live(logp=logp, entropy=None, mask=rows.mask)
    objective = plain(surrogate=DppoTv(w_max=20.0))
    compute_loss(objective, live, rows, Coefficients()).value.backward()
    # -keep·20·A/N with A = ±.5 and N = 2; both changes of probability are below .2.
    torch.testing.assert_close(logp.grad, torch.tensor([[-5.0], [5.0]], dtype=torch.float64))


def test_importance_is_unclipped() -> None:
    rows = rows_for(plain(), old_logp=torch.zeros(2, 1, dtype=torch.float64))
    logp = torch.full((2, 1), 4.0, dtype=torch.float64).log().requires_grad_()
    live = Live(logp=logp, entropy=None, mask=rows.mask)
    objective = plain(surrogate=Importance())
    loss = compute_loss(objective, live, rows, Coefficients())
    loss.value.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    assert not (loss.tokens.clipped_low | loss.tokens.clipped_high).any()


def test_own_parts_need_no_registration() -> None:
    class Squared:
        level, uses_clip, bypass = "token", False, False

        def __call__(self, live, *, old_logp, engine_logp, advantage, selected):
            token = Reinforce()(
                live,
                old_logp=old_logp,
                engine_logp=engine_logp,
                advantage=advantage * advantage.abs(),
                selected=selected,
            )
            return token

    objective = plain(surrogate=Squared(), credit=DrGrpo())
    rows = rows_for(objective)
    logp = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    live = Live(logp=logp, entropy=None, mask=rows.mask)
    compute_loss(objective, live, rows, Coefficients()).value.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.125], [0.125]], dtype=torch.float64))


SECTION = [
    "grpo",
    "r1_zero",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "gspo_token",
    "cispo",
    "gmpo",
    "sapo",
    "vespo",
    "luspo",
    "gpg",
    "opo",
    "rloo",
    "rloo_clip",
    "remax",
    "rpp",
    "rpp_baseline",
    "lite_ppo",
    "gdpo",
    "clip_cov",
    "kl_cov",
    "tokens_80_20",
    "skywork",
    "intellect2",
    "icepop",
    "tis",
    "mis",
    "dppo",
    "prime_default",
    "passk_best",
    "passk_analytic",
    "maxrl",
    "two_grpo",
    "process",
    "dro",
    "v32",
    "default",
]


def test_presets_are_complete_and_say_where_they_come_from() -> None:
    assert set(PRESETS) == set(SECTION)
    assert not set(PRESETS) & set(PLANNED)
    allowed = {
        "group_size": int,
        "filter": str,
        "overlong_buffer": int,
        "mask_truncated": bool,
        "reference_sync_steps": int,
        "greedy_baseline": bool,
    }
    for name, preset in PRESETS.items():
        assert len(preset.source) > 5, name
        assert preset.differs.endswith("."), name
        for key, value in preset.rollout.items():
            assert type(value) is allowed[key], (name, key)
        assert preset.rollout.get("greedy_baseline", False) == preset.objective.needs_greedy
        assert preset.rollout.get("filter", "skip") in {"keep", "skip", "drop", "resample"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_values(name: str) -> None:
    preset = PRESETS[name]
    assert pickle.loads(pickle.dumps(preset)) == preset
    with pytest.raises(FrozenInstanceError):
        preset.objective.surrogate = Reinforce()


def test_published_numbers() -> None:
    assert PRESETS["dapo"].objective.surrogate == PpoClip(eps_low=0.2, eps_high=0.28)
    assert PRESETS["grpo"].objective.surrogate.upper == 0.2
    assert PRESETS["grpo"].objective.kl == KLTerm(
        beta=0.04, estimator=PRESETS["r1_zero"].objective.kl.estimator
    )
    assert PRESETS["gspo"].objective.surrogate == Gspo(eps_low=3e-4, eps_high=4e-4)
    assert PRESETS["intellect2"].objective.surrogate.delta == 4.0
    assert PRESETS["icepop"].objective.correction == TokenMask(min=0.5, max=5.0)
    assert PRESETS["default"].objective == plain()
