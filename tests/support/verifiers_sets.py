"""Task sets of the verifiers library as its users write them, with tools and with a user."""

HEAD = "import asyncio, os, time\nimport verifiers.v1 as vf\n"

TOOLS = '''
class Data(vf.TaskData):
    goal: int


class State(vf.State):
    total: int = 0
    calls: int = 0


class Counter(vf.Toolset[vf.ToolsetConfig, State]):
    TOOL_PREFIX = None

    async def setup_task(self, task):
        self.goal = task.goal

    @vf.tool
    async def add(self, number: int) -> str:
        """Add a number to the total."""
        self.state.calls += 1
        if number == 99:
            await asyncio.sleep(60)
        if number == 98:
            os._exit(3)
        if number < 0:
            raise ValueError(f"{number} is negative")
        self.state.total += number
        return f"total {self.state.total} of {self.goal}"


class Task(vf.Task[Data, State, vf.TaskConfig]):
    async def setup(self, trace):
        trace.state.total = 1

    @classmethod
    def toolsets(cls, config):
        return [Counter(vf.ToolsetConfig())]

    @vf.stop
    async def enough(self, trace) -> bool:
        return trace.state.calls >= 4

    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.state.total == task.goal)

    @vf.reward(weight=0.25)
    async def turns(self, trace) -> float:
        return trace.num_turns

    @vf.reward(weight=0.01)
    async def record(self, trace) -> float:
        return len(trace.messages) + 100 * trace.num_output_tokens


class Adding(vf.Taskset[Task, vf.TasksetConfig]):
    def load(self):
        for n in range(3):
            prompt = chr(ord("a") + n)
            yield Task(Data(prompt=prompt, goal=3 + n), self.config.task)


__all__ = ["Adding"]
'''

GAME = """
class Data(vf.TaskData):
    secret: int


class Task(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def said(self, trace) -> float:
        return len(trace.messages)


class Game(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    worth: float = 1.0


class Guess(vf.Env[Game]):
    async def run(self, task, agents):
        found = False
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated:
                guess = int(segment.last_reply)
                found = guess == task.data.secret
                if found:
                    break
                segment = await talk.turn("higher" if guess < task.data.secret else "lower")
        talk.trace.record_reward("found", self.config.worth * found)

    async def finalize(self, task, episode):
        (trace,) = episode.traces
        trace.record_reward("ends", float(trace.stop_condition == "max_turns"), 0.125)


class Guessing(vf.Taskset[Task, vf.TasksetConfig]):
    def load(self):
        for n in range(2):
            prompt = chr(ord("a") + n)
            yield Task(Data(prompt=prompt, secret=5), self.config.task)


__all__ = ["Guess", "Guessing"]
"""
