"""One episode of an environment, with the policy at the other end of a socket.

The library's own objects do what they do: the task and its hooks, its tools, the environment's
``run`` and ``finalize``, rewards and judges. Only the agent is ours. In the library it is a program
that talks to a model's server, which keeps the tokens to itself; here it asks the trainer for each
turn, runs the turn's calls, and writes the trace as the library does.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, final

import verifiers.v1 as vf  # pyrefly: ignore[missing-import]
from verifiers.v1.state import state_cls  # pyrefly: ignore[missing-import]

from gruppo.worker.verifiers.scene import Refused, Scene, called, plain
from gruppo.worker.verifiers.tools import Tools, share_state

_MAX_LINE: Final = 64 * 1024 * 1024


async def play(scene: Scene, given: Mapping[str, Any], line: socket.socket, most: int) -> None:
    """Play the episode of the task in ``given``; its reward is said at its end, and when asked.

    A tool's result has at most ``most`` characters.
    """
    reader, writer = await asyncio.open_connection(sock=line, limit=_MAX_LINE)
    policy = Policy(reader, writer)
    try:
        said = await _outcome(scene, given, policy, most)
        while True:
            await policy.say(said)
            await policy.hear()
    finally:
        writer.close()


async def _outcome(
    scene: Scene, given: Mapping[str, Any], policy: Policy, most: int
) -> dict[str, Any]:
    try:
        return {"messages": [], "reward": await _perform(scene, given, policy, most)}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"[:400]}


async def _perform(
    scene: Scene, given: Mapping[str, Any], policy: Policy, most: int
) -> float | None:
    """The library's episode, its steps in its order; the sum of the rewards, None without any."""
    task = scene.make(given["data"])
    stage = Stage(scene=scene, task=task, prompt=given["prompt"], policy=policy, most=most)
    agents = vf.Agents(scene.env.config, lambda name, config: Seat(stage, config))
    about = vf.EnvInfo(id=scene.env.config.env_id)
    episode = vf.Episode(env=about, task=_recorded(task), traces=[stage.trace])
    try:
        await scene.env.start()
        await scene.env.setup(agents)
        await scene.env.run(task, agents)
        if not stage.begun:
            raise ValueError("the environment ran no agent")
        episode.ok = True
        await scene.env.finalize(task, episode)
    finally:
        await scene.env.stop()
    rewards = [trace.reward for trace in episode.traces if trace.rewards]
    return sum(rewards) if rewards else None


@final
class Policy:
    """The other end of the socket: asked for a turn, it says it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def say(self, message: Mapping[str, Any]) -> None:
        """Send a line."""
        self._writer.write(json.dumps(message).encode() + b"\n")
        await self._writer.drain()

    async def hear(self) -> dict[str, Any]:
        """The next line; the end of the socket is the end of this process."""
        text = await self._reader.readline()
        if not text:
            raise SystemExit(0)
        return json.loads(text)

    async def turn(self, shown: Sequence[Mapping[str, str]], failed: int) -> dict[str, Any] | None:
        """The policy's turn after ``shown``, of which ``failed`` are errors; None: it has none."""
        await self.say({"messages": plain(shown), "failed": failed})
        heard = await self.hear()
        return None if heard["do"] == "end" else heard


