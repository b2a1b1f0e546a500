"""What the README shows is true: its Python session runs and gives the numbers it says."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_session_runs():
    (session,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(session, names)
    advantage, gradient = names["advantage"], names["logp"].grad
    assert advantage.tolist() == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754])
    # on-policy every token's gradient is -A / N
    expected = (-advantage[:, None] / 12).expand(4, 3)
    assert torch.allclose(gradient.double(), expected, atol=1e-7)


def test_the_files_it_names_are_there():
    root = Path(__file__).parents[2]
    names = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(names) >= 7
    assert [
        name for name in names if not name.startswith("http") and not (root / name).exists()
    ] == []
