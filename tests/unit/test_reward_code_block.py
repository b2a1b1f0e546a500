"""Which fenced block of a completion is its program: its mark, and its place among others."""

import pytest

from gruppo.reward.code import _LANGUAGES, last_block


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\na\n```\n```python\nb\n```\nend", "b\n"),
        ("  ```py\na\n  ```", "a\n"),
        ("```python\na", None),
        ("a = 1", None),
        ("```a``` is code", None),
        ("```python\n```", ""),
        ("```\na\n```\n```\nb", "a\n"),
        ("```python\na\n```\n```python3\nb\n```", "b\n"),
        ("```python\na\n```\n```text\n9\n```", "a\n"),  # what it prints
        ("```python\na\n```\n```\n9\n```", "a\n"),
        ("```json\n{}\n```\n```bash\nls\n```", None),
        ("```\na\n```\n```bash\npython a.py\n```", "a\n"),
        ("```Python title='x'\na\n```\n```pythonic\nb\n```", "a\n"),
    ],
)
def test_the_last_closed_block_of_the_language_is_the_program(text: str, found: str | None) -> None:
    assert last_block(text, {"python", "python3", "py"}) == found


@pytest.mark.parametrize(
    ("language", "own", "other"),
    [
        (
            "python",
            "python py Python3 py3 python3.11 python3.12.1 {python} {.python} {.python3.11} .py "
            "{python,echo=FALSE} python{1,3} python:main.py python,no_run py3= python-3 py-3 "
            "Python-3.11 python-3.12.1 {python-3.11} {.python-3} python-3.11:main.py python3.13t "
            "python3.9+ python3.x",
            "python2.7 pythonic python-repl {python-console} pypy cython py4j {r} {=python} {} c+ "
            "python-2.7 python-traceback python-3-traceback python3.11-repl python-3.11-repl "
            "python- -3.11 3.11 ipython-3 micropython-3.4 {.python-traceback} {.javascript} "
            "{#python} {#id.python} {title=python} {.python2}",
        ),
        (
            "cpp",
            "cpp c++ cc cxx {c++} {.cpp} .cpp C++,ignore c++17 C++20 cpp23 c++-17 cpp-20",
            "c {c} c# c+++ c++-header cpp2 cpp-2 c-17 {#cpp}",
        ),
        (
            "c",
            "c C {c} {.c} .c c:main.c c,ignore c99 c11 c-99",
            "c++ {c++} c# {c#} cpp c-sharp ch objective-c c3 c-3 c++-17 objective-c-99 {#c}",
        ),
    ],
    ids=["python", "cpp", "c"],
)
def test_marks_of_the_language_and_of_others(language: str, own: str, other: str) -> None:
    marks = _LANGUAGES[language].marks
    spaced = ["{ .MARK }", "{.MARK .cell #id}", "  MARK  title='a'", "{#id .MARK}"]
    mine = [*own.split(), *(form.replace("MARK", own.split()[0]) for form in spaced)]
    assert [last_block(f"```{mark}\na\n```", marks) for mark in mine] == ["a\n"] * len(mine)
    foreign = other.split()
    assert [last_block(f"```{mark}\na\n```", marks) for mark in foreign] == [None] * len(foreign)


@pytest.mark.parametrize(
    ("mark", "is_python"),
    [
        ("{#id .python}", True),
        ("{#fig:a.1 .Python .numberLines}", True),
        ("{ #id  .python3 startFrom='5' }", True),
        ("{#id .python-3.11}", True),
        ('{startFrom="5" .python}', True),
        ("{#id title='in .c' at=2 .py}", True),
        ("python {#id .numberLines}", True),
        ("python-3.11 title='a'", True),
        ("python 3.11", True),
        ("{#id .javascript}", False),
        ("{#id .javascript .python}", False),  # the first class is the language
        ("{#python .javascript}", False),
        ("{.javascript #python}", False),
        ("{.text title='.python'}", False),
        ('{title="as .python is" .text}', False),
        ('{title="as .python is" }', False),
        ("{#id title=python}", False),
        ("{#id .python-traceback}", False),
        ("{#id .python-2.7}", False),
        ("{#id =python}", False),
        ("{#id }", False),
        ("{title='a .python}", False),
        ("python-traceback (most recent call last)", False),
        ("output python", False),
        ("{" + 'a="" ' * 20_000 + "!}", False),  # as long as a model likes
        ("{" + " " * 100_000 + "!}", False),
        ("python-" + "3" * 100_000 + "!", False),
        ("a-" * 50_000 + "3", False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_marks_of_several_words(mark: str, is_python: bool) -> None:
    """A block of another mark is none, and no block without one either."""
    found = last_block(f"```{mark}\na\n```", _LANGUAGES["python"].marks)
    assert found == ("a\n" if is_python else None)
