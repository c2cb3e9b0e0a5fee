"""Captured steps on a GPU: the same tokens as eager ones, nothing compiled or captured after the start, no leak."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from dynamo import num_compiled_graphs
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgen
from fastgen import SamplingParams, lora
from fastgen.core import scheduler, scheduling_policy

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU"),
    pytest.mark.filterwarnings("default"),  # torch's compiler has some of its own
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 5003,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
SPEC = fastgen.from_hf_config(CONFIG)
SETTINGS: dict[str, Any] = {"cache_tokens": 65536, "max_num_seqs": 96, "token_budget": 2048}


def engine(**settings: Any) -> fastgen.Engine:
    params = fastgen.init(SPEC, 1, device="cuda")
    return fastgen.Engine(params, SPEC, progress=False, **SETTINGS | settings)


def load(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Returns prompts and settings of all types: greedy, sampled, filtered, penalized, with logprobs."""
    r = random.Random(seed)
    prompts = [[r.randrange(5003) for _ in range(r.choice((1, 3, 40, 200, 700)))] for _ in range(count)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8},
        {"temperature": 1.3, "logprobs": 0},
        {"temperature": 0.9, "top_p": 0.8, "top_k": 40},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 0, "prompt_logprobs": 1},
    ]
    return prompts, [
        SamplingParams(**r.choice(kinds), seed=i, max_tokens=r.randrange(1, 60), stop_token_ids=(7, 8, 9))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def wanted() -> list[fastgen.Output]:
    """Returns the outputs of plain eager steps."""
    with engine(compile="eager") as e:
        return e.generate(*load(0, 150), progress=False)


@pytest.mark.parametrize("settings", [{}, {"compile": "inductor"}, {"overlap": False}, {"token_budget": 200}], ids=str)
def test_same_as_eager(settings: dict[str, Any], wanted: list[fastgen.Output]) -> None:
    """In fp32, compiled and captured steps, overlapped or not, in any chunks, have equal tokens and nearly equal
    logprobs."""
    with engine(**settings) as e:
        compiled, captured = num_compiled_graphs(), e.runner.graphs.num_captures
        got = e.generate(*load(0, 150), progress=False)
        assert (num_compiled_graphs(), e.runner.graphs.num_captures) == (compiled, captured), (
            "compiled or captured after the start"
        )
    for a, b in zip(got, wanted, strict=True):
        assert [c.token_ids for c in a.completions] == [c.token_ids for c in b.completions]
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-4))
        assert a.prompt_logprobs == (None if b.prompt_logprobs is None else [None, *map(approx, b.prompt_logprobs[1:])])


