"""How tool calls are read, held against how the model's chat template writes them."""

import pytest

from conftest import CHAT_TEMPLATE, byte_tokenizer
from gruppo.environment import Calculator, GuessingGame
from gruppo.model import Encoder
from gruppo.recipe.calls import calls_mismatch

SYSTEM = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
TURNS = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HERMES = """<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>"""
LLAMA = """{"name": "{{ call.function.name }}", \
"parameters": {{ call.function.arguments | tojson }}}"""
XML = "<tool_call><function={{ call.function.name }}></function></tool_call>"


def writing(call):
    """A template that takes tools, and writes calls so."""
    return SYSTEM + TURNS.replace("CALL", call)


def mismatch(template, calls="hermes", special=(), environment=None):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", *special]},
    )
    tokenizer.chat_template = template
    environment = environment or Calculator(calls=calls)
    return calls_mismatch(environment, Encoder(tokenizer, tools=environment.tools))


@pytest.mark.parametrize(
    ("call", "right", "wrong"),
    [(HERMES, "hermes", "llama"), (LLAMA, "llama", "hermes")],
)
def test_the_other_form_is_told_with_the_value_to_set(call, right, wrong):
    assert mismatch(writing(call), right) == ""
    for other in (wrong, "fenced"):
        told = mismatch(writing(call), other)
        assert f'where calls = "{other}" does not read them' in told
        assert f'set calls = "{right}" (environment.use.calls in a recipe)' in told
        assert '"name": "gruppo"' in told


def test_what_counts_is_the_text_that_an_engine_gives():
    """Special tokens are no part of it: Llama's mark of a call is gone, and so may be a tag."""
    marked = writing("<|python_tag|>" + LLAMA)
    assert mismatch(marked, "llama", special=["<|python_tag|>"]) == ""
    tags = ["<tool_call>", "</tool_call>"]
    assert 'set calls = "llama"' in mismatch(writing(HERMES), "hermes", special=tags)


def test_a_turn_that_opens_with_more_than_one_of_the_past_holds():
    thinking = writing(HERMES).replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert mismatch(thinking, "hermes") == ""
    assert 'set calls = "hermes"' in mismatch(thinking, "fenced")


def test_a_form_that_nothing_reads_is_told():
    told = mismatch(writing(XML))
    assert "'<tool_call><function=gruppo></function></tool_call>'" in told
    assert "no value of environment.use.calls reads these" in told


@pytest.mark.parametrize(
    ("hint", "calls", "told"),
    [
        ("Answer within <tool_call></tool_call>.", "hermes", ""),
        ("Answer within <tool_call></tool_call>.", "llama", 'set calls = "hermes"'),
        ("Begin with <|python_tag|>.", "hermes", 'set calls = "llama"'),
        ("Answer.", "hermes", ""),
    ],
)
def test_a_template_without_turns_that_call_is_known_by_its_marks(hint, calls, told):
    template = SYSTEM.replace("{{ tools", hint + "{{ tools") + CHAT_TEMPLATE
    assert told in mismatch(template, calls)
    assert (told == "") == (mismatch(template, calls) == "")


def test_without_tools_in_the_template_or_the_environment_nothing_is_told():
    """A template that knows none gets the form in words, the one that is read."""
    assert mismatch(CHAT_TEMPLATE, "llama") == ""
    assert mismatch(TURNS.replace("CALL", LLAMA), "hermes") == ""
    assert mismatch(writing(LLAMA), environment=GuessingGame()) == ""
