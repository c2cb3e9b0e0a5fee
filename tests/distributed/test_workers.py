"""Tensor-parallel ranks as processes: the tokens of one process; if one rank ends, all end soon, with the cause."""

import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from ranks import SETTINGS, SPEC, endless, engine, late, listening, load, tokens, weights
from torch.utils._pytree import tree_leaves, tree_map

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint.weights import named_weights
from fastgen.distributed import rendezvous, workers

LIMIT = 10  # seconds within which all processes end
LOOPBACK = "0100007F"  # 127.0.0.1, as /proc/net/tcp has it


def active_ranks() -> list[Any]:
    return [p for p in multiprocessing.active_children() if p.name.startswith("rank")]


@pytest.fixture(autouse=True)
def no_leftover_ranks() -> Iterator[None]:
    """Checks that no rank outlives its engine."""
    yield
    end = time.monotonic() + 5
    while (ranks := active_ranks()) and time.monotonic() < end:
        time.sleep(0.05)
    group = workers.WorkerGroup.active
    if group is not None:  # the test failed
        group.close()
    assert not ranks and group is None


def test_outputs(tmp_path: Path) -> None:
    """Two ranks return what one rank returns, for all calls."""

    def calls(e: fastgen.Engine) -> list[Any]:
        results: list[Any] = [tokens(e.generate(*load(1, 8), progress=False))]
        with pytest.raises(ValueError, match="do not fit"):
            e.generate([[1, 2], [1] * 500], progress=False)
        first = e.add([5, 6, 7], SamplingParams(max_tokens=30, temperature=0.8))  # the engine chooses the seed
        second = e.add([5, 6, 9], SamplingParams(max_tokens=30))
        third = e.add([5, 6, 8], SamplingParams(max_tokens=10))
        for _ in range(4):
            e.step()
        aborted = e.abort(second)
        assert aborted is not None
        with pytest.raises(ValueError, match="not running"):
            e.fork(99)
        copies, saved = e.fork(first, 2, seeds=[1, 2]), e.snapshot(first)
        again = e.restore(saved)
        e.params_changed()
        outputs = {}
        while e.has_unfinished_requests:
            outputs |= {x.request_id: x.output for x in e.step() if x.output}
        results += [first, copies, again, third, sorted(outputs)]
        results += [tokens([outputs[i]]) for i in (first, *copies, again, third)]
        return [*results, tokens(e.generate(*load(2, 4), progress=False))]

    with fastgen.Engine(weights(), SPEC, **SETTINGS) as alone:
        expected = calls(alone)
    with engine() as e:
        assert e.tp_group is not None and e.tp_group.shard.size == 2
        pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children() if p.pid)]
        assert len(pids) == 2 and all(listening(pid) <= {LOOPBACK} for pid in pids)  # unreachable from other machines
        with pytest.raises(ValueError, match="already runs an engine"):
            engine()
        actual = calls(e)
    assert actual == expected

    fastgen.save(tmp_path, SPEC, weights())
    with fastgen.Engine.from_pretrained(tmp_path, device="cpu", tensor_parallel=2, **SETTINGS) as e:
        assert tokens(e.generate(*load(1, 8), progress=False)) == expected[0]


def test_update_and_score() -> None:
    """All ranks get new parameters from any source of full tensors; a wrong source is refused and ends nothing."""
    new, name = weights(1), "model.layers.0.mlp.down_proj.weight"
    pairs = [(n, t.double()) for n, t in named_weights(new, SPEC)]
    prompts = load(1, 5)
    with fastgen.Engine(weights(1), SPEC, **SETTINGS) as alone:
        updated = tokens(alone.generate(*prompts, progress=False))
        alone.update_params({name: alone.params.layers[0].down * 2}, partial=True)
        partially_updated = tokens(alone.generate(*prompts, progress=False))
    assert updated != partially_updated

    def failing(error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
        yield pairs[0]
        raise error

    trained = tree_map(lambda x: x if x is None else x.requires_grad_(), weights())  # like those of a trainer
    with fastgen.Engine(trained, SPEC, tensor_parallel=2, **SETTINGS) as e:
        assert not any(x.requires_grad for x in tree_leaves(e.params) if x is not None)
        before = tokens(e.generate(*prompts, progress=False))
        assert before != updated
        for i, source in enumerate((new, dict(pairs), iter(pairs))):
            assert e.update_params(source) == 2 * i + 1
            assert tokens(e.generate(*prompts, progress=False)) == updated
            assert e.update_params(weights()) == 2 * i + 2
            assert tokens(e.generate(*prompts, progress=False)) == before
        e.update_params(new)
        for actual, expected in zip(e.score(prompts[0]), fastgen.score(new, SPEC, prompts[0]), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="sequence 0: it has no tokens"):
            e.score([[]])
        wrong: list[tuple[Any, str]] = [
            ({name: torch.ones(2)}, "shape"), (pairs[:3], "missing"),
            ([*pairs, ("more", torch.ones(1))], "unexpected"), (failing(ValueError("no")), "no"),
            (failing(KeyError("gone")), "the source of the tensors failed: KeyError: 'gone'"),
            (dict(pairs) | {pairs[2][0]: pairs[2][1] * math.nan}, f"in {pairs[2][0]} .*; nothing is written"),
            (iter([*pairs[:2], (pairs[2][0], pairs[2][1] * math.nan)]), "the 2 tensors before it are written"),
        ]  # fmt: skip
        for source, message in wrong:
            with pytest.raises(ValueError, match=message):
                e.update_params(source)
        e.update_params({name: new.layers[0].down * math.nan}, partial=True, check_finite=False)
        assert {c.finish_reason for o in e.generate(*prompts, progress=False) for c in o.completions} == {"error"}
        e.update_params(new)
        assert tokens(e.generate(*prompts, progress=False)) == updated
        id = e.add(prompts[0][0], SamplingParams(temperature=0, max_tokens=30))
        for _ in range(3):
            e.step()
        down = weights(1).layers[0].down
        e.update_params({name: down * 2}, partial=True, recompute=True)
        while e.has_unfinished_requests:
            outputs = {x.request_id: x.output for x in e.step() if x.output}
        assert {*outputs[id].completions[0].weight_versions} == {e.weight_version - 1, e.weight_version}  # type: ignore[union-attr]
        assert tokens(e.generate(*prompts, progress=False)) == partially_updated


def test_sleep_and_wake_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks release memory, and all or none map it again; requests continue with the same tokens."""
    fastgen.save(tmp_path, SPEC, weights())
    with fastgen.Engine(weights(), SPEC, **SETTINGS) as alone:
        expected = tokens(alone.generate(*load(1, 8), progress=False))
    with fastgen.Engine.from_pretrained(tmp_path, device="cpu", tensor_parallel=2, **SETTINGS) as e:
        assert tokens(e.generate(*load(1, 8), progress=False)) == expected
        ids = [e.add(prompt, params) for prompt, params in zip(*load(1, 8), strict=True)]
        for _ in range(3):
            e.step()
        size = e.sleep("all")
        assert size == sum(r.nbytes for r in e.memory.regions.values())
        assert e.memory.regions.keys() == {"cache", "params"}
        with pytest.raises(ValueError, match="call wake_up"):
            e.step()
        with monkeypatch.context() as patch:
            error = MagicMock(side_effect=torch.OutOfMemoryError("no"))
            patch.setattr(fastgen.training.sleep.ReleasableMemory, "reacquire", error)
            with pytest.raises(torch.OutOfMemoryError):
                e.wake_up()
            assert not any(r.resident for r in e.memory.regions.values())
        assert e.wake_up() == size
        outputs: dict[int, Any] = {}
        while e.has_unfinished_requests:
            outputs |= {x.request_id: x.output for x in e.step() if x.output}
        assert tokens([outputs[i] for i in ids]) == expected
        with pytest.raises(ValueError, match="unknown memory"):
            e.sleep("everything")
        for _ in range(3):
            e.sleep("cache")
            e.wake_up()
        assert tokens(e.generate(*load(1, 8), progress=False)) == expected
    with engine() as e, pytest.raises(ValueError, match="belong to the caller"):
        e.sleep("params")


def check_kill(e: fastgen.Engine, rank: int, after: float) -> None:
    """Kills a rank during steps; within seconds the call raises the cause."""
    victim, began = next(p for p in active_ranks() if p.name == f"rank {rank}"), [0.0]

    def kill() -> None:
        began[0] = time.monotonic()
        os.kill(victim.pid or 0, signal.SIGKILL)

    threading.Timer(after, kill).start()
    with pytest.raises(RuntimeError, match=rf"rank {rank} \(process {victim.pid}\) was killed by SIGKILL"):
        endless(e)
    assert time.monotonic() - began[0] < LIMIT
    with pytest.raises(RuntimeError, match=f"rank {rank} "):  # and so do later calls
        e.generate([[1, 2]], SamplingParams(max_tokens=2), progress=False)
    e.close()


def check_error(e: fastgen.Engine) -> None:
    """Makes a rank raise an error, which the call raises too."""
    e.ranks.broadcast_call("no_such_call")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 .* failed: .*no_such_call"):
        endless(e)
    assert time.monotonic() - began < LIMIT
    e.close()


def test_a_rank_is_killed() -> None:
    check_kill(engine(4), rank=3, after=0.7)


def test_a_rank_raises() -> None:
    check_error(engine())


def test_rank_0_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call raises rank 0's own error, and the other ranks end."""
    e = engine()
    e.generate([[1, 2]], SamplingParams(max_tokens=2), progress=False)
    monkeypatch.setattr(e.runner, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        endless(e)
    with pytest.raises(RuntimeError, match="rank 0 failed: division by zero"):
        e.generate([[1, 2]], SamplingParams(max_tokens=2), progress=False)
    e.close()


def broken(shard: Any, device: str, **_: Any) -> Any:
    """Loads parameters on rank 0 only."""
    if shard.rank:
        raise OSError("no such disk")
    return SPEC, weights(tp_shard=shard), None


def test_a_rank_cannot_load() -> None:
    group = workers.create_tp_group(2, "cpu", broken, {}, fastgen.Engine)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 .*no such disk"), workers.close_workers_on_error(group):
        group.all_reduce_min(1)
    assert time.monotonic() - began < LIMIT


SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {tests!r})
import ranks
if __name__ == "__main__":
    settings = dict(ranks.SETTINGS, tensor_parallel=2, device="cpu", dtype="float32")
    e = ranks.fastgen.Engine.from_pretrained({model!r}, **settings)
    print(multiprocessing.active_children()[0].pid, flush=True)
    ranks.endless(e)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_rank_0_ends(number: signal.Signals, tmp_path: Path) -> None:
    """When the process that started the other ranks is killed or interrupted, they end too."""
    script = tmp_path / "script.py"
    fastgen.save(tmp_path / "model", SPEC, weights())
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1] / "support"), model=str(tmp_path / "model")))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    other = Path("/proc") / process.stdout.readline().strip()
    assert other.is_dir()
    time.sleep(0.5)
    process.send_signal(number)
    end = time.monotonic() + LIMIT
    _, stderr = process.communicate(timeout=LIMIT)
    if number is signal.SIGINT:
        assert stderr.rstrip().endswith("KeyboardInterrupt") and "leaked" not in stderr
    while other.is_dir() and "Z" not in (other / "stat").read_text().rpartition(")")[2][:3] and time.monotonic() < end:
        time.sleep(0.05)
    assert not other.is_dir() or time.monotonic() < end


