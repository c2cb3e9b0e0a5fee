"""Several engines behind one queue: the tokens of one engine, an even load, and the end of all when one ends."""

import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import checkpoint
from test_lora import adapter

import fastgen
from fastgen import Replicas, SamplingParams, lora
from fastgen.config import LoraConfig
from fastgen.distributed import data_parallel, router

LIMIT = 10  # seconds within which all processes end
SETTINGS: dict[str, Any] = {
    "page_size": 16, "cache_tokens": 4096, "max_num_seqs": 8, "token_budget": 128, "seed": 5, "device": "cpu",
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def poet(model: Path) -> Path:
    """Returns the folder of an adapter's files."""
    spec, folder = fastgen.from_hf_config(json.loads((model / "config.json").read_text())), model.parent / "poet"
    lora.save(folder, spec, adapter(spec, "all"))
    return folder


@pytest.fixture(scope="module")
def pair(model: Path, poet: Path) -> Iterator[Replicas]:
    with Replicas.from_pretrained(model, adapters={"poet": poet}, **SETTINGS) as both:
        yield both
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("replica")]


def load(count: int, seed: int = 1) -> tuple[list[list[int]], list[SamplingParams]]:
    """Returns prompts with shared prefixes, and their settings, without seeds."""
    r = random.Random(seed)
    prefixes = [[r.randrange(300) for _ in range(n)] for n in (40, 20, 0)]
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"n": 3},
        {"logprobs": 2, "top_k": 9},
        {"prompt_logprobs": 1},
        {"allowed_token_ids": range(40, 90), "bad_words": ["A"]},
    ]
    prompts = [r.choice(prefixes) + [r.randrange(300) for _ in range(r.randrange(1, 30))] for _ in range(count)]
    return prompts, [SamplingParams(**r.choice(settings), max_tokens=r.randrange(1, 20)) for _ in range(count)]


def results(outputs: list[fastgen.Output]) -> list[Any]:
    return [(o.prompt_token_ids, [(c.token_ids, c.text, c.finish_reason) for c in o.completions]) for o in outputs]


def test_outputs(pair: Replicas, model: Path) -> None:
    """Outputs are in the order of the prompts, and those of one engine, which chooses the same seeds."""
    ids = pair.generate([[1]] * 2, SamplingParams(max_tokens=1))  # ids continue from these
    first = pair._seed_rng.getstate()
    actual = pair.generate(*load(60), progress=False)
    with fastgen.Engine.from_pretrained(model, **SETTINGS) as alone:
        alone.core._seeds.setstate(first)
        expected = alone.generate(*load(60), progress=False)
    assert results(actual) == results(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-4))
    assert [o.request_id for o in actual] == list(range(ids[-1].request_id + 1, ids[-1].request_id + 61))
    assert all(stats["steps"] > 10 and stats["prefix_hits"] for stats in pair.replica_stats)
    assert pair.stats()["steps"] == sum(stats["steps"] for stats in pair.replica_stats)
    assert not pair.has_unfinished_requests and pair._router.assigned_tokens == [0, 0] == pair._router.num_assigned_seqs


def test_adapters(pair: Replicas, model: Path, poet: Path) -> None:
    """Every replica has the adapters; an unknown name is refused before any replica receives the request."""
    with pytest.raises(ValueError, match="unknown adapter 'poem'; did you mean poet"):
        pair.add([1], SamplingParams(adapter="poem"))
    sampling = [SamplingParams(temperature=0, max_tokens=6, adapter=name) for name in (None, "poet")] * 4
    actual = pair.generate([[5, 6, 7]] * 8, sampling, progress=False)
    with fastgen.Engine.from_pretrained(model, adapters={"poet": poet}, **SETTINGS) as alone:
        assert alone.config.lora == LoraConfig(max_adapters=1, max_rank=4)
        expected = alone.generate([[5, 6, 7]] * 8, sampling, progress=False)
        assert results(actual) == results(expected) and results(actual)[0] != results(actual)[1]
        spec, new = alone.model_config, adapter(alone.model_config, "some", 5)
        for engine in (alone, pair):
            with pytest.raises(ValueError, match="raise lora.max_adapters"):
                engine.add_adapter("new", new)
            engine.remove_adapter("poet")
            engine.add_adapter("new", adapter(spec, "some", 6))
            engine.update_adapter("new", new)
        sampling = [SamplingParams(temperature=0, max_tokens=6, adapter=name) for name in (None, "new")] * 4
        actual = pair.generate([[5, 6, 7]] * 8, sampling, progress=False)
        assert results(actual) == results(alone.generate([[5, 6, 7]] * 8, sampling, progress=False))
        assert [{*o.completions[0].weight_versions} for o in actual] == [{0}, {1}] * 4
    id = pair.add([1], sampling[1])
    with pytest.raises(ValueError, match=rf"used by requests \[{id}\]"):
        pair.remove_adapter("new")
    with pytest.raises(ValueError, match="layer 0"):
        pair.update_adapter("new", adapter(spec, "all"))
    while pair.has_unfinished_requests:
        pair.step()
    pair.remove_adapter("new")
    assert not pair.adapters
    pair.add_adapter("poet", lora.load(poet, spec, device="cpu"))


