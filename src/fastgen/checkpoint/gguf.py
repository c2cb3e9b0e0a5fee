"""Reads a `.gguf` file as a Hugging Face config, tensors and tokenizer. Format: ggml's docs/gguf.md."""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from gguf import GGUFReader, GGUFValueType, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from fastgen.checkpoint.files import Checkpoint
from fastgen.text import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
UNQUANTIZED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # other types are quantized
GLOBAL_TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
MAX_ARRAY_VALUES, MAX_ENTRIES = 2**24, 2**20  # values of a metadata array; metadata entries, or tensors, of a file
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
BYTE_TOKENS = {f"<0x{b:02X}>" for b in range(256)}  # SentencePiece's tokens for single bytes
TOKENIZER_ADVICE = "put the model's tokenizer.json and config.json into a folder with its .safetensors instead"


class _CheckedReader(GGUFReader):
    """The gguf library's reader, with every offset and count checked against the size of the file."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> np.ndarray:
        self.data = np.asarray(self.data)  # slicing a memmap, once per token, is three times as slow
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"{int(count)} values of {np.dtype(dtype)} at byte {int(offset)} lie beyond its end")
        return super()._get(offset, dtype, count, *args, **kwargs)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            self._check_count(self._get(orig_offs + 4, np.uint64)[0], MAX_ARRAY_VALUES)
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_fields(self, offs: int, count: Any) -> int:
        return super()._build_fields(offs, self._check_count(count, MAX_ENTRIES))

    def _build_tensor_info(self, offs: int, count: Any) -> Any:
        return super()._build_tensor_info(offs, self._check_count(count, MAX_ENTRIES))

    def _check_count(self, count: Any, max_count: int) -> int:
        if count > min(max_count, len(self.data)):
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
    """Maps the file. Returns its reader, and its metadata without arrays and without the prefix `{arch}.` of keys."""
    try:
        with np.errstate(over="ignore"):  # sizes computed from damaged dimensions may overflow
            reader = _CheckedReader(path)
        meta = {k: f.contents() for k, f in reader.fields.items() if f.types[:1] != [GGUFValueType.ARRAY]}
    except (OSError, ValueError, IndexError, KeyError, RecursionError) as e:  # no file, bad magic, a file cut short
        raise ValueError(f"{path}: not a whole GGUF file ({e}); give the path of one") from e
    if (arch := meta.get("general.architecture")) not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {arch!r} is not supported; use {', '.join(ARCHITECTURES)}")
    if reader.byte_order == "S" or meta.get("split.count", 1) != 1:
        raise ValueError(f"{path}: split or big-endian; run llama-gguf-split --merge or gguf-convert-endian")
    return reader, {k.removeprefix(f"{arch}."): v for k, v in meta.items()}


def _parse_rope_scaling(meta: dict, freq_factors: np.ndarray | None, theta: float) -> dict | None:
    """Returns the config's `rope_scaling`; `freq_factors` [head_dim / 2] are Llama 3's.

    Raises ValueError for scaling that a config cannot express.
    """
    keys = {k[13:]: v for k, v in meta.items() if k.startswith("rope.scaling.") and k[13:] != "finetuned"}
    rope_type, factor = keys.pop("type", "linear"), keys.pop("factor", meta.get("rope.scale_linear", 0)) or 1.0
    yarn = {k: keys.pop(f"yarn_{k}", v) for k, v in (("beta_fast", 32.0), ("beta_slow", 1.0))}
    yarn["original_max_position_embeddings"] = keys.pop("original_context_length", meta["context_length"])
    if rope_type not in ("none", "linear", "yarn") or any(v != 1 for v in keys.values()):  # keys now: multipliers
        raise ValueError(f"rope scaling {rope_type} {keys} is not supported; use linear, yarn or llama3")
    if freq_factors is not None:  # GGUF stores them alone; the parameters are those of every Llama 3 model
        factor, low, high, context = float(freq_factors.max()), 1.0, 4.0, 8192
        rotations = context * theta ** (-np.arange(len(freq_factors)) / len(freq_factors)) / (2 * np.pi)
        smooth = np.clip((rotations - low) / (high - low), 0, 1)
        if not np.allclose(freq_factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ValueError("rope_freqs.weight is not Llama 3's; use the Hugging Face checkpoint instead")
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context}  # fmt: skip
    scaling = {"rope_type": rope_type, "factor": factor} | (yarn if rope_type == "yarn" else {})
    return None if rope_type == "none" or factor == 1 else scaling


def _read_positive(meta: dict, key: str, default: float | None = None) -> Any:
    """Returns a number of the metadata. Raises KeyError if it is absent without default, ValueError if not positive."""
    value = meta[key] if default is None else meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{key} is {value!r}, not a number above 0")
    return value


def _torch_shape(t: ReaderTensor) -> tuple[int, ...]:
    return tuple(reversed(t.shape.tolist()))


def _build_hf_config(reader: GGUFReader, meta: dict) -> dict:
    arch, tensors = meta["general.architecture"], {t.name: t for t in reader.tensors}
    embed, freqs = tensors["token_embd.weight"], getattr(tensors.get("rope_freqs.weight"), "data", None)
    heads, theta = _read_positive(meta, "attention.head_count"), _read_positive(meta, "rope.freq_base", 10000.0)
    head = _read_positive(meta, "attention.key_length", _read_positive(meta, "embedding_length") // heads or None)
    if {meta.get(k, head) for k in ("attention.value_length", "rope.dimension_count")} != {head}:
        raise ValueError("keys, values and rope differ in width; only one head_dim is supported")
    v = _Vocabulary(reader, meta)
    return {
        "architectures": [ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu",
        "hidden_size": meta["embedding_length"], "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": _read_positive(meta, "block_count"), "num_attention_heads": heads, "head_dim": head,
        "num_key_value_heads": _read_positive(meta, "attention.head_count_kv", heads), "rope_theta": theta,
        "vocab_size": _torch_shape(embed)[0], "max_position_embeddings": _read_positive(meta, "context_length"),
        "rope_scaling": _parse_rope_scaling(meta, freqs, theta), "sliding_window": meta.get("attention.sliding_window"),
        # float32's 1e-5 is 9.99e-6
        "rms_norm_eps": float(f"{_read_positive(meta, 'attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in tensors, "bos_token_id": v.bos_id,
        "attention_bias": "blk.0.attn_q.bias" in tensors, "pad_token_id": v.pad_id,
        "eos_token_id": v.eog_ids if len(v.eog_ids) > 1 else next(iter(v.eog_ids), None),
        "torch_dtype": str(UNQUANTIZED_DTYPES.get(embed.tensor_type.name, torch.float32)).removeprefix("torch."),
    }  # fmt: skip


def _hf_name(tensor_name: str, num_layers: int) -> str | None:
    """Returns the Hugging Face name of a tensor; None if a model of `num_layers` layers has no such tensor."""
    stem, _, suffix = tensor_name.rpartition(".")
    if block := re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)", stem):
        name = LAYER_TENSOR_NAMES.get(block[2]) if int(block[1]) < num_layers else None
        return name and f"model.layers.{block[1]}.{name}.{suffix}"
    name = GLOBAL_TENSOR_NAMES.get(stem)
    return name and f"{name}.{suffix}"


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file by their Hugging Face names, converted one at a time while iterating."""

    tensors: Mapping[str, ReaderTensor]
    permuted_heads: Mapping[str, int]  # heads of the modules whose rows llama.cpp permutes

    def iter_tensors(self, *, as_slices: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor), one in memory at a time; `as_slices` has no effect."""
        for name, t in self.tensors.items():
            stored = UNQUANTIZED_DTYPES.get(t.tensor_type.name)
            try:
                with np.errstate(all="ignore"):  # `weights.load` reports values that are not finite
                    array = np.array(t.data) if stored else dequantize(t.data, t.tensor_type)
            except NotImplementedError as e:
                raise ValueError(
                    f"{self.files[name]}: {t.name} is {t.tensor_type.name}, which is not supported: {e}"
                ) from e
            x = torch.from_numpy(array).view(stored or torch.float32)  # bfloat16 comes as bytes
            if n := self.permuted_heads.get(name.split(".")[-2]):
                # llama.cpp rotates rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2).
                x = rearrange(x, "(heads pair two) ... -> (heads two pair) ...", heads=n, two=2)
            yield name, x


def read(path: Path) -> tuple[dict, GGUFCheckpoint]:
    """Returns the config, with Hugging Face's keys, and tensors of a GGUF file of llama (or Mistral), qwen2 or qwen3.

    Quantized tensors become float32; others are float32, float16 or bfloat16 as stored. Raises ValueError for a file
    that is missing, damaged or not supported, and for a tensor that is not part of the model.
    """
    reader, meta = _open(path)
    try:
        config = _build_hf_config(reader, meta)
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: {'needs a single ' * isinstance(e, KeyError)}{e}") from e
    tensors = {}
    for t in reader.tensors:
        if t.name != "rope_freqs.weight":
            if (name := _hf_name(t.name, config["num_hidden_layers"])) is None:
                raise ValueError(f"{path}: {t.name} is not part of a {config['model_type']} model")
            tensors[name] = t
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    shapes = {name: _torch_shape(t) for name, t in tensors.items()}
    permuted = heads if config["model_type"] == "llama" else {}
    return config, GGUFCheckpoint(shapes, dict.fromkeys(tensors, path), tensors, permuted)


@dataclass(frozen=True, slots=True)
class _PreTokenizerRules:
    """How byte-level BPE splits a text into words, within which it merges."""

    splits: tuple[str, ...]  # regular expressions, each applied to the pieces of the one before
    ignore_merges: bool = False  # a word that is in the vocabulary is that token, without merging
    add_bos: bool = False  # the default where the file has no add_bos_token
    nfc: bool = False  # normalize to Unicode's composed form, as Qwen's own tokenizers do and llama.cpp does not


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_GPT4 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASE_AWARE = (  # splits words where an uppercase letter follows a lowercase one
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _WHITESPACE
)
_CASED_LETTERS = (  # letters of scripts with two cases, as DeepSeek LLM lists them
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _WHITESPACE,
)

# By `tokenizer.ggml.pre`, with the names of llama.cpp's llama-vocab.cpp. Where llama.cpp rewrites an expression for its
# own engine, this is the original of the model's tokenizer.json.
_RULES = {
    "default": _PreTokenizerRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2":
        _PreTokenizerRules((_GPT4 % "{1,3}",), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe": _PreTokenizerRules((_GPT4 % "{1,3}",)),
    "qwen2": _PreTokenizerRules((_GPT4 % "",), nfc=True),
    "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan": _PreTokenizerRules((_GPT4 % "",)),
    "qwen35": _PreTokenizerRules(
        ((_GPT4 % "").replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),)),
    "tekken": _PreTokenizerRules((_CASE_AWARE % ("", "", ""),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2": _PreTokenizerRules((_CASE_AWARE % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"),)),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": _PreTokenizerRules((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": _PreTokenizerRules((r"\p{N}", _GPT2)),
    "falcon": _PreTokenizerRules((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": _PreTokenizerRules((
        "[\r\n]", rf"\s?[{_CASED_LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$", _IDEOGRAPHS, r"\p{N}+")),
    "deepseek-coder": _PreTokenizerRules(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")),
    "deepseek-v3": _PreTokenizerRules(_DEEPSEEK3),
}  # fmt: skip
PRE_TOKENIZERS = {name: rules for names, rules in _RULES.items() for name in names.split()}

# Tokens that end an answer whatever their type in the file: llama.cpp's list.
EOG_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Tokens by which a code model ends a file: the metadata's name, and spellings for files without that metadata.
FIM_EOG_TOKENS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


class _Vocabulary:
    """The tokens of a GGUF file, classified by llama.cpp's rules.

    `bos_id`, `eos_id`, `unk_id` and `pad_id` may be None. `eog_ids` are the tokens that end an answer, `eos_id` first.
    """

    def __init__(self, reader: GGUFReader, meta: dict) -> None:
        def array(name: str) -> list:
            field = reader.fields.get(f"tokenizer.ggml.{name}")
            return [] if field is None else field.contents()

        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(array("tokens"))]
        self.token_to_id = {token: i for i, token in enumerate(self.tokens)}
        self.scores, self.merges = array("scores"), array("merges")
        types = array("token_type") or [TokenType.NORMAL] * len(self.tokens)
        is_spm = meta.get("tokenizer.ggml.model") == "llama"
        are_texts = {type(x) for x in (*self.tokens, *self.merges)} <= {str}
        if not are_texts or len(self.token_to_id) < len(self.tokens) or len(types) < len(self.tokens):
            raise ValueError("its tokens are not distinct texts, each with a type")
        if is_spm and len(self.scores) < len(self.tokens):
            raise ValueError("its tokens need a score each")
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_spm else {}  # for metadata that is absent

        def special(name: str) -> int | None:
            id = meta.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
            if id is not None and not isinstance(id, int):
                raise ValueError(f"tokenizer.ggml.{name}_token_id is {id!r}, and no token's number")
            return id if id is not None and (0 <= id < len(self.tokens) or not self.tokens) else None

        self.bos_id, self.eos_id, self.unk_id, self.pad_id = map(special, ("bos", "eos", "unknown", "padding"))
        eog = [self.token_to_id[name] for name in EOG_TOKENS if name in self.token_to_id]
        # In a byte-level vocabulary </s> may be ordinary text; llama.cpp takes it for an end even so.
        eog = [i for i in eog if self.tokens[i] != "</s>" or types[i] == TokenType.CONTROL]
        for name, spellings in FIM_EOG_TOKENS.items():
            by_name = special(name)
            candidates = [self.token_to_id.get(x) for x in spellings] if by_name is None else [by_name]
            eog += [i for i in candidates if i is not None][:1]
        # Where <|return|> and <|call|> end an answer, <|end|> ends a message only.
        if "<|end|>" in self.token_to_id and {"<|return|>", "<|call|>"} <= self.token_to_id.keys():
            eog.remove(self.token_to_id["<|end|>"])
        named = [i for i in map(special, ("eos", "eot", "eom")) if i is not None]
        self.eog_ids = [*dict.fromkeys((*named, *sorted(eog)))]
        control = {i for i, t in enumerate(types) if t in (TokenType.CONTROL, TokenType.UNKNOWN)}
        self.special_ids = sorted(control | set(eog))
        self.added_ids = [i for i, t in enumerate(types) if t == TokenType.USER_DEFINED and i not in eog]


def _build_byte_level_bpe(vocabulary: _Vocabulary, rules: _PreTokenizerRules) -> Backend:
    """Returns GPT-2's kind of BPE: each token is bytes, spelled as letters."""
    v, merges = vocabulary, list[tuple[str, str]]()
    for merge in v.merges:
        space = merge.find(" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        if left in v.token_to_id and right in v.token_to_id and left + right in v.token_to_id:
            merges.append((left, right))
    backend = Backend(models.BPE(v.token_to_id, merges, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rules.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece_bpe(vocabulary: _Vocabulary, *, add_space_prefix: bool) -> Backend:
    """Returns SentencePiece's BPE: it merges the neighbors whose token has the highest score, and falls back to bytes.

    With `add_space_prefix` a space is put before each text, and before text that follows a special token.
    """
    v, special = vocabulary, {*vocabulary.special_ids, *vocabulary.added_ids}
    pieces = {token: v.scores[i] for i, token in enumerate(v.tokens) if i not in special and token not in BYTE_TOKENS}
    ranked = list[tuple[float, int, str, str]]()
    for piece, score in pieces.items():
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in pieces and right in pieces:
                ranked.append((-score, -i, left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unk = None if v.unk_id is None else v.tokens[v.unk_id]
    backend = Backend(models.BPE(v.token_to_id, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if add_space_prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space_prefix else steps)
    return backend


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a GGUF file, with its chat template; its tokens are llama.cpp's with `parse_special`.

    Raises ValueError if the file has no tokenizer, or one that is damaged or of a type that is not supported.
    """
    reader, meta = _open(path)
    try:
        return _build_tokenizer(reader, meta)
    except Exception as e:  # the tokenizers library raises nothing more precise
        raise ValueError(f"{path}: {e}") from e


def _build_tokenizer(reader: GGUFReader, meta: dict) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    v, model = _Vocabulary(reader, meta), meta.get("tokenizer.ggml.model")
    if model is None or not v.tokens:
        raise ValueError(f"no tokenizer in this file; {TOKENIZER_ADVICE}")
    add_bos = model == "llama"
    if model == "gpt2":
        name = meta.get("tokenizer.ggml.pre")
        if name is None:  # as in files of 2023
            warnings.warn(
                "tokenizer.ggml.pre is missing, as in old GGUF files: texts may be split wrongly", stacklevel=3
            )
        if (rules := PRE_TOKENIZERS.get(name or "default")) is None:
            raise ValueError(f"tokenizer.ggml.pre is {name!r}, which is not supported; {TOKENIZER_ADVICE}")
        backend, add_bos = _build_byte_level_bpe(v, rules), rules.add_bos
    elif model == "llama":
        backend = _build_sentencepiece_bpe(v, add_space_prefix=meta.get("tokenizer.ggml.add_space_prefix", True))
    else:
        raise ValueError(f"tokenizer.ggml.model is {model!r}; only gpt2 and llama are supported; {TOKENIZER_ADVICE}")
    backend.add_special_tokens([AddedToken(v.tokens[i], normalized=False, special=True) for i in v.special_ids])
    backend.add_tokens([AddedToken(v.tokens[i], normalized=False, special=False) for i in v.added_ids])
    add_bos = meta.get("tokenizer.ggml.add_bos_token", add_bos) and v.bos_id is not None
    add_eos = meta.get("tokenizer.ggml.add_eos_token", False) and v.eos_id is not None
    added = [(v.tokens[i], i) for i, adds in ((v.bos_id, add_bos), (v.eos_id, add_eos)) if adds and i is not None]
    if added:
        single = [*([v.tokens[v.bos_id or 0]] * add_bos), "$A", *([v.tokens[v.eos_id or 0]] * add_eos)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
    ids = {"bos_token": v.bos_id, "eos_token": v.eos_id, "unk_token": v.unk_id, "pad_token": v.pad_id}
    special = {name: v.tokens[i] for name, i in ids.items() if i is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer
