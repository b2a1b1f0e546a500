"""Sentence forms of the word problems, as templates over a few fields.

Fields: ``{name} {he} {He} {him} {his}`` and ``{other}`` (people), ``{a} {b}`` (numbers), ``{many}``
(the thing, plural), ``{as}``/``{bs}`` (number a or b with the thing), ``{bmore}`` ("4 more
apples"), ``{box}``/``{boxes}`` (a container), ``{aboxes}``/``{bboxes}`` (number with the container)
and the like for friends, people, dollars, days, weeks, rows, shelves. All numbers are at least 2,
so verbs are plural. A two-step problem is an opening, one or two changes of one quantity, and a
question or an ending that asks.
"""

from __future__ import annotations

# Family -> (arithmetic, forms). a and b are the operands in the order of the arithmetic; for the
# two divisions a is the dividend and b the divisor.
ONE_STEP: dict[str, tuple[str, tuple[str, ...]]] = {
    "add": (
        "+",
        (
            "{name} has {as} and buys {bmore}. How many {many} does {name} have now?",
            "{name} has {as}. {other} gives {him} {bmore}. How many {many} does {name} have now?",
            "{name} found {as} in the morning and {bs} in the afternoon. How many {many} did "
            "{name} find?",
            "There are {as} in a {box}. {name} puts {bmore} into the {box}. How many {many} are "
            "in the {box} now?",
            "{name} sold {as} on Monday and {bs} on Tuesday. How many {many} did {he} sell on "
            "both days?",
            "{name} starts the week with {as} and gets {bmore} by Friday. How many {many} does "
            "{he} have on Friday?",
        ),
    ),
    "combine": (
        "+",
        (
            "{name} has {as} and {other} has {bs}. How many {many} do they have together?",
            "{name} brings {as} to the party. {other} brings {bs}. How many {many} are there in "
            "total?",
            "One {box} holds {as} and another {box} holds {bs}. How many {many} are in the two "
            "{boxes}?",
            "{name} and {other} put their {many} on one table. {name} has {as} and {other} has "
            "{bs}. How many {many} are on the table?",
            "{other} has {bmore} than {name}. {name} has {as}. How many {many} does {other} have?",
        ),
    ),
    "subtract": (
        "-",
        (
            "{name} has {as} and gives {b} to {other}. How many {many} does {name} have left?",
            "{name} had {as} but lost {b} of them. How many {many} does {he} have left?",
            "There are {as} on the table. {name} takes {b} of them away. How many {many} are still "
            "on the table?",
            "A {box} holds {as}. {name} takes out {b}. How many {many} are left in the {box}?",
            "A shop has {as}. It sells {b} of them. How many {many} remain in the shop?",
            "{name} wants to collect {as}. {He} already has {b}. How many more does {he} need?",
        ),
    ),
    "compare": (
        "-",
        (
            "{name} has {as} and {other} has {bs}. How many more {many} does {name} have than "
            "{other}?",
            "{other} has {bs}. {name} has {as}. How many fewer {many} does {other} have than "
            "{name}?",
            "One {box} holds {as} and another {box} holds {bs}. What is the difference in the "
            "number of {many}?",
            "{name} found {as} on Saturday and {bs} on Sunday. How many more did {he} find on "
            "Saturday?",
            "{other} has {b} fewer {many} than {name}. {name} has {as}. How many {many} does "
            "{other} have?",
        ),
    ),
    "multiply": (
        "*",
        (
            "{name} has {aboxes} with {bs} in each {box}. How many {many} does {name} have in "
            "total?",
            "There are {aboxes}. Each {box} holds {bs}. How many {many} are there in all?",
            "{name} gives {bs} to each of {a} friends. How many {many} does {he} give away?",
            "{name} collects {bs} every day. How many {many} does {he} collect in {adays}?",
            "{name} puts {many} in {arows} of {b}. How many {many} are there?",
            "{other} has {bs}. {name} has {a} times as many. How many {many} does {name} have?",
        ),
    ),
    "price": (
        "*",
        (
            "{name} buys {as}. Each one costs {bdollars}. How many dollars does {name} pay?",
            "One {one} costs {bdollars}. How many dollars do {as} cost?",
            "{name} sells {as} for {bdollars} each. How many dollars does {he} get?",
            "A {box} of {many} costs {bdollars}. {name} buys {aboxes}. How many dollars does {he} "
            "spend?",
            "{name} saves {bdollars} a week. How many dollars does {he} save in {aweeks}?",
        ),
    ),
    "divide": (
        "/",
        (
            "{name} shares {as} equally among {bfriends}. How many {many} does each friend get?",
            "{name} puts {as} into {bboxes}, with the same number in each. How many {many} are in "
            "each {box}?",
            "{bpeople} split {as} equally. How many {many} does each person get?",
            "{name} used {as} in {bdays}, the same number every day. How many {many} did {he} use "
            "per day?",
            "{bboxes} hold {as} in total, the same number each. How many {many} are in one {box}?",
        ),
    ),
    "group": (
        "/",
        (
            "{name} packs {as} into {boxes} of {b}. How many {boxes} does {he} fill?",
            "Each {box} holds {bs}. How many {boxes} does {name} need for {as}?",
            "{name} has {as} and uses {b} every day. For how many days do the {many} last?",
            "{name} makes groups of {b} from {as}. How many groups does {he} make?",
            "{name} has {adollars}. One {one} costs {bdollars}. How many {many} can {he} buy?",
        ),
    ),
}

# Two steps: the quantity after the first change is the first operand of the second one.
OPENINGS: dict[str, tuple[str, ...]] = {
    "has": ("{name} has {as}.", "{name} starts with {as}.", "{name} collected {as}."),
    "multiply": (
        "{name} has {aboxes} with {bs} in each.",
        "{name} buys {aboxes} that hold {bs} each.",
    ),
}
CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "add": (
        "+",
        (
            "{other} gives {him} {bmore}.",
            "{He} buys {bmore}.",
            "Later {he} gets {bmore}.",
        ),
    ),
    "subtract": (
        "-",
        (
            "{He} gives {bs} to {other}.",
            "{He} loses {b} of the {many}.",
            "Then {he} gives {bs} away.",
        ),
    ),
}
NOW = ("How many {many} does {name} have now?", "How many {many} does {he} have in the end?")
ENDINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "divide": (
        "/",
        (
            "{He} shares all the {many} equally among {bfriends}. How many {many} does each friend "
            "get?",
            "{He} then puts all the {many} on {bshelves}, the same number on each. How many {many} "
            "are on each shelf?",
        ),
    ),
    "price": (
        "*",
        (
            "{He} sells all the {many} for {bdollars} each. How many dollars does {he} get?",
            "Each {one} is worth {bdollars}. How many dollars are all the {many} worth now?",
        ),
    ),
}