def test_requests_go_where_prefix_and_salt_are_cached(pair: Replicas) -> None:
    """A prompt that was computed with another salt is not a cache hit for this one."""
    prompt = [*range(9, 9 + 2 * pair.config.kv_cache.page_size)]
    num_prefixes = len(pair._router._prefix_replicas)
    for salt, is_hit in (("a", False), ("b", False), ("a", True), ("b", True)):
        (output,) = pair.generate([prompt], SamplingParams(max_tokens=1, cache_salt=salt), progress=False)
        assert (output.num_cached_tokens > 0) == is_hit
    assert len(pair._router._prefix_replicas) == num_prefixes + 2


def test_outputs_without_text(pair: Replicas) -> None:
    """Each request may go without text, and all do where the parent's tokenizer was removed; no later one does."""
    greedy, coder = SamplingParams(temperature=0, max_tokens=5), pair.tokenizer
    settings = [greedy, replace(greedy, detokenize=False)] * 3
    outputs = pair.generate([[5, 6, 7]] * 6, settings, progress=False)
    pair.tokenizer = None
    outputs += pair.generate([[5, 6, 7]], greedy, progress=False)
    pair.tokenizer = coder
    outputs += pair.generate([[5, 6, 7]], greedy, progress=False)
    assert len({tuple(o.completions[0].token_ids) for o in outputs}) == 1
    assert [bool(o.completions[0].text) for o in outputs] == [True, False] * 3 + [False, True]


def test_stream_and_abort(pair: Replicas) -> None:
    """Streams yield their own events only; waiting and running requests can be aborted."""
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    ids = [pair.add([i, 2, 3], long) for i in range(30)]  # more than the replicas take at once
    assert len(pair._router.waiting) == 10
    while not any(e.token_ids for e in pair.step()):
        pass
    for id in ids:
        pair.abort(id)
    texts: dict[int, str] = {}
    for event in pair.stream(["Hello", "again"], SamplingParams(max_tokens=5)):
        texts[event.request_id] = texts.get(event.request_id, "") + event.text
        if event.output is not None:
            assert event.output.completions[0].text == texts[event.request_id]
    ended = {e.request_id: e.output for e in pair.events if e.output is not None}
    while pair.has_unfinished_requests:
        ended |= {e.request_id: e.output for e in pair.step() if e.output is not None}
    assert ended.keys() == set(ids) and {o.completions[0].finish_reason for o in ended.values()} == {"abort"}
    assert any(o.completions[0].token_ids for o in ended.values())


def test_a_dropped_stream_aborts_its_requests(pair: Replicas) -> None:
    events = pair.stream([[1, 2], [3, 4]], SamplingParams(max_tokens=400, ignore_eos=True))
    next(iter(events))
    del events
    gc.collect()
    pair.stream([5, 6], SamplingParams(max_tokens=400, ignore_eos=True))
    while pair.has_unfinished_requests:
        assert not pair.step()
    assert pair._router.assigned_tokens == [0, 0]


def test_wrong_requests(pair: Replicas) -> None:
    """Requests that no replica can run are refused before they are queued."""
    with pytest.raises(ValueError, match="prompt 1: .* do not fit"):
        pair.generate([[1], [1] * 600])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        pair.add([999])
    with pytest.raises(ValueError, match="2 sampling settings for 1 prompts"):
        pair.generate([1], [SamplingParams()] * 2)
    assert not pair.has_unfinished_requests


def test_an_interrupt(pair: Replicas) -> None:
    """Ctrl-C aborts the running requests, and the replicas can be used further."""
    greedy = SamplingParams(temperature=0, max_tokens=9)
    expected = results(pair.generate([[1, 2], [3]], greedy, progress=False))
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            pair.generate([[1, 2]] * 20, SamplingParams(max_tokens=300, ignore_eos=True), progress=False)
    assert results(pair.generate([[1, 2], [3]], greedy, progress=False)) == expected
    while pair.has_unfinished_requests:  # a replica may still report the events of aborted requests
        assert not pair.step()


