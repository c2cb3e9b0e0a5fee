"""Reads the files of a checkpoint: JSON, safetensors and their index. A damaged one is a ValueError that names it."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 2**28  # more than any tokenizer.json has
FLOAT_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
)  # dtypes of weights; whole numbers and float8 would be read without their scales
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
UNSUPPORTED_FORMATS = ("pytorch_model*.bin*", "*.pth", "*.pt", "tf_model.h5", "flax_model.msgpack", "*.gguf")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. ValueError, with the file, if it holds anything else."""
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_JSON_BYTES}")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:  # no UTF-8, no JSON, numbers of thousands of digits; nested too deep
        raise ValueError(f"{file}: damaged, not JSON: {e}; download it again") from e
    if not isinstance(value, dict):
        raise ValueError(f"{file}: damaged, a JSON {type(value).__name__} where an object is expected")
    return value


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file, mapped. ValueError, with the file, if it or one of the tensors read is damaged."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"{file}: damaged, not a whole safetensors file: {e}; download it again") from e
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror or e}") from e


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file. ValueError where one is not of floating point."""
    shapes = {}
    with open_safetensors(file) as f:
        for name in f.keys():
            tensor = f.get_slice(name)
            if tensor.get_dtype() not in FLOAT_DTYPES:
                kind = tensor.get_dtype()
                raise ValueError(
                    f"{file}: {name} has dtype {kind}: read are {', '.join(FLOAT_DTYPES)}, no quantized models"
                )
            shapes[name] = tuple(tensor.get_shape())
    return shapes


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a checkpoint: the shape of each tensor, and the file that holds it."""

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def iter_tensors(self, *, as_slices: bool = False) -> Iterator[tuple[str, Any]]:
        """Yield (name, tensor) of all, or, `sliced`, slices of which only what is indexed is read; one file is mapped
        at a time."""
        for file in sorted(set(self.files.values())):
            with open_safetensors(file) as f:
                for name in f.keys():
                    if self.files[name] == file:
                        yield name, f.get_slice(name) if as_slices else f.get_tensor(name)

    @contextmanager
    def open_slice(self, name: str) -> Iterator[Any]:
        """Open the slice of one tensor."""
        with open_safetensors(self.files[name]) as f:
            yield f.get_slice(name)


def open_checkpoint(path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Find the files that transformers would load, and read their headers.

    `path` is a folder, its config.json, an index or a `.safetensors` file. Of a folder these are, in this order: the
    file that config.json names as `transformers_weights`; model.safetensors; the shards of its index. A folder that
    has neither, which transformers refuses, may have files under other names, as long as no two hold one tensor.
    ValueError for a folder without any, and for damaged files.
    """
    files, unique = _find_weight_files(path, config)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        found = read_shapes(file)
        if unique and (twice := found.keys() & shapes.keys()):
            name = min(twice)
            raise ValueError(
                f"{file.parent}: {places[name].name} and {file.name} both hold {name}, and there is no {INDEX_FILE} to say "
                "which is the checkpoint: remove one, or name the file"
            )
        shapes |= found
        places |= dict.fromkeys(found, file)
    return Checkpoint(shapes, places)


def _find_weight_files(path: Path, config: Mapping[str, Any]) -> tuple[list[Path], bool]:
    """The files of a checkpoint, of which later ones win, and whether each tensor must be in one of them only."""
    if path.name.endswith(".index.json"):
        return _read_shard_index(path), False
    if path.is_file() and path.suffix != ".json":
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: weights are read from .safetensors and .gguf files only")
        return [path], False
    folder = path if path.is_dir() else path.parent
    if (explicit := config.get("transformers_weights")) is not None:
        if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{folder}: config.json names {explicit!r} as transformers_weights: no safetensors file")
        file = folder / explicit
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"{folder}: config.json names {explicit!r} as transformers_weights, outside of its folder")
        return (_read_shard_index(file) if explicit.endswith(".json") else [file]), False
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE], False
    if (folder / INDEX_FILE).is_file():
        return _read_shard_index(folder / INDEX_FILE), False
    if files := sorted(folder.glob("*.safetensors")):
        return files, True
    others = sorted(file.name for pattern in UNSUPPORTED_FORMATS for file in folder.glob(pattern))
    advice = (
        f"; {', '.join(others[:4])} is not read: save the model with transformers' save_pretrained" if others else ""
    )
    raise ValueError(f"{folder}: no .safetensors file{advice}")


def _read_shard_index(index: Path) -> list[Path]:
    """The files that an index names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: damaged, no weight_map from names of tensors to names of files")
    names = sorted(set(shards.values()))
    if bad := [name for name in names if not re.fullmatch(r"[^\0]+\.safetensors", name)]:
        raise ValueError(f"{index}: {bad[0]!r} is no safetensors file")
    files = [index.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        raise ValueError(f"{index.parent}: the index names {', '.join(absent[:8])}{more}, which are not there")
    return files
