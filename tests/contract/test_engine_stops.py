"""What every engine must do about end tokens, stop strings and the token budget."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gruppo.types import Completion, Request, Sampling
from support.engines import END, Make, letters, logits_of, requests


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path):
    return AutoTokenizer.from_pretrained(tiny_folder)


def chain(*tokens: int) -> nn.Module:
    """A model that after each of ``tokens`` (all different) says the next one, for certain."""
    assert len(set(tokens)) == len(tokens), "one successor each"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
        embedding = nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.lm_head.weight.zero_()
        for token, following in pairwise(tokens):
            model.lm_head.weight[following] = 10 * embedding[token]
    return model


def say(make: Make, tokenizer, text: str, **sampling: object) -> Completion:
    """What an engine makes of a model that says ``text`` and then ends its turn, after a '>'."""
    ids = tokenizer.encode(">" + text, add_special_tokens=False)
    engine = make(chain(*ids, END), lambda t: tokenizer.decode(t, skip_special_tokens=True))
    request = Request(tokens=tuple(ids[:1]), num_samples=1, key=(0,))
    settings = {"max_tokens": 30, "stop_tokens": (END,), **sampling}
    return engine.generate([request], Sampling(**settings))[0][0]


def test_stop_tokens_end_a_completion_and_change_nothing_before(make, model):
    """The tokens are a prefix of what is drawn without stops: leaving rows disturb no others."""
    asked = requests(4, 9, 6, num_samples=6)
    free = make(model, letters).generate(asked, Sampling(max_tokens=24))
    ends = tuple({c.tokens[at] for group in free for c in group for at in (5, 9, 15)})[:8]
    stopping = Sampling(max_tokens=24, stop_tokens=ends)
    finishes = []
    for group, whole in zip(
        make(model, letters, max_rows=12).generate(asked, stopping), free, strict=True
    ):
        for completion, unstopped in zip(group, whole, strict=True):
            at = next((n for n, t in enumerate(unstopped.tokens) if t in ends), None)
            finishes.append(completion.finish)
            expected = unstopped.tokens if at is None else unstopped.tokens[: at + 1]
            assert completion.tokens == expected
            assert completion.logp == pytest.approx(unstopped.logp[: len(expected)], abs=1e-5)
            assert completion.finish == ("length" if at is None else "stop")
            assert completion.truncated == (at is None)
            assert completion.text == letters(expected if at is None else expected[:-1])
            assert completion.mask == (True,) * len(expected)
    assert len(set(finishes)) == 2


def test_stop_strings_end_a_completion_and_are_cut_from_its_text(make, model):
    asked = requests(4, 9, 6, num_samples=6)
    free = make(model, letters).generate(asked, Sampling(max_tokens=24))
    stop = (letters(free[0][0].tokens[6:8]), letters(free[1][2].tokens[12:13]))
    drawn = make(model, letters).generate(asked, Sampling(max_tokens=24, stop=stop))
    stopped = 0
    for group, whole in zip(drawn, free, strict=True):
        for completion, unstopped in zip(group, whole, strict=True):
            text = letters(unstopped.tokens)
            ends = [(text.find(s), len(s)) for s in stop if s in text]
            start, length = min(ends, key=sum, default=(len(text), 0))
            assert completion.tokens == unstopped.tokens[: start + length]
            assert completion.text == text[:start]
            assert completion.finish == ("stop" if ends else "length")
            stopped += bool(ends)
    assert stopped >= 2


def test_characters_split_over_tokens_are_decoded_whole(make, tokenizer):
    text = "aé→😀z"  # 1, 2, 3, 4 and 1 bytes, a token each
    completion = say(make, tokenizer, text)
    assert completion.text == text
    assert len(completion.tokens) == 12
    assert (completion.tokens[-1], completion.finish) == (END, "stop")


def test_stop_string_of_split_characters(make, tokenizer):
    completion = say(make, tokenizer, "ab→cd", stop=("→c",))
    assert completion.text == "ab"
    assert tokenizer.decode(completion.tokens) == "ab→c"
    assert completion.finish == "stop"


def test_stop_string_in_the_middle_of_a_token(make):
    """A token may say more than the stop string: it is kept, its text is cut."""
    words = {1: ">", 2: "four", 3: "</answer>\nBut", 4: " wait"}
    engine = make(chain(1, 2, 3, 4), lambda ids: "".join(words[i] for i in ids))
    request = Request(tokens=(1,), num_samples=1, key=(0,))
    completion = engine.generate([request], Sampling(max_tokens=3, stop=("</answer>",)))[0][0]
    assert (completion.tokens, completion.text, completion.finish) == ((2, 3), "four", "stop")


def test_stop_string_that_ends_with_the_budget(make, tokenizer):
    assert say(make, tokenizer, "abcd", stop=("cd",), max_tokens=4).finish == "stop"
    cut = say(make, tokenizer, "abcd", stop=("cd",), max_tokens=3)
    assert (cut.text, cut.finish) == ("abc", "length")


def test_end_of_turn_that_does_not_stop_is_an_ordinary_token(make, tokenizer):
    completion = say(make, tokenizer, "ab", stop_tokens=(), max_tokens=3)
    assert (completion.tokens[-1], completion.finish) == (END, "length")


def test_end_token_as_the_last_of_the_budget_is_a_stop(make, tokenizer):
    completion = say(make, tokenizer, "ab", max_tokens=3)
    assert (completion.text, completion.finish, len(completion.tokens)) == ("ab", "stop", 3)


def test_no_tokens_asked(make, model):
    group = make(model, letters).generate(requests(4, num_samples=2), Sampling(max_tokens=0))[0]
    empty = Completion(tokens=(), logp=(), mask=(), version=(), text="", finish="length")
    assert group == (empty, empty)


def test_context_caps_the_budget(make, model):
    """512 positions in all: rows of one batch may have different room."""
    asked = requests(507, 512, 20)
    groups = make(model, letters).generate(asked, Sampling(max_tokens=8))
    assert [len(group[0].tokens) for group in groups] == [5, 0, 8]
    assert {group[0].finish for group in groups} == {"length"}
    logp = logits_of(model, asked[0].tokens, groups[0][0].tokens).log_softmax(-1)
    exact = logp.gather(-1, torch.tensor(groups[0][0].tokens)[:, None])[:, 0]
    assert groups[0][0].logp == pytest.approx(exact.tolist(), abs=2e-5)
