"""Reads the files of a checkpoint: JSON, config, safetensors and their index. Errors name the damaged file."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from fastgen.checkpoint.model_families import from_hf_config, parse_eos_token_ids
from fastgen.checkpoint.quantization_config import Fp8Format, parse_quantization_config
from fastgen.core.model_config import ModelConfig

MAX_JSON_BYTES = 2**28  # larger than any tokenizer.json
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # integers and float8 need scales
MODELOPT_CONFIG_FILE = "hf_quant_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
UNSUPPORTED_FORMATS = ("pytorch_model*.bin*", "*.pth", "*.pt", "tf_model.h5", "flax_model.msgpack", "*.gguf")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ValueError, naming the file, if it is anything else."""
    try:
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_JSON_BYTES}")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror or e}") from e
    # Not UTF-8, not JSON, integers of thousands of digits; nested too deep.
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: damaged, not JSON: {e}; download it again") from e
    if not isinstance(value, dict):
        raise ValueError(f"{file}: damaged, a JSON {type(value).__name__} where an object is expected")
    return value


def read_hf_config(path: Path) -> dict[str, Any]:
    """Returns the Hugging Face config of a resolved model, with the end tokens of generation_config.json added.

    A `quantization_config` may also be in hf_quant_config.json, where modelopt writes it.
    Raises ValueError, naming the file, for one that is missing or damaged.
    """
    if path.suffix == ".gguf":
        return read_checkpoint(path)[0]
    file = _config_file(path)
    if not file.is_file():
        is_adapter = (file.parent / "adapter_config.json").is_file()
        advice = "; this is an adapter: name its base model, and the adapter in `adapters`" if is_adapter else ""
        raise ValueError(f"{file.parent}: no config.json{advice}")
    config = read_json(file)
    generation = file.parent / "generation_config.json"
    if generation.is_file():
        eos = parse_eos_token_ids(config.get("eos_token_id"), str(file))
        eos += parse_eos_token_ids(read_json(generation).get("eos_token_id"), str(generation))
        config["eos_token_id"] = list(dict.fromkeys(eos))
    modelopt = file.parent / MODELOPT_CONFIG_FILE
    if not config.get("quantization_config") and modelopt.is_file():
        config["quantization_config"] = read_json(modelopt)
    return config


def read_model_config(path: Path, hf_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """Returns the `ModelConfig` of a resolved model, from `hf_config` if that was read already.

    Raises ValueError, naming the file, for a config that is missing, damaged or not supported.
    """
    hf_config = read_hf_config(path) if hf_config is None else hf_config
    try:
        return from_hf_config(hf_config)
    except ValueError as e:
        file = path if path.suffix == ".gguf" else _config_file(path)
        raise ValueError(str(e).replace("config.json", str(file), 1)) from e


def _config_file(path: Path) -> Path:
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return path
    return (path if path.is_dir() else path.parent) / "config.json"


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Maps a safetensors file. Raises ValueError, naming the file, if the file or a tensor read from it is damaged."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as e:
        raise ValueError(f"{file}: damaged, not a whole safetensors file: {e}; download it again") from e
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror or e}") from e


