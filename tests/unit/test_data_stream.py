"""The order of draws: epochs, mixtures, curriculum, history, cursor."""

import json
import re
from array import array
from collections import Counter

import pytest

from gruppo.data import Curriculum, Jsonl, ProblemStream, View
from gruppo.data.keyed import Draws, hash64, permutation
from gruppo.types import Message, Problem


def problems(name, count):
    return [
        Problem(id=f"{name}{i}", prompt=(Message("user", f"{name} {i}"),), source=name)
        for i in range(count)
    ]


def ids(drawn):
    return [p.id for p in drawn]


def some(name, *rows):
    """A view, as the sources of a recipe are after the split."""
    return View(problems(name, 3), array("Q", rows))


def test_every_epoch_has_every_problem_once_in_another_order():
    data = problems("a", 50)
    stream = ProblemStream([(data, 1.0)], seed=0)
    epochs = [ids(stream.draw(50)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(ids(data)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert (stream.epoch, stream.epochs, stream.drawn) == (3, (3.0,), 150)
    other = ProblemStream([(data, 1.0)], seed=1)
    assert ids(other.draw(50)) != epochs[0]


def test_epochs_count_passes():
    stream = ProblemStream([(problems("a", 10), 1.0)], seed=0, dropped=3)
    assert (stream.epoch, stream.epochs, stream.prompts_dropped) == (0, (0.0,), 3)
    stream.draw(25)
    assert (stream.epoch, stream.epochs) == (2.5, (2.5,))
    mixed = ProblemStream([(problems("a", 10), 1.0), (problems("b", 4), 1.0)], seed=0)
    mixed.draw(20)
    ten, four = mixed.epochs
    assert round(10 * ten + 4 * four) == 20
    assert mixed.epoch == four > ten


def test_equal_ids_under_other_names_and_once_in_views_are_fine():
    stream = ProblemStream(
        [(some("a", 0, 1), 1.0), (some("a", 2), 1.0), (some("b", 0), 1.0)], seed=0
    )
    assert {p.id for p in stream.draw(40)} == {"a0", "a1", "a2", "b0"}


def test_draws_do_not_depend_on_how_they_are_batched():
    data = [(problems("a", 7), 1.0), (problems("b", 5), 2.0)]
    whole = ids(ProblemStream(data, seed=3).draw(60))
    stream = ProblemStream(data, seed=3)
    assert [name for n in (1, 2, 3, 20, 34) for name in ids(stream.draw(n))] == whole


@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (0.1, 0.7, 0.2), (3.0, 1e-9, 3.0)])
def test_mixture_follows_the_weights(weights):
    names = ("a", "b", "c")
    stream = ProblemStream(
        [(problems(name, 9), weight) for name, weight in zip(names, weights, strict=True)], seed=7
    )
    count = 1000
    got = Counter(p.source for p in stream.draw(count))
    for name, weight in zip(names, weights, strict=True):
        share = weight / sum(weights)
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(got[name] - count * share) <= 4 * deviation + 0.01


def test_resume_at_any_draw_gives_the_same_rest():
    data = [(problems("a", 5), 1.0), (problems("b", 3), 0.5)]
    steering = Curriculum(floor=0.1, drop_pass_rate=0.9)

    def step(stream):
        """Draw 2 and record made-up pass rates for them."""
        drawn = stream.draw(2)
        for p in drawn:
            stream.record(p, hash64(p.id, stream.drawn) % 10 / 10)
        return ids(drawn)

    reference = ProblemStream(data, seed=2, curriculum=steering)
    whole, states = [], []
    for _ in range(12):
        states.append(json.dumps(reference.state()))
        whole.append(step(reference))
    for number, state in enumerate(states):
        stream = ProblemStream(data, seed=2, curriculum=steering)
        stream.restore(json.loads(state))
        assert [step(stream) for _ in range(12 - number)] == whole[number:]
        assert stream.state() == reference.state()


def test_restore_goes_back_in_place():
    stream = ProblemStream([(problems("a", 6), 1.0)], seed=0)
    state = stream.state()
    first = ids(stream.draw(15))
    stream.restore(state)
    assert ids(stream.draw(15)) == first


def test_state_is_a_copy():
    stream = ProblemStream([(problems("a", 6), 1.0)], seed=0)
    state = stream.state()
    before = json.dumps(state)
    stream.draw(4)
    stream.record(problems("a", 1)[0], 0.5)
    assert json.dumps(state) == before


@pytest.mark.parametrize(
    "other",
    [
        problems("a", 7),
        problems("a", 6)[::-1],
        problems("b", 6),
        [Problem(id=p.id, prompt=p.prompt, answer="9", source="a") for p in problems("a", 6)],
    ],
)
def test_restore_refuses_other_data(other):
    state = ProblemStream([(problems("a", 6), 1.0)], seed=0).state()
    with pytest.raises(ValueError, match="the problems differ from those of the checkpoint"):
        ProblemStream([(other, 1.0)], seed=0).restore(state)


def test_restore_refuses_another_seed():
    state = ProblemStream([(problems("a", 6), 1.0)], seed=0).state()
    with pytest.raises(ValueError, match="seed: 1 differs from the checkpoint's 0"):
        ProblemStream([(problems("a", 6), 1.0)], seed=1).restore(state)


def test_history_is_a_moving_average():
    (p,) = problems("a", 1)
    stream = ProblemStream([([p], 1.0)], seed=0, curriculum=Curriculum(decay=0.75))
    assert stream.pass_rate(p) is None
    for rate in (1.0, 0.0, 0.5):
        stream.record(p, rate)
    # 1; .75 * 1 + .25 * 0 = .75; .75 * .75 + .25 * .5 = .6875
    assert stream.pass_rate(p) == 0.6875
    with pytest.raises(ValueError, match=re.escape("pass_rate: 1.5 must be between 0 and 1")):
        stream.record(p, 1.5)


def test_solved_problems_are_dropped_for_good():
    data = problems("a", 10)
    stream = ProblemStream([(data, 1.0)], seed=0, curriculum=Curriculum(drop_pass_rate=0.9))
    for p, rate in zip(data, (1.0, 0.9, 0.89, 0.0), strict=False):
        stream.record(p, rate)
    assert Counter(ids(stream.draw(24))) == {f"a{i}": 3 for i in range(2, 10)}


def test_all_dropped_says_so_and_a_mixture_goes_on():
    easy, hard = problems("a", 3), problems("b", 3)
    steering = Curriculum(drop_pass_rate=0.9)
    stream = ProblemStream([(easy, 99.0), (hard, 1.0)], seed=0, curriculum=steering)
    for p in easy:
        stream.record(p, 1.0)
    assert {p.source for p in stream.draw(20)} == {"b"}
    for p in hard:
        stream.record(p, 0.95)
    with pytest.raises(ValueError, match=r"every problem has reached 0\.9"):
        stream.draw(1)


def test_curriculum_weights_by_pass_rate():
    data = problems("a", 3)
    stream = ProblemStream([(data, 1.0)], seed=0, curriculum=Curriculum(floor=0.05))
    for p, rate in zip(data, (0.0, 0.5, 0.9), strict=True):
        stream.record(p, rate)
    counts = Counter(ids(stream.draw(1000)))
    # taken with .05/.3, .3/.3, .14/.3 when their turn comes
    weights = {"a0": 0.05, "a1": 0.30, "a2": 0.14}
    for name, weight in weights.items():
        share = weight / 0.49
        assert abs(counts[name] - 1000 * share) < 4 * (1000 * share * (1 - share)) ** 0.5


def test_recorded_rates_steer_nothing_by_default():
    data = problems("a", 8)
    plain = ids(ProblemStream([(data, 1.0)], seed=0).draw(40))
    stream = ProblemStream([(data, 1.0)], seed=0)
    for p in data:
        stream.record(p, 1.0)
    assert ids(stream.draw(40)) == plain


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"decay": 1.0}, "decay: 1.0"),
        ({"floor": 0.0}, "floor: 0.0"),
        ({"drop_pass_rate": 0.0}, "drop_pass_rate: 0.0"),
        ({"drop_pass_rate": 1.1}, "drop_pass_rate: 1.1"),
    ],
)
def test_curriculum_refuses(settings, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Curriculum(**settings)


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ([], "sources: there is none"),
        ([([], 1.0)], "data set 1 has no problems"),
        ([(problems("a", 2), 0.0)], "weight: 0.0 of data set 1"),
        ([(problems("a", 2), float("nan"))], "weight: nan of data set 1"),
        ([(problems("a", 2), 1.0), (problems("a", 1), 1.0)], "id 'a0' of 'a' is there twice"),
        ([(some("a", 0, 1), 1.0), (some("a", 2, 1), 1.0)], "id 'a1' of 'a' is there twice"),
        ([(some("a", 2, 0, 2), 1.0)], "id 'a2' of 'a' is there twice"),
    ],
)
def test_mixture_refuses(sources, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ProblemStream(sources, seed=0)


def test_streamed_rows_are_drawn_like_loaded_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"question": "q{i}", "answer": "{i}"}}\n' for i in range(20)))
    loaded = ProblemStream([(Jsonl(path=str(path)).load(), 1.0)], seed=4)
    streamed = ProblemStream([(Jsonl(path=str(path), streaming=True).load(), 1.0)], seed=4)
    assert streamed.draw(13) == loaded.draw(13)
    streamed.restore(loaded.state())
    assert streamed.draw(30) == loaded.draw(30)


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(3, "u", i).tolist()) for i in range(900))
    assert len(counts) == 6
    # 150 each: chi square with 5 degrees of freedom is above 20.5 once in a thousand
    assert sum((count - 150) ** 2 / 150 for count in counts.values()) < 20.5


def test_keyed_values_are_pinned():
    """The order of every recorded run hangs on these."""
    draws = Draws("pin", 1)
    assert hash64("a", 1) == 8098670429562427586
    assert [draws.below(1000) for _ in range(4)] == [902, 520, 528, 191]
    assert permutation(6, "pin").tolist() == [5, 1, 4, 3, 0, 2]


def test_pick_takes_different_positions_evenly():
    counts = Counter(tuple(Draws("pick", i).pick("abc", 2)) for i in range(600))
    assert set(counts) == {tuple(pair) for pair in ("ab", "ac", "ba", "bc", "ca", "cb")}
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5
