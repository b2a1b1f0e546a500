"""Services that are slow, broken or hostile: what comes back, how often they are asked, no leak."""

import json
import logging
import socket
import threading
import time

import pytest

from gruppo.reward import Part, Remote, RewardSet, Service
from gruppo.reward.service import Client, Lost, Pacer
from gruppo.types import Completion, Message, Problem
from support.http_server import answering
from support.scores import count_failures

KEY = "planted-key-0123456789abcdef"


def row(text):
    return Completion(tokens=(), logp=(), mask=(), version=(), text=text, finish="stop")


def service(server, **settings):
    return Service(url=server.url, **{"backoff_s": 0.01, "retries": 2, **settings})


def post(server, *bodies, **settings):
    encoded = [json.dumps(body).encode() for body in bodies]
    return Client(service(server, **settings)).post_all("", encoded)


def test_answers_come_back_in_order_and_concurrency_reaches_its_bound_exactly():
    barrier = threading.Barrier(3, timeout=20)

    def answer(number, body):
        barrier.wait()  # passes only when three requests are under way at once
        return 200, {}, {"echo": body}

    with answering(answer) as server:
        answers = post(server, *range(12), concurrency=3)
    assert [json.loads(a)["echo"] for a in answers] == list(range(12))
    assert server.most_busy == 3


def test_a_429_is_tried_again_when_the_service_says_so():
    times = []

    def answer(number, body):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.3"}, b"slow down") if number == 0 else (200, {}, b"1")

    with answering(answer) as server:
        assert post(server, 7) == [b"1"]
    assert server.bodies == [7, 7]
    assert times[1] - times[0] >= 0.3


def test_a_retry_after_beyond_the_deadline_is_not_waited_for():
    with answering(lambda n, body: (503, {"Retry-After": "3600"}, b"later")) as server:
        [lost] = post(server, 1, deadline_s=30.0)
    assert (lost.kind, len(server.bodies)) == ("http_503", 1)


def test_500s_are_tried_as_often_as_told_and_other_statuses_once():
    statuses = {"broken": 500, "bad": 400, "moved": 301}
    with answering(lambda n, body: (statuses[body], {"Location": "/x"}, b"no")) as server:
        lost = post(server, "broken", "bad", "moved", retries=3)
    assert [answer.kind for answer in lost] == ["http_500", "http_400", "http_301"]
    assert [server.bodies.count(name) for name in statuses] == [4, 1, 1]


def test_a_server_that_recovers_costs_nothing():
    with answering(lambda n, body: (500, {}, b"") if n < 2 else (200, {}, b"ok")) as server:
        assert post(server, 1) == [b"ok"]
    assert len(server.bodies) == 3


def test_a_hanging_server_is_left_at_the_timeout_and_all_at_the_deadline():
    release = threading.Event()

    def answer(number, body):
        release.wait(20)
        return 200, {}, b"late"

    with answering(answer) as server:
        hung = post(server, 1, 2, timeout_s=0.2, retries=0)
        late = post(server, 3, 4, 5, timeout_s=10, deadline_s=0.3, concurrency=1)
        release.set()
    assert [answer.kind for answer in hung] == ["timeout"] * 2
    assert [answer.kind for answer in late] == ["timeout", "deadline", "deadline"]
    assert server.bodies[2:] == [3]


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_sends_byte_by_byte_is_left_at_the_timeout(start):
    def drip(stream):
        stream.write(start)
        for _ in range(400):
            stream.write(b"x")
            time.sleep(0.01)

    with answering(lambda n, body: (200, {}, drip)) as server:
        [lost] = post(server, 1, timeout_s=0.3, retries=0)
    assert lost == Lost("timeout", "no answer within 0.3 s")


def test_a_huge_answer_is_not_read():
    with answering(lambda n, body: (200, {}, b"1" * (1 << 20))) as server:
        [lost] = post(server, 1, max_reply_kib=16)
        [whole] = post(server, 1, max_reply_kib=1024)
    assert lost == Lost("oversize", "the answer is longer than 16 KiB")
    assert len(whole) == 1 << 20


def test_nobody_there_and_no_http():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        [lost] = Client(Service(url=address, retries=0, timeout_s=5)).post_all("", [b"1"])
    assert lost.kind == "connection"
    with answering(lambda n, body: (200, {}, lambda stream: stream.write(b"hello"))) as server:
        [garbage] = post(server, 1, retries=0)
    assert garbage.kind == "connection"


def test_requests_are_spaced_by_the_rate_limit():
    times = []

    def answer(number, body):
        times.append(time.monotonic())
        return 200, {}, b"1"

    with answering(answer) as server:
        post(server, *range(5), per_minute=600.0)
    assert max(times) - min(times) >= 0.35  # five starts, 0.1 s apart


# the key -----------------------------------------------------------------------------------


def test_a_request_that_is_given_up_takes_no_turn():
    pacer = Pacer(60)
    assert [pacer.reserve(0.0, 1.5) for _ in range(4)] == [0.0, 1.0, None, None]
    assert pacer.reserve(2.0, 1.5) == 0.0  # and not behind those that never came
    with answering(lambda n, body: (200, {}, b"1")) as server:
        one = Client(service(server, per_minute=600, deadline_s=0.5, concurrency=30))
        first, second = (one.post_all("", [b"7"] * 30) for _ in range(2))
    assert b"1" in first
    assert Lost("deadline", "not tried within service.deadline_s") in first
    assert b"1" in second


