"""Every public call is refused in the wrong thread, process or state, and a refused call changes nothing."""

import asyncio
import contextlib
import gc
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

import fastgen
from fastgen import Engine, SamplingParams

SPEC = fastgen.from_hf_config(tiny.config())
PARAMS = tiny.weights(SPEC)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [[1, 2, 3], [4, 5] * 9]
CALLS: dict[str, Callable[[Engine], Any]] = {  # calls that need an engine to themselves
    "add": lambda e: e.add(PROMPTS[0], GREEDY),
    "step": lambda e: e.step(),
    "generate": lambda e: e.generate(PROMPTS, GREEDY),
    "chat": lambda e: e.chat([{"role": "user", "content": "a"}], GREEDY),
    "stream": lambda e: e.stream(PROMPTS, GREEDY),
    "as_completed": lambda e: e.as_completed(PROMPTS, GREEDY),
    "add_many": lambda e: e.add_many(PROMPTS, GREEDY),
    "abort": lambda e: e.abort(0),
    "fork": lambda e: e.fork(0),
    "snapshot": lambda e: e.snapshot(0),
    "restore": lambda e: e.restore(None),
    "wake_up": lambda e: e.wake_up(),
    "sleep": lambda e: e.sleep(),
    "params_changed": lambda e: e.params_changed(),
    "score": lambda e: e.score(PROMPTS),
    "update_params": lambda e: e.update_params(PARAMS),
    "add_adapter": lambda e: e.add_adapter("a", fastgen.lora.init(SPEC)),
    "load_adapters": lambda e: e.load_adapters({}),
    "adapter_params": lambda e: e.adapter_params("a"),
    "update_adapter": lambda e: e.update_adapter("a"),
    "remove_adapter": lambda e: e.remove_adapter("a"),
    "summary": lambda e: e.summary(),
}
READS: dict[str, Callable[[Engine], Any]] = {  # that any thread may make of an engine that is open
    "params": lambda e: e.params,
    "source_params": lambda e: e.source_params,
    "cache": lambda e: e.cache,
    "last_batch": lambda e: e.last_batch,
    "adapters": lambda e: e.adapters,
    "profile": lambda e: e.profile(),
    "prepare_grammars": lambda e: e.prepare_grammars(),
    "compile_grammar": lambda e: e.compile_grammar(GREEDY),
}
ALWAYS = {"close", "worker_failure", "cache_stats", "has_unfinished_requests", "from_pretrained"}
ALWAYS |= {"num_steps", "requests", "state", "stats", "tokenizer", "tp_shard", "weight_version"}


def engine(**settings: Any) -> Engine:
    return Engine(PARAMS, SPEC, progress=False, **{"cache_tokens": 512, **settings})


