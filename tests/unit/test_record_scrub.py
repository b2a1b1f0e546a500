"""What counts as a secret, and what does not."""

from pathlib import Path

import pytest

from gruppo.record import scrub, scrub_values
from gruppo.record.scrub import secrets


@pytest.mark.parametrize(
    "name",
    [
        "OPENAI_API_KEY",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "PGPASSWORD",
        "GITHUB_PAT",
        "api_key",
        "MYTOKEN",
        "SENTRY_DSN",
        "GOOGLE_CREDENTIALS",
        "APIKEY",
    ],
)
def test_secret_names(name: str) -> None:
    assert secrets({name: "abcdef"}) == {"abcdef": name}
    assert scrub("x abcdef y", {name: "abcdef"}) == "x [redacted] y"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "abcdef"),
        ("KEYBOARD", "abcdef"),
        ("PATH", "/usr/bin:/bin"),
        ("PWD", "abcdef"),
        ("OLDPWD", "abcdef"),
        ("HF_TOKEN", "short"),
        ("SSH_AUTH_SOCK", "/dev/null"),
        ("MONKEY", "abcdef"),
    ],
)
def test_innocent_variables(name: str, value: str) -> None:
    assert secrets({name: value}) == {}


def test_odd_secret_values_are_no_paths() -> None:
    values = {"A_KEY": "/" + "x" * 5000, "B_KEY": "/a\0bcdefgh", "C_KEY": "/no/such/file+base64="}
    assert set(secrets(values)) == set(values.values())


def test_longer_secret_goes_first() -> None:
    environment = {"A_KEY": "secret1", "B_KEY": "secret1-and-more"}
    assert scrub("secret1-and-more secret1", environment) == "[redacted] [redacted]"


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-AbCdEfGhIjKlMnOpQrSt",
        "hf_AbCdEfGhIjKlMnOpQrStUvWx",
        "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
        "github_pat_11ABCDEFG0abcdefghij",
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-1234567890-abcdef",
        "glpat-AbCdEfGhIjKlMnOpQr",
    ],
)
def test_known_kinds_of_keys_are_found_without_an_environment(key: str) -> None:
    assert scrub(f'key = "{key}"', {}) == 'key = "[redacted]"'


def test_private_key_bearer_and_url_password() -> None:
    block = "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----"
    assert scrub(f"a {block} b", {}) == "a [redacted] b"
    assert scrub("Authorization: Bearer abc.def-ghi==", {}) == "Authorization: Bearer [redacted]"
    assert scrub("https://u:p%40ss@h:8000/x", {}) == "https://u:[redacted]@h:8000/x"


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/v1",
        "task-based sk-short hf_hub hf_home",
        "lr = 1e-6, model = 'Qwen/Qwen3-0.6B'",
        "2 + 2 = 4 @ home: http://a/b:c@d",
    ],
)
def test_harmless_text_is_left_alone(text: str) -> None:
    assert scrub(text, {}) == text


def test_home_folder_becomes_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert scrub('data = "/home/ann/x.jsonl"', {}) == 'data = "~/x.jsonl"'
    assert scrub("/home/ann", {}) == "~"
    assert scrub("file:///home/ann/x", {}) == "file://~/x"
    for other in ("/home/anna/x", "/mnt/home/ann/x", "/home/ann-2", "/home/ann.old"):
        assert scrub(other, {}) == other
    monkeypatch.setenv("HOME", "/")
    assert scrub("/a/b", {}) == "/a/b"


def test_nested_values_and_keys() -> None:
    value = {"abcdef": ["abcdef", ("x", 1, None, 2.5)], "n": {"k": "-abcdef-"}}
    assert scrub_values(value, {"A_KEY": "abcdef"}) == {
        "[redacted]": ["[redacted]", ["x", 1, None, 2.5]],
        "n": {"k": "-[redacted]-"},
    }


def test_a_path_in_a_secret_variable_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text("{}")
    assert scrub(str(file), {"APPLICATION_CREDENTIALS": str(file)}) == str(file)
