"""Tasks, tools, environments and traces, by the names and with the behaviour that are relied on."""

import functools
import importlib
import inspect
from typing import Any

from pydantic import BaseModel, ConfigDict

from verifiers.v1.state import State as State
from verifiers.v1.state import state_cls
from verifiers.v1.utils.decorators import discover_decorated


def _mark(name):
    def decorate(function=None, weight=1.0):
        if function is None:
            return lambda f: decorate(f, weight)
        setattr(function, name, True)
        function.weight = weight
        return function

    return decorate


tool, stop, reward = map(_mark, ("tool", "stop", "reward"))


class _Generic:
    """A class that keeps what it was subscribed with."""

    arguments = ()

    def __class_getitem__(cls, arguments):
        given = arguments if isinstance(arguments, tuple) else (arguments,)
        return type(cls.__name__, (cls,), {"arguments": given})


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Harness(_Config):
    id: str


class AgentConfig(_Config):
    harness: Harness | None = None


class TaskConfig(_Config):
    pass


class TasksetConfig(_Config):
    id: str = ""
    task: TaskConfig = TaskConfig()


class ToolsetConfig(_Config):
    url: str | None = None
    colocated: bool = False


class EnvConfig(_Config):
    taskset: TasksetConfig = TasksetConfig()

    @property
    def env_id(self):
        return self.taskset.id


class _Single(EnvConfig):
    agent: AgentConfig = AgentConfig()


class TaskData(BaseModel):
    idx: int | None = None
    prompt: str | None = None
    system_prompt: str | None = None
    skills: list[str] = []


class Request: ...


class Response: ...


class Task(_Generic):
    NEEDS_CONTAINER = False

    def __init__(self, data, config):
        self.data, self.config, self.key, self.hash = data, config, "key", "hash"

    def with_data(self, **changes):
        return type(self)(self.data.model_copy(update=changes), self.config)

    @classmethod
    def data_type(cls):
        return next(a for a in cls.arguments if issubclass(a, TaskData))

    @classmethod
    def toolsets(cls, config):
        return []

    async def setup(self, trace, runtime): ...

    async def finalize(self, trace, runtime): ...

    def hooks(self, name):
        return discover_decorated(self, name)

    def plugged_judges(self):
        return []

    async def score(self, trace):
        for hook in self.hooks("reward"):
            offered = {"task": self.data, "trace": trace}
            names = inspect.signature(hook).parameters
            value = await hook(**{n: v for n, v in offered.items() if n in names})
            trace.record_reward(hook.__name__, value, hook.weight)


class Taskset(_Generic):
    bounded = True

    def __init__(self, config):
        self.config = config

    @classmethod
    def task_type(cls):
        return cls.arguments[0]

    @classmethod
    def toolsets(cls, config):
        return []

    def __iter__(self):
        for number, task in enumerate(self.load()):
            yield task.with_data(idx=number)


class Toolset(_Generic):
    def __init__(self, config):
        self.config, self._state_cls = config, state_cls(type(self))

    @property
    def server_name(self):
        return self.TOOL_PREFIX or ""

    async def setup(self): ...

    async def setup_task(self, task): ...

    def register(self, server):
        for function in discover_decorated(self, "tool"):
            server.add_tool(self._with_state(function), function.__name__, function.__doc__)

    def _with_state(self, function):
        @functools.wraps(function)
        async def call(**arguments):
            self.state = await self._pull_state()
            result = await function(**arguments)
            await self._push_state(b"")
            return result

        return call


class Env(_Generic):
    def __init__(self, config):
        self.config, self.taskset = config, load_taskset(config.taskset)

    async def start(self): ...

    async def stop(self): ...

    async def setup(self, agents): ...

    async def finalize(self, task, episode): ...


class SingleAgentEnv(Env):
    async def run(self, task, agents):
        await agents.agent.run(task)


class Agents:
    def __init__(self, config, make):
        for name, value in config:
            if isinstance(value, AgentConfig):
                setattr(self, name, make(name, value))


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class AgentInfo(_Record): ...


class TraceTask(_Record): ...


class EnvInfo(_Record): ...


class Episode(_Record): ...


class ModelCall(_Record): ...


class Usage(_Record): ...


class ToolCall(_Record): ...


class AssistantMessage(_Record):
    role: str = "assistant"


class MessageNode(_Record): ...


class Segment(_Record):
    @property
    def last_reply(self):
        said = [m.content for m in self.messages if isinstance(m, AssistantMessage)]
        return said[-1].strip() if said else ""


class Trace(_Record):
    nodes: list[Any] = []
    calls: list[Any] = []
    rewards: dict[str, float] = {}
    stop_condition: str | None = None

    @property
    def messages(self):
        return [node.message for node in self.nodes]

    @property
    def num_turns(self):
        return sum(node.sampled for node in self.nodes)

    @property
    def num_output_tokens(self):
        return sum(call.usage.completion_tokens for call in self.calls)

    @property
    def reward(self):
        return sum(self.rewards.values())

    def stop(self, condition):
        self.stop_condition = self.stop_condition or condition

    def record_reward(self, name, value, weight=1.0):
        self.rewards[name] = float(value) * weight


def _exported(name, kind):
    module = importlib.import_module(name)
    found = [vars(module)[one] for one in module.__all__]
    return next((one for one in found if issubclass(one, kind)), None)


def environment_class(name):
    return _exported(name, Env) or SingleAgentEnv


def taskset_config_type(name):
    return next(a for a in _exported(name, Taskset).arguments if issubclass(a, TasksetConfig))


def load_taskset(config):
    return _exported(config.id, Taskset)(config)


def default_harness_id(name):
    return "bash"


def resolve_env_config(table):
    name = table["taskset"]["id"]
    kind = next(iter(environment_class(name).arguments), _Single)
    return kind.model_validate(table)


def load_environment(config):
    return environment_class(config.taskset.id)(config)
