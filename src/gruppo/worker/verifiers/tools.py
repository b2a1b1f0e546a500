"""The tools of a task set: the library's tool servers, without servers.

The functions are registered as the library registers them and called in this process; the state
that a server would fetch from the rollout and send back is the trace's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mcp.server.mcpserver import MCPServer  # pyrefly: ignore[missing-import]

_CUT: Final = "\n[cut]"


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools by the names that the library gives them before a model."""

    schemas: list[dict[str, Any]]
    servers: dict[str, tuple[Any, str]]

    @classmethod
    async def of(cls, toolsets: Sequence[Any]) -> Tools:
        """The tools of ``toolsets``. Raises ValueError if two have one name."""
        made = cls([], {})
        for toolset in toolsets:
            server = MCPServer(toolset.server_name or type(toolset).__name__)
            toolset.register(server)
            for tool in await server.list_tools():
                prefix = f"{toolset.server_name}_" if toolset.server_name else ""
                made._add(f"{prefix}{tool.name}", server, tool)
        return made

    def _add(self, name: str, server: Any, tool: Any) -> None:
        if name in self.servers:
            raise ValueError(f"two tools are called {name!r}")
        self.servers[name] = (server, tool.name)
        function = {
            "name": name,
            "description": tool.description or "",
            "parameters": tool.input_schema,
        }
        self.schemas.append({"type": "function", "function": function})

    async def answer(self, call: Mapping[str, Any], most: int) -> tuple[str, bool]:
        """What the policy is told of a call in ``most`` characters, and whether it worked."""
        text, done = await self._result(call)
        return (text if len(text) <= most else text[: most - len(_CUT)] + _CUT), done

    async def _result(self, call: Mapping[str, Any]) -> tuple[str, bool]:
        if "bad" in call:
            return f"error: {call['bad']}", False
        if call["name"] not in self.servers:
            known = ", ".join(self.servers) or "none"
            return f"error: there is no tool {call['name'][:80]!r}; there are: {known}", False
        if not isinstance(call["arguments"], dict):
            return "error: arguments must be a JSON object", False
        server, name = self.servers[call["name"]]
        try:
            result = await server.call_tool(name, call["arguments"])
            texts = [block.text if block.type == "text" else str(block) for block in result.content]
            failed = bool(result.is_error)
        except Exception as error:  # of the tool, or its arguments do not fit
            return f"error: {error}", False
        said = "\n".join(texts)
        return (f"error: {said}" if failed and not said.startswith("error: ") else said), not failed


def share_state(toolset: Any, trace: Any) -> None:
    """Let the calls of ``toolset`` work on the trace's state.

    Raises:
        ValueError: it has another type.
    """
    if not isinstance(trace.state, toolset._state_cls):
        raise ValueError(
            f"{type(toolset).__name__} has the state {toolset._state_cls.__name__}, and its task "
            f"{type(trace.state).__name__}"
        )

    async def pull() -> Any:
        return trace.state

    async def push(before: bytes) -> None:
        """Nothing: the state was changed in place."""

    toolset._pull_state, toolset._push_state = pull, push
