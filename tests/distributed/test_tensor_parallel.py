"""Tensor parallelism: the same logits, tokens and plans as on one rank. Ranks are threads that meet at a barrier."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ranks import MAX_PROGRAMS, SETTINGS, SPEC, load, run_all_reduce_kernel
from ranks import weights as weights_of
from test_transformer import CASES, PAGE, build, empty, prompt
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastgen
from fastgen import SamplingParams, SamplingTensors
from fastgen.checkpoint import files
from fastgen.checkpoint.weights import named_weights, update
from fastgen.core import sampling, scheduler
from fastgen.core.attention import reference
from fastgen.core.layers import rms_norm
from fastgen.core.model_config import ModelConfig, TPShard, shard_config
from fastgen.core.scheduler import SchedulerOutput, Span
from fastgen.core.transformer import TORCH_OPS, run_layers
from fastgen.core.types import PartialSum
from fastgen.distributed import peer_memory, tensor_parallel
from fastgen.distributed.tensor_parallel import TPGroup, TPProcessGroup, raise_if_inconsistent, shard_ops, step_digest
from fastgen.quantization.kv_cache import fp8_row_bytes


class Meeting:
    """Barrier and exchanged values of the threads."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=120), [None] * size


class Rank(TPGroup):
    """A TPGroup whose ranks are threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.shard, self.steps = meeting, TPShard(rank, meeting.size), 0

    def _all(self, x: Any) -> list[Any]:
        m = self.meeting
        m.values[self.shard.rank] = x
        m.barrier.wait()
        values = [*m.values]
        m.barrier.wait()
        return values

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._all(x.clone())).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x))

    def all_reduce_min(self, n: int) -> int:
        return min(self._all(n))

    def check_step(self, step: int, scheduled: SchedulerOutput, last_token_ids: Sequence[int]) -> None:
        self.steps += 1
        raise_if_inconsistent(self.shard.rank, step, self._all(step_digest(scheduled, last_token_ids)))


class ThreadBuffers(peer_memory.PeerBuffers):
    """Buffers of a rank that is a thread: all-reduces of up to `read_rows` rows are read, up to `push_rows` pushed."""

    def __init__(self, rank: Rank, hidden_size: int, read_rows: int, push_rows: int) -> None:
        self.thread, self.num_read, self.num_pushed, self._push_max_rows = rank, 0, 0, push_rows
        self._partials = [torch.zeros(read_rows, hidden_size) for _ in range(3)]
        local = [torch.zeros(push_rows, hidden_size) for _ in range(2)]
        remote = rank._all(local)[1 - rank.shard.rank]
        self._push_buffers = [*zip(local, remote, strict=True)]
        self._rank_ptrs = [torch.tensor([i]) for i in range(5)]  # the number of the buffer

    def _push(self, local: Tensor, remote: Tensor) -> None:
        remote.copy_(local)

    def _wait_for_push(self) -> None: ...

    def all_reduce_add_norm(self, x: Tensor, y: PartialSum, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert y.rank_ptrs is not None
        i = int(y.rank_ptrs)
        ranks = self.thread._all((i, len(x), y.local))
        assert {(j, rows) for j, rows, _ in ranks} == {(i, len(x))}
        if i < 3:
            self.num_read += 1
            total = sum(partial for *_, partial in ranks)
        else:
            self.num_pushed += 1
            total = y.local + self._push_buffers[i - 3][0][: len(x)]
        self.thread._all(None)  # all threads have read: partial sums may be written from now on
        return x + total, rms_norm(x + total, norm, eps)


def together(size: int, run: Callable[[Rank], Any]) -> list[Any]:
    """Returns the results of all ranks' threads; an error of one thread ends the others' waiting."""
    meeting = Meeting(size)

    def guarded(rank: int) -> Any:
        try:
            with torch.no_grad():
                return run(Rank(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [e for f in futures if (e := f.exception()) and not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise errors[0]
        return [f.result() for f in futures]


def shard_params(params: fastgen.Params, spec: ModelConfig, tp_shard: TPShard) -> fastgen.Params:
    """Returns a rank's shard of parameters."""
    local = fastgen.init(spec, dtype=torch.float32, tp_shard=tp_shard)
    update(local, spec, named_weights(params, spec), tp_shard=tp_shard)
    return local


