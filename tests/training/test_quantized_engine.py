"""Engines in fp8: beside a trainer's parameters, from checkpoints, over ranks, and asleep."""

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer import CONFIG, GREEDY, PROMPTS, clone, engine, finish, generate, new_params, tokens_and_logprobs
from transformers import PreTrainedModel

import fastgen
from fastgen import Params, lora
from fastgen.checkpoint import weights
from fastgen.config import LoraConfig
from fastgen.core.model_config import TPShard
from fastgen.core.scheduler import Span
from fastgen.core.transformer import TORCH_OPS, ModelOps
from fastgen.distributed import workers
from fastgen.kernels import fp8_matmul
from fastgen.kernels.batch_invariant import batch_invariant_ops, verify_batch_invariance
from fastgen.kernels.select import check_fp8_gpu, check_fp8_sizes
from fastgen.lora import AdapterManager
from fastgen.quantization.fp8 import QuantizedRows, QuantizedWeight, is_quantized, map_weights, weight_leaves
from fastgen.quantization.ops import quantized_ops
from fastgen.training import weight_sync
from fastgen.training.grpo import Trainer
from fastgen.training.problems import load_problem

pytestmark = pytest.mark.filterwarnings("default")
FP8: dict[str, Any] = {"quantization": "fp8"}


def quantize(params: Params) -> Params:
    return weights.quantize_params(params, CONFIG)


def generate_quantized(params: Params) -> list[Any]:
    """Returns what a new engine generates with the parameters quantized now, in memory of their own."""
    with engine(quantize(clone(params))) as e:
        return generate(e)


def assert_same(a: Params, b: Params) -> None:
    """Asserts that two trees have the same form and are equal bit for bit."""
    assert map_weights(type, a) == map_weights(type, b)
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert x is y is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def addresses(params: Params) -> list[int]:
    return [w.data_ptr() for w in tree_leaves(params) if w is not None]


def test_parameters_in_full_precision_have_fp8_copies() -> None:
    params = new_params()
    before = clone(params)
    with engine(params, **FP8) as e, engine(params) as plain:
        assert generate(e) == generate_quantized(params) != generate(plain)
        assert_same(e.params, quantize(params))
        assert e.source_params is params and plain.source_params is plain.params is params
        assert e.params.embed is params.embed
        assert e.config.quantization.weights == "fp8" and plain.config.quantization.weights == "none"
        usage, full = e._memory_usage(), plain._memory_usage()
        assert usage["params"] == sum(w.nbytes for w in weight_leaves(e.params) if w is not None) < full["params"] / 2
        matmuls = (getattr(layer, n) for layer in params.layers for n in ("qkv", "out", "gate_up", "down"))
        assert usage["source params"] == sum(w.nbytes for w in matmuls)
        assert re.search(r"weights +0.0 GB fp8 and float32, copies of 0.0 GB float32 on", e.summary())
    assert_same(params, before)
    with engine(quantize(params)) as e:
        assert e.shadow is None and "source params" not in e._memory_usage()
        assert "fp8 and float32 on" in e.summary()
    with pytest.raises(ValueError, match="quantization=none, but these parameters are quantized: load them with"):
        engine(quantize(params), quantization="none")


def test_forward_takes_quantized_weights() -> None:
    """The plain ops compute with quantized weights, too; other functions say what they would take."""
    with engine(quantize(new_params()), compile="eager") as e:
        e.add(PROMPTS[2], GREEDY)
        e.step()
        arguments: Any = e.params, e.cache, e.last_batch, CONFIG
        logits = fastgen.forward(*arguments)
        assert torch.equal(logits, fastgen.forward(*arguments, ops=e.runner.ops)) or e.device.type == "cuda"
        with pytest.raises(TypeError, match=r"mm does not take a QuantizedWeight: .*dequantize"):
            torch.mm(logits, e.params.layers[0].down)  # type: ignore[arg-type]


class KernelsWithoutGemm(fp8_matmul.QuantizedLinear):
    """The kernels of a GPU, in the interpreter, with a plain matmul for many rows."""

    def many_rows(self, x: QuantizedRows, w: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
        y = x.data.float() @ w.data.float().T * x.scale[:, None] * w.scale
        y = (y if bias is None else y + bias).to(self.dtype)
        return y if out is None else out.copy_(y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted, the kernels compute with fp32 activations")
@pytest.mark.parametrize("unquantized", [None, "gate_up", "down"])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_kernels_in_a_forward(unquantized: str | None, with_adapter: bool) -> None:
    """A forward by the kernels is that by the plain ops: with biases, adapters, and layers in full precision."""
    full, num_tokens = new_params(), 18 if unquantized == "down" else 5  # many rows, or few
    params, adapters = quantize(full), None
    if unquantized is not None:
        layer = params.layers[0]._replace(**{unquantized: getattr(full.layers[0], unquantized)})
        params = params._replace(layers=(layer, *params.layers[1:]))
    batch = fastgen.build_batch((Span(0, 0, num_tokens, True, (1, 2)),), {0: PROMPTS[2]}, 16, torch.device("cpu"))
    batch = batch._replace(logits_indices=torch.arange(num_tokens))
    merged = full
    if with_adapter:
        adapter = tree_map_only(Tensor, lambda x: torch.randn_like(x) * 0.5, lora.init(CONFIG, rank=4))
        config = LoraConfig(max_adapters=1, max_rank=4)
        manager = AdapterManager(CONFIG, config, torch.device("cpu"), torch.float32, None)
        manager.add("one", adapter)
        adapters, merged = manager.adapters, lora.merge(full, CONFIG, adapter)
        batch = batch._replace(adapter_idx=torch.ones(num_tokens, dtype=torch.int32))

    def logits(params: Params, ops: ModelOps = TORCH_OPS, adapters: Any = None) -> Tensor:
        shape = 48, CONFIG.num_kv_heads, CONFIG.head_dim
        cache = fastgen.KVCache(*(tuple(torch.zeros(shape) for _ in params.layers) for _ in "kv"))
        return fastgen.forward(params, cache, batch, CONFIG, ops=ops, adapters=adapters)

    linear = KernelsWithoutGemm(torch.device("cpu"), torch.float32)
    ops = quantized_ops(TORCH_OPS, params, linear, fp8_matmul.add_norm_quantize, fp8_matmul.swiglu_quantize)
    plain = logits(params, quantized_ops(TORCH_OPS, params), adapters)
    difference, rounding = logits(params, ops, adapters) - plain, plain - logits(merged)
    assert 0 < rounding.abs().mean() < 0.2 * plain.abs().mean()
    # Another order of a sum may round a value to the other neighbor, which changes those that follow.
    assert difference.abs().mean() < 0.1 * rounding.abs().mean()


def test_matmuls_that_a_gpu_does_not_have() -> None:
    params = quantize(new_params())
    with pytest.raises(
        ValueError, match=r"weights need a GPU .*capability 8.9 or later, and this one has 8.0: set off"
    ):
        check_fp8_gpu((8, 0), "weights", "off")
    check_fp8_gpu((9, 0), "weights", "off")
    check_fp8_sizes(params)
    layer = params.layers[1]._replace(down=params.layers[1].down.map(lambda x: x[:24]))
    with pytest.raises(ValueError, match=r"multiples of 16, and down is \(24, 48\): set quantization=none"):
        check_fp8_sizes(params._replace(layers=(params.layers[0], layer)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes with the ops of a CPU")
def test_batch_invariance_is_verified_in_every_format() -> None:
    """A later layer may be in fp8 where the first is not."""
    params, quantized = new_params(), quantize(new_params())
    mixed = params._replace(layers=(params.layers[0], quantized.layers[1]))
    ops = quantized_ops(batch_invariant_ops("cpu"), mixed)
    verify_batch_invariance(mixed, ops)

    def linear(x: Tensor, w: Any, *args: Any) -> Tensor:
        return ops.linear(x, w, *args) + (len(x) if isinstance(w, QuantizedWeight) else 0)

    with pytest.raises(RuntimeError, match=r"the matmul by qkv \(64, 32\) in fp8 has other bits for 1 rows"):
        verify_batch_invariance(mixed, ops._replace(linear=linear))


def test_an_optimizers_step_is_the_update(model: PreTrainedModel) -> None:
    """After each step of the optimizer the copies are made anew, at their addresses."""
    _, params = fastgen.adopt(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with engine(params, **FP8) as e:
        before, previous = addresses(e.params), [generate(e)]
        for i in range(3):
            optimizer.zero_grad()
            batch = torch.tensor([PROMPTS[2]])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            if i == 1:
                with torch.no_grad():  # a scorer may be the first to see the change
                    score = e.score(PROMPTS[1:3])
                    expected = fastgen.score(quantize(params), CONFIG, PROMPTS[1:3])
                assert all(torch.equal(a, b) for a, b in zip(score, expected, strict=True))
            outputs = e.generate(PROMPTS, GREEDY)
            assert all(c.weight_versions == [i + 1] * 12 for o in outputs for c in o.completions)
            assert not any(o.num_cached_tokens for o in outputs)
            previous.append(tokens_and_logprobs(outputs))
            assert previous[-1] not in previous[:-1]
            assert previous[-1] == generate_quantized(params)
            assert_same(e.params, quantize(params))
        model.lm_head.weight.data.mul_(2)  # torch does not see these writes
        params.layers[0].down.data.mul_(2)
        e.params_changed()
        assert generate(e) == generate_quantized(params)
        assert addresses(e.params) == before
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with pytest.raises(ValueError, match="no longer share"):
            e.generate(PROMPTS, GREEDY)


def test_updates_are_quantized() -> None:
    """`update_params` writes fp8 weights, or the parameters that they are copies of."""
    others = new_params(5)
    named = list(weights.named_weights(others, CONFIG))
    loaded, params = quantize(new_params()), new_params()
    with engine(loaded) as own, engine(params, **FP8) as shadowed:
        for e in (own, shadowed):
            before, read = generate(e), addresses(e.params)
            for source in (others, named, iter(named), dict(named)):
                e.update_params(new_params())
                assert generate(e) == before
                e.update_params(source)
                assert_same(e.params, quantize(others))
            assert generate(e) == generate_quantized(others)
            assert addresses(e.params) == read
        assert_same(params, others)
        partial = [("model.layers.0.mlp.down_proj.weight", torch.ones(32, 48))]
        for e in (own, shadowed):
            e.update_params(partial, partial=True)
            assert torch.equal(e.params.layers[0].down.dequantize(torch.float32), torch.ones(32, 48))
            version = e.weight_version
            with pytest.raises(ValueError, match="NaN or infinite"):
                e.update_params([(partial[0][0], partial[0][1] * torch.inf)], partial=True)
            assert e.weight_version == version and torch.isfinite(e.params.layers[0].down.scale).all()
        own.update_params(quantize(new_params()))
        assert_same(own.params, quantize(new_params()))
        shadowed.update_params(quantize(new_params()))
        assert torch.equal(params.layers[0].down, own.params.layers[0].down.dequantize(torch.float32))


def test_sleep_and_wake_up(tmp_path: Path) -> None:
    """The copies' memory is released and comes back; a change of the parameters meanwhile is seen afterwards."""
    fastgen.save(tmp_path, CONFIG, new_params())
    params = new_params()
    loaded = fastgen.Engine.from_pretrained(tmp_path, progress=False, cache_tokens=1024, page_size=16, **FP8)
    with loaded, engine(params, **FP8) as shadowed:
        assert loaded.memory.regions["params"].nbytes == weights.param_bytes(CONFIG, torch.float32, quantization="fp8")
        for e in (loaded, shadowed):
            before, read = generate(e), addresses(e.params)
            assert before == generate_quantized(new_params())
            assert e.sleep() >= e.memory.regions["params"].nbytes > 0
            assert e.memory.regions["params"]._buffer.untyped_storage().nbytes() == 0
            with pytest.raises(ValueError, match="wake_up"):
                e.score(PROMPTS[1:2])
            e.wake_up()
            assert generate(e) == before
            assert addresses(e.params) == read or e.device.type == "cpu"
        shadowed.sleep("params")
        with torch.no_grad():
            params.layers[0].gate_up.mul_(1.5)
        shadowed.wake_up()
        assert generate(shadowed) == generate_quantized(params)


def test_random_weights(tmp_path: Path) -> None:
    fastgen.save(tmp_path, CONFIG, new_params())
    options: dict[str, Any] = {"progress": False, "cache_tokens": 256, "random_weights": True, "random_seed": 3}
    with fastgen.Engine.from_pretrained(tmp_path, **options, **FP8) as e:
        assert_same(e.params, quantize(fastgen.init(CONFIG, 3, device="cpu", dtype=torch.float32)))
    with fastgen.Engine.from_pretrained(tmp_path, **options) as e:
        assert not is_quantized(e.params)


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    _, params = fastgen.adopt(model)
    with engine(params, **FP8) as e:
        with pytest.raises(ValueError, match="gradients do not pass through fp8 weights.*no_grad"):
            e.score(PROMPTS[1:2])
        assert fastgen.score(params, CONFIG, PROMPTS[1:2])[0].requires_grad
        outputs = e.generate(PROMPTS, GREEDY)
        with torch.no_grad():
            mismatch = fastgen.compare_logprobs(outputs, e.params, CONFIG)
            full = fastgen.compare_logprobs(outputs, params, CONFIG)
        assert mismatch.max_abs_diff < 1e-3 < full.max_abs_diff
    with engine(quantize(new_params())) as e, pytest.raises(ValueError, match="grpo: gradients do not pass.*full prec"):
        Trainer(e, load_problem("addition"))


def test_snapshots_belong_to_the_weights() -> None:
    """Pages of a snapshot are used by an engine with the same fp8 weights, and not after a change."""
    params = new_params()
    with engine(params, **FP8) as e:
        request = e.add(PROMPTS[2], GREEDY)
        for _ in range(6):
            e.step()
        snapshot = e.snapshot(request, include_pages=True)
        with engine(quantize(clone(params))) as other:
            other.restore(snapshot)
            (output,) = finish(other).values()
            assert output.num_cached_tokens > 0
        assert output.completions[0].token_ids == finish(e)[request].completions[0].token_ids
        with torch.no_grad():
            params.layers[0].down.mul_(2)
        new = e.restore(snapshot)
        assert finish(e)[new].num_cached_tokens == 0


def test_tensor_parallel(tmp_path: Path) -> None:
    """Ranks have the shards of quantized parameters, or quantize their own; updates reach them."""
    full = ranks.weights()
    quantized = weights.quantize_params(full, ranks.SPEC)
    prompts = ranks.load(1, 4)
    fastgen.save(tmp_path, ranks.SPEC, quantized)

    def results(e: fastgen.Engine) -> list[Any]:
        return ranks.tokens(e.generate(*prompts, progress=False))

    load = workers.shard_loader(full, ranks.SPEC, None, 2, "fp8")
    own_scales = [weights.shard_params(full, ranks.SPEC, TPShard(rank, 2), "fp8") for rank in range(2)]
    for rank in range(2):
        assert_same(load(TPShard(rank, 2), "cpu")[1], own_scales[rank])
    settings = ranks.SETTINGS | {"tensor_parallel": 2, "dtype": "float32"}
    with fastgen.Engine.from_pretrained(tmp_path, **settings) as e:
        full_rows = weights.shard_params(quantized, ranks.SPEC, TPShard(0, 2))
        assert_same(e.params, full_rows)
        assert e.config.quantization.weights == "fp8"
        first = results(e)
        e.update_params(full)
        assert_same(e.params, own_scales[0])
        assert results(e) != first
        e.update_params(quantized)  # sent as values and scales
        assert_same(e.params, full_rows)
        assert results(e) == first
        scores = e.score(prompts[0])
    with torch.no_grad():
        one_rank = fastgen.score(quantized, ranks.SPEC, prompts[0])
    difference = max(float((a - b).abs().max()) for a, b in zip(scores, one_rank, strict=True))
    assert difference < 1, "activations are quantized shard by shard"


def test_quantized_weights_are_sent(single_rank_group: None) -> None:
    named = list(weights.named_weights(quantize(new_params()), CONFIG))
    received = dict(weight_sync.broadcast_weights(named, bucket_bytes=3000))
    staged = dict(weight_sync.stage_named_tensors(named))
    for name, w in named:
        for copy in (received[name], staged[name]):
            assert type(copy) is type(w), name
            for a, b in zip(tree_leaves(copy), tree_leaves(w), strict=True):
                assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
        if isinstance(w, QuantizedWeight):
            assert staged[name].data.data_ptr() != w.data.data_ptr()
    with pytest.raises(ValueError, match="CUDA IPC is for a GPU"):
        weight_sync.cuda_ipc_handles(named)


@pytest.fixture
def single_rank_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_close_frees_the_copies() -> None:
    params = new_params()
    e = engine(params, **FP8)
    copy = e.params.layers[0].qkv.data
    e.close()
    assert e.shadow is None
    gc.collect()
    assert copy.untyped_storage().nbytes() > 0  # the caller's view keeps it
    assert isinstance(params.layers[0].qkv, Tensor)