def tokens(e: Engine) -> list[list[int]]:
    return [o.completions[0].token_ids for o in e.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine() as e:
        return tokens(e)


def run(call: Callable[[], Any]) -> list[Any]:
    """Returns what calls in another thread returned or raised."""
    results: list[Any] = []

    def inner() -> None:
        try:
            results.append(call())
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    return results


def test_every_public_call_is_tried() -> None:
    """A new public call must be added here."""
    public = {name for name, _ in inspect.getmembers(Engine) if not name.startswith("_")}
    assert public == CALLS.keys() | READS.keys() | ALWAYS


@pytest.mark.parametrize("name", [*CALLS, *READS])
def test_closed(name: str) -> None:
    e = engine()
    e.close()
    e.close()
    with pytest.raises(RuntimeError, match="engine is closed: make another one"):
        (CALLS | READS)[name](e)


def test_held_by_an_async_engine(expected: list[list[int]]) -> None:
    """While an AsyncEngine holds the engine, direct calls, `close` and a second AsyncEngine are refused."""

    async def use_async(a: fastgen.AsyncEngine) -> dict[int, list[int]]:
        results = {}
        async for i, output in a.generate(PROMPTS, GREEDY):
            results[i] = output.completions[0].token_ids
            for name, call in CALLS.items():
                with pytest.raises(RuntimeError, match="held by an AsyncEngine"):
                    call(e)
                assert not isinstance(await a.call(lambda _: 0), BaseException), name
            for call in (e.close, lambda: fastgen.AsyncEngine(e)):
                with pytest.raises(RuntimeError, match="held by an AsyncEngine"):
                    call()
        return results

    with engine() as e:
        with fastgen.AsyncEngine(e) as a:
            assert asyncio.run(use_async(a)) == dict(enumerate(expected))
        assert tokens(e) == expected, "it is its owner's again"
        e.close()
        with pytest.raises(RuntimeError, match="closed"):
            fastgen.AsyncEngine(e)


def test_two_threads(expected: list[list[int]]) -> None:
    """While one thread is inside a call, calls of other threads are refused; afterwards they are not."""
    with engine() as e:
        seen: list[Any] = []

        def source() -> Iterator[tuple[str, Any]]:
            for call in CALLS.values():
                seen.extend(run(lambda call=call: call(e)))
            seen.extend(run(lambda: fastgen.AsyncEngine(e)))
            seen.extend(run(e.close))
            yield "model.norm.weight", PARAMS.final_norm

        e.update_params(source(), partial=True)
        assert len(seen) == len(CALLS) + 2
        assert all(isinstance(x, RuntimeError) and "AsyncEngine serves any number of threads" in str(x) for x in seen)
        (other_tokens,) = run(lambda: tokens(e))
        assert other_tokens == tokens(e) == expected


def test_a_stream_that_is_refused_goes_on(expected: list[list[int]]) -> None:
    """A stream that is iterated while another thread is inside a call loses no events."""
    with engine() as e:
        stream = e.stream(PROMPTS[0], GREEDY)
        results = [next(stream)]

        def source() -> Iterator[tuple[str, Any]]:
            (refused,) = run(lambda: next(stream))
            assert isinstance(refused, RuntimeError)
            yield "model.norm.weight", PARAMS.final_norm

        e.update_params(source(), partial=True)
        results += [*stream]
        assert [t for x in results for t in x.token_ids] == expected[0]


def test_a_stream_whose_events_step_has_given_ends() -> None:
    """A stream does not hang if its events were returned by a direct call of `step`."""
    with engine() as e:
        stream = e.stream([7, 8], GREEDY)
        first, later_events = next(stream), list[fastgen.Event]()
        while e.has_unfinished_requests:
            later_events += e.step()
        assert first.token_ids + [t for x in later_events for t in x.token_ids] == tokens_of(e, [7, 8])
        assert [*stream] == []


def tokens_of(e: Engine, prompt: list[int]) -> list[int]:
    return e.generate(prompt, GREEDY)[0].completions[0].token_ids


def test_a_dropped_stream_never_aborts_inside_a_call(expected: list[list[int]]) -> None:
    """A stream that is garbage-collected in another thread during a call is aborted by the next call."""
    with engine() as e:
        streams = [e.stream([7, 8], GREEDY)]
        next(streams[0])

        def source() -> Iterator[tuple[str, Any]]:
            run(lambda: (streams.clear(), gc.collect()))
            assert e.state.running or e.state.waiting
            assert not e.has_unfinished_requests
            yield "model.norm.weight", PARAMS.final_norm

        e.update_params(source(), partial=True)
        assert e.step() == [] and not e.state.running and not e.state.waiting
        assert tokens(e) == expected


@contextlib.contextmanager
def bf16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16):
        yield


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
@pytest.mark.parametrize("mode", [bf16, torch.inference_mode, torch.enable_grad], ids=["bf16", "inference", "grad"])
def test_modes_of_torch(mode: Any, expected: list[list[int]]) -> None:
    """Autocast and inference mode around the constructor, calls and `score` change no result."""
    score = fastgen.score(PARAMS, SPEC, PROMPTS)
    with mode():
        e = engine()
        assert tokens(e) == expected
        for logprobs in (e.score(PROMPTS), fastgen.score(PARAMS, SPEC, PROMPTS)):
            assert all(map(torch.equal, logprobs, score))
        logits = fastgen.forward(e.params, e.cache, e.last_batch, SPEC)
        e.params_changed()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, fastgen.forward(e.params, e.cache, e.last_batch, SPEC))
    e.params_changed()
    assert tokens(e) == expected
    e.close()


