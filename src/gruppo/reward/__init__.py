"""Rewards: parts that grade completions, and the boundary that makes one Score of them.

``KINDS`` holds the records that a recipe can name by their ``kind``; ``SHAPE_KINDS`` are those
that are shaping terms (``Part.shape``) unless told otherwise.
"""

from gruppo.reward.adapters import Function, InProcess
from gruppo.reward.answer import Exact, Number
from gruppo.reward.base import (
    BatchReward,
    Part,
    RewardSet,
    Shaping,
    refused,
    ungraded,
)
from gruppo.reward.code import Code
from gruppo.reward.control import Random
from gruppo.reward.countdown import Countdown
from gruppo.reward.environment import EnvironmentReward, ToolUse, score_sound, used_tools
from gruppo.reward.grader import GradingModel
from gruppo.reward.gym import ReasoningGym
from gruppo.reward.judge import Judge, Pairwise, Verifier
from gruppo.reward.language import LanguageConsistency
from gruppo.reward.layout import Format, OpenR1Format, ReasoningSteps, TagCount
from gruppo.reward.math_answer import Math
from gruppo.reward.part import Gate, Opens, Ramp
from gruppo.reward.regex import Regex
from gruppo.reward.remote import Remote
from gruppo.reward.reward_model import RewardModel
from gruppo.reward.service import Service
from gruppo.reward.shape import (
    CosineLength,
    KimiLength,
    LinearLength,
    Repetition,
    SoftOverlong,
)
from gruppo.reward.verifiers import Verifiers

KINDS: dict[str, type] = {
    "code": Code,
    "cosine_length": CosineLength,
    "countdown": Countdown,
    "environment": EnvironmentReward,
    "exact": Exact,
    "format": Format,
    "function": Function,
    "gym": ReasoningGym,
    "judge": Judge,
    "kimi_length": KimiLength,
    "language": LanguageConsistency,
    "linear_length": LinearLength,
    "math": Math,
    "number": Number,
    "open_r1_format": OpenR1Format,
    "pairwise": Pairwise,
    "random": Random,
    "reasoning_steps": ReasoningSteps,
    "regex": Regex,
    "remote": Remote,
    "repetition": Repetition,
    "reward_model": RewardModel,
    "soft_overlong": SoftOverlong,
    "tag_count": TagCount,
    "tool_use": ToolUse,
    "verifier": Verifier,
    "verifiers": Verifiers,
}
SHAPE_KINDS = frozenset(
    {"cosine_length", "kimi_length", "linear_length", "repetition", "soft_overlong"}
)

__all__ = [
    "KINDS",
    "SHAPE_KINDS",
    "BatchReward",
    "Code",
    "CosineLength",
    "Countdown",
    "EnvironmentReward",
    "Exact",
    "Format",
    "Function",
    "Gate",
    "GradingModel",
    "InProcess",
    "Judge",
    "KimiLength",
    "LanguageConsistency",
    "LinearLength",
    "Math",
    "Number",
    "OpenR1Format",
    "Opens",
    "Pairwise",
    "Part",
    "Ramp",
    "Random",
    "ReasoningGym",
    "ReasoningSteps",
    "Regex",
    "Remote",
    "Repetition",
    "RewardModel",
    "RewardSet",
    "Service",
    "Shaping",
    "SoftOverlong",
    "TagCount",
    "ToolUse",
    "Verifier",
    "Verifiers",
    "refused",
    "score_sound",
    "ungraded",
    "used_tools",
]
