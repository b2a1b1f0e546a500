"""Golden losses where policies agree, and PPO's four quadrants of sign and ratio."""

import pytest
import torch

from gruppo.objective import (
    Cispo,
    DppoTv,
    DrGrpo,
    Gmpo,
    Gspo,
    GspoToken,
    Luspo,
    Objective,
    PpoClip,
    Reinforce,
    RlooSeq,
    Sapo,
    SeqMeanTokenMean,
    TokenMean,
    Vespo,
)
from support.golden_loss import assert_matches, ppo, run

ON_POLICY = {
    "ppo_clip": PpoClip(),
    "reinforce": Reinforce(),
    "cispo": Cispo(),
    "sapo": Sapo(),
    "dppo_tv": DppoTv(),
    "vespo": Vespo(),
    "gspo_token": GspoToken(),
    "two_sided": PpoClip(delta=4.0),
    "dual_clip": PpoClip(dual_clip=3.0),
}


@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("given", [True, False])
def test_on_policy_equivalence(golden, name: str, given: bool) -> None:
    case = golden("loss/on_policy_equivalence")
    assert set(ON_POLICY) == set(case["expected"]["losses"])
    inputs = dict(case["inputs"])
    if not given:
        del inputs["old_logp"]
    objective = Objective(credit=DrGrpo(), surrogate=ON_POLICY[name], weights=TokenMean())
    _, grad = run(objective, inputs)
    assert_matches(grad, case["expected"]["grad_logp"], case["tol"])


@pytest.mark.parametrize(
    ("surrogate", "key"),
    [
        (Gspo(), "gspo_and_gmpo_grad"),
        (Gmpo(), "gspo_and_gmpo_grad"),
        (Luspo(), "luspo_grad"),
        (RlooSeq(), "rloo_seq_grad"),
    ],
)
def test_on_policy_equivalence_sequence(golden, surrogate, key: str) -> None:
    case = golden("loss/on_policy_equivalence_sequence")
    objective = Objective(credit=DrGrpo(), surrogate=surrogate, weights=SeqMeanTokenMean())
    _, grad = run(objective, case["inputs"])
    assert_matches(grad, case["expected"][key], case["tol"])


def test_quadrants(golden) -> None:
    case = golden("loss/ppo_clip_quadrants")
    for (sign, ratio), want in zip(case["inputs"]["cases"], case["expected"]["rows"], strict=True):
        inputs = {
            "logp": [[torch.tensor(ratio, dtype=torch.float64).log().item()]],
            "old_logp": [[0.0]],
            "mask": [[1.0]],
            "advantages": [float(sign)],
        }
        objective = Objective(credit=DrGrpo(), surrogate=ppo(case["inputs"]), weights=TokenMean())
        loss, grad = run(objective, inputs)
        assert_matches(loss.value, want["loss"], 1e-6)
        assert_matches(grad, [[want["grad_logp"]]], 1e-6)
