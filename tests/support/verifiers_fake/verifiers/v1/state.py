from pydantic import BaseModel


class State(BaseModel):
    pass


def state_cls(kind):
    return next((a for a in kind.arguments if issubclass(a, State)), State)
