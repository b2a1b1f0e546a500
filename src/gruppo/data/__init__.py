"""Problems: where they come from, how they become prompts, which are held out, in what order.

Sources are frozen records with ``load()``; `split` holds problems out; `ProblemStream` draws.
"""

from gruppo.data.check import AnswerCheck, WrongAnswer, check_answers
from gruppo.data.prompting import Prompting
from gruppo.data.rows import Columns
from gruppo.data.sources import DataSource, Gym, Hub, Jsonl, Parquet, TaskSource, Verl, load
from gruppo.data.split import Problems, View, fitting, partition, split
from gruppo.data.stream import Curriculum, ProblemStream
from gruppo.data.streamed import StreamedProblems
from gruppo.data.tasks import TASKS, Item, Task, WordProblems
from gruppo.data.verifiers import Verifiers

__all__ = [
    "TASKS",
    "AnswerCheck",
    "Columns",
    "Curriculum",
    "DataSource",
    "Gym",
    "Hub",
    "Item",
    "Jsonl",
    "Parquet",
    "ProblemStream",
    "Problems",
    "Prompting",
    "StreamedProblems",
    "Task",
    "TaskSource",
    "Verifiers",
    "Verl",
    "View",
    "WordProblems",
    "WrongAnswer",
    "check_answers",
    "fitting",
    "load",
    "partition",
    "split",
]
