"""gruppo post-trains language models with GRPO: exact, group-native, and it explains itself."""

__version__ = "0.1.0"