def test_a_stream_is_dropped_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may drop a stream at any time; all ranks abort its requests after the step."""
    with engine() as e:
        expected = tokens(e.generate(*load(1, 3), progress=False))
        streams = [e.stream([[1, 2], [3, 4]], SamplingParams(max_tokens=60)) for _ in range(2)]
        next(streams[0])  # the other stream is never started
        run, sizes = e.runner.forward, list[int]()

        def dropping(*args: Any, **named: Any) -> Any:
            streams.clear()
            sizes.append(len(e.core.sequence_states))
            return run(*args, **named)

        monkeypatch.setattr(e.runner, "forward", dropping)
        e.step()
        assert sizes == [4] and not e.core.sequence_states and not e.has_unfinished_requests
        assert tokens(e.generate(*load(1, 3), progress=False)) == expected


def test_an_interrupt_leaves_the_ranks_in_step() -> None:
    """Ctrl-C aborts the running requests, and the engine can be used further."""
    with engine() as e:
        expected = tokens(e.generate(*load(1, 3), progress=False))
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            endless(e)
        assert not e.state.running and tokens(e.generate(*load(1, 3), progress=False)) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "tensor_parallel=2, but .* WORLD_SIZE=4"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2' is no rank of WORLD_SIZE='2'"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' is no rank"),
    ],
)
def test_wrong_environments(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inconsistent variables of torchrun are refused before any rank waits."""
    if "WORLD_SIZE" in environment:
        environment = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        engine()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "address", "message"),
    [
        ("1", "127.0.0.1", "rank 1 of 2 found no group at 127.0.0.1:.*refused"),
        ("1", "192.0.2.1", "rank 1 of 2 found no group at 192.0.2.1:"),  # an address that no machine has
        ("0", "192.0.2.1", "rank 0 of 2 found no group at 192.0.2.1:"),
        ("1", "no-such-host.invalid", "rank 1 of 2 found no group at no-such-host.invalid:"),
        ("0", "127.0.0.1", "rank 0 of 2 found no group at .*: rank 1 did not come within 1 s"),
    ],
)
def test_ranks_that_do_not_meet(rank: str, address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank raises within seconds where no rank listens, or after START_TIMEOUT where one is missing."""
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "START_TIMEOUT", 1.0)
    if address != "127.0.0.1":
        monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", 2.0)  # otherwise each takes 7 s
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        engine()
    assert time.monotonic() - began < LIMIT


def test_a_late_rank(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(late, (free_port(), str(tmp_path / "tokens")), nprocs=2)  # type: ignore[attr-defined]
    with fastgen.Engine(weights(), SPEC, **SETTINGS) as alone:
        expected = tokens(alone.generate(*load(1, 3), progress=False))
    results = [torch.load(tmp_path / f"tokens.{rank}") for rank in range(2)]
    assert [outputs for outputs, _ in results] == [expected] * 2
    assert all(addresses <= {LOOPBACK} for _, addresses in results)


def test_sizes() -> None:
    with pytest.raises(ValueError, match="possible: 1, 2, 4"):
        engine(3)
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match="needs as many GPUs"):
            workers.create_tp_group(2, "cuda", broken, {}, fastgen.Engine)