def test_a_long_pause_that_was_asked_for_ends_with_the_call():
    replies = [(503, {"Retry-After": "3600"}, b"later"), (200, {}, b"1")]
    with answering(lambda n, body: replies[n]) as server:
        one = Client(service(server, deadline_s=0.5))
        [lost] = one.post_all("", [b"7"])
        time.sleep(0.5)
        assert (lost.kind, one.post_all("", [b"7"])) == ("http_503", [b"1"])


def test_a_connection_that_comes_too_late_is_not_used(monkeypatch):
    resolve = socket.getaddrinfo

    def slowly(*args, **settings):
        time.sleep(0.4)
        return resolve(*args, **settings)

    with answering(lambda n, body: (200, {}, b"1")) as server:
        monkeypatch.setattr(socket, "getaddrinfo", slowly)
        [lost] = post(server, 7, timeout_s=0.1, retries=0)
    assert (lost.kind, server.bodies) == ("timeout", [])


def test_the_key_is_sent_and_is_in_no_record_log_or_failure(monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def answer(number, body):
        return 401, {}, f"Incorrect API key provided: {KEY}".encode()

    with answering(answer) as server:
        reward = Remote(service=service(server, key_env="JUDGE_KEY"))
        scores = RewardSet((Part(name="r", reward=reward),)).score(
            Problem(id="p", prompt=()), [row("x")]
        )
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert count_failures(scores) == {"grader/service_http_401": 1}
    assert "Incorrect API key provided: [key]" in scores[0].error.text
    said = capfd.readouterr()
    for text in (repr(scores), repr(reward), caplog.text, said.out, said.err):
        assert KEY not in text


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak"])
def test_a_missing_or_impossible_key_is_told_without_its_value(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match=r"service\.key_env = 'JUDGE_KEY'") as caught:
        Remote(service=Service(url="http://localhost:1", key_env="JUDGE_KEY")).open()
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host"}, r"service\.url = 'ftp://host'"),
        ({"url": "http://"}, r"service\.url"),
        ({"url": "http://host:99999/x"}, r"service\.url"),
        ({"url": "http://host/a b"}, r"service\.url"),
        ({"timeout_s": 0.0}, r"service\.timeout_s = 0"),
        ({"retries": -1}, r"service\.retries = -1"),
        ({"per_minute": 0.0}, r"service\.per_minute = 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Service(**{"url": "http://host", **settings})


def test_a_password_or_key_in_the_wrong_place_is_not_repeated():
    for settings in ({"url": f"http://me:{KEY}@host"}, {"url": "http://h", "key_env": KEY}):
        with pytest.raises(ValueError, match="key_env") as caught:
            Service(**settings)
        assert KEY not in str(caught.value)


# OpenRLHF's remote rewards -------------------------------------------------------------------

PROBLEMS = [
    Problem(id=str(n), prompt=(Message("system", "s"), Message("user", f"q{n}")), answer=f"{n}")
    for n in range(2)
]


def remote(answer, *texts):
    with answering(answer) as server:
        reward = RewardSet((Part(name="r", reward=Remote(service=service(server))),))
        scores = reward.score_groups([(p, [row(t) for t in texts]) for p in PROBLEMS])
    return server, scores


def test_the_remote_contract():
    def answer(number, body):
        pairs = zip(body["query"], body["labels"], strict=True)
        right = [float(query.endswith(label)) for query, label in pairs]
        return 200, {}, {"rewards": [2 * value - 1 for value in right], "scores": right}

    server, scores = remote(answer, " is 0", " is 1")
    assert sorted(server.bodies, key=lambda body: body["labels"])[1] == {
        "query": ["s\nq1 is 0", "s\nq1 is 1"],
        "prompts": ["s\nq1", "s\nq1"],
        "labels": ["1", "1"],
    }
    assert [[(s.total, s.task) for s in group] for group in scores] == [
        [(1.0, 1.0), (-1.0, 0.0)],
        [(-1.0, 0.0), (1.0, 1.0)],
    ]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"not json", "service_answer"),
        (b"[" * 100_000, "service_answer"),
        ([1.0, 1.0], "service_answer"),
        ({"reward": [1.0, 1.0]}, "service_answer"),
        ({"rewards": [1.0]}, "service_answer"),
        ({"rewards": [1.0, True]}, "service_answer"),
        ({"rewards": [1.0, "2"]}, "service_answer"),
        (b'{"rewards": [1.0, 1' + b"0" * 400 + b"]}", "service_answer"),
    ],
)
def test_a_group_with_a_wrong_answer_is_unscored_and_the_other_is_not(reply, kind):
    def answer(number, body):
        return 200, {}, reply if body["labels"][0] == "0" else {"scores": [0.25, 0.75]}

    _, (bad, good) = remote(answer, "a", "b")
    assert [s.total for s in bad] == [None, None]
    assert count_failures(bad) == {f"grader/{kind}": 2}
    assert [s.total for s in good] == [0.25, 0.75]


def test_null_abstains_and_nan_is_unscored():
    reply = b'{"rewards": [null, NaN, 0.5]}'
    _, (group, _) = remote(lambda n, body: (200, {}, reply), "a", "b", "c")
    assert [s.total for s in group] == [None, None, 0.5]
    assert count_failures(group) == {"grader/none": 1, "grader/nonfinite": 1}
