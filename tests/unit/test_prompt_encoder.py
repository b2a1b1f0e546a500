"""Encoder: templates, exactly one BOS, end tokens."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from gruppo.model import Encoder, end_ids
from gruppo.types import Message

WORDS = ["<s>", "</s>", "<|end|>", "hello", "world", "gruppo", "user", "?"]


def word_tokenizer(template: str | None = None, *, end: bool = False) -> PreTrainedTokenizerFast:
    """Words to ids, BOS in front of everything (and EOS behind it if ``end``), as Llama does."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    fast.chat_template = template
    return fast


TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}{{ opening | default('gruppo') }}{% endif %}"
)


def test_chat_is_rendered_by_the_template(tiny_folder: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_folder))
    messages = [Message("system", "Be brief."), Message("user", "né?")]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nné?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoder.render(messages) == text
    ids = encoder.encode(messages)
    assert ids[0] == 257
    assert ids.count(256) == 2
    assert encoder.decode(ids, skip_special=False) == text
    assert encoder.decode(ids) == "system\nBe brief.\nuser\nné?\nassistant\n"
    assert (encoder.stop_tokens, encoder.pad_token) == ((256,), 256)


def test_an_open_assistant_message_is_continued(tiny_folder: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_folder))
    text = encoder.render([Message("user", "2+2"), Message("assistant", "<think>")])
    assert text.endswith("<|im_start|>assistant\n<think>")


def test_the_template_writes_its_own_bos() -> None:
    encoder = Encoder(word_tokenizer(TEMPLATE))
    assert encoder.encode([Message("user", "hello")]) == (0, 6, 3, 2, 5)


def test_template_options_reach_the_template() -> None:
    encoder = Encoder(word_tokenizer(TEMPLATE), template_options={"opening": "world"})
    assert encoder.encode([Message("user", "hello")]) == (0, 6, 3, 2, 4)


@pytest.mark.parametrize("text", ["hello world", "<s> hello world", "<s> <s> hello world"])
@pytest.mark.parametrize("end", [False, True])
def test_plain_text_has_one_bos_and_no_eos(text: str, end: bool) -> None:
    encoder = Encoder(word_tokenizer(end=end), chat=False)
    assert encoder.encode([Message("user", text)]) == (0, 3, 4)


def test_plain_text_joins_contents() -> None:
    encoder = Encoder(word_tokenizer(), chat=False)
    assert encoder.render([Message("system", "a"), Message("user", "b")]) == "a\n\nb"


def test_the_turn_end_of_the_template_stops_too() -> None:
    """End of text, end of turn and what the generation configuration names: all of them."""
    encoder = Encoder(word_tokenizer(TEMPLATE), stop_tokens=[7])
    assert encoder.stop_tokens == (1, 2, 7)
    assert Encoder(word_tokenizer(), chat=False).stop_tokens == (1,)
    assert encoder.pad_token == 1


def test_a_template_that_refuses_the_probe_still_encodes() -> None:
    strict = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}<s> hello"
    )
    encoder = Encoder(word_tokenizer(strict))
    assert encoder.stop_tokens == (1,)
    assert encoder.encode([Message("user", "x")]) == (0, 3)


def test_no_template_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"no chat template.*set chat = false"):
        Encoder(word_tokenizer())


def test_no_end_at_all_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        Encoder(tokenizer, chat=False)
    assert Encoder(tokenizer, chat=False, stop_tokens=(4,)).pad_token == 4


def test_end_ids_of_generation_configurations() -> None:
    assert end_ids(None) == ()
    assert end_ids(GenerationConfig()) == ()
    assert end_ids(GenerationConfig(eos_token_id=5)) == (5,)
    assert end_ids(GenerationConfig(eos_token_id=[5, 9])) == (5, 9)
