"""fp8 parameters: quantized, loaded, initialized, updated, sharded and copied as walks over one tree."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgen
from fastgen import ModelConfig, Params
from fastgen.checkpoint import weights
from fastgen.core.model_config import TPShard
from fastgen.quantization import fp8
from fastgen.quantization.fp8 import QuantizedWeight, map_weights, quantize_rows, weight_leaves
from fastgen.training.sleep import ReleasableMemory

CONFIG = fastgen.from_hf_config(tiny.config("Qwen3", torch_dtype="bfloat16"))
MATMULS = "qkv", "out", "gate_up", "down"


@pytest.fixture(scope="module")
def params() -> Params:
    return tiny.weights(CONFIG)


@pytest.fixture(scope="module")
def folder(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    fastgen.save(folder, CONFIG, params)
    return folder


def as_bytes(params: Params) -> list[Tensor]:
    """Returns every tensor of a tree, values and scales of quantized weights too, as bytes."""
    return [x.contiguous().view(torch.uint8) for x in tree_leaves(params) if x is not None]


def assert_same(a: Params, b: Params) -> None:
    """Asserts that two trees have the same form and are equal bit for bit."""
    assert map_weights(type, a) == map_weights(type, b)
    for x, y in zip(as_bytes(a), as_bytes(b), strict=True):
        assert torch.equal(x, y)


def quantize(params: Params) -> Params:
    """Returns a tree with its matmuls quantized by the definition: amax / 448 of each row."""
    layers = []
    for layer in params.layers:
        layers.append(layer._replace(**{n: QuantizedWeight(*quantize_rows(getattr(layer, n))) for n in MATMULS}))
    return params._replace(layers=tuple(layers))


def test_quantize_params(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the matmuls are quantized row by row, whatever the chunks; everything else is shared."""
    monkeypatch.setattr(fp8, "CHUNK_VALUES", 100)  # three rows
    quantized = weights.quantize_params(params, CONFIG)
    assert_same(quantized, quantize(params))
    assert quantized.embed is params.embed and quantized.final_norm is params.final_norm
    for a, b in zip(quantized.layers, params.layers, strict=True):
        assert all(getattr(a, n) is getattr(b, n) for n in a._fields if n not in MATMULS)
    for layer, original in zip(quantized.layers, params.layers, strict=True):
        values = original.qkv.float()
        error = (layer.qkv.dequantize(torch.float32) - values).abs()
        half_step = values.abs().amax(1, keepdim=True) / 448 * 16.001  # of e4m3 between 256 and 448
        assert (error <= half_step).all()
        assert error.any()


def test_requantize_keeps_addresses(params: Params) -> None:
    source = map_weights(Tensor.clone, params)
    quantized = weights.quantize_params(source, CONFIG)
    addresses = [x.data_ptr() for x in tree_leaves(quantized) if x is not None]
    for w in weight_leaves(source):
        if w is not None:
            w.mul_(-3).add_(0.5)
    assert any(not torch.equal(a, b) for a, b in zip(as_bytes(quantized), as_bytes(quantize(source)), strict=True))
    weights.requantize(quantized, source)
    assert_same(quantized, quantize(source))
    assert [x.data_ptr() for x in tree_leaves(quantized) if x is not None] == addresses


def test_load_and_init(params: Params, folder: Path) -> None:
    config, loaded = fastgen.load(folder, quantization="fp8")
    assert config == CONFIG
    assert_same(loaded, quantize(params))
    for quantization in ("auto", "none"):
        assert_same(fastgen.load(folder, quantization=quantization)[1], params)
    assert_same(fastgen.init(CONFIG, 3, quantization="fp8"), quantize(fastgen.init(CONFIG, 3)))
    with pytest.raises(ValueError, match="quantization: unknown|unknown quantization"):
        fastgen.load(folder, quantization="int8")


def test_memory_of_parameters(folder: Path) -> None:
    """`param_bytes` are the bytes that the tensors take, and half of those of bfloat16, for the matmuls."""
    regions = []

    def allocate(num_bytes: int) -> ReleasableMemory:
        regions.append(ReleasableMemory(num_bytes, torch.device("cpu")))
        return regions[-1]

    _, loaded = fastgen.load(folder, quantization="fp8", allocate=allocate)
    (region,) = regions
    assert region.nbytes == weights.param_bytes(CONFIG, torch.bfloat16, quantization="fp8")
    with pytest.raises(ValueError, match="bytes left"):
        region.allocate((1,), torch.uint8)
    begin = region._buffer.data_ptr()
    assert all(begin <= x.data_ptr() < begin + region.nbytes for x in tree_leaves(loaded) if x is not None)
    memory = ReleasableMemory(region.nbytes, torch.device("cpu"))
    fastgen.init(CONFIG, memory=memory, quantization="fp8")
    assert memory._allocated_bytes == memory.nbytes