DIVISIBLE = [(name, n) for name, (_, q, kv, *_) in CASES.items() for n in (2, 4)
             if not (q % n or (kv % n and n % kv))]  # fmt: skip


@pytest.mark.parametrize(("name", "size"), DIVISIBLE)
def test_logits(name: str, size: int) -> None:
    """Every rank has one rank's logits: all families, tied or not, fewer KV heads than ranks, an odd vocabulary."""
    _, spec, params = build(name)
    tokens = {0: prompt(30, 1), 1: prompt(9, 2)}
    plan = (Span(0, 0, 30, True, tuple(range(20, 12, -1))), Span(1, 0, 9, True, (1, 22, 2)))
    batch = fastgen.build_batch(plan, tokens, PAGE)
    expected = fastgen.forward(params, empty(spec, 23), batch, spec, reference)

    def run(rank: Rank) -> Tensor:
        local, ops = shard_config(spec, size), shard_ops(TORCH_OPS, rank, spec)
        return fastgen.forward(shard_params(params, spec, rank.shard), empty(local, 23), batch, local, reference, ops)

    for actual in together(size, run):
        torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("read_rows", "push_rows", "num_sums"),
    [(4, 0, [2, 0]), (64, 0, [5, 0]), (0, 64, [0, 4]), (4, 64, [2, 2]), (0, 38, [0, 2])],
)
@pytest.mark.parametrize("bias", [False, True])
def test_peer_memory(
    read_rows: int, push_rows: int, num_sums: list[int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums that fit are read or pushed, others all-reduced by the group; a bias is added once."""
    monkeypatch.setattr(peer_memory, "PUSH_CHUNK_ROWS", 16)
    spec = replace(SPEC, num_layers=2, sliding_windows=SPEC.sliding_windows * 2)
    params = tree_map(lambda x: x if x is None or x.ndim == 1 else x * 15, fastgen.init(spec, dtype=torch.float32))
    full = params
    if bias:
        layers = tuple(x._replace(out_bias=torch.randn(32)) for x in params.layers)
        params = params._replace(layers=layers)
    plan = (Span(0, 0, 30, True, tuple(range(20, 12, -1))), Span(1, 0, 9, True, (1, 22, 2)))
    batch = fastgen.build_batch(plan, {0: prompt(30, 1), 1: prompt(9, 2)}, PAGE)
    ops = TORCH_OPS._replace(attention=reference)
    expected = run_layers(params, empty(spec, 23), batch, spec, ops, last_token_only=True)
    expected = ops.final_norm(*expected, params.final_norm, spec.rms_norm_eps)

    def run(rank: Rank) -> tuple[Tensor, list[int]]:
        local, buffers = shard_config(spec, 2), ThreadBuffers(rank, spec.hidden_size, read_rows, push_rows)
        local_params = shard_params(full, spec, rank.shard)
        local_params = local_params._replace(layers=tuple(
            a._replace(out_bias=b.out_bias) for a, b in zip(local_params.layers, params.layers, strict=True)
        ))  # fmt: skip
        local_ops = shard_ops(ops, rank, spec, buffers)
        x, y = run_layers(local_params, empty(local, 23), batch, local, local_ops, last_token_only=True)
        return local_ops.final_norm(x, y, params.final_norm, spec.rms_norm_eps), [buffers.num_read, buffers.num_pushed]

    for actual, counts in together(2, run):
        torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
        assert counts == num_sums


def test_all_reduce_kernel_over_processes(tmp_path: Path) -> None:
    """All ranks get the same bits, also with more rows than programs."""
    pytest.importorskip("triton")
    size, file = 3, str(tmp_path / "group")
    partials = [torch.zeros(2, 7, 40).share_memory_() for _ in range(size)]
    flags = [torch.zeros(MAX_PROGRAMS * size + 1, dtype=torch.int32).share_memory_() for _ in range(size)]
    mp.spawn(run_all_reduce_kernel, (size, file, partials, flags), nprocs=size)  # type: ignore[attr-defined]
    results = [torch.load(f"{file}.{rank}") for rank in range(size)]
    norm = torch.randn(1, 40, generator=torch.Generator().manual_seed(99))[0]
    for step, rows in enumerate((3, 7, 1, 5, 3)):
        for a, b in zip(results[0][step], results[1][step], strict=True):
            assert torch.equal(a, b)
        seeds = [step, *(10 * step + r for r in range(size))]
        x = sum(torch.randn(rows, 40, generator=torch.Generator().manual_seed(s)) for s in seeds)
        torch.testing.assert_close(results[2][step][0], x, atol=1e-5, rtol=0)
        torch.testing.assert_close(results[2][step][1], rms_norm(x, norm, 1e-5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [4, 8])
def test_many_heads(size: int) -> None:
    """A 70B model's 64 query heads and 8 KV heads: a rank has 16 and 2, or 8 and 1."""
    spec = fastgen.from_hf_config({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 4, "vocab_size": 131,
        "max_position_embeddings": 256,
    })  # fmt: skip
    params = tree_map(lambda x: x if x is None or x.ndim == 1 else x * 15, fastgen.init(spec, dtype=torch.float32))
    plan = (Span(0, 0, 30, True, tuple(range(20, 12, -1))), Span(1, 0, 9, True, (1, 22, 2)))
    batch = fastgen.build_batch(plan, {0: prompt(30, 1), 1: prompt(9, 2)}, PAGE)
    expected = fastgen.forward(params, empty(spec, 23), batch, spec, reference)

    def run(rank: Rank) -> Tensor:
        local, ops = shard_config(spec, size), shard_ops(TORCH_OPS, rank, spec)
        assert (local.num_q_heads, local.num_kv_heads) == (64 // size, 8 // size)
        return fastgen.forward(shard_params(params, spec, rank.shard), empty(local, 23), batch, local, reference, ops)

    for actual in together(size, run):
        torch.testing.assert_close(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("size", "cache_dtype"), [(2, "auto"), (4, "auto"), (2, "fp8")])
def test_outputs(size: int, cache_dtype: str) -> None:
    """Engines with shared prefixes, host pages and preemption generate what one rank generates."""
    settings = SETTINGS | {"kv_cache_dtype": cache_dtype, "host_gb": 1e-4 if cache_dtype == "auto" else 5e-5}
    with fastgen.Engine(weights_of(), SPEC, **settings) as engine:
        expected = 2 * engine.generate(*load(1, 12), progress=False)

    def run(rank: Rank) -> tuple[list[fastgen.Output], fastgen.CacheStats]:
        with fastgen.Engine(weights_of(tp_shard=rank.shard), SPEC, tp_group=rank, **settings) as engine:
            heads, row = max(1, 2 // size), engine.cache.k[0].shape[1:]
            assert row == ((heads, 8) if cache_dtype == "auto" else (1, fp8_row_bytes(heads, 8)))
            outputs = [o for _ in range(2) for o in engine.generate(*load(1, 12), progress=False)]
            return outputs, engine.cache_stats

    for outputs, counts in together(size, run):
        assert (
            counts.num_hit_tokens and counts.num_offloaded_pages and counts.num_loaded_pages and counts.num_preemptions
        )
        for a, b in zip(outputs, expected, strict=True):
            assert [c.token_ids for c in a.completions] == [c.token_ids for c in b.completions]
            for x, y in zip(a.completions, b.completions, strict=True):
                assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-4))
            if b.prompt_logprobs is not None:
                assert a.prompt_logprobs is not None
                assert a.prompt_logprobs[1:] == pytest.approx(b.prompt_logprobs[1:], abs=1e-4)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("vocab", [5, 131, 128])
def test_samples(vocab: int, size: int) -> None:
    """Padded vocabulary shards, some of them empty, sample the tokens of the full vocabulary."""
    rows, width = 40, -(-vocab // size)
    generator = torch.Generator().manual_seed(vocab * size)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    logits[::4] = logits[::4].round()  # ties
    logits[1::5, ::2] = float("-inf")
    temperature = torch.tensor([0.0, 1.0, 0.3, 1.7])[torch.arange(rows) % 4]
    seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    padded = torch.zeros(rows, width * size)
    padded[:, :vocab] = logits
    for seeds, top in ((seed, None), (seed, 0), (seed, 3), (None, 0), (None, vocab)):
        s = SamplingTensors(temperature, seeds, torch.arange(rows), torch.arange(rows) % 3 == 1, None, None)
        expected = sampling.sample(logits, s, top)
        words = -(-vocab // 32)
        special = s._replace(token_mask=torch.full((rows, words), 5))  # tokens 0 and 2

        def run(
            rank: Rank, s: SamplingTensors = s, special: SamplingTensors = special, top: int | None = top
        ) -> list[Any]:
            shard = padded[:, rank.shard.rank * width :][:, :width]
            return [tensor_parallel.sample_from_shards(shard, x, top, rank, vocab) for x in (s, special)]

        for actual, special_actual in together(size, run):
            assert torch.equal(actual.token_ids, expected.token_ids)
            assert actual.token_ids.dtype == expected.token_ids.dtype
            for a, b in zip(actual, expected, strict=True):
                assert a.shape == b.shape
            torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=1e-5)
            assert torch.equal(special_actual.token_ids, sampling.sample(logits, special, top).token_ids)


def test_only_statistics_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks exchange nothing that grows with the vocabulary, unless a request needs all logits."""
    widths = list[int]()

    def run(rank: Rank, **params: Any) -> None:
        gather = rank.all_gather
        monkeypatch.setattr(rank, "all_gather", lambda x: (widths.append(x.shape[-1]), gather(x))[1])
        with fastgen.Engine(weights_of(tp_shard=rank.shard), SPEC, tp_group=rank, **SETTINGS) as engine:
            engine.generate([[1, 2], [3]], SamplingParams(max_tokens=4, **params), progress=False)

    together(2, run)
    assert set(widths) == {5}
    together(2, partial(run, logprobs=3))
    assert set(widths) == {5, 11}
    together(2, partial(run, top_k=3))
    assert set(widths) == {5, 11, 66}


def test_wake_up_succeeds_on_all_ranks_or_none() -> None:
    """If one rank's device is full, all ranks raise and stay asleep; later all wake up."""

    def run(rank: Rank) -> list[Any]:
        with fastgen.Engine(weights_of(tp_shard=rank.shard), SPEC, tp_group=rank, **SETTINGS) as engine:
            before = [c.token_ids for o in engine.generate(*load(1, 6), progress=False) for c in o.completions]
            cache = engine.memory.regions["cache"]
            size, restore = engine.sleep("cache"), cache.reacquire
            assert not cache.resident and cache._buffer.untyped_storage().nbytes() == 0
            if rank.shard.rank == 1:
                cache.reacquire = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))  # type: ignore[method-assign]
            with pytest.raises(torch.OutOfMemoryError, match="full" if rank.shard.rank == 1 else "another rank"):
                engine.wake_up()
            assert not cache.resident
            cache.reacquire = restore  # type: ignore[method-assign]
            assert engine.wake_up() == size and cache.resident
            after = [c.token_ids for o in engine.generate(*load(1, 6), progress=False) for c in o.completions]
            assert after == before
            return after

    first, second = together(2, run)
    assert first == second


def test_scores() -> None:
    """Scores equal one rank's; gradients, which would be of one shard, are refused."""
    sequences, first = load(4, 5)[0], [1, 3, 2, 1, 5]
    expected = fastgen.score(weights_of(), SPEC, sequences, first=first, temperature=0.7, token_budget=50)

    def run(rank: Rank) -> list[Tensor]:
        params = weights_of(tp_shard=rank.shard)
        with torch.enable_grad():
            tree = tree_map(lambda x: x if x is None else x.requires_grad_(), params)
            with pytest.raises(ValueError, match="no gradients"):
                fastgen.score(tree, SPEC, sequences, tp_group=rank)
        with pytest.raises(ValueError, match="no batch-invariant sums"):
            fastgen.score(params, SPEC, sequences, tp_group=rank, batch_invariant=True)
        return fastgen.score(params, SPEC, sequences, first=first, temperature=0.7, token_budget=50, tp_group=rank)

    for actual in together(2, run):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_thousand_steps() -> None:
    """With random arrivals and aborts, all ranks plan and sample the same, which each step checks."""

    def run(rank: Rank) -> tuple[list[Any], Any]:
        r, seen = random.Random(3), list[Any]()
        with fastgen.Engine(weights_of(tp_shard=rank.shard), SPEC, tp_group=rank, **SETTINGS) as engine:
            ids = list[int]()
            for step in range(1000):
                if r.random() < 0.3 and len(engine.state.waiting) < 20:
                    (prompt,), (params,) = load(step, 1)
                    ids.append(engine.add(prompt, params))
                if r.random() < 0.05 and ids:
                    engine.abort(ids.pop(r.randrange(len(ids))))
                seen += [(e.request_id, e.index, e.token_ids, e.finish_reason) for e in engine.step()]
                if step % 50 == 0:
                    scheduler.check(engine.state, engine.config.schedule)
            assert rank.steps == 1000 and engine.cache_stats.num_preemptions and engine.cache_stats.num_loaded_pages
            return seen, (engine.state.prefix_cache.stats.num_queried_tokens, [s[:4] for s in engine.state.running])

    first, second = together(2, run)
    assert first == second and len(first[0]) > 1000


def test_diverged_ranks() -> None:
    """All ranks name the rank that got another request."""

    def run(rank: Rank) -> None:
        with fastgen.Engine(weights_of(tp_shard=rank.shard), SPEC, tp_group=rank, **SETTINGS) as engine:
            engine.add([1] * (5 + rank.shard.rank // 3), SamplingParams(temperature=0, max_tokens=30))
            while engine.has_unfinished_requests:
                engine.step()

    diverged = (
        r"diverged at step 0: (3 planned or sampled .* than rank [012]|0, 1, 2 planned or sampled .* than rank 3)"
    )
    with pytest.raises(RuntimeError, match=diverged):
        together(4, run)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "3 does not divide 4 query heads, 2 key heads and a feed-forward width of 48; possible: 1, 2, 4"),
        (0, "of 0"),
    ],
)
def test_sizes_that_do_not_divide(size: int, message: str) -> None:
    """Heads and widths that a number of ranks does not divide are refused, with the possible numbers."""
    with pytest.raises(ValueError, match=message):
        fastgen.init(SPEC, tp_shard=TPShard(0, size))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_checkpoint_shards(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank reads its own rows and columns, and no full tensor; together they are the checkpoint."""
    full = weights_of()
    fastgen.save(tmp_path, SPEC, full)
    if size > 1:
        opened = files.safe_open

        class Sliced:
            def __init__(self, *args: Any) -> None:
                self.file = opened(*args)

            def __enter__(self) -> "Sliced":
                self.inner = self.file.__enter__()
                return self

            def __exit__(self, *args: Any) -> None:
                self.file.__exit__(*args)

            def keys(self) -> list[str]:
                return self.inner.keys()

            def get_slice(self, name: str) -> Any:
                return self.inner.get_slice(name)

        monkeypatch.setattr(files, "safe_open", Sliced)
    loaded = [fastgen.load(tmp_path, device="cpu", progress=False, tp_shard=TPShard(r, size))[1] for r in range(size)]
    for r, params in enumerate(loaded):
        for a, b in zip(tree_leaves(params), tree_leaves(shard_params(full, SPEC, TPShard(r, size))), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    rows = torch.cat([p.embed for p in loaded])
    assert torch.equal(rows[:131], full.embed) and not rows[131:].any() and len(rows) == size * -(-131 // size)
    assert sum(p.layers[0].down.shape[1] for p in loaded) == 48
    if size > 1:
        with pytest.raises(ValueError, match="another model's, or one rank's"):
            fastgen.save(tmp_path / "no", SPEC, loaded[0])


def test_no_process_group() -> None:
    """TPProcessGroup needs an initialized process group."""
    with pytest.raises(ValueError, match="init_process_group"):
        TPProcessGroup()
