"""Tokenizers are loaded from a checkpoint's files, and a missing package is named."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tokenizer import BYTE_LEVEL, MESSAGES

from fastgen.checkpoint import tokenizer
from fastgen.text.tokenizer import encode


def test_load(tmp_path: Path) -> None:
    """Loads the tokenizer and chat template of a checkpoint's folder or file; None without one."""
    assert tokenizer.load(tmp_path) is None
    BYTE_LEVEL.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "config.json"):
        loaded = tokenizer.load(path)
        assert loaded is not None and encode(loaded, MESSAGES) == encode(BYTE_LEVEL, MESSAGES)
        assert loaded.decode(loaded("Hello, 漢字").input_ids) == "Hello, 漢字"


@pytest.mark.parametrize(
    ("file", "data", "names"),
    [
        (
            "tokenizer.model",
            b"\n\x0e\n\x05<unk>",
            "sentencepiece and protobuf: pip install sentencepiece protobuf, or put",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken: pip install tiktoken, or put"),
        ("tekken.json", b"{}", "mistral-common: pip install mistral-common, or put"),
    ],
)
def test_missing_packages_are_named(
    file: str, data: bytes, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the packages that the tokenizer's file needs."""
    (tmp_path / file).write_bytes(data)
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    monkeypatch.setattr(tokenizer, "sys", SimpleNamespace(modules={}))
    with pytest.raises(ValueError, match=f"{file} cannot be read without {names} the model's tokenizer.json"):
        tokenizer.load(tmp_path)


def test_mistral_folder_with_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizer.json is preferred to tekken.json, even if mistral-common is installed."""
    BYTE_LEVEL.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    loaded = tokenizer.load(tmp_path)
    assert loaded is not None and encode(loaded, MESSAGES) == encode(BYTE_LEVEL, MESSAGES)