@dataclass(slots=True, kw_only=True)
class Stage:
    """The conversation of the one agent, as the library's trace records it."""

    scene: Scene
    task: Any
    prompt: list[dict[str, str]]
    policy: Policy
    most: int
    trace: Any = field(init=False)
    tools: Tools = field(init=False)
    begun: bool = False
    over: bool = False

    def __post_init__(self) -> None:
        self.trace = vf.Trace(
            task=_recorded(self.task),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            state=state_cls(type(self.task))(),
        )

    async def begin(self, task: Any) -> None:
        """Set up the task, which the environment may have changed, and its tools.

        Raises:
            Refused: a conversation has begun before.
        """
        if self.begun:
            raise Refused("a second conversation of the agent")
        self.begun, self.task = True, task
        self.trace.task = _recorded(task)
        await called(task.setup, trace=self.trace, runtime=None)
        shared, own = self.scene.toolsets()
        for made in [*shared, *own]:
            share_state(made, self.trace)
            await made.setup()
        for made in own:
            await made.setup_task(task.data)
        self.tools = await Tools.of([*shared, *own])

    async def finish(self) -> None:
        """Score the trace, as the library does when an agent has ended."""
        self.trace.stop("user_closed")
        self.trace.ok = True
        await called(self.task.finalize, trace=self.trace, runtime=None)
        await self.task.score(self.trace)

    def open_with(self, said: Sequence[Mapping[str, str]]) -> None:
        """Begin the trace with the prompt that the policy has seen.

        Raises:
            ValueError: the environment begins with another one.
        """
        data = self.task.data
        system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        wanted = [*system, *plain(data.prompt), *said]
        given = [message for message in self.prompt if message["role"] == "system"]
        if self.prompt not in (wanted, [*given, *wanted]):
            raise ValueError(
                f"the environment opens with {wanted!r:.150}, the data with {self.prompt!r:.150}"
            )
        self._add(self.prompt)

    async def segment(self, said: Sequence[Mapping[str, str]]) -> Any:
        """Turns of the policy until one calls no tool, after ``said``: the library's segment.

        What is said is recorded with the turn that answers it.
        """
        first, failed = None, 0
        while not await self._stopped():
            turn = await self.policy.turn(said, failed)
            if turn is None:
                self.trace.stop("max_turns")
                self.over = True
                break
            self._add(said)
            first = len(self.trace.nodes) if first is None else first
            self._record(turn)
            if not turn["calls"]:
                break
            results = [await self.tools.answer(call, self.most) for call in turn["calls"]]
            failed = sum(not done for _, done in results)
            said = [
                {"role": "tool", "content": text, "tool_call_id": self._name(number)}
                for number, (text, _) in enumerate(results)
            ]
        messages = [] if first is None else [node.message for node in self.trace.nodes[first:]]
        return vf.Segment(messages=messages, terminated=not messages)

    async def _stopped(self) -> bool:
        """Whether the exchange is over, by the task's own ``stop`` hooks or before."""
        for hook in () if self.over else self.task.hooks("stop"):
            if await called(hook, trace=self.trace):
                self.trace.stop(hook.__name__)
                self.over = True
                break
        return self.over

    def _record(self, turn: Mapping[str, Any]) -> None:
        calls = [
            vf.ToolCall(
                id=self._name(number, ahead=1),
                name=call.get("name", "?"),
                arguments=json.dumps(call.get("arguments", {})),
            )
            for number, call in enumerate(turn["calls"])
        ]
        said = vf.AssistantMessage(content=turn["text"], tool_calls=calls or None)
        self._add([said], sampled=True)
        usage = vf.Usage(prompt_tokens=0, completion_tokens=turn["tokens"])
        self.trace.calls.append(vf.ModelCall(node=len(self.trace.nodes) - 1, usage=usage))

    def _name(self, number: int, *, ahead: int = 0) -> str:
        return f"call_{self.trace.num_turns + ahead}_{number}"

    def _add(self, messages: Sequence[Any], *, sampled: bool = False) -> None:
        nodes = self.trace.nodes
        for message in messages:
            parent = len(nodes) - 1 if nodes else None
            nodes.append(vf.MessageNode(message=message, parent=parent, sampled=sampled))


@final
class Seat:
    """The agent, as an environment's ``run`` sees it."""

    def __init__(self, stage: Stage, config: Any) -> None:
        self._stage = stage
        self.config = config
        self.trainable = True

    async def run(self, task: Any) -> Any:
        """The whole conversation on a task that speaks first; the trace."""
        async with self.interaction(task) as talk:
            await talk.turn()
        return talk.trace

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator[Talk]:
        """The conversation held open, with the environment as the user."""
        await self._stage.begin(task)
        yield Talk(self._stage)
        await self._stage.finish()


@final
class Talk:
    """An open conversation."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._ended = False

    @property
    def trace(self) -> Any:
        """What was said so far."""
        return self._stage.trace

    async def turn(self, message: Any = None) -> Any:
        """The policy's segment after ``message``, or after the prompt if it speaks first.

        Raises:
            RuntimeError: the last segment said that the exchange is over.
            ValueError: there is nothing to answer.
        """
        stage, said = self._stage, plain(message)
        if self._ended:
            raise RuntimeError("the exchange is over: read interaction.trace")
        if not stage.trace.nodes:
            stage.open_with(said)
            said = []
        elif not said:
            raise ValueError("a bare turn() takes the opening reply: give the user's message")
        segment = await stage.segment(said)
        self._ended = segment.terminated
        return segment


def _recorded(task: Any) -> Any:
    return vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
