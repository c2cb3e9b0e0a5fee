"""Loads the tokenizer that lies beside a checkpoint."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastgen.text import Tokenizer


def load(path: Path) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint's folder, file or `.gguf`; returns None if there is none.

    Raises ValueError for files that cannot be read, naming the packages to install if some are missing.
    """
    if path.suffix == ".gguf":
        from fastgen.checkpoint import gguf  # the gguf package takes long to import

        return gguf.read_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((folder / name).is_file() for name in files):
        return None
    try:
        tokenizer = _load_from_folder(folder)
    except ImportError as e:
        raise ValueError(f"{folder}: {e}") from e
    except Exception as e:  # the tokenizers library raises plain Exception, and its callers whatever bad values cause
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {type(e).__name__}: {e}") from e
    length, template = tokenizer.model_max_length, tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    for name, value, is_valid in (
        ("model_max_length", length, isinstance(length, int | float) and not isinstance(length, bool)),
        ("chat_template", template, all(isinstance(text, str) for text in texts)),
    ):
        if not is_valid:
            raise ValueError(f"{folder}: tokenizer_config.json: {name} is of type {type(value).__name__}")
    return tokenizer


def _load_from_folder(folder: Path) -> Tokenizer:
    """Reads a folder's tokenizer with transformers. Raises ImportError for a missing package, with advice."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def require_packages(file: str, *packages: tuple[str, str]) -> None:
        if missing := [name for module, name in packages if module not in sys.modules and not find_spec(module)]:
            names = " and ".join(missing)
            advice = f"pip install {' '.join(missing)}, or put the model's tokenizer.json into this folder"
            raise ImportError(f"{file} cannot be read without {names}: {advice}")

    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("tekken.json"):  # transformers would use mistral-common's own tokenizer where that is installed
        if has("tokenizer.json"):
            return PreTrainedTokenizerFast.from_pretrained(folder)
        require_packages("tekken.json", ("mistral_common", "mistral-common"))
        from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[reportPrivateImportUsage]

        tokenizer: Any = convert_tekken_tokenizer(str(folder / "tekken.json"))
        tokenizer.add_bos_token = True
        return tokenizer
    is_bare = has("tokenizer.model") and not (has("tokenizer.json") or has("vocab.json"))
    # A SentencePiece file is a protobuf, which begins with its first field's tag; tiktoken's is lines of base64.
    is_sentencepiece = is_bare and (folder / "tokenizer.model").read_bytes()[:1] == b"\n"
    if is_bare and is_sentencepiece:
        require_packages("tokenizer.model", ("sentencepiece", "sentencepiece"), ("google", "protobuf"))
    elif is_bare:
        require_packages("tokenizer.model", ("tiktoken", "tiktoken"))
    # Never runs code that lies beside a tokenizer, and never asks the user for permission.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if is_sentencepiece and not has("tokenizer_config.json"):  # which would set it
        tokenizer.add_bos_token = True
    return tokenizer
