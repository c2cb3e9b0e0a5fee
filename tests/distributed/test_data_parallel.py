"""Several engines behind one queue: the tokens of one engine, an even load, and an end of all of them when one ends."""

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

LIMIT = 10  # seconds within which everything ends
SETTINGS: dict[str, Any] = {
    "page_size": 16, "cache_tokens": 4096, "max_num_seqs": 8, "token_budget": 128, "seed": 5, "device": "cpu",
    "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def poet(model: Path) -> Path:
    """An adapter's files."""
    spec, folder = fastgen.from_hf_config(json.loads((model / "config.json").read_text())), model.parent / "poet"
    lora.save(folder, spec, adapter(spec, "all"))
    return folder


@pytest.fixture(scope="module")
def pair(model: Path, poet: Path) -> Iterator[Replicas]:
    with Replicas.from_pretrained(model, adapters={"poet": poet}, **SETTINGS) as both:
        yield both
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("replica")]


def load(count: int, seed: int = 1) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that begin alike, drawn with seeds of the queue's own."""
    r = random.Random(seed)
    stems = [[r.randrange(300) for _ in range(n)] for n in (40, 20, 0)]
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"n": 3}, {"logprobs": 2, "top_k": 9}, {"prompt_logprobs": 1}]
    prompts = [r.choice(stems) + [r.randrange(300) for _ in range(r.randrange(1, 30))] for _ in range(count)]
    return prompts, [SamplingParams(**r.choice(kinds), max_tokens=r.randrange(1, 20)) for _ in range(count)]


def said(outputs: list[fastgen.Output]) -> list[Any]:
    return [(o.prompt_token_ids, [(c.token_ids, c.text, c.finish_reason) for c in o.completions]) for o in outputs]


def test_outputs(pair: Replicas, model: Path) -> None:
    """In the order of the prompts: those of one engine, whose seeds are drawn in the same order."""
    ids = pair.generate([[1]] * 2, SamplingParams(max_tokens=1))  # whatever was before
    first = pair._seed_rng.getstate()
    got = pair.generate(*load(60), progress=False)
    with fastgen.Engine.from_pretrained(model, **SETTINGS) as alone:
        alone._seed_rng.setstate(first)
        want = alone.generate(*load(60), progress=False)
    assert said(got) == said(want)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.logprobs == (None if y.logprobs is None else pytest.approx(y.logprobs, abs=1e-4))
    assert [o.request_id for o in got] == list(range(ids[-1].request_id + 1, ids[-1].request_id + 61))
    assert all(f["steps"] > 10 and f["prefix_hits"] for f in pair.replica_stats)  # both have worked
    assert pair.stats()["steps"] == sum(stats["steps"] for stats in pair.replica_stats)
    assert not pair.has_unfinished_requests and pair._router.assigned_tokens == [0, 0] == pair._router.num_assigned_seqs


def test_adapters(pair: Replicas, model: Path, poet: Path) -> None:
    """Every replica has them; another name is refused before any is told."""
    with pytest.raises(ValueError, match="unknown adapter 'poem'; did you mean poet"):
        pair.add([1], SamplingParams(adapter="poem"))
    sampling = [SamplingParams(temperature=0, max_tokens=6, adapter=name) for name in (None, "poet")] * 4
    got = pair.generate([[5, 6, 7]] * 8, sampling, progress=False)
    with fastgen.Engine.from_pretrained(model, adapters={"poet": poet}, **SETTINGS) as alone:
        assert alone.config.lora == LoraConfig(max_adapters=1, max_rank=4)
        want = alone.generate([[5, 6, 7]] * 8, sampling, progress=False)
        assert said(got) == said(want) and said(got)[0] != said(got)[1]
        spec, mine = alone.model_config, adapter(alone.model_config, "some", 5)
        for engine in (alone, pair):
            with pytest.raises(ValueError, match="raise lora.max_adapters"):
                engine.add_adapter("mine", mine)
            engine.remove_adapter("poet")
            engine.add_adapter("mine", adapter(spec, "some", 6))
            engine.update_adapter("mine", mine)
        sampling = [SamplingParams(temperature=0, max_tokens=6, adapter=name) for name in (None, "mine")] * 4
        got = pair.generate([[5, 6, 7]] * 8, sampling, progress=False)
        assert said(got) == said(alone.generate([[5, 6, 7]] * 8, sampling, progress=False))
        assert [{*o.completions[0].weight_versions} for o in got] == [{0}, {1}] * 4
    id = pair.add([1], sampling[1])
    with pytest.raises(ValueError, match=rf"used by requests \[{id}\]"):
        pair.remove_adapter("mine")
    with pytest.raises(ValueError, match="layer 0"):
        pair.update_adapter("mine", adapter(spec, "all"))
    while pair.has_unfinished_requests:
        pair.step()
    pair.remove_adapter("mine")
    assert not pair.adapters
    pair.add_adapter("poet", lora.load(poet, spec, device="cpu"))


def test_salts_go_where_their_prefix_is(pair: Replicas) -> None:
    """A prompt that was seen with another salt is cached nowhere for this one."""
    prompt = [*range(9, 9 + 2 * pair.config.kv_cache.page_size)]
    keys = len(pair._router._prefix_replicas)
    for salt, found in (("a", False), ("b", False), ("a", True), ("b", True)):
        (output,) = pair.generate([prompt], SamplingParams(max_tokens=1, cache_salt=salt), progress=False)
        assert (output.num_cached_tokens > 0) == found
    assert len(pair._router._prefix_replicas) == keys + 2


