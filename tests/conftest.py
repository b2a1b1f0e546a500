"""Shared fixtures: the golden cases, and a tiny random model with a byte tokenizer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import config as shape_checks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "cases.json").read_text())
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: tiny tensors gain nothing from more, and results are the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """No shape checks where thousands of losses are computed: they take four fifths of the time.

    The golden tests run the same code with them.
    """
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """Golden case by name: ``golden("adv/grpo")["inputs"]`` (a null stands for NaN)."""
    return CASES.__getitem__


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id per byte, plus <|im_start|> and <|im_end|> (end of turn)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**overrides: object) -> LlamaConfig:
    """A Llama of about 40k parameters over the byte vocabulary."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **overrides})


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (tied embeddings) with the byte tokenizer, as on a hub."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
