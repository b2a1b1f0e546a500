"""Continuous batching: who runs when, in which slot, and how much memory is held."""

from gruppo.engine.local.schedule import Admission, Row, Schedule, rows_of
from gruppo.types import Request


def asked(*shapes: tuple[int, int]) -> list[Request]:
    """Requests of (prompt length, samples), all prompts different."""
    return [
        Request(tokens=(index, *range(1, length)), num_samples=samples, key=(0, index))
        for index, (length, samples) in enumerate(shapes)
    ]


def schedule(requests: list[Request], limit: int, **bounds: int) -> Schedule:
    return Schedule(rows_of(requests, [limit] * len(requests)), requests, **bounds)


def shown(admitted: list[Admission]) -> list[tuple[int, int, int, int, bool]]:
    return [(a.row.request, a.row.sample, a.slot, a.place, a.is_first) for a in admitted]


def test_rows_come_in_order_and_without_those_that_have_no_room():
    requests = asked((3, 2), (4, 1), (5, 1))
    assert rows_of(requests, [7, 0, 9]) == [
        Row(request=0, sample=0, limit=7),
        Row(request=0, sample=1, limit=7),
        Row(request=2, sample=0, limit=9),
    ]


def test_a_free_slot_is_taken_at_once():
    plan = schedule(asked((3, 2), (4, 2)), 8, max_rows=3)
    assert shown(plan.admit()) == [
        (0, 0, 0, 0, True),
        (0, 1, 1, 0, False),
        (1, 0, 2, 1, True),
    ]
    assert plan.admit() == []
    assert plan.finish([0]) == [(2, 0)]
    assert shown(plan.admit()) == [(1, 1, 2, 1, False)]
    assert [plan.place(row) for row in plan.rows] == [1, 0, 1]


def test_a_prompt_leaves_with_its_last_row_and_its_place_is_used_again():
    plan = schedule(asked((3, 2), (4, 1), (5, 1)), 8, max_rows=3)
    plan.admit()
    assert plan.finish([0]) == [(2, 0)]
    assert plan.finish([1]) == []  # request 0 is done now
    assert shown(plan.admit()) == [(2, 0, 1, 0, True)]
    assert plan.finish([0, 1]) == []
    assert plan.is_done


def test_a_prompt_is_held_while_rows_of_its_group_wait():
    plan = schedule(asked((3, 3)), 8, max_rows=1)
    assert shown(plan.admit()) == [(0, 0, 0, 0, True)]
    plan.finish([0])
    assert shown(plan.admit()) == [(0, 1, 0, 0, False)]
    plan.finish([0])
    assert shown(plan.admit()) == [(0, 2, 0, 0, False)]


def test_equal_prompts_of_two_requests_are_one():
    requests = [
        Request(tokens=(1, 2), num_samples=1, key=(0, 0)),
        Request(tokens=(1, 2), num_samples=1, key=(0, 1)),
    ]
    assert shown(schedule(requests, 4, max_rows=2).admit()) == [
        (0, 0, 0, 0, True),
        (1, 0, 1, 0, False),
    ]


def test_holes_are_filled_from_the_end():
    plan = schedule(asked((3, 6)), 8, max_rows=6)
    plan.admit()
    assert plan.finish([1, 5, 3]) == [(4, 1)]
    assert [row.sample for row in plan.rows] == [0, 4, 2]


def test_memory_counts_a_prompt_once_and_every_row_with_its_limit():
    """Prompts of 10 and 20 tokens, rows of 8: 10 + 8 + 8 = 26, then 20 + 8 = 28 more."""
    plan = schedule(asked((10, 2), (20, 2)), 8, max_rows=9, max_tokens=54)
    assert len(plan.admit()) == 3
    assert plan.peak_tokens == 54
    plan.finish([0])
    assert len(plan.admit()) == 1
    plan.finish([0, 1, 2])
    assert plan.peak_tokens == 54
    assert plan.is_done


def test_a_row_larger_than_the_bound_runs_alone():
    plan = schedule(asked((10, 2)), 8, max_rows=9, max_tokens=5)
    assert [len(plan.admit()), plan.finish([0]), len(plan.admit())] == [1, [], 1]
    assert plan.peak_tokens == 18