def test_stream_and_abort(pair: Replicas) -> None:
    """Events as they come; what waits and what runs can be aborted, and others' events are kept for them."""
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    mine = [pair.add([i, 2, 3], long) for i in range(30)]  # more than have room
    assert len(pair._router.waiting) == 10
    while not any(e.token_ids for e in pair.step()):
        pass
    for id in mine:
        pair.abort(id)
    texts: dict[int, str] = {}
    for event in pair.stream(["Hello", "again"], SamplingParams(max_tokens=5)):
        texts[event.request_id] = texts.get(event.request_id, "") + event.text
        if event.output is not None:
            assert event.output.completions[0].text == texts[event.request_id]
    ended = {e.request_id: e.output for e in pair._pending_events if e.output is not None}
    while pair.has_unfinished_requests:
        ended |= {e.request_id: e.output for e in pair.step() if e.output is not None}
    assert ended.keys() == set(mine) and {o.completions[0].finish_reason for o in ended.values()} == {"abort"}
    assert any(o.completions[0].token_ids for o in ended.values())


def test_a_stream_that_is_dropped(pair: Replicas) -> None:
    events = pair.stream([[1, 2], [3, 4]], SamplingParams(max_tokens=400, ignore_eos=True))
    next(iter(events))
    del events
    gc.collect()
    pair.stream([5, 6], SamplingParams(max_tokens=400, ignore_eos=True))
    while pair.has_unfinished_requests:
        assert not pair.step()
    assert pair._router.assigned_tokens == [0, 0]


def test_wrong_requests(pair: Replicas) -> None:
    """Are refused here, with the numbers; nothing is queued."""
    with pytest.raises(ValueError, match="prompt 1: .* do not fit"):
        pair.generate([[1], [1] * 600])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        pair.add([999])
    with pytest.raises(ValueError, match="2 sampling settings for 1 prompts"):
        pair.generate([1], [SamplingParams()] * 2)
    assert not pair.has_unfinished_requests


def test_an_interrupt(pair: Replicas) -> None:
    """Ends what was asked for, and the replicas go on."""
    want = said(pair.generate([[1, 2], [3]], SamplingParams(temperature=0, max_tokens=9), progress=False))
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            pair.generate([[1, 2]] * 20, SamplingParams(max_tokens=300, ignore_eos=True), progress=False)
    assert said(pair.generate([[1, 2], [3]], SamplingParams(temperature=0, max_tokens=9), progress=False)) == want
    while (
        pair.has_unfinished_requests
    ):  # a replica that had none of these may still be telling what it has ended, which is nobody's
        assert not pair.step()


@pytest.mark.parametrize(
    ("load", "room", "seen", "cost", "want"),
    [
        ([5, 3, 9], [True] * 3, (), 1, 1),
        ([5, 3, 9], [True, False, True], (), 1, 0),
        ([5, 3], [False, False], (), 1, None),
        ([5, 3, 9], [True] * 3, {0}, 1, 0),  # a little busier
        ([8, 3, 9], [True] * 3, {0}, 1, 1),  # much busier
        ([8, 3, 9], [True] * 3, {0, 2}, 2, 0),
        ([8, 3, 9], [False, True, True], {0}, 2, 1),
    ],
)
def test_choose(load: list[int], room: list[bool], seen: set[int], cost: int, want: int | None) -> None:
    assert router.choose_replica(load, room, seen, cost) == want


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [data_parallel.visible_devices(i, 2, 8) for i in range(4)] == ["0,1", "2,3", "4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-a,5,1")
    assert [data_parallel.visible_devices(i, 1, 4) for i in range(4)] == ["3", "GPU-a", "5", "1"]


def test_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any process starts."""
    for make in (fastgen.Engine.from_pretrained, Replicas.from_pretrained):
        with pytest.raises(ValueError, match="between 1 and 64"):
            make(model, replicas=0)
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
    """Two ranks each: the tokens are the same, and the call that runs says which process ended."""
    both = Replicas.from_pretrained(model, tensor_parallel=2, **SETTINGS)
    with fastgen.Engine.from_pretrained(model, **SETTINGS) as alone:
        want = said(alone.generate(*load(12), progress=False))
    assert said(both.generate(*load(12), progress=False)) == want
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
        with pytest.raises(RuntimeError, match=cause):  # and so does whatever is tried later
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


@pytest.mark.parametrize("victim", ["it", "replica", "interrupt"])
def test_the_end(victim: str, model: Path, tmp_path: Path) -> None:
    """The first process is killed or interrupted, or another is killed: all are gone, with the cause."""
    script = tmp_path / "it.py"
    script.write_text(SCRIPT.format(model=str(model), settings=SETTINGS))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    others = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.5)
    end = time.monotonic() + LIMIT
    if victim == "replica":
        os.kill(others[1], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if victim == "it" else signal.SIGINT)
    _, text = process.communicate(timeout=LIMIT)
    if victim == "replica":
        assert text.rstrip().endswith(f"RuntimeError: replica 1 (process {others[1]}) was killed by SIGKILL")
    if victim == "interrupt":
        assert text.rstrip().endswith("KeyboardInterrupt")

    def alive(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
        except OSError:
            return False

    while any(map(alive, others)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, others))
