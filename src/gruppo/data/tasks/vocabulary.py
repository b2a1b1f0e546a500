"""Words for the own tasks: names with pronouns, things with plurals, plain nouns.

No name and no plural needs an irregular possessive, so sentence forms stay simple.
"""

from __future__ import annotations

from typing import NamedTuple


class Person(NamedTuple):
    """A name and its pronouns."""

    name: str
    he: str
    him: str
    his: str


class Noun(NamedTuple):
    """A thing that can be counted."""

    one: str
    many: str

    def counted(self, number: int) -> str:
        """``number`` and the noun in agreement.

        >>> Noun("box", "boxes").counted(1), Noun("box", "boxes").counted(3)
        ('1 box', '3 boxes')
        """
        return f"{number} {self.one if number == 1 else self.many}"


def _split(words: str) -> list[str]:
    return words.split()


_SHE = _split(
    "Alice Amy Anna Bella Carla Clara Diana Ella Emily Emma Eva Fiona Grace Hannah Helen Irene "
    "Ivy Jane Julia Kate Laura Lena Lily Lucy Maria Maya Mia Nina Nora Olivia Paula Rachel Rosa "
    "Ruth Sara Sofia Tina Vera Wendy Zoe"
)
_HE = _split(
    "Aaron Adam Alan Ben Bob Carl Daniel David Eric Ethan Felix Frank George Henry Hugo Ian Jack "
    "Jacob John Kevin Leo Liam Mark Martin Max Nathan Noah Oliver Oscar Paul Peter Ray Robert Sam "
    "Simon Ted Tom Victor Walter Will"
)
PEOPLE = tuple(
    [Person(name, "she", "her", "her") for name in _SHE]
    + [Person(name, "he", "him", "his") for name in _HE]
)

_REGULAR = _split(
    "apple orange banana lemon pear plum cookie muffin donut egg carrot onion walnut book pen "
    "pencil crayon marker eraser notebook card stamp sticker coin button bead marble shell stone "
    "feather flower ball balloon doll puzzle ribbon badge key candle cup plate spoon ticket kite "
    "block ring postcard magnet"
)
_IRREGULAR = (
    ("peach", "peaches"),
    ("candy", "candies"),
    ("potato", "potatoes"),
    ("tomato", "tomatoes"),
    ("brush", "brushes"),
    ("watch", "watches"),
    ("photo", "photos"),
    ("leaf", "leaves"),
    ("berry", "berries"),
    ("sandwich", "sandwiches"),
)
THINGS = (*(Noun(word, word + "s") for word in _REGULAR), *(Noun(*pair) for pair in _IRREGULAR))

CONTAINERS = (
    Noun("box", "boxes"),
    Noun("bag", "bags"),
    Noun("basket", "baskets"),
    Noun("tray", "trays"),
    Noun("pack", "packs"),
    Noun("crate", "crates"),
)

WORDS = tuple(
    _split(
        "apple banana cherry lemon melon grape peach plum mango olive bread cheese butter honey "
        "sugar salt pepper onion carrot potato tomato garlic rice bean corn river mountain forest "
        "desert island beach ocean valley lake cloud storm rain snow wind fire stone metal paper "
        "wood glass cotton silk horse tiger lion zebra monkey rabbit eagle shark whale snake mouse "
        "sheep goat chicken duck table chair window door floor garden kitchen bridge tower castle "
        "village city street market school teacher doctor farmer artist singer dancer writer pilot "
        "sailor king queen prince knight dragon wizard music guitar piano violin drum flute movie "
        "story letter number color summer winter spring autumn morning evening night yellow purple "
        "green black white silver golden"
    )
)
