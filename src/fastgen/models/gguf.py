"""Reads a `.gguf` file as a Hugging Face config, tensors and tokenizer. Format: ggml's docs/gguf.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from tokenizers import normalizers, pre_tokenizers

from fastgen.types import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # the rest is quantized
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
MOST_VALUES, MOST_ENTRIES = 2**24, 2**20  # of an array in the metadata, and of these and tensors in a file
INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class _Reader(GGUFReader):
    """The library's reader, which believes every number in a file: here each is checked against the file's size."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> np.ndarray:
        self.data = np.asarray(self.data)  # slicing a memmap, once per token, is three times as slow
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"{int(count)} values of {np.dtype(dtype)} at byte {int(offset)} lie beyond its end")
        return super()._get(offset, dtype, count, *args, **kwargs)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            self._count(self._get(orig_offs + 4, np.uint64)[0], MOST_VALUES)
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_fields(self, offs: int, count: Any) -> int:
        return super()._build_fields(offs, self._count(count, MOST_ENTRIES))

    def _build_tensor_info(self, offs: int, count: Any) -> Any:
        return super()._build_tensor_info(offs, self._count(count, MOST_ENTRIES))

    def _count(self, count: Any, most: int) -> int:
        if count > min(most, len(self.data)):
            raise ValueError(f"it claims to hold {count} values or tensors")
        return int(count)

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        super()._build_tensors(start_offs, fields)
        end = start_offs
        for t in sorted(self.tensors, key=lambda t: t.data_offset):
            if t.data_offset < end:
                raise ValueError(f"{t.name} lies where another tensor is")
            end = t.data_offset + t.n_bytes


def _open(path: str | Path) -> tuple[GGUFReader, dict]:
    """The mapped file, and its metadata without arrays and with `{arch}.` cut from the keys."""
    try:
        with np.errstate(over="ignore"):  # of products of dimensions that are no tensor's
            reader = _Reader(path)
        meta = {k: f.contents() for k, f in reader.fields.items() if f.types[:1] != [GGUFValueType.ARRAY]}
    except (OSError, ValueError, IndexError, KeyError, RecursionError) as e:  # no file, bad magic, a file cut short
        raise ValueError(f"{path}: not a whole GGUF file ({e}); give the path of one") from e
    if (arch := meta.get("general.architecture")) not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {arch!r} is not supported; use {', '.join(ARCHITECTURES)}")
    if reader.byte_order == "S" or meta.get("split.count", 1) != 1:
        raise ValueError(f"{path}: split or big-endian; run llama-gguf-split --merge or gguf-convert-endian")
    return reader, {k.removeprefix(f"{arch}."): v for k, v in meta.items()}


def _scaling(meta: dict, freqs: np.ndarray | None, theta: float) -> dict | None:
    """`rope_scaling`; `freqs` [head_dim / 2] is Llama 3's. ValueError for what a config cannot express."""
    keys = {k[13:]: v for k, v in meta.items() if k.startswith("rope.scaling.") and k[13:] != "finetuned"}
    kind, factor = keys.pop("type", "linear"), keys.pop("factor", meta.get("rope.scale_linear", 0)) or 1.0
    yarn = {k: keys.pop(f"yarn_{k}", v) for k, v in (("beta_fast", 32.0), ("beta_slow", 1.0))}
    yarn["original_max_position_embeddings"] = keys.pop("original_context_length", meta["context_length"])
    if kind not in ("none", "linear", "yarn") or any(v != 1 for v in keys.values()):  # left: multipliers
        raise ValueError(f"rope scaling {kind} {keys} is not supported; use linear, yarn or llama3")
    if freqs is not None:  # the file lacks the numbers behind them; all of Llama 3 shares these three
        factor, low, high, context = float(freqs.max()), 1.0, 4.0, 8192
        turns = context * theta ** (-np.arange(len(freqs)) / len(freqs)) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if not np.allclose(freqs, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ValueError("rope_freqs.weight is not Llama 3's; use the Hugging Face checkpoint instead")
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context}  # fmt: skip
    scaling = {"rope_type": kind, "factor": factor} | (yarn if kind == "yarn" else {})
    return None if kind == "none" or factor == 1 else scaling


def _positive(meta: dict, key: str, default: float | None = None) -> Any:
    """A number of the metadata. KeyError where it is absent and has no default, ValueError where it is none."""
    value = meta[key] if default is None else meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} is {value!r}, not a number above 0")
    return value


def _shape(t: ReaderTensor) -> tuple[int, ...]:
    return tuple(reversed(t.shape.tolist()))