@pytest.mark.parametrize(
    ("load", "accepts", "cached", "num_tokens", "expected"),
    [
        ([5, 3, 9], [True] * 3, (), 1, 1),
        ([5, 3, 9], [True, False, True], (), 1, 0),
        ([5, 3], [False, False], (), 1, None),
        ([5, 3, 9], [True] * 3, {0}, 1, 0),  # a slightly larger load
        ([8, 3, 9], [True] * 3, {0}, 1, 1),  # a much larger load
        ([8, 3, 9], [True] * 3, {0, 2}, 2, 0),
        ([8, 3, 9], [False, True, True], {0}, 2, 1),
    ],
)
def test_choose_replica(
    load: list[int], accepts: list[bool], cached: set[int], num_tokens: int, expected: int | None
) -> None:
    assert router.choose_replica(load, accepts, cached, num_tokens) == expected


def test_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [data_parallel.visible_devices(i, 2, 8) for i in range(4)] == ["0,1", "2,3", "4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-a,5,1")
    assert [data_parallel.visible_devices(i, 1, 4) for i in range(4)] == ["3", "GPU-a", "5", "1"]


def test_refused_layouts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts that cannot work are refused before any process starts."""
    for create in (fastgen.Engine.from_pretrained, Replicas.from_pretrained):
        with pytest.raises(ValueError, match="between 1 and 64"):
            create(model, replicas=0)
    with pytest.raises(ValueError, match="parallel.replicas=2 are several engines: use fastgen.Replicas"):
        fastgen.Engine.from_pretrained(model, replicas=2)
    spec, params = fastgen.load(model, device="cpu", progress=False)
    with pytest.raises(ValueError, match="use fastgen.Replicas"):
        fastgen.Engine(params, spec, replicas=2)
    with pytest.raises(ValueError, match="possible: 1, 2"):
        Replicas.from_pretrained(model, device="cpu", tensor_parallel=3)
    with pytest.raises(ValueError, match="got 'cuda:1'"):
        Replicas.from_pretrained(model, device="cuda:1")
    if torch.cuda.device_count() < 64:
        with pytest.raises(ValueError, match=r"replicas=32 of .*=2 need 64 GPUs, and this machine shows"):
            Replicas.from_pretrained(model, replicas=32, tensor_parallel=2, device="cuda")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="RANK says that torchrun started this one"):
        Replicas.from_pretrained(model, device="cpu")


def test_a_replica_cannot_start(model: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"replica \d \(process \d+\) failed: offload.host_gb=1e-06 holds not even"):
        Replicas.from_pretrained(model, offload="host", host_gb=1e-6, **SETTINGS)
    assert time.monotonic() - began < 30


def endless(engine: Replicas) -> None:
    while True:
        engine.generate([[i] for i in range(20)], SamplingParams(max_tokens=50), progress=False)


def test_a_rank_of_a_replica_is_killed(model: Path) -> None:
    """Replicas of two ranks sample the same tokens; if a rank is killed, the running call names it."""
    both = Replicas.from_pretrained(model, tensor_parallel=2, **SETTINGS)
    with fastgen.Engine.from_pretrained(model, **SETTINGS) as alone:
        expected = results(alone.generate(*load(12), progress=False))
    assert results(both.generate(*load(12), progress=False)) == expected
    (pid,) = Path(f"/proc/{both._children[1].pid}/task/{both._children[1].pid}/children").read_text().split()[-1:]
    began = [0.0]

    def kill() -> None:
        began[0] = time.monotonic()
        os.kill(int(pid), signal.SIGKILL)

    threading.Timer(0.5, kill).start()
    cause = rf"replica 1 \(process \d+\) failed: rank 1 \(process {pid}\) was killed by SIGKILL"
    with pytest.raises(RuntimeError, match=cause):
        endless(both)
    assert time.monotonic() - began[0] < LIMIT and not both.has_unfinished_requests
    for call in (both.step, lambda: both.add([1])):
        with pytest.raises(RuntimeError, match=cause):  # and so do later calls
            call()
    assert not any(child.is_alive for child in both._children)


SCRIPT = """
import fastgen
if __name__ == "__main__":
    both = fastgen.Replicas.from_pretrained({model!r}, **{settings!r})
    print(*(p.pid for p in both._children), flush=True)
    while True:
        both.generate([[i] for i in range(20)], fastgen.SamplingParams(max_tokens=50), progress=False)
"""


@pytest.mark.parametrize("victim", ["parent", "replica", "interrupt"])
def test_the_end(victim: str, model: Path, tmp_path: Path) -> None:
    """If the parent is killed or interrupted, or a replica is killed, all processes end, with the cause."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(model), settings=SETTINGS))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.5)
    end = time.monotonic() + LIMIT
    if victim == "replica":
        os.kill(pids[1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if victim == "parent" else signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT)
    if victim == "replica":
        assert stderr.rstrip().endswith(f"RuntimeError: replica 1 (process {pids[1]}) was killed by SIGKILL")
    if victim == "interrupt":
        assert stderr.rstrip().endswith("KeyboardInterrupt")

    def alive(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
        except OSError:
            return False

    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))