def related(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Returns prompts that begin alike, each with several samples: pages are shared, copied, and read in groups."""
    r = random.Random(seed)
    stems = [[r.randrange(5003) for _ in range(n)] for n in (64, 256, 700)]
    prompts = [[*r.choice(stems), *(r.randrange(5003) for _ in range(r.choice((0, 1, 30))))] for _ in range(24)]
    return prompts, [
        SamplingParams(temperature=r.choice((0, 1)), seed=i, n=r.choice((1, 6, 16)), max_tokens=r.randrange(8, 60))
        for i in range(24)
    ]


HIERARCHY = {
    "device": {},
    "alone": {"shared_prefix_attention": False},
    "host": {"offload": "host", "host_gb": 0.05, "cache_tokens": 4096},
    "host only": {"offload": "host", "host_gb": 0.05, "cache_tokens": 8192, "prefix_cache": False},
    "preempted": {"cache_tokens": 3072},
}


@pytest.mark.parametrize("name", HIERARCHY)
def test_hierarchy_same_as_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, pages shared, copied, read in groups, evicted, offloaded, loaded or lost give the same tokens."""
    monkeypatch.setattr(scheduling_policy, "MIN_SAVED_KEYS", 1)
    load_ = related(3)
    with engine(compile="eager", prefix_cache=False) as e:
        wanted = e.generate(*load_, progress=False)
    with engine(**HIERARCHY[name]) as e:
        compiled, captured, grouped = num_compiled_graphs(), e.runner.graphs.num_captures, 0
        for _ in range(2):
            for prompt, params in zip(*load_, strict=True):
                e.add(prompt, params)
            got = {}
            while e.has_unfinished_requests:
                got |= {event.request_id: event.output for event in e.step() if event.output is not None}
                grouped += e.last_batch is not None and e.last_batch.shared_prefix is not None
                scheduler.check(e.state, e.config.schedule)
            for id, b in zip(sorted(got), wanted, strict=True):
                assert [c.token_ids for c in got[id].completions] == [c.token_ids for c in b.completions]
        assert (num_compiled_graphs(), e.runner.graphs.num_captures) == (compiled, captured), (
            "compiled or captured after the start"
        )
        n = e.cache_stats
        assert n.num_hit_tokens and (grouped > 0) is (name in ("device", "host", "preempted"))
        if "host" in name:
            assert n.num_offloaded_pages > 20 and n.num_loaded_pages > 20
        if name == "preempted":
            assert n.num_preemptions and n.num_evicted_pages


def rounding(spec: fastgen.ModelConfig, ways: dict[str, dict[str, Any]]) -> None:
    """Asserts that bf16 engines of several settings are as far from fp32 as the first, and part only at an fp32 tie."""
    params = fastgen.init(spec, 1, device="cuda")
    for w in (params.embed, params.lm_head, *(w for layer in params.layers for w in layer)):
        if w is not None and w.ndim == 2:
            w *= 3  # distributions that are not flat
    half = tree_map_only(torch.Tensor, lambda w: w.bfloat16(), params)
    exact = tree_map_only(torch.Tensor, lambda w: w.float(), half)
    r = random.Random(5)
    prompts = [[r.randrange(5003) for _ in range(r.choice((3, 60, 300)))] for _ in range(64)]
    greedy, found, noise = SamplingParams(temperature=0, max_tokens=64, logprobs=0, ignore_eos=True), {}, {}
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    with fastgen.Engine(exact, spec, progress=False, compile="eager", **SETTINGS) as fp32:
        for how, settings in ways.items():
            with fastgen.Engine(half, spec, progress=False, **SETTINGS | settings) as e:
                found[how] = [o.completions[0] for o in e.generate(prompts, greedy, progress=False)]
            whole = [p + c.token_ids for p, c in zip(prompts, found[how], strict=True)]
            scored = fp32.generate(whole, score, progress=False)
            errors = [
                abs(a - b)
                for p, c, o in zip(prompts, found[how], scored, strict=True)
                for a, b in zip(c.logprobs or (), (o.prompt_logprobs or ())[len(p) :], strict=True)
                if b is not None
            ]
            noise[how] = sum(errors) / len(errors), max(errors)
        print("mean and largest difference from fp32:", noise)
        first, *rest = ways
        for how in rest:
            assert noise[how][0] < 1.25 * noise[first][0] + 1e-4
            parted = 0
            for p, a, b in zip(prompts, found[first], found[how], strict=True):
                at = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), None)
                if at is None:
                    continue
                parted += 1
                common = p + a.token_ids[:at]
                both = fp32.generate([[*common, x.token_ids[at]] for x in (a, b)], score, progress=False)
                one, other = ((o.prompt_logprobs or [0.0])[-1] or 0.0 for o in both)
                assert abs(one - other) < 2 * max(noise[first][1], noise[how][1]), "not a tie"
            print(f"{how}: {parted} of {len(prompts)} answers part")


def test_bf16_differs_by_rounding_only() -> None:
    rounding(SPEC, {"eager": {"compile": "eager"}, "graphs": {}})


def adapter(seed: int, **how: Any) -> fastgen.Adapter:
    made = lora.init(SPEC, seed=seed, device="cuda", **how)
    for i, x in enumerate(lora.parameters(made)):
        x.normal_(0, 0.05, generator=torch.Generator("cuda").manual_seed(1000 * seed + i))
    return made


