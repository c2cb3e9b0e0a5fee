"""Quantized checkpoints, written and read by compressed-tensors and transformers on the other side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import Params
from fastgen.checkpoint import weights
from fastgen.checkpoint.model_families import to_hf_config
from fastgen.core.model_config import TPShard
from fastgen.quantization.fp8 import E4M3, QuantizedWeight, map_weights, quantize_rows

pytestmark = pytest.mark.filterwarnings("default")  # transformers' and pydantic's own
CONFIG = fastgen.from_hf_config(
    {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
)  # fmt: skip
PARAMS = map_weights(lambda w: w * 10 if w.ndim == 2 else w, fastgen.init(CONFIG, 1, device="cpu"))
NAMED = dict(weights.named_weights(PARAMS, CONFIG))
MATMULS = [name for name in NAMED if name.endswith("_proj.weight")]
Tensors = dict[str, Tensor]


def as_bytes(params: Params) -> list[Tensor]:
    return [x.contiguous().view(torch.uint8) for x in tree_leaves(params) if x is not None]


def assert_same(a: Params, b: Params) -> None:
    """Asserts that two trees have the same form and are equal bit for bit."""
    assert map_weights(type, a) == map_weights(type, b)
    assert all(torch.equal(x, y) for x, y in zip(as_bytes(a), as_bytes(b), strict=True))


def write(folder: Path, tensors: Tensors, quantization_config: Any = None, **more: Any) -> Path:
    """Writes a checkpoint, its scales in a file of their own."""
    config = to_hf_config(CONFIG) | ({"quantization_config": quantization_config} if quantization_config else {}) | more
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    scales = {name for name in tensors if "scale" in name}
    files = {"model-00001-of-00002.safetensors": tensors.keys() - scales, "model-00002-of-00002.safetensors": scales}
    for file, names in files.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def to_blocks(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns e4m3 values and fp32 scales [blocks, blocks] of a matrix, block by block."""
    grid = [-(-n // b) for n, b in zip(w.shape, block, strict=True)]
    data, scale = torch.empty(w.shape, dtype=E4M3), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = w[part].float().abs().max() / 448
            data[part] = (w[part].float() / scale[i, j]).clamp(-448, 448).to(E4M3)
    return data, scale


# --- compressed-tensors -----------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"}, "tensor": {"strategy": "tensor"},
    "block": {"strategy": "block", "block_structure": [32, 32]}, "group": {"strategy": "group", "group_size": 32},
}  # fmt: skip


def scales_of(w: Tensor, args: QuantizationArgs) -> Tensor:
    """Returns a weight's scales for a strategy, amax / 448."""
    if args.strategy == "block":
        return to_blocks(w, tuple(args.block_structure))[1]
    if args.strategy == "group":
        return to_blocks(w, (1, args.group_size))[1]
    amax = w.abs().amax(1, keepdim=True) if args.strategy == "channel" else w.abs().max().reshape(1)
    return amax / 448


@pytest.mark.parametrize(
    ("strategy", "activations"), [*((s, "dynamic") for s in STRATEGIES), ("tensor", "static"), ("channel", "none")]
)
def test_compressed_tensors(strategy: str, activations: str, tmp_path: Path) -> None:
    """Models compressed by compressed-tensors have its weights here: bit for bit, or dequantized as it does."""
    model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**to_hf_config(CONFIG))).bfloat16()
    model.load_state_dict(NAMED, strict=False)
    float8 = {"num_bits": 8, "type": "float"}
    args = QuantizationArgs(**float8, **STRATEGIES[strategy])
    inputs = None
    if activations != "none":
        inputs = QuantizationArgs(**float8, strategy="token" if activations == "dynamic" else "tensor",
                                  dynamic=activations == "dynamic")  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    ignored = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(scales_of(module.weight.data, args))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight_scale" in stored
    assert ("model.layers.0.self_attn.q_proj.input_scale" in stored) == (activations == "static")

    compressor.decompress_model(model)
    expected = {name: p for name, p in model.state_dict().items() if name in NAMED}
    config, full = fastgen.load(tmp_path, quantization="none")
    assert config == CONFIG
    for name, w in weights.named_weights(full, config):
        assert torch.equal(w, expected[name]), name

    params = fastgen.load(tmp_path)[1]
    named = dict(weights.named_weights(params, config))
    quantized = [name for name, w in named.items() if isinstance(w, QuantizedWeight)]
    plain = {"model.layers.0.mlp.down_proj.weight"} | {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"}
    assert quantized == [name for name in MATMULS if name not in plain]
    for name, w in named.items():
        if name not in quantized:
            assert torch.equal(w, expected[name]), "left as it is, or dequantized with the part that is ignored"
        elif strategy in ("channel", "tensor"):
            assert torch.equal(w.data.view(torch.uint8), stored[name].view(torch.uint8))
            assert torch.equal(w.scale, stored[name + "_scale"].float().flatten().expand(len(w.scale)))
        else:
            again = expected_requantized(stored[name], stored[name + "_scale"], args)
            assert torch.equal(w.scale, again.scale)
            assert torch.equal(w.data.view(torch.uint8), again.data.view(torch.uint8))


def expected_requantized(data: Tensor, scale: Tensor, args: QuantizationArgs) -> QuantizedWeight:
    """Returns a block-scaled weight with a scale for each row: dequantized in fp32, and quantized again."""
    block = tuple(args.block_structure or (1, args.group_size))
    scale = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return QuantizedWeight(*quantize_rows(data.float() * scale[: data.shape[0], : data.shape[1]]))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK"])
def test_llmcompressor(scheme: str, tmp_path: Path) -> None:
    """Models quantized by llmcompressor have here the weights that transformers reads."""
    reason = "llmcompressor needs older releases of transformers than the dev extra: pip install it in an environment"
    llmcompressor = pytest.importorskip("llmcompressor", reason=reason)
    from datasets import Dataset
    from llmcompressor.modifiers.quantization import QuantizationModifier

    fastgen.save(tmp_path / "full", CONFIG, PARAMS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    tokens = [[i % 61 for i in range(16)] for _ in range(4)]
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 16] * 4})
    samples = {"dataset": data, "num_calibration_samples": 4, "max_seq_length": 16} if scheme == "FP8" else {}
    ignored = ["lm_head", "re:.*layers.1.mlp.down_proj", "re:.*layers.0.self_attn.v_proj"]
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignored)
    llmcompressor.oneshot(model=model, recipe=recipe, **samples)
    folder = tmp_path / "fp8"
    model.save_pretrained(folder, save_compressed=True)
    options: Any = {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).state_dict()
    stored = load_file(folder / "model.safetensors")
    for name, w in weights.named_weights(fastgen.load(folder, quantization="none")[1], CONFIG):
        assert torch.equal(w, expected[name]), name
    quantized = 0
    for name, w in weights.named_weights(fastgen.load(folder)[1], CONFIG):
        if isinstance(w, QuantizedWeight):
            quantized += 1
            if scheme != "FP8_BLOCK":
                assert torch.equal(w.data.view(torch.uint8), stored[name].view(torch.uint8))
                assert torch.equal(w.scale, stored[name + "_scale"].float().flatten().expand(len(w.scale)))
            else:
                torch.testing.assert_close(w.dequantize(torch.float32), expected[name].float(), rtol=2**-4, atol=2e-3)
        else:
            assert torch.equal(w, expected[name]), name
    assert quantized == len(MATMULS) - 4, "down of a layer, and q, k and v of the other"


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    """A saved fp8 model is read bit for bit here, and as the same weights by transformers."""
    quantized = weights.quantize_params(PARAMS, CONFIG)
    specs = weights.weight_specs(CONFIG, quantization="fp8", unquantized=["model.layers.1.mlp.up_proj.weight"])
    mixed = map_weights(lambda s, w, q: q if s.quantized else w, specs, PARAMS, quantized)
    for params in (quantized, mixed):
        fastgen.save(tmp_path, CONFIG, params, shard_bytes=200_000)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        config, loaded = fastgen.load(tmp_path)
        assert config == CONFIG
        assert_same(loaded, params)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
        )
        read = model.state_dict()
        for name, w in weights.named_weights(fastgen.load(tmp_path, quantization="none")[1], CONFIG):
            torch.testing.assert_close(w, read[name], rtol=2**-6, atol=0)  # some releases round scales to bfloat16
    fastgen.save(tmp_path, CONFIG, PARAMS)
    assert_same(fastgen.load(tmp_path)[1], PARAMS)


