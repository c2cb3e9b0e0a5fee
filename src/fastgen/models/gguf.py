"""Reads a `.gguf` file as a Hugging Face config, tensors and tokenizer. Format: ggml's docs/gguf.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from tokenizers import normalizers, pre_tokenizers

from fastgen.types import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # the rest is quantized
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class _Reader(GGUFReader):
    def _get(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.data = np.asarray(self.data)  # slicing a memmap, once per token, is three times as slow
        return super()._get(*args, **kwargs)


def _open(path: str | Path) -> tuple[GGUFReader, dict]:
    """The mapped file, and its metadata without arrays and with `{arch}.` cut from the keys."""
    try:
        reader = _Reader(path)
    except (OSError, ValueError, IndexError, KeyError) as e:  # no file, bad magic, a file cut short
        raise ValueError(f"{path}: not a whole GGUF file ({e}); give the path of one") from e
    meta = {k: f.contents() for k, f in reader.fields.items() if f.types[:1] != [GGUFValueType.ARRAY]}
    if (arch := meta.get("general.architecture")) not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {arch!r} is not supported; use {', '.join(ARCHITECTURES)}")
    if reader.byte_order == "S" or meta.get("split.count", 1) > 1:
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


def _config(reader: GGUFReader, meta: dict) -> dict:
    arch, tensors = meta["general.architecture"], {t.name: t for t in reader.tensors}
    embed, freqs = tensors["token_embd.weight"], getattr(tensors.get("rope_freqs.weight"), "data", None)
    heads, theta = meta["attention.head_count"], meta.get("rope.freq_base", 10000.0)
    head = meta.get("attention.key_length", meta["embedding_length"] // heads)
    if {meta.get(k, head) for k in ("attention.value_length", "rope.dimension_count")} != {head}:
        raise ValueError("keys, values and rope differ in width; only one head_dim is supported")
    bos, pad, *ends = (meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "padding", "eos", "eot"))
    return {
        "architectures": [ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu",
        "hidden_size": meta["embedding_length"], "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"], "num_attention_heads": heads, "head_dim": head,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads), "rope_theta": theta,
        "vocab_size": int(embed.shape[1]), "max_position_embeddings": meta["context_length"],  # [dim, vocab]
        "rope_scaling": _scaling(meta, freqs, theta), "sliding_window": meta.get("attention.sliding_window"),
        "rms_norm_eps": float(f"{meta['attention.layer_norm_rms_epsilon']:.6g}"),  # float32's 1e-5 is 9.99e-6
        "tie_word_embeddings": "output.weight" not in tensors, "bos_token_id": bos,
        "attention_bias": "blk.0.attn_q.bias" in tensors, "pad_token_id": pad,
        "eos_token_id": ends[0] if ends[1] in (None, ends[0]) else [t for t in ends if t is not None],
        "torch_dtype": str(STORED.get(embed.tensor_type.name, torch.float32)).removeprefix("torch."),
    }  # fmt: skip


def _tensors(path: str | Path, reader: GGUFReader, config: dict) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    layers = range(config["num_hidden_layers"])
    names = OUTER | {f"blk.{i}.{k}": f"model.layers.{i}.{v}" for i in layers for k, v in INNER.items()}
    for t in (t for t in reader.tensors if t.name != "rope_freqs.weight"):
        stem, _, kind = t.name.rpartition(".")
        if stem not in names:
            raise ValueError(f"{path}: {t.name} is not part of a {config['model_type']} model")
        stored = STORED.get(t.tensor_type.name)
        array = np.array(t.data) if stored else dequantize(t.data, t.tensor_type)
        x = torch.from_numpy(array).view(stored or torch.float32)  # bfloat16 comes as bytes
        if config["model_type"] == "llama" and (n := heads.get(stem.split(".")[-1])):
            # llama.cpp rotates rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2)
            x = x.unflatten(0, (n, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield f"{names[stem]}.{kind}", x


def read(path: str | Path) -> tuple[dict, Iterator[tuple[str, torch.Tensor]]]:
    """Config, with Hugging Face's keys, and tensors of a GGUF file of llama (Mistral too), qwen2 or qwen3.

    The iterator gives (Hugging Face name, tensor), one in memory at a time: float32 if it is quantized, else
    float32, float16 or bfloat16 as stored. ValueError for a file that is missing, damaged or not supported.
    """
    reader, meta = _open(path)
    try:
        config = _config(reader, meta)
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: {'needs a single ' * isinstance(e, KeyError)}{e}") from e
    return config, _tensors(path, reader, config)


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
