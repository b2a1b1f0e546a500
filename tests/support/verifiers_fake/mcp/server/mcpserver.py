"""Tools registered and called by name, as by the MCP server of that name."""

import inspect
from types import SimpleNamespace


class MCPServer:
    def __init__(self, name):
        self._tools = {}

    def add_tool(self, function, name, description):
        self._tools[name] = (function, description)

    async def list_tools(self):
        return [
            SimpleNamespace(name=name, description=said, input_schema=_schema(function))
            for name, (function, said) in self._tools.items()
        ]

    async def call_tool(self, name, arguments):
        function, _ = self._tools[name]
        try:
            for key, value in arguments.items():
                if not isinstance(value, inspect.signature(function).parameters[key].annotation):
                    raise TypeError("Input should be a valid integer")
            text = await function(**arguments)
        except Exception as error:
            raise RuntimeError(f"Error executing tool {name}: {error}") from error
        block = SimpleNamespace(type="text", text=text)
        return SimpleNamespace(content=[block], is_error=False)


def _schema(function):
    names = inspect.signature(function).parameters
    return {"type": "object", "properties": {n: {"type": "integer"} for n in names}}
