"""Adapters under tensor parallelism equal those on one device. Ranks are threads or processes."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import ADAPTERS, CONFIGS, PARAMS, SPEC, SPECS, adapter, assert_same_output, random_requests, run
from test_tensor_parallel import Rank, ThreadBuffers, shard_params, together
from test_workers import no_leftover_ranks  # noqa: F401, an autouse fixture
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import Adapter, Output, SamplingParams, lora
from fastgen.core.attention import reference
from fastgen.core.model_config import TPShard, shard_config
from fastgen.core.scheduler import Span
from fastgen.core.transformer import TORCH_OPS, ModelOps, run_layers
from fastgen.distributed import peer_memory
from fastgen.distributed.tensor_parallel import TPGroup, shard_ops

SETTINGS: dict[str, Any] = {
    "page_size": 4, "cache_tokens": 256, "max_num_seqs": 8, "token_budget": 64, "max_adapters": 3, "max_rank": 8,
    "compile": "eager", "progress": False,
}  # fmt: skip


def double(x: Adapter) -> Adapter:
    """Returns an adapter with every b doubled."""
    return tree_map_only(Tensor, lambda t: 2 * t, x)


def final(
    params: fastgen.Params,
    spec: fastgen.ModelConfig,
    ops: ModelOps,
    adapters: fastgen.StackedAdapters,
    kv_heads: int,
    head: int,
) -> Tensor:
    """Returns the hidden states of the last tokens of three sequences, each under another adapter."""
    plan = (Span(0, 0, 9, True, (1, 2)), Span(1, 0, 5, True, (3,)), Span(2, 0, 7, True, (4,)))
    tokens = {i: [(7 * i + 3 * j) % 61 for j in range(span.stop)] for i, span in enumerate(plan)}
    batch = fastgen.build_batch(plan, tokens, 16)
    batch = batch._replace(adapter_idx=torch.tensor([1] * 9 + [0] * 5 + [2] * 7))
    cache = fastgen.new_kv_cache(spec, 80, dtype=torch.float32)
    assert cache.k[0].shape[1:] == (kv_heads, head)
    return ops.final_norm(
        *run_layers(params, cache, batch, spec, ops, adapters, last_token_only=True),
        params.final_norm,
        spec.rms_norm_eps,
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward(name: str, size: int) -> None:
    """Every family has the hidden states of one device, with biases and with fewer key heads than ranks."""
    spec = SPECS[name]
    params = fastgen.init(spec, dtype=torch.float32)
    adapters = [adapter(spec, "all"), adapter(spec, "some")]
    ops = TORCH_OPS._replace(attention=reference)
    want = final(params, spec, ops, lora.stack(adapters, spec), spec.num_kv_heads, spec.head_dim)
    assert not torch.allclose(
        want, final(params, spec, ops, lora.stack(adapters[::-1], spec), spec.num_kv_heads, spec.head_dim)
    )

    def one(rank: Rank) -> Tensor:
        local, mine = shard_config(spec, size), lora.stack(adapters, spec, rank.shard)
        over = shard_ops(ops, rank, spec)
        return final(
            shard_params(params, spec, rank.shard), local, over, mine, max(1, spec.num_kv_heads // size), spec.head_dim
        )

    for got in together(size, one):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize(("few", "many", "sums"), [(2, 0, [0, 0]), (64, 0, [5, 0]), (0, 64, [0, 4]), (4, 64, [2, 2])])
def test_changes_are_summed_with_what_they_change(
    few: int, many: int, sums: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low-rank terms are part of the partial sums in peer memory, whether those are read or pushed."""
    monkeypatch.setattr(peer_memory, "PUSH_CHUNK_ROWS", 8)
    adapters, ops = [ADAPTERS["all"], ADAPTERS["wide"]], TORCH_OPS._replace(attention=reference)
    want = final(PARAMS, SPEC, ops, lora.stack(adapters, SPEC), SPEC.num_kv_heads, SPEC.head_dim)

    def one(rank: Rank) -> tuple[Tensor, list[int]]:
        local, read = shard_config(SPEC, 2), ThreadBuffers(rank, SPEC.hidden_size, few, many)
        over, mine = shard_ops(ops, rank, SPEC, read), lora.stack(adapters, SPEC, rank.shard)
        hidden = final(shard_params(PARAMS, SPEC, rank.shard), local, over, mine, SPEC.num_kv_heads // 2, SPEC.head_dim)
        return hidden, [read.num_read, read.num_pushed]

    for got, done in together(2, one):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)
        assert done == sums


def test_shares() -> None:
    """The shards of an adapter are views that together are the adapter."""
    whole = ADAPTERS["all"]
    parts = [lora.shard_adapter(whole, SPEC, TPShard(rank, 2)) for rank in range(2)]
    first = whole.layers[1]
    assert first.out is not None and first.up is not None
    mine = [x.layers[1] for x in parts]
    assert torch.equal(torch.cat([x.out.a for x in mine], 1), first.out.a)  # type: ignore[union-attr]
    assert torch.equal(torch.cat([x.up.b for x in mine]), first.up.b)  # type: ignore[union-attr]
    assert all(x.up.a.data_ptr() == first.up.a.data_ptr() for x in mine)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="wanted"):
        lora.shard_adapter(parts[0], SPEC, TPShard(0, 2))