def _config(reader: GGUFReader, meta: dict) -> dict:
    arch, tensors = meta["general.architecture"], {t.name: t for t in reader.tensors}
    embed, freqs = tensors["token_embd.weight"], getattr(tensors.get("rope_freqs.weight"), "data", None)
    heads, theta = _positive(meta, "attention.head_count"), _positive(meta, "rope.freq_base", 10000.0)
    head = _positive(meta, "attention.key_length", _positive(meta, "embedding_length") // heads or None)
    if {meta.get(k, head) for k in ("attention.value_length", "rope.dimension_count")} != {head}:
        raise ValueError("keys, values and rope differ in width; only one head_dim is supported")
    bos, pad, *ends = (meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "padding", "eos", "eot"))
    return {
        "architectures": [ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu",
        "hidden_size": meta["embedding_length"], "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": _positive(meta, "block_count"), "num_attention_heads": heads, "head_dim": head,
        "num_key_value_heads": _positive(meta, "attention.head_count_kv", heads), "rope_theta": theta,
        "vocab_size": _shape(embed)[0], "max_position_embeddings": _positive(meta, "context_length"),
        "rope_scaling": _scaling(meta, freqs, theta), "sliding_window": meta.get("attention.sliding_window"),
        # float32's 1e-5 is 9.99e-6
        "rms_norm_eps": float(f"{_positive(meta, 'attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in tensors, "bos_token_id": bos,
        "attention_bias": "blk.0.attn_q.bias" in tensors, "pad_token_id": pad,
        "eos_token_id": ends[0] if ends[1] in (None, ends[0]) else [t for t in ends if t is not None],
        "torch_dtype": str(STORED.get(embed.tensor_type.name, torch.float32)).removeprefix("torch."),
    }  # fmt: skip


class Tensors:
    """The tensors of a GGUF file by their Hugging Face names; each is converted when the iterator comes to it."""

    def __init__(self, path: str | Path, reader: GGUFReader, config: dict) -> None:
        """Raises ValueError, with the tensor's name, for what is not part of such a model."""
        self.path, self.config = path, config
        names = {}
        for t in (t for t in reader.tensors if t.name != "rope_freqs.weight"):
            stem, _, kind = t.name.rpartition(".")
            block = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)", stem)
            name = OUTER.get(stem) if block is None else INNER.get(block[2])
            if name is None or (block is not None and int(block[1]) >= config["num_hidden_layers"]):
                raise ValueError(f"{path}: {t.name} is not part of a {config['model_type']} model")
            names[f"{name}.{kind}" if block is None else f"model.layers.{int(block[1])}.{name}.{kind}"] = t
        self.tensors = names
        self.shapes = {name: _shape(t) for name, t in names.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), one in memory at a time."""
        config = self.config
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for name, t in self.tensors.items():
            stored = STORED.get(t.tensor_type.name)
            try:
                array = np.array(t.data) if stored else dequantize(t.data, t.tensor_type)
            except NotImplementedError as e:
                raise ValueError(f"{self.path}: {t.name} is {t.tensor_type.name}, which is not supported: {e}") from e
            x = torch.from_numpy(array).view(stored or torch.float32)  # bfloat16 comes as bytes
            if config["model_type"] == "llama" and (n := heads.get(name.split(".")[-2])):
                # llama.cpp rotates rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2)
                x = x.unflatten(0, (n, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield name, x


def read(path: str | Path) -> tuple[dict, Tensors]:
    """Config, with Hugging Face's keys, and tensors of a GGUF file of llama (Mistral too), qwen2 or qwen3.

    Tensors are float32 if they are quantized, else float32, float16 or bfloat16 as stored. ValueError for a file that
    is missing, damaged or not supported.
    """
    reader, meta = _open(path)
    try:
        config = _config(reader, meta)
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: {'needs a single ' * isinstance(e, KeyError)}{e}") from e
    return config, Tensors(path, reader, config)


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file, with its chat template. Raises ValueError where the file has none."""
    from transformers import PreTrainedTokenizerFast

    path, meta = Path(path), _open(path)[1]
    if "tokenizer.ggml.model" not in meta:
        raise ValueError(f"{path}: no tokenizer in this file; name one beside the model")
    made = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    pre, backend = meta.get("tokenizer.ggml.pre"), made.backend_tokenizer
    if pre == "smollm":  # transformers 5.23 loses the digit split, which also parts spaces from a digit
        digits, rest = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    if pre == "qwen2":  # and the normalizer of this one
        backend.normalizer = normalizers.NFC()
    return made
