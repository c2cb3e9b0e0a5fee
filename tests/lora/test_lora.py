"""Adapters: requests of several in one batch get what merged parameters would give each, in every way of running."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from serving import SETTINGS, Server, checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import Adapter, Event, Output, SamplingParams, Snapshot, lora
from fastgen.checkpoint.model_families import from_hf_config
from fastgen.checkpoint.weights import named_weights
from fastgen.cli import parsers, serve
from fastgen.cli import run as command
from fastgen.cli.bench import benchmark
from fastgen.config import LoraConfig
from fastgen.core import scheduler
from fastgen.core.attention import reference
from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Span
from fastgen.core.types import Params
from fastgen.lora.adapter import LayerLora
from fastgen.lora.stacked import apply_lora

CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}  # fmt: skip
SPECS = {name: fastgen.from_hf_config(tiny.SIZES | config) for name, config in CONFIGS.items()}
SPEC = SPECS["mistral"]
SMALL: dict[str, Any] = {"max_num_seqs": 8, "token_budget": 64}
NAMES = (None, "all", "some", "wide")


def adapter(spec: ModelConfig, name: str, seed: int = 0) -> Adapter:
    """Returns an adapter by name: names differ in rank, targets and scale. Strong enough to change sampled tokens."""
    how: dict[str, Any] = {
        "all": {"rank": 4, "alpha": 8},
        "some": {"rank": 3, "alpha": 3, "target_modules": ("q_proj", "v_proj", "up_proj")},
        "wide": {
            "rank": 8,
            "alpha": 8,
            "target_modules": ("k_proj", "o_proj", "gate_proj", "down_proj"),
            "use_rslora": True,
        },
    }[name]
    made = lora.init(spec, seed=seed, device="cpu", **how)
    r = torch.Generator("cpu").manual_seed(seed + 1)
    for x in lora.parameters(made):
        x.copy_(torch.randn(x.shape, generator=r, device="cpu") * 0.2)
    return tree_map_only(Tensor, lambda x: x.to(torch.get_default_device()), made)


PARAMS = tiny.weights(SPEC)
ADAPTERS = {name: adapter(SPEC, name, seed) for seed, name in enumerate(NAMES[1:])}


class Engine(fastgen.Engine):
    """Checks the scheduler's invariants after every step, and that no two adapters read the same page."""

    def step(self) -> list[Event]:
        events = super().step()
        scheduler.check(self.state, self.config.schedule)
        users: dict[int, Any] = {}
        for s in self.state.running:
            assert (
                s.namespace == self.core.sequence_states[s.id].adapter_idx
                if s.id in self.core.sequence_states
                else True
            )
            for page in s.pages:
                assert users.setdefault(page, s.namespace) == s.namespace, "two adapters share a page"
        return events


def engine(params: Params = PARAMS, adapters: dict[str, Adapter] = ADAPTERS, **settings: Any) -> Engine:
    """Returns an engine with capacity for three adapters."""
    e = Engine(
        params,
        SPEC,
        progress=False,
        **{"page_size": 4, "max_adapters": 3, "max_rank": 8, "compile": "eager"} | settings,
    )
    for name, x in adapters.items():
        e.add_adapter(name, x)
    return e


def random_requests(seed: int, count: int = 16) -> list[tuple[list[int], dict[str, Any], str | None]]:
    """Returns requests that share prefixes under different adapters, greedy and sampled."""
    r = random.Random(seed)
    stems = [[r.randrange(61) for _ in range(n)] for n in (1, 9, 21)]
    requests = []
    for i in range(count):
        prompt = [*r.choice(stems), *(r.randrange(61) for _ in range(r.choice((0, 1, 7))))]
        how = {"temperature": r.choice((0, 0.8)), "seed": i, "max_tokens": r.randrange(1, 14), "logprobs": 0}
        requests.append((prompt, how | ({"prompt_logprobs": 0} if r.random() < 0.2 else {}), r.choice(NAMES)))
    return requests


MERGED: dict[str | None, fastgen.Engine] = {}


def generate_merged(prompt: Sequence[int], how: dict[str, Any], name: str | None) -> Output:
    """Returns the output of the request alone in an engine of the merged parameters."""
    if name not in MERGED:
        params = PARAMS if name is None else lora.merge(PARAMS, SPEC, ADAPTERS[name])
        MERGED[name] = fastgen.Engine(
            params, SPEC, progress=False, prefix_cache=False, cache_tokens=1024, compile="eager"
        )
    return MERGED[name].generate([[*prompt]], SamplingParams(**how))[0]