class PeakMemory:
    """Measures the largest number of bytes that torch's CPU allocator held at once inside the context."""

    def __enter__(self) -> "PeakMemory":
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True, with_stack=False
        )
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = self.nbytes = 0
        for _, change in changes:
            held += change
            self.nbytes = max(self.nbytes, held)


@pytest.mark.parametrize("how", ["load", "init"])
def test_peak_memory(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and initializing need memory for the fp8 model and one weight, not for the model in bfloat16."""
    config = fastgen.from_hf_config(
        tiny.config(hidden_size=256, intermediate_size=512, num_hidden_layers=3, torch_dtype="bfloat16")
    )
    monkeypatch.setattr(fp8, "CHUNK_VALUES", 2**13)
    fastgen.save(tmp_path, config, fastgen.init(config))
    with PeakMemory() as peak:
        if how == "load":
            loaded = fastgen.load(tmp_path, device="cpu", quantization="fp8")[1]
        else:
            loaded = fastgen.init(config, device="cpu", quantization="fp8")
    fp8_bytes = weights.param_bytes(config, torch.bfloat16, quantization="fp8")
    leaf = max(2 * w.shape.numel() for w in weight_leaves(loaded) if w is not None)
    full = weights.param_bytes(config, torch.bfloat16)
    mapped = (tmp_path / "model.safetensors").stat().st_size if how == "load" else 0
    assert 0.8 * fp8_bytes < peak.nbytes - mapped < fp8_bytes + leaf + 2**17 < full


def test_update_quantizes(params: Params) -> None:
    """An update of a quantized model takes any float dtype; one with a quantized model copies bits."""
    quantized = weights.quantize_params(map_weights(Tensor.clone, params), CONFIG)
    others = tiny.weights(CONFIG, seed=5)
    named = [(name, w.double()) for name, w in weights.named_weights(others, CONFIG)]
    weights.check_update(quantized, CONFIG, named)
    weights.update(quantized, CONFIG, named)
    assert_same(quantized, quantize(others))
    target = map_weights(Tensor.clone, params)
    weights.copy_params(target, quantized)  # dequantizes
    assert torch.equal(target.layers[0].down, quantized.layers[0].down.dequantize(torch.bfloat16))
    again = weights.quantize_params(map_weights(Tensor.clone, params), CONFIG)
    pairs = list(weights.named_weights(quantized, CONFIG))
    weights.check_update(again, CONFIG, pairs)
    weights.update(again, CONFIG, pairs)
    assert_same(again, quantized)
    copied = weights.quantize_params(map_weights(Tensor.clone, params), CONFIG)
    weights.copy_params(copied, quantized)
    assert_same(copied, quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float, params: Params, folder: Path, tmp_path: Path) -> None:
    broken = map_weights(Tensor.clone, params)
    broken.layers[1].down[3, 5] = value
    quantized, name = weights.quantize_params(params, CONFIG), "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=name):
        weights.check_update(quantized, CONFIG, list(weights.named_weights(broken, CONFIG)))
    with pytest.raises(ValueError, match=name):
        weights.check_update(quantized, CONFIG, list(weights.named_weights(quantize(broken), CONFIG)))
    fastgen.save(tmp_path, CONFIG, broken)
    with pytest.raises(ValueError, match=name):
        fastgen.load(tmp_path, quantization="fp8")
    fastgen.load(tmp_path, quantization="fp8", check_finite=False)


def test_other_models_parameters(params: Params) -> None:
    quantized = weights.quantize_params(params, CONFIG)
    wrong = quantized._replace(embed=QuantizedWeight(*quantize_rows(params.embed)))
    with pytest.raises(ValueError, match="QuantizedWeight instead of a tensor, for model.embed_tokens"):
        list(weights.named_weights(wrong, CONFIG))
    with pytest.raises(ValueError, match="is declared"):
        layer = quantized.layers[0]._replace(out=quantized.layers[0].out.rows(0, 5))
        list(weights.named_weights(quantized._replace(layers=(layer, quantized.layers[1])), CONFIG))
    larger = fastgen.from_hf_config(tiny.config("Qwen3", intermediate_size=64))
    with pytest.raises(ValueError, match="another model's"):
        weights.quantize_params(params, larger)


def gather(shards: list[Params], config: ModelConfig) -> dict[str, Tensor]:
    """Returns the dequantized weights of the ranks' shards, put together by name."""
    result = {}
    views = [list(weights._param_views(p, config, TPShard(rank, len(shards)))) for rank, p in enumerate(shards)]
    for parts in zip(*views, strict=True):
        name, full = parts[0][0].name, torch.zeros(parts[0][0].full_shape)
        for tensor, view in parts:
            values = view if isinstance(view, Tensor) else view.dequantize(torch.float32)
            full[tuple(d.slice for d in tensor.dim_shards)] = values[: tensor.dim_shards[0].size].float()
        result[name] = full
    return result


def test_tensor_parallel_shards(params: Params, folder: Path) -> None:
    """Shards of full-precision weights have scales of their own; shards of quantized weights keep the full rows'."""
    ranks = [TPShard(rank, 2) for rank in range(2)]
    by_load = [fastgen.load(folder, quantization="fp8", tp_shard=r)[1] for r in ranks]
    by_copy = [weights.shard_params(params, CONFIG, r, "fp8") for r in ranks]
    by_quantize = [weights.quantize_params(weights.shard_params(params, CONFIG, r), CONFIG, tp_shard=r) for r in ranks]
    for a, b, c in zip(by_load, by_copy, by_quantize, strict=True):
        assert_same(a, b)
        assert_same(a, c)
    quantized = weights.quantize_params(params, CONFIG)
    shards = [weights.shard_params(quantized, CONFIG, r, "fp8") for r in ranks]
    expected = {
        name: w.float() if isinstance(w, Tensor) else w.dequantize(torch.float32)
        for name, w in weights.named_weights(quantized, CONFIG)
    }
    gathered = gather(shards, CONFIG)
    assert gathered.keys() == expected.keys()
    for name, w in gathered.items():
        assert torch.equal(w, expected[name]), name
    down = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(gather(by_load, CONFIG)[down], expected[down]), "each rank has scales of its columns"
    for rank, p in zip(ranks, by_load, strict=True):
        columns = slice(rank.rank * 24, rank.rank * 24 + 24)
        assert torch.equal(p.layers[0].down.scale, quantize_rows(params.layers[0].down[:, columns])[1])
    for r in ranks:
        _, initialized = CONFIG, fastgen.init(CONFIG, 4, tp_shard=r, quantization="fp8")
        assert_same(initialized, weights.shard_params(fastgen.init(CONFIG, 4), CONFIG, r, "fp8"))


def test_a_layer_that_is_not_quantized(params: Params) -> None:
    """A tree may have matmuls in both formats; a packed one is quantized if none of its parts is excluded."""
    names = {"model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    specs = weights.weight_specs(CONFIG, quantization="fp8", unquantized=names)
    quantized = [[n for n in MATMULS if getattr(layer, n).quantized] for layer in specs.layers]
    assert quantized == [["out", "gate_up", "down"], ["qkv", "out", "gate_up"]]
    mixed = weights._allocate(specs, torch.bfloat16, None)
    weights.update(mixed, CONFIG, weights.named_weights(params, CONFIG))
    for layer, mixed_layer, expected in zip(quantize(params).layers, mixed.layers, quantized, strict=True):
        for n in MATMULS:
            assert isinstance(getattr(mixed_layer, n), QuantizedWeight) == (n in expected)
            if n in expected:
                assert torch.equal(getattr(mixed_layer, n).scale, getattr(layer, n).scale)
    shard = weights.shard_params(mixed, CONFIG, TPShard(1, 2))
    assert map_weights(type, shard) == map_weights(type, mixed)


def test_tree_functions(params: Params) -> None:
    quantized = weights.quantize_params(params, CONFIG)
    assert fp8.is_quantized(quantized) and not fp8.is_quantized(params)
    assert len(weight_leaves(quantized)) == len(tree_leaves(params))
    moved = tree_map_only(Tensor, Tensor.clone, quantized)
    assert_same(moved, quantized)
    assert quantized.layers[0].qkv.nbytes == params.layers[0].qkv.numel() + 4 * len(params.layers[0].qkv)