# --- other formats, written by their layouts --------------------------------------------------------------------------


def fine_grained(dtype: torch.dtype = torch.float32) -> tuple[Tensors, dict[str, Any]]:
    """Returns a checkpoint with scales of blocks, whole ones as transformers needs them, and its config."""
    tensors = dict(NAMED)
    for name in MATMULS:
        data, scale = to_blocks(NAMED[name], (16, 32))
        if dtype == torch.float8_e8m0fnu:
            scale = scale.log2().ceil().exp2()
            grid = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)
            data = (NAMED[name].float() / grid).to(E4M3)
        tensors |= {name: data, name + "_scale_inv": scale.to(dtype)}
    return tensors, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_fine_grained_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    """Blocks are dequantized as transformers does, and then have a scale for each row."""
    tensors, quantization = fine_grained(dtype)
    folder = write(tmp_path, tensors, quantization | {"modules_to_not_convert": ["lm_head"]})
    config, full = fastgen.load(folder, quantization="none")
    dequantize = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=dequantize
    )
    expected = model.state_dict()
    for name, w in weights.named_weights(full, config):
        assert torch.equal(w, expected[name]), name
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    for name, w in weights.named_weights(fastgen.load(folder)[1], config):
        if name in MATMULS:
            again = expected_requantized(tensors[name], tensors[name + "_scale_inv"], args)
            assert torch.equal(w.data.view(torch.uint8), again.data.view(torch.uint8))
            assert torch.equal(w.scale, again.scale)