@pytest.mark.parametrize(
    "settings", [{}, {"token_budget": 200}, {"compile": "inductor"}, {"cache_tokens": 6144}], ids=str
)
def test_adapters_same_as_merged(settings: dict[str, Any]) -> None:
    """In fp32, requests of adapters added, trained and replaced after the capture have merged weights' outputs."""
    params, (prompts, sampling) = fastgen.init(SPEC, 1, device="cuda"), load(5, 96)
    for w in (params.embed, params.lm_head, *(w for layer in params.layers for w in layer)):
        if w is not None and w.ndim == 2:
            w *= 3  # distributions that are not flat: the two sums round differently
    trees = {
        "all": adapter(1, rank=16),
        "some": adapter(2, rank=5, target_modules=("q_proj", "v_proj", "down_proj")),
        "wide": adapter(3, rank=24, target_modules=("o_proj", "gate_proj")),
    }
    names = [random.Random(i).choice((None, *trees)) for i in range(len(prompts))]
    each = [replace(p, adapter=name) for p, name in zip(sampling, names, strict=True)]
    room: dict[str, Any] = {"max_adapters": 4, "max_rank": 24}
    with fastgen.Engine(params, SPEC, progress=False, **SETTINGS | room | settings) as e:
        compiled, captured = num_compiled_graphs(), e.runner.graphs.num_captures
        views = {name: e.add_adapter(name, tree) for name, tree in trees.items()}
        where = [x.data_ptr() for tree in views.values() for x in lora.parameters(tree)]
        for change in (None, "all", "some"):
            if change == "all":  # in place, as an optimizer does
                for x in lora.parameters(views["all"]):
                    x.mul_(-1)
                e.update_adapter("all")
            elif change == "some":
                e.remove_adapter("some")
                views["some"] = e.add_adapter("some", adapter(9, rank=8, alpha=4))
            got = e.generate(prompts, each, progress=False)
            for name in (None, *views):
                some = [i for i, x in enumerate(names) if x == name]
                plain = params if name is None else lora.merge(params, SPEC, views[name])
                with fastgen.Engine(plain, SPEC, progress=False, **SETTINGS, compile="eager") as merged:
                    wanted = merged.generate([prompts[i] for i in some], [sampling[i] for i in some], progress=False)
                for i, b in zip(some, wanted, strict=True):
                    for x, y in zip(got[i].completions, b.completions, strict=True):
                        assert x.token_ids == y.token_ids, (change, name, i)
                        assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-3))
        kept = [x.data_ptr() for name in ("all", "wide") for x in lora.parameters(views[name])]
        assert set(kept) <= set(where)
        assert (num_compiled_graphs(), e.runner.graphs.num_captures) == (compiled, captured), (
            "compiled or captured after the start"
        )


def approx(x: float | None) -> Any:
    return pytest.approx(x, abs=1e-4)