@pytest.fixture
def own_memory(tmp_path: Any) -> Iterator[Engine]:
    """An engine that owns its parameters and cache, so that all memory can be released."""
    fastgen.save(tmp_path, SPEC, PARAMS)
    with Engine.from_pretrained(tmp_path, progress=False, cache_tokens=512, max_adapters=1) as e:
        yield e


def test_released(own_memory: Engine, expected: list[list[int]]) -> None:
    """Calls that need released memory raise ValueError, and change no state."""
    e = own_memory
    id = e.add(PROMPTS[0], GREEDY)
    for _ in range(3):
        e.step()
    snapshot = e.snapshot(id, include_pages=True)
    assert snapshot.pages
    stream = e.stream(PROMPTS[1], GREEDY)
    e.sleep("all")
    touching: list[Callable[[], Any]] = [
        lambda: e.params, lambda: e.cache, lambda: e.step(), lambda: e.generate(PROMPTS, GREEDY),
        lambda: e.stream(PROMPTS, GREEDY), lambda: e.as_completed(PROMPTS, GREEDY), lambda: e.score(PROMPTS),
        lambda: e.update_params(PARAMS), lambda: e.snapshot(id, include_pages=True), lambda: e.restore(snapshot),
        lambda: next(stream), lambda: fastgen.forward(e.params, e.cache, e.last_batch, SPEC),
    ]  # fmt: skip
    for call in touching:
        with pytest.raises(ValueError, match=r"was given back: call wake_up\(\)"):
            call()
    assert e.weight_version == 0 and len(e.state.waiting) == 2
    assert e.summary() and e.snapshot(id).completions[0].token_ids == snapshot.completions[0].token_ids
    e.wake_up()
    assert [t for x in stream for t in x.token_ids] == expected[1]
    outputs = {x.request_id: x.output for x in e.step() if x.output} | {0: None}
    assert outputs.keys() == {0}
    assert tokens(e) == expected
    e.sleep("cache")  # as during training: the parameters stay
    assert e.update_params(PARAMS) == 1 and len(e.score(PROMPTS)) == 2
    e.wake_up()
    assert tokens(e) == expected
    e.params.final_norm.numpy()
    with pytest.raises(ValueError, match="NumPy"):
        e.sleep("all")
    assert e.sleep("cache") > 0 and e.wake_up() > 0
    assert tokens(e) == expected


@pytest.mark.parametrize("argument", ["some/model", None, torch.nn.Linear(2, 2), PARAMS])
def test_what_is_no_engine(argument: Any) -> None:
    with pytest.raises(ValueError, match="from_pretrained"):
        Engine(argument)
    with pytest.raises(ValueError, match="AsyncEngine takes an Engine"):
        fastgen.AsyncEngine(argument)


LONG, OUTSIDE = [1] * 80, [3, 61]