def per_row() -> tuple[Tensors, Tensors]:
    """Returns a checkpoint with a scale [N, 1] for each row, and the weights that it stands for, in bfloat16."""
    tensors, expected = dict(NAMED), dict(NAMED)
    for name in MATMULS:
        data, scale = quantize_rows(NAMED[name])
        tensors |= {name: data, name + "_scale": scale[:, None]}
        expected[name] = (data.float() * scale[:, None]).bfloat16()
    return tensors, expected


def per_tensor() -> tuple[Tensors, Tensors]:
    """Returns a checkpoint with one scale for each tensor, and the weights that it stands for, in bfloat16."""
    tensors, expected = dict(NAMED), dict(NAMED)
    for name in MATMULS:
        scale = NAMED[name].float().abs().max() / 448
        data = (NAMED[name].float() / scale).to(E4M3)
        stem = name.removesuffix(".weight")
        tensors |= {name: data, name + "_scale": scale, stem + ".input_scale": torch.tensor(0.01)}
        expected[name] = (data.float() * scale).bfloat16()
    attention = "model.layers.0.self_attn"
    tensors |= {f"{attention}.{n}": torch.tensor(0.02) for n in ("k_proj.k_scale", "v_proj.v_scale", "k_scale")}
    return tensors, expected


FORMATS: dict[str, tuple[Callable[[], tuple[Tensors, Tensors]], dict[str, Any], bool]] = {
    "fbgemm_fp8": (per_row, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, False),
    "fp8 per tensor": (per_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, False),
    "modelopt": (per_tensor, {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}, False),
    "hf_quant_config": (
        per_tensor,
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
        True,
    ),
    "modelopt per row": (per_row, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_rows_and_tensors(name: str, tmp_path: Path) -> None:
    make, quantization, own_file = FORMATS[name]
    tensors, expected = make()
    folder = write(tmp_path, tensors, None if own_file else quantization)
    if own_file:
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    config, full = fastgen.load(folder, quantization="none")
    assert config == CONFIG
    for tensor_name, w in weights.named_weights(full, config):
        assert torch.equal(w, expected[tensor_name]), tensor_name
    for choice in ("auto", "fp8"):
        for tensor_name, w in weights.named_weights(fastgen.load(folder, quantization=choice)[1], config):
            if tensor_name in MATMULS:
                assert torch.equal(w.data.view(torch.uint8), tensors[tensor_name].view(torch.uint8))
                scale = tensors[tensor_name + "_scale"].flatten().expand(len(w.scale))
                assert torch.equal(w.scale, scale)
            else:
                assert torch.equal(w, expected[tensor_name])


def test_block_scales_of_modelopt(tmp_path: Path) -> None:
    """modelopt's grids of 128 x 128 blocks may have four dimensions."""
    tensors, expected = dict(NAMED), dict(NAMED)
    for name in MATMULS:
        data, scale = to_blocks(NAMED[name], (128, 128))
        tensors |= {name: data, name + "_scale": scale[:, None, :, None]}
        grid = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: data.shape[0], : data.shape[1]]
        expected[name] = (data.float() * grid).bfloat16()
    folder = write(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"})
    for name, w in weights.named_weights(fastgen.load(folder, quantization="none")[1], CONFIG):
        assert torch.equal(w, expected[name]), name


@pytest.mark.parametrize(
    "scheme", ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"]
)
def test_modelopt(scheme: str, tmp_path: Path) -> None:
    """Models exported by modelopt have the weights that its own dequantization returns."""
    quantization = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor

    fastgen.save(tmp_path / "full", CONFIG, PARAMS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    tokens = torch.arange(32).view(2, 16)
    quantization.quantize(model, getattr(quantization, scheme), lambda m: m(tokens))
    folder = tmp_path / "fp8"
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    stored, blocks = load_file(folder / "model.safetensors"), "BLOCKWISE" in scheme
    expected = {}
    for name in MATMULS:
        data, scale = stored[name], stored[name + "_scale"]
        scale = scale[:, 0, :, 0] if blocks else scale[:, None] if scale.ndim else scale
        options = {"scale": scale} | ({"block_sizes": {-1: 128, -2: 128}} if blocks else {})
        values = FP8QTensor(data.shape, torch.float32, data).dequantize(torch.float32, **options)
        expected[name] = values[: data.shape[0], : data.shape[1]].bfloat16()
        torch.testing.assert_close(expected[name], NAMED[name], rtol=2**-3, atol=5e-3)
    for own_file in (False, True):  # older exports have hf_quant_config.json alone
        for name, w in weights.named_weights(fastgen.load(folder, quantization="none")[1], CONFIG):
            assert torch.equal(w, expected.get(name, NAMED[name])), name
        for name, w in weights.named_weights(fastgen.load(folder)[1], CONFIG):
            assert isinstance(w, QuantizedWeight) == (name in MATMULS)
            if isinstance(w, QuantizedWeight) and not blocks:
                assert torch.equal(w.data.view(torch.uint8), stored[name].view(torch.uint8))
        if not own_file:
            del config["quantization_config"]
            (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stored", ["rows", "blocks"])
def test_a_rank_reads_its_shards(stored: str, tmp_path: Path) -> None:
    """Each rank of several reads its shard, with the scales of the full rows where the file has them."""
    if stored == "rows":
        folder = write(tmp_path, per_row()[0], FORMATS["fbgemm_fp8"][1])
    else:
        folder = write(tmp_path, *fine_grained())
    whole = fastgen.load(folder)[1]
    full = fastgen.load(folder, quantization="none")[1]
    for rank in range(2):
        shard = TPShard(rank, 2)
        loaded = fastgen.load(folder, tp_shard=shard)[1]
        assert_same(
            fastgen.load(folder, tp_shard=shard, quantization="none")[1], weights.shard_params(full, CONFIG, shard)
        )
        sharded = weights.shard_params(whole, CONFIG, shard)
        if stored == "rows":
            assert_same(loaded, sharded)
            continue
        for a, b in zip(loaded.layers, sharded.layers, strict=True):
            assert torch.equal(a.qkv.data.view(torch.uint8), b.qkv.data.view(torch.uint8)), "full rows"
            columns = b.down.dequantize(torch.float32)
            torch.testing.assert_close(a.down.dequantize(torch.float32), columns, rtol=2**-3, atol=1e-3)
            assert (a.down.scale <= b.down.scale).all() and (a.down.scale < b.down.scale).any(), "scales of the shard"


def test_head_and_embedding_are_dequantized(tmp_path: Path) -> None:
    tensors, expected = per_row()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        data, scale = quantize_rows(NAMED[name])
        tensors |= {name: data, name + "_scale": scale[:, None]}
        expected[name] = (data.float() * scale[:, None]).bfloat16()
    for tied in (False, True):  # a quantized head is not the embedding, whatever the config says
        folder = write(tmp_path, tensors, FORMATS["fbgemm_fp8"][1], tie_word_embeddings=tied)
        config, params = fastgen.load(folder)
        assert config == CONFIG
        assert torch.equal(params.embed, expected["model.embed_tokens.weight"])
        assert torch.equal(params.lm_head, expected["lm_head.weight"])


# --- refused ----------------------------------------------------------------------------------------------------------

CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def group(**changes: Any) -> dict[str, Any]:
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": FLOAT8 | changes}}}


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    *(({"quant_method": method}, method) for method in ("awq", "gptq", "bitsandbytes", "mxfp4", "quark", "torchao")),
    ({"bits": 4}, "unknown"),
    (group(num_bits=4), "float4"),
    (group(type="int"), "int8"),
    (group(symmetric=False), "asymmetric"),
    (group(strategy="attn_head"), "attn_head"),
    (group() | {"format": "pack-quantized"}, "pack-quantized"),
    (group() | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    (group() | {"quantization_status": "frozen"}, "frozen"),
    (group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (group() | {"sparsity_config": "sparse"}, "sparsity_config"),
    (group() | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ"}}, "W4A8_AWQ"),
]  # fmt: skip
DAMAGED: list[tuple[dict[str, Any], str]] = [
    (CT, "config_groups"),
    (CT | {"config_groups": [1]}, "config_groups"),
    (CT | {"config_groups": {"group_0": {"weights": 8}}}, "weights of config_groups"),
    (group(strategy="block", block_structure=[128]), "rows, columns"),
    (group(strategy="group", group_size=0), "rows, columns"),
    ({"quant_method": "fp8", "weight_block_size": "128"}, "rows, columns"),
    ({"quant_method": ["fp8"]}, "fp8"),
]


@pytest.mark.parametrize(("quantization", "what"), UNSUPPORTED + DAMAGED)
def test_unsupported_formats(quantization: dict[str, Any], what: str, tmp_path: Path) -> None:
    """The error names the file, what is not supported and what is, before a weight is read."""
    folder = write(tmp_path, {"a_scale": torch.zeros(1), "a": torch.zeros(1)}, quantization)
    with pytest.raises(ValueError, match=what) as error:
        fastgen.load(folder)
    assert str(folder / "config.json") in str(error.value)
    if (quantization, what) in UNSUPPORTED:
        assert "supported: compressed-tensors (float-quantized), fp8, fbgemm_fp8, modelopt" in str(error.value)
    with pytest.raises(ValueError, match=what):
        fastgen.from_hf_config(to_hf_config(CONFIG) | {"quantization_config": quantization})


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    name, fbgemm = "model.layers.0.mlp.down_proj.weight", FORMATS["fbgemm_fp8"][1]

    def message(changes: dict[str, Any], quantization: dict[str, Any] | None = fbgemm) -> str:
        tensors = per_row()[0] | changes
        folder = write(tmp_path, {n: t for n, t in tensors.items() if t is not None}, quantization)
        with pytest.raises(ValueError) as error:
            fastgen.load(folder)
        return str(error.value)

    assert f"{name} has dtype F8_E4M3, and there are no scales" in message({name + "_scale": None})
    assert f"{name}_scale has shape (3,)" in message({name + "_scale": torch.ones(3)})
    assert f"{name}_scale has shape (2, 3)" in message({name + "_scale": torch.ones(2, 3)}), "a block was not named"
    assert "has dtype I32, not F32, F16" in message({name + "_scale": torch.ones(160, dtype=torch.int32)})
    assert f"{name} has dtype F8_E5M2" in message({name: torch.zeros(160, 288, dtype=torch.float8_e5m2)})
    assert f"{name} has dtype I8" in message({name: torch.zeros(160, 288, dtype=torch.int8)})
    assert f"{name} has shape (160, 280), the config says (160, 288)" in message(
        {name: torch.zeros(160, 280, dtype=E4M3)}
    )
    assert f"unexpected: {name}_scale" in message({name: NAMED[name]}), "scales of a weight in bfloat16"
    assert "NaN or infinite" in message({name + "_scale": torch.full((160,), float("nan"))})
    assert "NaN or infinite" in message({name: torch.full((160, 288), float("nan")).to(E4M3)})
    assert "F8_E4M3" in (text := message({}, None)) and "quantization_config" in text
