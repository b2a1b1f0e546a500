"""How running rows are laid out for a decode step whose shapes do not change from token to token.

A captured step works on buffers of fixed shapes, so rows and columns are rounded up to a few sizes
(buckets), and rows of one prompt are cut into blocks of equal size, so that a prompt's keys are
read once for a block. This module is plain Python: it holds no tensors and calls no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FINE = 64
"""Up to here row counts are powers of two, beyond it multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A running row: its prompt's place and length, and the tokens of its own in the store."""

    place: int
    prompt_length: int
    own_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The shapes of a decode step: what it costs depends on these alone.

    ``rows`` are decoded, the last of them padding; ``blocks`` of ``block`` rows each share a
    prompt; ``width`` columns of the prompts' keys and ``columns`` of the rows' own are looked at.
    """

    rows: int
    block: int
    blocks: int
    width: int
    columns: int

    @property
    def num_inputs(self) -> int:
        """Numbers that say where everything is: see :func:`seating`."""
        return 5 * self.rows + self.blocks * (self.block + 1)


def round_rows(rows: int) -> int:
    """The bucket of a number of rows: a power of two up to 64, then a multiple of 64.

    >>> [round_rows(n) for n in (1, 3, 33, 64, 65, 200)]
    [1, 4, 64, 64, 128, 256]
    """
    return _power(rows) if rows <= _FINE else -(-rows // _FINE) * _FINE


def round_columns(columns: int, least: int) -> int:
    """``least`` times 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half as much again is wasted.

    >>> [round_columns(n, 128) for n in (1, 129, 257, 385, 600, 1000)]
    [128, 256, 384, 512, 768, 1024]
    """
    wanted = -(-columns // least)
    double = _power(wanted)
    between = double // 4 * 3
    return least * (between if between >= wanted else double)


def round_places(places: int) -> int:
    """A power of two, at least 8."""
    return max(8, _power(places))


def most_inputs(rows: int) -> int:
    """Largest ``num_inputs`` of any bucket of at most ``rows`` (rounded) rows.

    At most 3 blocks of 1 for every row: see :func:`fitting`.
    """
    return 5 * rows + 2 * 3 * rows


def fitting(seats: Sequence[Seat], *, width: int, columns: int) -> Bucket:
    """The smallest bucket that takes ``seats``.

    A block is as large as the mean group (up to 64, rounded up to a power of two). That bounds
    both kinds of waste, however unequal groups are: with P prompts, N rows and blocks of g, there
    are at most P + N / g < 3 N / g blocks.
    """
    rows = round_rows(len(seats))
    sizes = _sizes(seats)
    block = min(_power(-(-len(seats) // len(sizes))), _FINE)
    needed = sum(-(-size // block) for size in sizes.values())
    unit = max(1, rows // block)
    return Bucket(
        rows=rows,
        block=block,
        blocks=-(-needed // unit) * unit,
        width=width,
        columns=columns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """What a step must be told of its rows; every list has the length that the bucket says.

    ``active`` is 1 for a row and 0 for padding, which has no prompt and writes to a slot that no
    row uses. ``members`` are the rows of every block (row 0 where there are fewer), ``places``
    the blocks' prompts, and ``back`` says where among the members a row stands.
    """

    active: list[int]
    prompt_length: list[int]
    own_length: list[int]
    back: list[int]
    members: list[int]
    places: list[int]


def seating(seats: Sequence[Seat], bucket: Bucket) -> Seating:
    """Lay out ``seats`` in ``bucket``."""
    spare = [0] * (bucket.rows - len(seats))
    members: list[int] = []
    places: list[int] = []
    back = [0] * len(seats)
    for place in _sizes(seats):
        rows = [row for row, seat in enumerate(seats) if seat.place == place]
        for first in range(0, len(rows), bucket.block):
            part = rows[first : first + bucket.block]
            for at, row in enumerate(part):
                back[row] = len(members) + at
            members += part + [0] * (bucket.block - len(part))
            places.append(place)
    unused = bucket.blocks - len(places)
    return Seating(
        active=[1] * len(seats) + spare,
        prompt_length=[seat.prompt_length for seat in seats] + spare,
        own_length=[seat.own_length for seat in seats] + spare,
        back=back + spare,
        members=members + [0] * (unused * bucket.block),
        places=places + [0] * unused,
    )


def _sizes(seats: Sequence[Seat]) -> dict[int, int]:
    """Rows of every place."""
    sizes: dict[int, int] = {}
    for seat in seats:
        sizes[seat.place] = sizes.get(seat.place, 0) + 1
    return sizes


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
