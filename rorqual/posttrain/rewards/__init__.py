"""Rewards of reinforcement learning: verifiable ones, prices on length and guessing, and models that judge."""

from rorqual.posttrain.rewards.base import Answer, Reward, Score, total
from rorqual.posttrain.rewards.registry import BUILDERS, RewardSetting, build_reward

__all__ = ["BUILDERS", "Answer", "Reward", "RewardSetting", "Score", "build_reward", "total"]
