"""How tool calls are read, held against how the model's chat template writes them."""

from __future__ import annotations

from typing import Final

from gruppo.environment import Environment
from gruppo.environment.calls import Call, ReadsCalls, formats_marked, formats_of
from gruppo.model import Encoder

_CALL: Final = Call("gruppo", {"number": 1})


def calls_mismatch(environment: Environment, encoder: Encoder) -> str:
    """What to tell if calls are read in another form than the chat template writes them; "" if not.

    A template that knows no tools teaches no form: there the environment's own words do, in the
    form that it reads.
    """
    if not isinstance(environment, ReadsCalls) or not environment.tools or not encoder.takes_tools:
        return ""
    text = encoder.written_call(_CALL.name, {"number": 1})
    if text is None:
        template = encoder.tokenizer.get_chat_template(
            tools=[dict(tool) for tool in environment.tools]
        )
        forms, shown = formats_marked(template), "of another form"
        if not forms:
            return ""
    else:
        forms, shown = formats_of(text, _CALL), f"as {text[:200]!r}"
    if environment.calls in forms:
        return ""
    fix = (
        f'set calls = "{forms[0]}" (environment.use.calls in a recipe)'
        if forms
        else "no value of environment.use.calls reads these: use another model or chat template"
    )
    return (
        f"the model's chat template writes tool calls {shown}, where calls = "
        f'"{environment.calls}" does not read them, so no tool would ever run; {fix}'
    )
