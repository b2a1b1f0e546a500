"""Own tasks: generated problems that need no download, by name in `TASKS`.

Every task is deterministic in (seed, index), has no last problem, and gives each problem the
canonical keys by which `gruppo.data.split` keeps held-out problems out of training.
"""

from typing import Any

from gruppo.data.tasks.arithmetic import Arithmetic, Comparison
from gruppo.data.tasks.base import Item, Task
from gruppo.data.tasks.code import CodeTasks
from gruppo.data.tasks.countdown import Countdown
from gruppo.data.tasks.guess import Guess
from gruppo.data.tasks.word_problems import WordProblems
from gruppo.data.tasks.words import LastWord, Letters, ReverseWords

TASKS: dict[str, type[Any]] = {
    "arithmetic": Arithmetic,
    "code_tasks": CodeTasks,
    "comparison": Comparison,
    "countdown": Countdown,
    "guess": Guess,
    "last_word": LastWord,
    "letters": Letters,
    "reverse_words": ReverseWords,
    "word_problems": WordProblems,
}

__all__ = [
    "TASKS",
    "Arithmetic",
    "CodeTasks",
    "Comparison",
    "Countdown",
    "Guess",
    "Item",
    "LastWord",
    "Letters",
    "ReverseWords",
    "Task",
    "WordProblems",
]