def calls(e: fastgen.Engine) -> list[Output]:
    """Makes all calls about adapters, with requests between them; returns the outputs."""
    for name, x in ADAPTERS.items():
        e.add_adapter(name, x)
    outputs = run(e, random_requests(1))
    with pytest.raises(ValueError, match="raise lora.max_adapters"):
        e.add_adapter("more", ADAPTERS["all"])
    e.update_adapter("some", double(ADAPTERS["some"]))
    outputs += run(e, random_requests(2))
    id = e.add([1, 2, 3], SamplingParams(adapter="wide", max_tokens=9))
    with pytest.raises(ValueError, match="used by"):
        e.remove_adapter("wide")
    with pytest.raises(ValueError, match="NaN or infinite"):
        e.update_adapter("all", tree_map_only(Tensor, lambda x: x / 0, ADAPTERS["all"]))
    with pytest.raises(ValueError, match="unknown adapter"):
        e.generate([[1]], SamplingParams(adapter="wied", max_tokens=1))
    e.abort(id)
    e.remove_adapter("wide")
    e.add_adapter("wide", ADAPTERS["all"], scale=0.5)
    outputs += run(e, random_requests(3))
    assert e.cache_stats.num_hit_tokens
    return outputs


def weights(group: TPGroup) -> fastgen.Params:
    return shard_params(PARAMS, SPEC, group.shard)


@pytest.fixture(scope="module")
def wanted() -> list[Output]:
    with fastgen.Engine(PARAMS, SPEC, **SETTINGS) as e:
        return calls(e)


def test_outputs(wanted: list[Output]) -> None:
    """Ranks that all make the calls, as a trainer's processes do, generate one device's outputs."""

    def one(rank: Rank) -> list[Output]:
        with fastgen.Engine(weights(rank), SPEC, tp_group=rank, **SETTINGS) as e:
            return calls(e)

    for outputs in together(2, one):
        for got, want in zip(outputs, wanted, strict=True):
            assert_same_output(got, want)


def test_changed_in_place() -> None:
    """Every rank changes its own views; a value that is not finite on one rank is an error on all."""
    with fastgen.Engine(PARAMS, SPEC, **SETTINGS) as e:
        e.add_adapter("all", double(ADAPTERS["all"]))
        wanted = run(e, [([1, 2, 3], {"max_tokens": 9, "temperature": 0}, "all")])

    def one(rank: Rank) -> list[Output]:
        with fastgen.Engine(weights(rank), SPEC, tp_group=rank, **SETTINGS) as e:
            views = e.add_adapter("all", ADAPTERS["all"])
            for x in lora.parameters(views):
                x.mul_(2)
            e.update_adapter("all")
            outputs = run(e, [([1, 2, 3], {"max_tokens": 9, "temperature": 0}, "all")])
            if rank.shard.rank:
                lora.parameters(views)[0].fill_(float("inf"))
            with pytest.raises(ValueError, match="NaN or infinite"):
                e.update_adapter("all")
            return outputs

    for (got,) in together(2, one):
        assert_same_output(got, wanted[0])


def test_processes(wanted: list[Output], tmp_path: Path) -> None:
    """The ranks that an engine starts make its calls, too; folders are loaded with the model."""
    with fastgen.Engine(PARAMS, SPEC, tensor_parallel=2, **SETTINGS) as e:
        for got, want in zip(calls(e), wanted, strict=True):
            assert_same_output(got, want)
        with pytest.raises(ValueError, match="give the tree"):
            e.update_adapter("all")
        with pytest.MonkeyPatch.context() as patch:  # wrong adapters are refused before anything is broadcast
            patch.setattr(e.ranks, "broadcast_call", None)
            wrong = ADAPTERS["all"]._replace(layers=ADAPTERS["all"].layers[:1])
            for change in (partial(e.add_adapter, "more"), partial(e.update_adapter, "all")):
                for tree in (wrong, ADAPTERS["all"]._replace(scale=math.nan)):
                    with pytest.raises(ValueError, match="adapter"):
                        change(tree)
    fastgen.save(tmp_path / "model", SPEC, PARAMS)
    lora.save(tmp_path / "wide", SPEC, ADAPTERS["wide"])
    settings = {k: v for k, v in SETTINGS.items() if k not in ("max_adapters", "max_rank")} | {"device": "cpu"}
    work = [([1, 2, 3], {"max_tokens": 9, "temperature": 0}, name) for name in ("wide", None)]
    outputs = []
    for size in (1, 2):
        with fastgen.Engine.from_pretrained(
            tmp_path / "model", adapters={"wide": tmp_path / "wide"}, tensor_parallel=size, **settings
        ) as e:
            outputs.append(run(e, work))
    for got, want in zip(*outputs, strict=True):
        assert_same_output(got, want)
    assert outputs[0][0].completions[0].token_ids != outputs[0][1].completions[0].token_ids
