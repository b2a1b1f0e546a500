"""Progress of a run: a live bar on a terminal, one plain line a step anywhere else.

A callback and listener like any other: it reads a step's groups and metrics and changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from gruppo.types import Group

_RATE_WINDOW: Final = 5  # steps whose mean time the remaining time is estimated from


class Reporter:
    """Shows every finished step of a run of ``total`` steps. ``clock`` gives seconds."""

    def __init__(
        self, total: int, console: Console, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._total = total
        self._console = console
        self._clock = clock
        self._samples = 0
        self._told: set[str] = set()
        self._last = clock()
        self._seconds: list[float] = []
        self._bar = _bar(console) if console.is_terminal else None
        self._task: TaskID | None = None

    @contextmanager
    def showing(self, done: int = 0) -> Iterator[None]:
        """Show the bar (on a terminal) while the block runs; ``done`` steps were made before."""
        self._last = self._clock()
        if self._bar is None:
            yield
            return
        with self._bar:
            self._task = self._bar.add_task("step", total=self._total, completed=done, text="...")
            yield

    def __call__(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Show one finished step."""
        now = self._clock()
        self._seconds.append(metrics.get("time/step", now - self._last))
        self._last = now
        self._samples += sum(len(group.completions) for group in groups)
        recent = self._seconds[-_RATE_WINDOW:]
        text = describe_step(
            metrics,
            samples=self._samples,
            tokens_per_second=metrics.get("tokens/sampled", 0.0) / max(self._seconds[-1], 1e-9),
            seconds_left=sum(recent) / len(recent) * (self._total - step),
        )
        if metrics.get("group/partial", 0.0):
            self._say_once("partial", describe_partial(step, len(groups), metrics))
        elif not groups:
            self._say_once("empty", describe_empty(step))
        if self._bar is None or self._task is None:
            width = len(str(self._total))
            self.say(f"step {step:>{width}}/{self._total}  {text}")
        else:
            self._bar.update(self._task, completed=step, text=text)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation's first result."""
        name = next(iter(metrics))
        error = metrics.get(f"{name}_stderr", math.nan)
        spread = "" if math.isnan(error) else f" ± {error:.3f}"
        self.say(f"held-out problems after step {step}: {name} {metrics[name]:.3f}{spread}")

    def _say_once(self, topic: str, text: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            self.say(text)

    def say(self, text: str) -> None:
        """Print one plain line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_step(
    metrics: Mapping[str, float], *, samples: int, tokens_per_second: float, seconds_left: float
) -> str:
    """The numbers of one step worth watching, on one line.

    ``signal`` is the share of groups whose rewards differ: the others teach nothing.

    Example:
        >>> describe_step(
        ...     {"reward/total_mean": 0.5, "group/zero_std_frac": 0.25},
        ...     samples=64, tokens_per_second=1234.4, seconds_left=95,
        ... )
        'reward 0.500  signal 75%  64 samples  1,234 tokens/s  1m35s left'
    """
    reward = metrics.get("reward/total_mean", math.nan)
    dead = metrics.get("group/zero_std_frac", math.nan)
    shown = [
        f"reward {reward:.3f}",
        "signal ?" if math.isnan(dead) else f"signal {1 - dead:.0%}",
        f"{samples:,} samples",
        f"{tokens_per_second:,.0f} tokens/s",
        f"{duration(seconds_left)} left",
    ]
    return "  ".join(shown)


def describe_partial(step: int, count: int, metrics: Mapping[str, float]) -> str:
    """What to say when a step goes on with fewer groups than asked for.

    Example:
        >>> describe_partial(7, 3, {"group/gen_batches": 10.0})
        'note: step 7 has only 3 groups: no others had differing rewards after 10 batches \
(rollout.max_gen_batches, rollout.on_limit); later such steps are in the metric group/partial'
    """
    tries = metrics.get("group/gen_batches", math.nan)
    return (
        f"note: step {step} has only {count} groups: no others had differing rewards after "
        f"{tries:.0f} batches (rollout.max_gen_batches, rollout.on_limit); later such steps are in "
        "the metric group/partial"
    )


def describe_empty(step: int) -> str:
    """What to say when a filter has left a step nothing to train on.

    Example:
        >>> describe_empty(7)
        'note: step 7 trains on nothing: rollout.filter = "drop" left no group, because none had \
differing rewards; later such steps have the metric tokens/trained = 0'
    """
    return (
        f'note: step {step} trains on nothing: rollout.filter = "drop" left no group, because none '
        "had differing rewards; later such steps have the metric tokens/trained = 0"
    )


def duration(seconds: float) -> str:
    """Seconds in words, two units at most.

    Example:
        >>> duration(7), duration(95), duration(3700)
        ('7s', '1m35s', '1h01m')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
    )