def assert_same_output(got: Output, want: Output) -> None:
    """Asserts that tokens are equal and logprobs nearly."""
    for a, b in zip(got.completions, want.completions, strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert (got.prompt_logprobs or [None])[1:] == pytest.approx((want.prompt_logprobs or [None])[1:], abs=1e-4)


def run(e: fastgen.Engine, work: Iterable[tuple[list[int], dict[str, Any], str | None]]) -> list[Output]:
    """Generates the outputs of (prompt, settings, adapter name) requests."""
    work = list(work)
    ids = [e.add(prompt, SamplingParams(**how, adapter=name)) for prompt, how, name in work]
    done: dict[int, Output] = {}
    while e.has_unfinished_requests:
        done |= {event.request_id: event.output for event in e.step() if event.output is not None}
    return [done[id] for id in ids]


# --- the forward ------------------------------------------------------------------------------------------------------


def logits(
    params: Params, spec: ModelConfig, tokens: list[int], adapters: fastgen.StackedAdapters | None = None, i: int = 0
) -> Tensor:
    """Returns logits [T, V] of one forward, with its own cache."""
    batch = fastgen.build_batch((Span(0, 0, len(tokens), True, (1, 2, 3, 4)),), {0: tokens}, 16)
    batch = batch._replace(adapter_idx=torch.full((len(tokens),), i) if adapters else None)
    hidden = fastgen.hidden_states(params, fastgen.new_kv_cache(spec, 80), batch, spec, reference, adapters=adapters)
    return fastgen.compute_logits(params, hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_of_several(name: str) -> None:
    """A batch of sequences under different adapters and none has the fp32 logits of merged parameters."""
    spec, params = SPECS[name], tiny.weights(SPECS[name], 1)
    trees = [adapter(spec, kind, 5) for kind in NAMES[1:]]
    stacked, r = lora.stack(trees, spec), random.Random(0)
    contexts = [[r.randrange(61) for _ in range(n)] for n in (5, 1, 9, 13)]
    plan = tuple(Span(i, 0, len(c), True, (1 + i,)) for i, c in enumerate(contexts))
    batch = fastgen.build_batch(plan, dict(enumerate(contexts)), 16)
    rows = torch.tensor([i for i, c in zip((2, 0, 3, 1), contexts, strict=True) for _ in c])
    got = fastgen.forward(
        params, fastgen.new_kv_cache(spec, 80), batch._replace(adapter_idx=rows), spec, adapters=stacked
    )
    for row, i, context in zip(got, (2, 0, 3, 1), contexts, strict=True):
        plain = params if i == 0 else lora.merge(params, spec, trees[i - 1])
        torch.testing.assert_close(row, logits(plain, spec, context)[-1], atol=1e-4, rtol=1e-5)
        assert i == 0 or (row - logits(params, spec, context)[-1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="batch.adapter"):
        fastgen.forward(params, fastgen.new_kv_cache(spec, 80), batch, spec, adapters=stacked)


def test_merge_shares_what_it_does_not_change() -> None:
    """merge() changes only matrices with an update, and leaves the given parameters as they are."""
    got = lora.merge(PARAMS, SPEC, ADAPTERS["some"])
    assert got.embed is PARAMS.embed and got.layers[0].down is PARAMS.layers[0].down
    d, (q, _, v) = SPEC.hidden_size, got.layers[1].qkv.split((32, 16, 16))
    change = ADAPTERS["some"].layers[1].v
    assert change is not None
    torch.testing.assert_close(v, PARAMS.layers[1].qkv[48:] + change.b @ change.a * 1.0)
    assert torch.equal(got.layers[1].qkv[32:48], PARAMS.layers[1].qkv[32:48]) and q.shape == (32, d)


KERNEL = [  # tokens, depth, rows of the packed matrices, rank, adapters
    (1, 40, (24,), 1, 1),
    (7, 130, (32, 16, 16), 4, 2),
    (33, 2100, (150, 150), 5, 3),
    (530, 64, (48, 16, 16), 16, 4),
    (20, 96, (300,), 33, 2),
    (18, 70, (40, 40), 100, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "depth", "rows", "r", "count"), KERNEL)
def test_kernel(tokens: int, depth: int, rows: tuple[int, ...], r: int, count: int, dtype: torch.dtype) -> None:
    """The kernels equal the plain function, for mixed and ragged rows; rows without an adapter stay as they are."""
    pytest.importorskip("triton")
    from fastgen.kernels import lora

    torch.manual_seed(tokens)
    y, x = torch.randn(tokens, sum(rows)).to(dtype), torch.randn(tokens, depth).to(dtype)
    a = (torch.randn(count + 1, len(rows) * r, depth) * depth**-0.5).to(dtype)
    b, scale = torch.randn(count + 1, sum(rows), r).to(dtype), torch.rand(count + 1)
    for whose in (torch.randint(count + 1, (tokens,)), torch.full((tokens,), count), torch.zeros(tokens).long()):
        exact = apply_lora(y.double(), x.double(), a.double(), b.double(), scale.double(), whose, rows)
        got = lora.apply_lora(y.clone(), x, a, b, scale, whose.int(), rows)
        assert got.dtype == dtype and torch.equal(got[whose == 0], y[whose == 0])
        size = exact.square().mean().sqrt()
        assert (got.double() - exact).abs().max() / size < (4e-3 if dtype == torch.float16 else 1e-5)


def test_kernel_rows_do_not_depend_on_their_company(device: str) -> None:
    """A row is the same alone, among others and at any index: bitwise on a GPU, where an index does not change sums."""
    pytest.importorskip("triton")
    from fastgen.kernels import lora

    torch.manual_seed(0)
    y, x, whose = torch.randn(20, 40), torch.randn(20, 70), torch.randint(4, (20,)).int()
    a, b, scale = torch.randn(4, 6, 70), torch.randn(4, 40, 3), torch.rand(4)
    whole = lora.apply_lora(y.clone(), x, a, b, scale, whose, (24, 16))
    for pick in ([3], [19, 0], list(range(12, 2, -1))):
        got = lora.apply_lora(y[pick].clone(), x[pick], a, b, scale, whose[pick], (24, 16))
        torch.testing.assert_close(got, whole[pick], rtol=0, atol=1e-5 if device == "cpu" else 0)


# --- the engine -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"cache_tokens": 1024},
    "no reuse": {"cache_tokens": 1024, "prefix_cache": False},
    "chunks": {"cache_tokens": 1024, "max_num_seqs": 5, "token_budget": 7, "prefill_chunk": 3},
    "preempted": {"cache_tokens": 84},
    "host": {"cache_tokens": 84, "offload": "host", "host_gb": 1e-4},
    "prefill first": {"cache_tokens": 1024, "policy": "prefill_first", "token_budget": 40, "max_num_seqs": 8},
}


@cache
def separately(seed: int) -> list[Output]:
    return [generate_merged(*one) for one in random_requests(seed)]


@pytest.mark.parametrize("way", WAYS)
def test_as_merged(way: str) -> None:
    """Requests of three adapters and of none, in one batch, have the tokens and logprobs of merged parameters."""
    e, work = engine(**WAYS[way]), random_requests(3)
    for _ in range(2):  # the second time much of it is cached
        for got, want in zip(run(e, work), separately(3), strict=True):
            assert_same_output(got, want)
    n = e.cache_stats
    assert (n.num_hit_tokens > 0) is (way != "no reuse")
    if way == "preempted":
        assert n.num_preemptions and n.num_evicted_pages
    if way == "host":
        assert n.num_loaded_pages


def compiled() -> None:
    """Checks compiled regions: adding, changing and removing adapters recompiles nothing."""
    from dynamo import num_compiled_graphs

    e, work = engine(adapters={}, cache_tokens=1024, compile="inductor", **SMALL), random_requests(4, 12)
    before = num_compiled_graphs()
    for name, x in ADAPTERS.items():
        e.add_adapter(name, x)
    for got, one in zip(run(e, work), work, strict=True):
        assert_same_output(got, generate_merged(*one))
    e.remove_adapter("some")
    e.add_adapter("some", ADAPTERS["some"])
    for got, one in zip(run(e, work), work, strict=True):
        assert_same_output(got, generate_merged(*one))
    assert num_compiled_graphs() == before


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="test_graphs compares on GPUs")
@pytest.mark.parametrize("what", ["compiled()", "train('inductor')"])
def test_compiled(what: str) -> None:
    """Runs `compiled` in a process of its own: types that are checked at run time cannot be traced."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import torch; torch.set_num_threads(1); import test_lora; "
        f"test_lora.{what}; print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_off_is_as_before() -> None:
    """An engine without capacity for adapters has no buffers, fields or functions of them."""
    e = fastgen.Engine(PARAMS, SPEC, progress=False, cache_tokens=256, compile="eager")
    e.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert (
        e.last_batch is not None
        and e.last_batch.adapter_idx is None
        and e.adapters == {}
        and "adapters" not in e._memory_usage()
    )
    assert e.runner.adapters is None


def test_any_operations() -> None:
    """Adapters added, changed in place, copied over and removed while requests of all kinds arrive, fork and end.

    A request that was admitted after the last change gets exactly what the current parameters give; pages are checked
    after every step.
    """
    r, e = random.Random(0), engine(adapters={}, cache_tokens=160, max_adapters=2, max_num_seqs=6)
    trees: dict[str, Adapter] = {}
    stale: set[int] = set()
    pending: dict[int, tuple[list[int], dict[str, Any], Params]] = {}
    checked = 0
    for step in range(150):
        op, name = r.random(), r.choice(("x", "y", "z"))
        users = {s.params.adapter for s in e.core.sequence_states.values()}
        if op < 0.06 and name not in trees and len(trees) < 2:
            trees[name] = adapter(SPEC, r.choice(NAMES[1:]) or "", step)
            e.add_adapter(name, trees[name])
        elif op < 0.1 and name in trees and name not in users:
            e.remove_adapter(name)
            del trees[name]
        elif op < 0.16 and name in trees:
            views = e.adapter_params(name)
            if r.random() < 0.5:
                for x in lora.parameters(views):
                    x.mul_(-1)
                e.update_adapter(name)
            else:
                e.update_adapter(name, tree_map_only(Tensor, lambda x: -x, views))
            trees[name] = tree_map_only(Tensor, torch.clone, e.adapter_params(name))
            stale |= {s.output.request_id for s in e.core.sequence_states.values() if s.params.adapter == name}
        elif op < 0.6:
            prompt, how, _ = random_requests(r.randrange(5), 1)[0]
            who = r.choice([None, *trees])
            params = PARAMS if who is None else lora.merge(PARAMS, SPEC, trees[who])
            pending[e.add(prompt, SamplingParams(**how, adapter=who))] = prompt, how, params
        elif op < 0.62 and e.core.sequence_states:
            e.abort(r.choice([*e.core.sequence_states.values()]).output.request_id)
        for event in e.step():
            if event.output is None:
                continue
            prompt, how, params = pending.pop(event.request_id)
            if event.request_id not in stale and event.finish_reason != "abort":
                with fastgen.Engine(
                    params, SPEC, progress=False, prefix_cache=False, cache_tokens=128, compile="eager"
                ) as plain:
                    assert_same_output(event.output, plain.generate([prompt], SamplingParams(**how))[0])
                checked += 1
    assert checked > 20 and e.cache_stats.num_hit_tokens


def test_a_change_forgets_its_own_pages_only() -> None:
    """An update of an adapter drops the cached pages of that adapter alone."""
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 1}
    e, prompt = engine(cache_tokens=1024), [*range(20)]

    def cached(name: str | None) -> int:
        return e.generate([prompt], SamplingParams(**how, adapter=name))[0].num_cached_tokens

    assert [cached(name) for name in NAMES] == [0, 0, 0, 0], "nobody begins with another's pages"
    assert [cached(name) for name in NAMES] == [19, 19, 19, 19]
    e.update_adapter("some")
    assert [cached(name) for name in NAMES] == [19, 19, 0, 19]
    e.params_changed()
    assert [cached(name) for name in NAMES] == [0, 0, 0, 0]
    assert [e.adapters[name].version for name in ADAPTERS] == [0, 1, 0]


def test_a_name_given_anew() -> None:
    """An adapter under a removed one's name has neither its values nor its cached pages."""
    e, work = engine(cache_tokens=1024), [([5, 6, 7, 8, 9, 10, 11, 12, 13], {"temperature": 0, "max_tokens": 8}, "all")]
    assert_same_output(run(e, work)[0], generate_merged(*work[0]))
    views = e.adapter_params("all")
    e.remove_adapter("all")
    assert not any(x.any() for x in lora.parameters(views))
    e.add_adapter("all", ADAPTERS["some"])
    assert_same_output(run(e, work)[0], generate_merged(*work[0][:2], "some"))


def test_fork_and_snapshot(tmp_path: Path) -> None:
    """Forked and restored requests keep their adapter."""
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    e = engine(cache_tokens=1024)
    want = generate_merged(range(7), how, "wide").completions[0].token_ids
    id = e.add([*range(7)], SamplingParams(**how, adapter="wide"))
    for _ in range(4):
        e.step()
    fork = e.fork(id)[0]
    e.snapshot(id, include_pages=True).save(tmp_path / "one")
    done = {x.request_id: x.output for _ in range(12) for x in e.step() if x.output}
    assert done[id].completions[0].token_ids == done[fork].completions[0].token_ids == want
    with engine(cache_tokens=1024) as other:
        new = other.restore(Snapshot.load(tmp_path / "one"))
        done = {x.request_id: x.output for _ in range(12) for x in other.step() if x.output}
        assert done[new].completions[0].token_ids == want
        other.remove_adapter("wide")
        with pytest.raises(ValueError, match="unknown adapter 'wide'"):
            other.restore(Snapshot.load(tmp_path / "one"))


def test_refused() -> None:
    """Invalid adapters are refused with advice; other requests are not disturbed."""
    off = fastgen.Engine(PARAMS, SPEC, progress=False, cache_tokens=256, compile="eager")

    def one_stack(adapter: Adapter) -> object:
        return lora.stack([adapter], SPEC)

    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: off.add_adapter("x", ADAPTERS["all"]), "max_adapters=N"),
        (lambda: off.add([1], SamplingParams(adapter="all", max_tokens=1)), "max_adapters=N"),
    ]
    e = engine(cache_tokens=256)
    id = e.add([1, 2, 3], SamplingParams(adapter="some", max_tokens=9))
    other = adapter(SPECS["qwen3"], "all")
    refused += [
        (
            lambda: e.add([1], SamplingParams(adapter="sone", max_tokens=1)),
            "unknown adapter 'sone'; did you mean.* some",
        ),
        (
            lambda: e.generate([[1], [2]], [SamplingParams(max_tokens=1), SamplingParams(adapter="q", max_tokens=1)]),
            "prompt 1: unknown adapter",
        ),
        (lambda: e.add_adapter("all", ADAPTERS["all"]), "already"),
        (lambda: e.add_adapter("", ADAPTERS["all"]), "needs a name"),
        (lambda: e.add_adapter("more", ADAPTERS["all"]), "raise lora.max_adapters"),
        (lambda: e.remove_adapter("some"), rf"used by requests \[{id}\]"),
        (lambda: e.remove_adapter("none"), "unknown adapter"),
        (lambda: e.update_adapter("some", ADAPTERS["all"]), "layer 0"),
        (lambda: lora.merge(PARAMS, SPEC, other), "wanted"),
        (lambda: lora.stack([other], SPEC), "wanted"),
        (lambda: lora.merge(PARAMS, SPEC, Adapter((), 1.0)), "0 layers"),
        (lambda: lora.init(SPEC, target_modules=("q_porj",)), "did you mean q_proj"),
        (lambda: lora.init(SPEC, rank=0), "at least 1"),
        (lambda: lora.stack([Adapter((LayerLora(),) * 2, 1.0)], SPEC), "changes anything"),
        (lambda: e.update_adapter("all", tree_map_only(Tensor, lambda x: x / 0, ADAPTERS["all"])), "in layers.0.q.a"),
        *(
            (partial(call, *args, ADAPTERS["all"]._replace(scale=scale)), "scale must be a finite number")
            for scale in (float("nan"), float("-inf"), 1e39)
            for call, *args in ((e.update_adapter, "all"), (partial(lora.merge, PARAMS, SPEC),), (one_stack,))
        ),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    e.abort(id)
    e.remove_adapter("some")
    with pytest.raises(ValueError, match="raise lora.max_rank"):
        e.add_adapter("wide2", lora.init(SPEC, rank=9))
    with pytest.raises(ValueError, match="wanted"):
        e.add_adapter("x", other)
    assert len(run(e, random_requests(1, 3)[:0])) == 0 and sorted(e.adapters) == ["all", "wide"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradients() -> None:
    """Gradients through stacked adapters equal those through merged parameters, in every tensor of the tree."""
    context, tree = [3, 1, 4, 1, 5, 9, 2, 6], adapter(SPEC, "all", 7)
    grads = []
    for way in ("stack", "merge"):
        mine = tree_map_only(Tensor, lambda x: x.clone().requires_grad_(), tree)
        if way == "stack":
            out = logits(PARAMS, SPEC, context, lora.stack([ADAPTERS["some"], mine], SPEC), 2)
        else:
            out = logits(lora.merge(PARAMS, SPEC, mine), SPEC, context)
        out.log_softmax(-1)[:-1].gather(1, torch.tensor(context[1:])[:, None]).sum().backward()
        grads.append([x.grad for x in lora.parameters(mine)])
    assert len(grads[0]) == 2 * 7 * SPEC.num_layers
    for a, b in zip(*grads, strict=True):
        assert a is not None and a.abs().max() > 1e-6
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_training_in_place() -> None:
    """Runs `train` on an engine's adapter."""
    train("eager")


def train(compile: str) -> None:
    """Optimizer steps on the engine's own tensors update the adapter: later tokens are sampled from it."""
    e = engine(adapters={"other": ADAPTERS["wide"]}, cache_tokens=512, compile=compile, **SMALL)
    views = e.add_adapter("mine", lora.init(SPEC, rank=4, alpha=8, seed=1))
    where = [x.data_ptr() for x in lora.parameters(views)]
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    prompt, wanted = [7, 8, 9], [11, 12, 13, 14, 15, 16]
    before = run(e, [(prompt, how, "mine")])[0].completions[0].token_ids
    assert before == generate_merged(prompt, how, None).completions[0].token_ids, "a new adapter changes nothing"
    optimizer = torch.optim.Adam([x.requires_grad_() for x in lora.parameters(views)], lr=0.02)
    context, losses = [*prompt, *wanted], []
    for _ in range(60):
        out = logits(PARAMS, SPEC, context, lora.stack([views], SPEC), 1).log_softmax(-1)
        loss = -out[len(prompt) - 1 : -1].gather(1, torch.tensor(wanted)[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    e.update_adapter("mine")
    got = run(e, [(prompt, how, "mine"), (prompt, how, None), (prompt, how, "other")])
    assert [x.data_ptr() for x in lora.parameters(e.adapter_params("mine"))] == where
    assert losses[-1] < 0.1 * losses[0] and got[0].completions[0].token_ids == wanted
    with fastgen.Engine(
        lora.merge(PARAMS, SPEC, views), SPEC, progress=False, cache_tokens=256, compile="eager"
    ) as fresh:
        assert_same_output(got[0], fresh.generate([prompt], SamplingParams(**how))[0])
    assert_same_output(got[1], generate_merged(prompt, how, None))
    assert_same_output(got[2], generate_merged(prompt, how, "wide"))


# --- files ------------------------------------------------------------------------------------------------------------


def assert_equal(a: Adapter, b: Adapter) -> None:
    assert [p is None for x in a.layers for p in x] == [p is None for x in b.layers for p in x]
    assert a.scale == pytest.approx(b.scale)
    for x, y in zip(lora.parameters(a), lora.parameters(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ADAPTERS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    """A saved adapter loads bit for bit."""
    lora.save(tmp_path, SPEC, ADAPTERS[name], base_model="mine")
    assert_equal(lora.load(tmp_path, SPEC), ADAPTERS[name])
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(x.startswith("base_model.model.model.layers.") and ".lora_" in x for x in names)


def test_update_by_name() -> None:
    """Names of a PEFT model in memory are accepted, too."""
    mine, other = adapter(SPEC, "some", 1), adapter(SPEC, "some", 2)
    lora.update(mine, SPEC, dict(lora.named_tensors(other, SPEC)).items())
    assert_equal(mine, other)
    third = adapter(SPEC, "some", 3)
    live = [(n.replace(".weight", ".default.weight"), x) for n, x in lora.named_tensors(third, SPEC)]
    lora.update(mine, SPEC, live)
    assert_equal(mine, third)
    with pytest.raises(ValueError, match="missing for model.layers.1.mlp.up_proj"):
        lora.update(mine, SPEC, live[:-1])
    with pytest.raises(ValueError, match="lm_head"):
        lora.update(mine, SPEC, [*live, ("base_model.model.lm_head.lora_A.weight", live[0][1])])
    with pytest.raises(ValueError, match="layer 1"):
        lora.update(mine, SPEC, live[:-2])


REFUSED = {
    "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}, "peft_type": "LOHA",
    "alpha_pattern": {"q_proj": 2}, "init_lora_weights": "pissa", "layer_replication": [[0, 1]], "fan_in_fan_out": True,
}  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_load_refuses_by_name(option: str, tmp_path: Path) -> None:
    """Options that are not supported are errors by their name."""
    lora.save(tmp_path, SPEC, ADAPTERS["all"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: REFUSED[option]}))
    with pytest.raises(ValueError, match=f"{option}.*not supported"):
        lora.load(tmp_path, SPEC)


@pytest.mark.parametrize("alpha", ["1e308", "-1e40", "NaN", "-Infinity", "1e400", "9" * 400, "9" * 5000, "true"])
def test_load_refuses_scales_that_are_not_finite(alpha: str, tmp_path: Path) -> None:
    """A scale that float32, float64 or JSON cannot represent is refused, naming the file; no engine is changed."""
    lora.save(tmp_path, SPEC, ADAPTERS["all"])
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8.0', f'"lora_alpha": {alpha}'))
    for call in (lambda: lora.load(tmp_path, SPEC), lambda: lora.expand_lora_config(LoraConfig(), {"x": tmp_path})):
        with pytest.raises(ValueError, match="adapter_config.json"):
            call()


def test_a_slot_is_clean_for_the_next_adapter() -> None:
    """NaN written through views of a removed adapter does not reach the next one in its buffers."""
    one, wanted = (engine(adapters={name: ADAPTERS[name]}, max_adapters=1) for name in ("wide", "some"))
    stale = lora.parameters(one.adapter_params("wide"))
    one.remove_adapter("wide")
    for x in stale:
        x.fill_(float("nan"))
    one.add_adapter("some", ADAPTERS["some"])
    work = [(prompt, how, "some") for prompt, how, _ in random_requests(2, 4)]
    for got, want in zip(run(one, work), run(wanted, work), strict=True):
        assert_same_output(got, want)


def test_versions_count_changes_of_the_adapter() -> None:
    """A token's version is the model's plus its adapter's, in flight as well; a reused name continues its count."""
    one, how = engine(), {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    ids = {name: one.add([1, 2, 3], SamplingParams(**how, adapter=name)) for name in NAMES}
    done: dict[int, Output] = {}

    def steps(count: int) -> None:
        for _ in range(count):
            done.update({e.request_id: e.output for e in one.step() if e.output is not None})

    steps(2)
    one.update_adapter("all", ADAPTERS["all"]._replace(scale=0.1))
    steps(2)
    one.params_changed()
    steps(2)
    for x in lora.parameters(one.adapter_params("some")):
        x.mul_(0.5)
    one.update_adapter("some")
    steps(2)
    versions = {name: done[id].completions[0].weight_versions for name, id in ids.items()}
    assert versions == {
        None: [0] * 4 + [1] * 4, "wide": [0] * 4 + [1] * 4,
        "all": [0, 0, 1, 1, 2, 2, 2, 2], "some": [0] * 4 + [1, 1, 2, 2],
    }  # fmt: skip
    assert one.weight_version + one.adapters["all"].version == 2
    one.remove_adapter("all")
    one.add_adapter("all", ADAPTERS["all"])
    (again,) = run(one, [([1, 2, 3], how, "all")])
    assert {*again.completions[0].weight_versions} == {3} == {one.weight_version + one.adapters["all"].version}


def test_load_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an adapter"):
        lora.load(tmp_path, SPEC)
    lora.save(tmp_path, SPEC, ADAPTERS["all"])
    with pytest.raises(ValueError, match="wanted"):
        lora.load(tmp_path, SPECS["qwen3"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for r, alpha, said in ((5, 8, "rank 4, the config says 5"), (10**9, 8, "r=1000000000"), (4, 1e308, "lora_alpha")):
        file.write_text(json.dumps(config | {"r": r, "lora_alpha": alpha}))
        with pytest.raises(ValueError, match=said):
            lora.expand_lora_config(fastgen.EngineConfig().lora, {"x": tmp_path})  # before there is room for it
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.x.weight": torch.zeros(1, device="cpu")}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"base_model.model.x.weight targets an unsupported module"):
        lora.load(tmp_path, SPEC)
    mixed = ADAPTERS["all"].layers[0]._replace(q=ADAPTERS["some"].layers[0].q)
    with pytest.raises(ValueError, match=r"ranks \[3, 4\]"):
        lora.save(tmp_path, SPEC, ADAPTERS["all"]._replace(layers=(mixed, mixed)))


@pytest.mark.filterwarnings("default")  # PEFT has some of its own
@pytest.mark.parametrize("name", CONFIGS)
def test_against_peft(name: str, tmp_path: Path) -> None:
    """An adapter of PEFT has the same logits here as on transformers' model, and PEFT reads what we save."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    with torch.device("cpu"):
        config = transformers.AutoConfig.for_model(name, **tiny.SIZES | CONFIGS[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.save_pretrained(tmp_path / "base")
        how = peft.LoraConfig(r=4, lora_alpha=10, use_rslora=name == "qwen3", target_modules=[*lora.TARGET_MODULES])
        theirs = peft.get_peft_model(model, how).eval()
        for key, x in theirs.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(x, std=0.3)
        theirs.save_pretrained(tmp_path / "adapter")
    spec, params = fastgen.load(tmp_path / "base", progress=False)
    mine = lora.load(tmp_path / "adapter", spec)
    tokens = [random.Random(1).randrange(61) for _ in range(20)]
    with torch.no_grad():
        want = theirs(torch.tensor([tokens], device="cpu")).logits[0].to(torch.get_default_device())
    got = logits(params, spec, tokens, lora.stack([mine], spec), 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert (got - logits(params, spec, tokens)).abs().max() > 0.1
    lora.save(tmp_path / "ours", spec, mine)
    with torch.no_grad(), torch.device("cpu"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(again.to(want.device), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_transformers(name: str) -> None:
    """transformers' model with b @ a added to its unpacked matrices has the same logits."""
    torch.manual_seed(0)
    spec = SPECS[name]
    with torch.device("cpu"):
        config = transformers.AutoConfig.for_model(name, **tiny.SIZES | CONFIGS[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        params, tree = tiny.weights(spec), adapter(spec, "all", 3)
        model.load_state_dict({n: x.cpu() for n, x in named_weights(params, spec)}, strict=False)
        tensors, modules = {n: x.cpu() for n, x in lora.named_tensors(tree, spec)}, dict(model.named_modules())
        for key in (k for k in tensors if "lora_A" in k):
            inner = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            modules[inner].weight.data += tree.scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        tokens = [random.Random(2).randrange(61) for _ in range(20)]
        with torch.no_grad():
            want = model(torch.tensor([tokens])).logits[0]
    got = logits(params, spec, tokens, lora.stack([tree], spec), 1)
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-5)


# --- the tools --------------------------------------------------------------------------------------------------------


def test_fgrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fgrun loads adapters by name and a request chooses one; an adapter of another model is an error."""
    spec = fastgen.from_hf_config(tiny.config("Mistral"))
    config_of(tmp_path)
    lora.save(tmp_path / "poet", spec, adapter(spec, "all", 3))
    words = [f"model.path={tmp_path}", "model.random_weights=true", "model.device=cpu", "prompt=[1,2,3]", "chat=false"]
    words += [f"model.adapters.poet={tmp_path / 'poet'}", "kv_cache.cache_tokens=64", "sampling.max_tokens=4"]
    plain, changed = (command.run(command.compose(*words, *more))[0] for more in ((), ("sampling.adapter=poet",)))
    assert plain.completions[0].token_ids != changed.completions[0].token_ids
    with pytest.raises(ValueError, match="layers"):
        command.run(command.compose(*words, f"model.path={config_of(tmp_path / 'other', num_hidden_layers=1)}"))
    words = [*words[2:3], *words[5:7], "sampling.adapter=poet", "--workload", "2x4x2", "--repeats", "1"]
    assert benchmark.main([str(tmp_path), *words]) == 0 and "2x4x2" in capsys.readouterr().out


def config_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny.config("Mistral", **changes)))
    return folder


# --- the server -------------------------------------------------------------------------------------------------------


def test_serve(tmp_path: Path) -> None:
    """A request chooses an adapter as its model; adapters are loaded and unloaded while the server runs."""
    folder = checkpoint(tmp_path / "tiny")
    spec, params = fastgen.load(folder, device="cpu", progress=False)
    trees = {"poet": adapter(spec, "all", 3), "judge": adapter(spec, "wide", 4)}
    for name, tree in trees.items():
        lora.save(tmp_path / name, spec, tree)
    options = ("--lora-dir", str(tmp_path), "lora.max_adapters=2", "max_rank=8")
    server = Server(str(folder), *SETTINGS, *options, "--lora", f"poet={tmp_path / 'poet'}").ready()

    def post(path: str, status: int, **body: Any) -> str:
        reply = server.http.post(path, json=body)
        assert reply.status_code == status, reply.text
        return reply.text

    def check(*names: str | None) -> None:
        for name in names:
            body = {"token_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_tokens": 6}}
            got = server.http.post("/inference/v1/generate", json=body | ({"model": name} if name else {})).json()
            merged = lora.merge(params, spec, trees[name]) if name in trees else params
            with fastgen.Engine(merged, spec, progress=False, cache_tokens=64, compile="eager") as e:
                wanted = e.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))
            assert got["choices"][0]["token_ids"] == wanted[0].completions[0].token_ids

    try:
        check("tiny", None, "poet")
        said = server.http.post("/v1/completions", json={"model": "judge", "prompt": "x"})
        assert said.status_code == 404 and "there is tiny, poet" in said.text
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert '"parent":"tiny"' in post(load, 200, lora_name="judge", lora_path=str(tmp_path / "judge"))
        check("judge", "poet", None)
        models = server.http.get("/v1/models").json()["data"]
        assert [(m["id"], m.get("parent")) for m in models] == [("tiny", None), ("judge", "tiny"), ("poet", "tiny")]
        assert "already" in post(load, 409, lora_name="judge", lora_path="judge")
        assert "max_adapters" in post(load, 400, lora_name="third", lora_path="judge")
        assert "own name" in post(load, 400, lora_name="tiny", lora_path="judge")
        for path in ("..", "/", "nowhere", "tiny/../../x", "a\0b"):
            assert "lora_path" in post(load, 400, lora_name="x", lora_path=path)
        assert "adapter_config.json" in post(load, 400, lora_name="x", lora_path="tiny")
        trees["judge"] = tree_map_only(Tensor, lambda x: -x, trees["judge"])
        lora.save(tmp_path / "judge", spec, trees["judge"])
        post(load, 200, lora_name="judge", lora_path="judge", load_inplace=True)
        check("judge")

        def versions(name: str, **how: Any) -> list[list[int]]:
            body = {"model": name, "prompt": "x", "max_tokens": 6, "return_weight_versions": True, "ignore_eos": True}
            reply = server.http.post("/v1/completions", json=body | how)
            lines = [x.removeprefix("data: ") for x in reply.text.splitlines() if x.startswith("data: {")]
            parts = [c for line in lines or [reply.text] for c in json.loads(line)["choices"]]
            return [[v for c in parts if c["index"] == i for v in c["weight_versions"]] for i in range(how.get("n", 1))]

        assert versions("judge", n=2) == versions("judge", n=2, stream=True) == [[1] * 6] * 2
        assert versions("poet") == versions("tiny", stream=True) == [[0] * 6]
        body = {
            "model": "judge",
            "token_ids": [5],
            "return_weight_versions": True,
            "sampling_params": {"max_tokens": 2},
        }
        assert json.loads(post("/inference/v1/generate", 200, **body))["choices"][0]["weight_versions"] == [1, 1]
        config = tmp_path / "judge" / "adapter_config.json"
        before = config.read_text()
        for alpha in ("1e308", "9" * 400, "Infinity", "NaN", "1e400", "9" * 5000):
            config.write_text(json.dumps(json.loads(before) | {"lora_alpha": "ALPHA"}).replace('"ALPHA"', alpha))
            for name in ("judge", "third"):
                said = post(load, 400, lora_name=name, lora_path="judge", load_inplace=True)
                assert "adapter_config.json" in said, said
        config.write_text(before)
        check("judge", "poet", None)
        for value, status in ((float("nan"), 409), (1e30, 200)):
            lora.save(tmp_path / "judge", spec, tree_map_only(Tensor, lambda x, v=value: x * v, trees["judge"]))
            post(load, status, lora_name="judge", lora_path="judge", load_inplace=True)
            if status == 200:
                for stream in (False, True):
                    said = post("/v1/completions", 200 if stream else 500, model="judge", prompt="x", stream=stream)
                    assert "NaN or infinite" in said and "engine_error" in said
            check(None, "poet")
        lora.save(tmp_path / "judge", spec, trees["judge"])
        post(load, 200, lora_name="judge", lora_path="judge", load_inplace=True)
        check("judge", "poet", None)
        with server.http.stream("POST", "/v1/completions", json={"model": "judge", "prompt": "x", "stream": True,
                                "max_tokens": 400, "n": 90, "ignore_eos": True}) as stream:  # fmt: skip
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            assert "used by requests" in post(unload, 409, lora_name="judge")
        assert "no model" in post(unload, 404, lora_name="poem")
        server.until(lambda: server.status()["running"] == 0)
        post(unload, 200, lora_name="judge")
        assert "own name" in post(unload, 400, lora_name="tiny")
        post("/v1/completions", 404, model="judge", prompt="x")
        check("poet")
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora-dir", "."], "no adapter can be loaded; add max_adapters=N"),
        (["--lora-dir", "nowhere", "max_adapters=1"], "no folder nowhere"),
        (["--lora", "poet"], "NAME=PATH"),
        (["--lora", "debug=FOLDER"], "the model's own name"),
        (["--lora", "x=FOLDER", "--lora", "x=FOLDER"], "each name once"),
        (["--lora", "x=no/such/folder"], "no/such/folder"),
    ],
)
def test_serve_refuses(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Invalid options are refused before anything starts."""
    lora.save(tmp_path, SPEC, ADAPTERS["all"])
    assert serve.main(["debug", *(word.replace("FOLDER", str(tmp_path)) for word in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_serve_makes_room(tmp_path: Path) -> None:
    """The server allocates the capacity that its adapters need, unless configured."""
    lora.save(tmp_path, SPEC, ADAPTERS["wide"])
    words = ["debug", "--lora", f"x={tmp_path}"]
    assert serve.configure(parsers.serve_parser().parse_args(words))[0].lora == LoraConfig(max_adapters=1, max_rank=8)
    config, _ = serve.configure(parsers.serve_parser().parse_intermixed_args([*words, "lora.max_adapters=5"]))
    assert config.lora == LoraConfig(max_adapters=5, max_rank=8)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, "meta"])
def test_adapters_of_other_dtypes(kind: Any) -> None:
    """Adapters of integers or booleans are refused: a cast would change their meaning."""
    spec = from_hf_config(tiny.config())
    adapter = tree_map_only(Tensor, lambda x: x.to(kind), lora.init(spec, 4))
    with fastgen.Engine(tiny.weights(spec), spec, max_adapters=1, cache_tokens=256, page_size=16) as engine:
        with pytest.raises(ValueError, match=r"adapter 'a': layers\.0\.q\.a is .* must be of floating point"):
            engine.add_adapter("a", adapter)
        assert engine.adapters == {}