def test_many_mixed_steps() -> None:
    """Through thousands of steps with random arrivals, lengths and aborts, every token is eager's, and no page or byte
    is lost."""
    steps, r = 10_000, random.Random(1)
    with engine(cache_tokens=16384) as e:
        started, done, aborted = dict[int, tuple[list[int], SamplingParams]](), list[fastgen.Output](), set[int]()
        compiled, captured, memory = num_compiled_graphs(), e.runner.graphs.num_captures, 0
        for step in range(steps):
            if len(started) - len(done) < 60 and r.random() < 0.5:
                (prompt,), (params,) = load(step, 1)
                started[e.add(prompt, params)] = prompt, params
            if r.random() < 0.02 and (running := e.state.running):
                id = (
                    e.core.sequence_states[r.choice(running).id].output.request_id
                    if running[0].id in e.core.sequence_states
                    else None
                )
                if id is not None:
                    aborted.add(id)
                    e.abort(id)
            done += [event.output for event in e.step() if event.output is not None]
            if step % 100 == 0:
                scheduler.check(e.state, e.config.schedule)
            if step == 1000:
                memory = torch.cuda.memory_allocated()
        while e.has_unfinished_requests:
            done += [event.output for event in e.step() if event.output is not None]
        assert (num_compiled_graphs(), e.runner.graphs.num_captures) == (compiled, captured)
        assert torch.cuda.memory_allocated() <= memory + 2**24
        assert sorted(o.request_id for o in done) == sorted(started)
    chosen = random.Random(2).sample(done, 300)
    with engine(compile="eager") as e:
        replay = e.generate([started[o.request_id][0] for o in chosen], [started[o.request_id][1] for o in chosen])
    for a, b in zip(chosen, replay, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            n = len(x.token_ids)
            assert x.token_ids == y.token_ids[:n] and (n == len(y.token_ids) or a.request_id in aborted)


def test_memory_fits_the_fraction() -> None:
    """The cache takes the rest of the memory fraction, and the largest steps still fit."""
    with engine(cache_tokens=None, gpu_memory_utilization=0.5) as e:
        e.generate([[1] * 2000] * 96, SamplingParams(max_tokens=20, ignore_eos=True), progress=False)
        free, total = torch.cuda.mem_get_info()
        assert e.cache_capacity == 96 * 4096 or 0.45 * total < total - free < 0.51 * total
    with pytest.raises(ValueError, match="token_budget"):
        engine(cache_tokens=None, gpu_memory_utilization=0.01, token_budget=2**18)


POISONED = {
    "graphs": {},
    "inductor": {"compile": "inductor"},
    "eager": {"compile": "eager"},
    "deterministic": {"batch_invariant": True},
    "host": {"offload": "host", "host_gb": 0.05, "cache_tokens": 4096},
    "adapters": {"max_adapters": 2, "max_rank": 8},
}


@pytest.mark.parametrize("name", POISONED)
def test_what_memory_held_before_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN in every page, scratch included, in host pages, the graphs' logits and adapters' free slots, tokens and
    logprobs are the same as with zeros: alone, in groups, and from cached pages."""
    monkeypatch.setattr(scheduling_policy, "MIN_SAVED_KEYS", 1)
    work = [load(2, 60), related(5)]
    with engine(**POISONED[name]) as clean, engine(**POISONED[name]) as poisoned:
        shelf = [] if poisoned.runner.adapters is None else tree_leaves(poisoned.runner.adapters.layers)
        logits = [] if poisoned.runner.logits_buffer is None else [poisoned.runner.logits_buffer]
        for x in (*tree_leaves(poisoned.cache), *poisoned.page_copier.host_buffers, *logits, *(x[1:] for x in shelf)):
            x.fill_(float("nan"))
        for some in (*work, *work):
            found, wanted = (e.generate(*some, progress=False) for e in (poisoned, clean))
            for a, b in zip(found, wanted, strict=True):
                for x, y in zip(a.completions, b.completions, strict=True):
                    assert (x.token_ids, x.finish_reason) == (y.token_ids, y.finish_reason)
                    assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-5))


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}, {"overlap": False}], ids=str)
def test_parameters_of_nan_and_then_good_ones(settings: dict[str, Any]) -> None:
    """Requests of every type end with an error under parameters of NaN; after an update to good ones all is well."""
    work = load(4, 60)
    with engine(**settings) as one:
        wanted = one.generate(*work, progress=False)
        good = tree_map_only(torch.Tensor, torch.clone, one.params)
        one.update_params(tree_map_only(torch.Tensor, lambda w: w * float("nan"), good), check_finite=False)
        found = [c for o in one.generate(*work, progress=False) for c in o.completions]
        assert all((c.finish_reason, c.token_ids) == ("error", []) for c in found)
        with pytest.raises(ValueError, match="NaN or infinite values"):
            one.update_params(one.params)
        one.update_params(good)
        again = one.generate(*work, progress=False)
    assert [o.completions[0].token_ids for o in again] == [o.completions[0].token_ids for o in wanted]
