"""Buckets of a captured step: rows, and blocks of rows that share a prompt; what is wasted."""

import random

from gruppo.engine.local.seats import Seat, fitting, most_inputs, seating


def seats(*places: int) -> list[Seat]:
    return [
        Seat(place=place, prompt_length=10 + place, own_length=row)
        for row, place in enumerate(places)
    ]


def test_equal_groups_waste_nothing() -> None:
    rows = seats(*[place for place in range(32) for _ in range(8)])
    bucket = fitting(rows, width=64, columns=128)
    assert (bucket.rows, bucket.block, bucket.blocks) == (256, 8, 32)
    assert seating(rows, bucket).members == list(range(256))


def test_a_seating_by_hand() -> None:
    rows = seats(3, 0, 3, 3, 0)
    bucket = fitting(rows, width=64, columns=128)
    assert (bucket.rows, bucket.block, bucket.blocks) == (8, 4, 2)
    found = seating(rows, bucket)
    assert found.members == [0, 2, 3, 0, 1, 4, 0, 0]
    assert found.places == [3, 0]
    assert found.back == [0, 4, 1, 2, 5, 0, 0, 0]
    assert found.active == [1, 1, 1, 1, 1, 0, 0, 0]
    assert found.prompt_length == [13, 10, 13, 13, 10, 0, 0, 0]
    assert found.own_length == [0, 1, 2, 3, 4, 0, 0, 0]


def test_waste_is_bounded_however_unequal_groups_are() -> None:
    generator = random.Random(0)
    for _ in range(300):
        count = generator.randint(1, 300)
        spread = generator.randint(1, count)
        rows = seats(*[generator.choice([0, generator.randrange(spread)]) for _ in range(count)])
        bucket = fitting(rows, width=64, columns=128)
        assert bucket.blocks * bucket.block <= 3 * bucket.rows
        assert bucket.num_inputs <= most_inputs(bucket.rows)
        found = seating(rows, bucket)
        assert [found.members[at] for at in found.back[:count]] == list(range(count))
        assert [found.places[at // bucket.block] for at in found.back[:count]] == [
            seat.place for seat in rows
        ]
        sizes = (len(found.members), len(found.places), len(found.back))
        assert sizes == (bucket.blocks * bucket.block, bucket.blocks, bucket.rows)
