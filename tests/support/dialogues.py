"""Scripted environments and engines for episodes: what is asked of them can be looked at."""

import math
from dataclasses import dataclass, field

from gruppo.environment import Reply
from gruppo.types import Completion, Message, Problem, Request

END = 0


def problem(text="go", answer=None, **info):
    return Problem(id=text, prompt=(Message("user", text),), answer=answer, info=info)


class Letters:
    """One id a character; a turn ends with 0. A message is 1, its text, 2."""

    stop_tokens = (END,)

    def encode(self, messages):
        return tuple(ord(c) for m in messages for c in m.content)

    def continuation(self, messages, *, after):
        ids = [] if after == END else [END]
        for message in messages:
            ids += [1, *map(ord, message.content), 2]
        return tuple(ids)


@dataclass
class Script:
    """An engine that says ``turns[problem][sample]``, one text a turn; records what it is asked.

    A text that ends in "…" runs out of tokens there, one in "|" ends by a stop string.
    """

    turns: dict
    version: int = 3
    asked: list = field(default_factory=list)

    def generate(self, requests, sampling):
        self.asked.append(list(requests))
        return [
            tuple(self._say(request, sample, sampling) for sample in range(request.num_samples))
            for request in requests
        ]

    def _say(self, request: Request, sample: int, sampling) -> Completion:
        name = chr(request.tokens[0])
        number = request.key[-1] if request.offset else sample
        done = sum(token == END for token in request.tokens)
        text = self.turns[name][number][done]
        cut = text.endswith("…")
        body = text.rstrip("…|")
        tokens = tuple(map(ord, body)) + (() if text[-1:] in ("…", "|") else (END,))
        most = sampling.max_tokens if request.max_tokens is None else request.max_tokens
        if len(tokens) > most:
            tokens, cut = tokens[:most], True
        return Completion(
            tokens=tokens,
            logp=tuple(-0.25 for _ in tokens),
            mask=(True,) * len(tokens),
            version=(self.version,) * len(tokens),
            text="".join(chr(t) for t in tokens if t != END),
            finish="length" if cut else "stop",
        )

    def load(self, weights, version): ...

    def close(self): ...


@dataclass
class Talk:
    """An environment whose episodes answer by ``answers[text]`` and end where there is none."""

    answers: dict
    worth: object = None
    tools: tuple = ()
    instructions: str = ""
    closed: list = field(default_factory=list)

    def prompt(self, problem):
        return problem.prompt

    def start(self, problem):
        return TalkEpisode(self, problem)


@dataclass
class TalkEpisode:
    talk: Talk
    problem: Problem
    heard: list = field(default_factory=list)

    def reply(self, text, tokens):
        self.heard.append((text, tokens))
        answer = self.talk.answers.get(text)
        if callable(answer):
            answer = answer()
        if answer is None or isinstance(answer, Reply):
            return answer or Reply()
        return Reply(messages=(Message("user", answer),))

    def reward(self):
        return self.talk.worth() if callable(self.talk.worth) else self.talk.worth

    def close(self):
        self.talk.closed.append(self.problem.id)


def same(left: Completion, right: Completion) -> bool:
    """Equal, NaN to NaN."""
    return repr(left) == repr(right) and all(
        a == b or (math.isnan(a) and math.isnan(b))
        for a, b in zip(left.logp, right.logp, strict=True)
    )
