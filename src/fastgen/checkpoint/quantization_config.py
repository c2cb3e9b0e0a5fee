"""Reads the `quantization_config` of a Hugging Face `config.json`: which formats of 8-bit weights are supported.

compressed-tensors   llm-compressor's: float-quantized, with scales per tensor, channel, group or block
fp8                  transformers' fine-grained format and DeepSeek's, with scales per block or tensor
fbgemm_fp8           per channel
modelopt             NVIDIA's, per tensor, channel or block; also described by hf_quant_config.json

All of them are e4m3 weights with scales. What they say of activations is not needed, since activations are quantized
token by token; so are keys and values, where the cache is. Modules that a format leaves out are found by the dtypes of
their tensors.
"""

from collections.abc import Mapping
from reprlib import repr
from typing import Any, NamedTuple

Json = Mapping[str, Any]
SUPPORTED = "compressed-tensors (float-quantized), fp8, fbgemm_fp8, modelopt (FP8), each with e4m3 weights"
COMPRESSED_TENSORS_FORMATS = ("float-quantized", "naive-quantized", "mixed-precision", None)
# Rows and columns of a block with one scale, where the algorithm has blocks.
MODELOPT_ALGORITHMS = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": (128, 128)}


class Fp8Format(NamedTuple):
    """How the quantized weights of a checkpoint are stored."""

    method: str
    block: tuple[int, int] | None = None  # rows and columns that share a scale; None: rows, or whole tensors, do


def parse_quantization_config(hf_config: Json) -> Fp8Format | None:
    """Returns the format of a checkpoint's quantized weights; None if it has none.

    Raises ValueError for a format that is not supported, with those that are.
    """
    config = hf_config.get("quantization_config") or hf_config.get("compression_config")
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json: quantization_config must be an object, not {repr(config)}")
    nested = config.get("quantization")  # as in hf_quant_config.json
    if isinstance(nested, Mapping) and "quant_algo" in nested:
        config = {"quant_method": "modelopt", **nested}
        if not config["quant_algo"]:  # the cache alone is quantized
            return None
    readers = {
        "compressed-tensors": _compressed_tensors, "fp8": _fine_grained, "fbgemm_fp8": _fbgemm, "modelopt": _modelopt,
    }  # fmt: skip
    method = config.get("quant_method", "unknown")
    if not isinstance(method, str) or method not in readers:
        raise _unsupported(f"quant_method {repr(method)}")
    return Fp8Format(method, readers[method](config))


def _unsupported(what: str) -> ValueError:
    return ValueError(f"config.json: quantization {what} is not supported; supported: {SUPPORTED}")


def _compressed_tensors(config: Json) -> tuple[int, int] | None:
    status, groups = config.get("quantization_status", "compressed"), config.get("config_groups")
    if status != "compressed":
        raise _unsupported(f"compressed-tensors with quantization_status {repr(status)}")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()) or not groups:
        raise ValueError(f"config.json: config_groups of compressed-tensors must be an object, not {repr(groups)}")
    for name in ("sparsity_config", "transform_config"):
        value = config.get(name)
        is_dense = isinstance(value, Mapping) and name == "sparsity_config" and value.get("format") in (None, "dense")
        if value and not is_dense:
            raise _unsupported(f"compressed-tensors with a {name}")
    blocks = set()
    for group in groups.values():
        for stored in (config.get("format"), group.get("format")):
            if stored not in COMPRESSED_TENSORS_FORMATS:
                raise _unsupported(f"compressed-tensors with format {repr(stored)}")
        if (weights := group.get("weights")) is not None:
            blocks.add(_compressed_tensors_block(weights))
    if len(blocks) > 1:
        raise _unsupported("compressed-tensors with several sizes of blocks")
    return next(iter(blocks), None)


def _compressed_tensors_block(weights: Any) -> tuple[int, int] | None:
    """Returns the block of a group's `weights`, an object of QuantizationArgs."""
    if not isinstance(weights, Mapping):
        raise ValueError(f"config.json: weights of config_groups must be an object, not {repr(weights)}")
    if (weights.get("type", "int"), weights.get("num_bits", 8)) != ("float", 8):
        number = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}"
        raise _unsupported(f"compressed-tensors with {number} weights")
    if weights.get("symmetric", True) is not True or weights.get("dynamic", False) is not False:
        raise _unsupported("compressed-tensors with asymmetric or dynamic weights")
    strategy = weights.get("strategy", "tensor")
    if strategy in ("tensor", "channel"):
        return None
    if strategy == "group":
        return _block([1, weights.get("group_size")])
    if strategy == "block":
        return _block(weights.get("block_structure"))
    raise _unsupported(f"compressed-tensors with weights of strategy {repr(strategy)}")


def _fine_grained(config: Json) -> tuple[int, int] | None:
    if (number := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"fp8 with fmt {repr(number)}")
    size = config.get("weight_block_size", None)
    return None if size is None else _block(size)


def _fbgemm(config: Json) -> None:
    return None


def _modelopt(config: Json) -> tuple[int, int] | None:
    algorithm = config.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm.upper() not in MODELOPT_ALGORITHMS:
        raise _unsupported(f"modelopt with quant_algo {repr(algorithm)}")
    return MODELOPT_ALGORITHMS[algorithm.upper()]


def _block(size: Any) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"config.json: blocks of quantized weights must be [rows, columns], not {repr(size)}")
    return size[0], size[1]


def to_compressed_tensors(unquantized_modules: list[str]) -> dict[str, Any]:
    """Returns the `quantization_config` of weights with a scale per channel and activations quantized per token."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": unquantized_modules, "kv_cache_scheme": None,
    }  # fmt: skip