def test_prompts_that_cannot_run(expected: list[list[int]]) -> None:
    """With `on_error="skip"`, invalid prompts get outputs with errors and the others run; otherwise all are refused."""
    prompts: list[Any] = [LONG, PROMPTS[0], OUTSIDE, [], PROMPTS[1]]
    reasons = ["the prompt alone is too long", None, "token 61 is outside", "empty", None]

    def check_outputs(outputs: list[fastgen.Output]) -> None:
        assert [o.completions[0].token_ids for o in outputs] == [[], expected[0], [], [], expected[1]]
        for o, reason in zip(outputs, reasons, strict=True):
            assert (o.error is None) if reason is None else (o.error is not None and reason in o.error)
            assert {c.finish_reason for c in o.completions} == {"length" if reason is None else "error"} and o.finished

    async def all_of(a: fastgen.AsyncEngine) -> list[fastgen.Output]:
        results = {i: o async for i, o in a.generate(prompts, GREEDY, on_error="skip")}
        return [results[i] for i in range(len(prompts))]

    with engine() as e:
        check_outputs(e.generate(prompts, GREEDY, on_error="skip"))
        results = dict(e.as_completed(prompts, GREEDY, on_error="skip"))
        check_outputs([results[i] for i in range(len(prompts))])
        events = [x for x in e.stream(prompts, GREEDY, on_error="skip") if x.output]
        check_outputs([x.output for x in sorted(events, key=lambda x: x.request_id) if x.output])
        both = replace(GREEDY, n=2)
        assert [len(o.completions) for o in e.generate([LONG, PROMPTS[0]], both, on_error="skip")] == [2, 2]
        assert all(o.error for o in e.generate([LONG, OUTSIDE], GREEDY, on_error="skip"))
        for call in (e.generate, e.stream, e.as_completed):
            with pytest.raises(ValueError, match="prompt 2: .*outside the vocabulary"):
                call([*PROMPTS, OUTSIDE, LONG], GREEDY)
            with pytest.raises(ValueError, match="on_error"):
                call(PROMPTS, GREEDY, on_error="ignore")
        assert not e.has_unfinished_requests and tokens(e) == expected
        with fastgen.AsyncEngine(e) as a:
            check_outputs(asyncio.run(all_of(a)))


def forked(check: Callable[[], Any], *, leave: bool = True) -> int:
    """Runs a check in a forked child and returns its exit status. `leave` runs Python's exit handlers in the child."""
    pid = os.fork()
    if pid == 0:
        try:
            code = 0 if check() else 3
        except BaseException:
            code = 4
        if not leave:
            os._exit(code)
        raise SystemExit(code)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError as e:
        return "start processes with spawn" in str(e)
    return False


def test_a_fork_is_refused(expected: list[list[int]]) -> None:
    """In a forked child every call is refused, also inside a call and with an AsyncEngine; `close` does nothing."""
    with engine() as e:
        calls = [lambda call=call: call(e) for call in CALLS.values()]
        assert forked(lambda: all(map(refused, calls)), leave=False) == 0

        def source() -> Iterator[tuple[str, Any]]:
            assert forked(lambda: all(map(refused, calls)), leave=False) == 0
            yield "model.norm.weight", PARAMS.final_norm

        e.update_params(source(), partial=True)
        with fastgen.AsyncEngine(e) as a:
            ask: list[Callable[[], Any]] = [
                lambda: asyncio.run(a.call(Engine.params_changed)),
                lambda: asyncio.run(a.add(PROMPTS[0], GREEDY)),
                lambda: fastgen.AsyncEngine(e),
            ]
            assert forked(lambda: all(map(refused, ask)) and a.close() is None, leave=False) == 0
        assert forked(lambda: e.close() is None, leave=False) == 0
        assert tokens(e) == expected
        torch.set_num_threads(2)
        try:
            alone: list[Callable[[], Any]] = [lambda: fastgen.score(PARAMS, SPEC, PROMPTS), engine]
            assert forked(lambda: all(map(refused, alone)), leave=False) == 0
        finally:
            torch.set_num_threads(1)


FORK = """
import asyncio, os, sys
import tiny, fastgen
spec = fastgen.from_hf_config(tiny.config())
engine = fastgen.Engine(tiny.weights(spec), spec, progress=False, cache_tokens=512, tensor_parallel=2)
sampling = fastgen.SamplingParams(temperature=0, max_tokens=12)
want = engine.generate([1, 2, 3], sampling)[0].completions[0].token_ids
held = fastgen.AsyncEngine(engine)
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
    held.close()
    assert engine.generate([1, 2, 3], sampling)[0].completions[0].token_ids == want
    engine.close()
    print("went on")
else:
    try:
        engine.generate([1, 2, 3], sampling)
    except RuntimeError as e:
        assert "spawn" in str(e)
        sys.exit(0)  # with all that Python does at its end
"""


def test_the_end_of_a_fork_leaves_ranks_alone() -> None:
    """Finalizers in a forked child neither end the parent's ranks nor hang."""
    import subprocess

    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert process.stdout == "went on\n", process.stderr