class TensorInfo(NamedTuple):
    """Dtype, as safetensors spells it, and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Returns dtypes and shapes of the tensors in a safetensors file."""
    with open_safetensors(file) as f:
        slices = {name: f.get_slice(name) for name in f.keys()}
        return {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a safetensors file. Raises ValueError for dtypes that are not float."""
    infos = read_tensor_infos(file)
    for name, (dtype, _) in infos.items():
        if dtype not in FLOAT_DTYPES:
            quantized = "quantized models need a config.json with the quantization_config of a supported format"
            raise ValueError(f"{file}: {name} has dtype {dtype}: read are {', '.join(FLOAT_DTYPES)}; {quantized}")
    return {name: info.shape for name, info in infos.items()}


def first_names(names: Sequence[str]) -> str:
    """Formats names for an error message: the first eight, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a model: the shape of each tensor, and the file that holds it. Here, safetensors files."""

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]

    @property
    def quantized_names(self) -> frozenset[str]:
        """Names of tensors that are stored in fp8, with scales."""
        return frozenset()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def iter_tensors(self, *, as_slices: bool = False) -> Iterator[tuple[str, Any]]:
        """Yields (name, tensor) of every tensor, mapping one file at a time. Indexing a slice reads only that part."""
        for file in sorted(set(self.files.values())):
            with open_safetensors(file) as f:
                for name in f.keys():
                    if self.files[name] == file:
                        yield name, f.get_slice(name) if as_slices else f.get_tensor(name)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Returns the Hugging Face config of a resolved model, and the weight files that transformers would load.

    `path` is a folder, its config.json, an index, a `.safetensors` or a `.gguf` file. In a folder the weight files are,
    in this order: the file that config.json names as `transformers_weights`; model.safetensors; the shards of its
    index. A folder with none of them, which transformers rejects, may have files under other names, as long as no two
    hold the same tensor. Raises ValueError if there are none, or damaged ones.
    """
    if path.suffix == ".gguf":
        from fastgen.checkpoint import gguf  # the reader takes a while to import

        return gguf.read(path)
    hf_config = read_hf_config(path)
    files, unique = _find_weight_files(path, hf_config)
    fp8_format = _parse_format(path, hf_config)
    shapes: dict[str, tuple[int, ...]] = {}
    infos: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        if fp8_format is None:
            new: Any = read_shapes(file)
        else:
            infos |= (new := read_tensor_infos(file))
        if unique and (duplicates := new.keys() & shapes.keys()):
            problem = f"{file_of[name := min(duplicates)].name} and {file.name} both hold {name}"
            advice = f"there is no {INDEX_FILE} to say which is the checkpoint: remove one, or name the file"
            raise ValueError(f"{file.parent}: {problem}, and {advice}")
        shapes |= new
        file_of |= dict.fromkeys(new, file)
    if fp8_format is not None:
        from fastgen.checkpoint import fp8_tensors  # which imports this module

        return hf_config, fp8_tensors.read(infos, file_of, fp8_format)
    return hf_config, Checkpoint(shapes, file_of)


def _parse_format(path: Path, hf_config: Mapping[str, Any]) -> Fp8Format | None:
    """Returns the format of quantized weights. Raises ValueError, naming the file."""
    try:
        return parse_quantization_config(hf_config)
    except ValueError as e:
        raise ValueError(str(e).replace("config.json", str(_config_file(path)), 1)) from e


def _find_weight_files(path: Path, config: Mapping[str, Any]) -> tuple[list[Path], bool]:
    """Returns the files of a checkpoint, of which later ones win, and whether no two may hold the same tensor."""
    if path.is_file() and (path.suffix != ".json" or path.name.endswith(".index.json")):
        if path.suffix not in (".safetensors", ".json"):
            raise ValueError(f"{path}: weights are read from .safetensors and .gguf files only")
        return _list_shards(path), False
    folder = path if path.is_dir() else path.parent
    if (explicit := config.get("transformers_weights")) is not None:
        problem = f"{folder}: config.json names {explicit!r} as transformers_weights"
        if not isinstance(explicit, str) or not explicit.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{problem}: no safetensors file")
        file = folder / explicit
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"{problem}, outside of its folder")
        return _list_shards(file), False
    for file in (folder / WEIGHTS_FILE, folder / INDEX_FILE):
        if file.is_file():
            return _list_shards(file), False
    if files := sorted(folder.glob("*.safetensors")):
        return files, True
    names = sorted(file.name for pattern in UNSUPPORTED_FORMATS for file in folder.glob(pattern))
    advice = f"; {', '.join(names[:4])} is not read: save the model with transformers' save_pretrained" if names else ""
    raise ValueError(f"{folder}: no .safetensors file{advice}")


def _list_shards(index: Path) -> list[Path]:
    """Returns the files that an index names, or the safetensors file itself."""
    if index.suffix != ".json":
        return [index]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: damaged, no weight_map from names of tensors to names of files")
    names = sorted(set(shards.values()))
    if bad := [name for name in names if not re.fullmatch(r"[^\0]+\.safetensors", name)]:
        raise ValueError(f"{index}: {bad[0]!r} is no safetensors file")
    files = [index.parent / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.parent}: the index names {first_names(absent)}, which are not there")
    return files
