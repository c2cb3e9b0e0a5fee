"""An engine for coroutines: what they get is a plain engine's, whatever is asked for between its steps."""

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from trainer import CONFIG as SPEC
from trainer import GREEDY, PROMPTS, engine
from trainer import RNG as DICE
from trainer import generate_fresh as expected_with_logprobs
from trainer import new_params as fresh
from transformers import Qwen2Config, Qwen2ForCausalLM

import fastgen
from fastgen import AsyncEngine, Engine, SamplingParams
from fastgen.checkpoint import weights
from fastgen.training import logprobs

LONG = replace(GREEDY, max_tokens=60)
OVERLAP = pytest.mark.parametrize("overlap", [False, True])


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """In a loop of its own; nothing here takes a minute."""
    return asyncio.run(asyncio.wait_for(main, 60))


def told(outputs: list[fastgen.Output]) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.completions]


def expected(params: fastgen.Params) -> list[list[int]]:
    """A plain engine's tokens; their logprobs' last bits depend on who shares a step."""
    return [tokens for tokens, _ in expected_with_logprobs(params)]


def steps(e: AsyncEngine) -> int:
    return e.engine.num_steps


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


async def gathered(outputs: AsyncIterator[tuple[int, fastgen.Output]]) -> list[fastgen.Output]:
    found = {index: output async for index, output in outputs}
    return [found[i] for i in sorted(found)]


# --- generate, stream, add ------------------------------------------------------------------------------------------


@OVERLAP
def test_outputs_as_they_finish(overlap: bool) -> None:
    """They wait for the slowest, lose their place, or differ from a plain engine's."""
    lengths = [9, 2, 12, 1]
    each = [replace(GREEDY, max_tokens=n) for n in lengths]

    async def main(e: AsyncEngine) -> None:
        found = [(i, o) async for i, o in e.generate(PROMPTS, each)]
        order = [i for i, _ in found]
        assert sorted(order) == [0, 1, 2, 3]
        assert order.index(1) < order.index(0) < order.index(2)
        for i, o in found:
            assert o.completions[0].token_ids == wanted[i][: lengths[i]]
        assert [i async for i, _ in e.generate(PROMPTS[0], GREEDY)] == [0]
        assert [x async for x in e.generate([], GREEDY)] == []

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))
        assert not one.has_unfinished_requests and not one.state.running


@OVERLAP
def test_stream_and_add(overlap: bool) -> None:
    async def main(e: AsyncEngine) -> None:
        events = [x async for x in e.stream(PROMPTS[:2], GREEDY)]
        for id in {x.request_id for x in events}:
            mine = [x for x in events if x.request_id == id]
            assert [x.output is not None for x in mine] == [False] * 11 + [True]
            tokens = [t for x in mine for t in x.token_ids]
            assert tokens in wanted[:2] and len([v for x in mine for v in x.logprobs or ()]) == 12
        live, quiet = await e.add(PROMPTS[2], GREEDY), await e.add(PROMPTS[3], GREEDY, stream_text=False)
        assert told([await live.output(), await quiet.output()]) == wanted[2:]
        assert len([x async for x in live]) == 12 and len([x async for x in quiet]) == 1
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await e.add([97], GREEDY)
        with pytest.raises(ValueError, match="prompt 1: "):
            await anext(e.generate([[1], []], GREEDY))

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


def test_every_step_is_the_threads() -> None:
    """Steps elsewhere, or steps while there is nothing to do."""
    seen = set[str]()
    begun = [0]

    class Watched(Engine):
        def step(self) -> list[fastgen.Event]:
            seen.add(threading.current_thread().name)
            begun[0] += 1
            return super().step()

    async def main(e: AsyncEngine) -> None:
        await gathered(e.generate(PROMPTS, GREEDY))
        before = begun[0]
        assert before < 20
        await asyncio.sleep(0.05)
        assert begun[0] == before

    with Watched(fresh(), SPEC, progress=False, cache_tokens=1024) as one, AsyncEngine(one) as e:
        run(main(e))
    assert seen == {"fastgen"}


def test_one_wakeup_of_a_loop_for_each_step() -> None:
    """Every token wakes the loop by itself, and a server's loop does nothing else."""
    wakeups = [0]

    async def main(e: AsyncEngine) -> None:
        loop = asyncio.get_running_loop()
        inner = loop.call_soon_threadsafe

        def counted(*args: Any) -> Any:
            wakeups[0] += threading.current_thread() is e._thread
            return inner(*args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        consumers = [gathered(e.generate([p] * 8, replace(GREEDY, n=2))) for p in PROMPTS]
        assert sum(map(len, await asyncio.gather(*consumers))) == 32

    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(main(e))
        assert wakeups[0] <= one.num_steps + 2 * len(PROMPTS) + 1


def test_consumers_in_several_loops() -> None:
    """Of threads of their own, beside each other."""
    wanted, found = expected(fresh()), dict[int, Any]()

    async def main(e: AsyncEngine, i: int) -> None:
        found[i] = told(await gathered(e.generate(PROMPTS, GREEDY)))

    with engine(fresh()) as one, AsyncEngine(one) as e:
        threads = [threading.Thread(target=lambda i=i: run(main(e, i))) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == dict.fromkeys(range(4), wanted)


def test_a_loop_that_is_gone() -> None:
    """Its requests run for ever, or the thread ends with it."""

    async def leave(e: AsyncEngine) -> None:
        await e.pause()
        await e.add(PROMPTS[0], LONG)

    async def main(e: AsyncEngine) -> None:
        await e.resume()
        await until(lambda: not e.engine.has_unfinished_requests)
        assert steps(e) < 5
        assert told(await gathered(e.generate(PROMPTS, GREEDY))) == wanted

    wanted = expected(fresh())
    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(leave(e))
        run(main(e))


# --- control --------------------------------------------------------------------------------------------------------


@OVERLAP
def test_pause_and_resume_under_load(overlap: bool) -> None:
    """A step is done while paused, or a token is lost, doubled or changed."""

    async def main(e: AsyncEngine) -> None:
        task = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        for i in range(4):
            await until(lambda i=i: steps(e) > 2 * i)
            await e.pause()
            before = steps(e)
            assert e.engine.core._in_flight is None
            if i == 1:
                late = await e.add(PROMPTS[0], GREEDY)
            await asyncio.sleep(0.01)
            assert steps(e) == before
            assert not await e.call(lambda x: x.core.events), "what is there is told"
            await e.resume()
        assert told(await task) == wanted
        assert told([await late.output()])[0] == wanted[0]

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


@OVERLAP
def test_abort(overlap: bool) -> None:
    """Partial results are those of the moment, for who aborts and for who waits; others go on."""

    async def main(e: AsyncEngine) -> None:
        one, two = await e.add(PROMPTS[0], LONG), await e.add(PROMPTS[1], LONG)
        other = asyncio.create_task(gathered(e.generate(PROMPTS[2], GREEDY)))
        await anext(one), await anext(one)
        output = await e.abort(one.request_id)
        assert output is not None and output is await one.output()
        (c,) = output.completions
        assert c.finish_reason == "abort" and 2 <= len(c.token_ids) < 60
        assert c.token_ids[:12] == wanted[0][: len(c.token_ids)]
        assert await e.abort(one.request_id) is None
        assert told(await other)[0] == wanted[2]
        everything = await e.abort_all()
        assert [*everything] == [two.request_id] and everything[two.request_id] is await two.output()
        three = await e.add(PROMPTS[3], LONG)
        await anext(three)
        await e.pause("abort")
        assert (await three.output()).completions[0].finish_reason == "abort"
        with pytest.raises(ValueError, match="did you mean keep"):
            await e.pause("kep")
        four = await e.add(PROMPTS[3], GREEDY)
        await e.resume()
        assert told([await four.output()])[0] == wanted[3]

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


@OVERLAP
def test_update_in_flight(overlap: bool) -> None:
    """Versions of tokens do not say which parameters drew them, or a consumer loses something."""

    async def main(e: AsyncEngine) -> None:
        task = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        await until(lambda: steps(e) > 4)
        await e.pause()
        assert await e.call(Engine.update_params, fresh(1), recompute=True) == 1
        await e.resume()
        for prompt, output in zip(PROMPTS, await task, strict=True):
            (c,) = output.completions
            assert (
                len(c.weight_versions) == 12
                and {*c.weight_versions} == {0, 1}
                and c.weight_versions == sorted(c.weight_versions)
            )
            n = c.weight_versions.count(0)
            rest = replace(GREEDY, max_tokens=12 - n)
            (again,) = await gathered(e.generate([prompt + c.token_ids[:n]], rest))
            assert again.completions[0].token_ids == c.token_ids[n:]

    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


@OVERLAP
def test_an_update_that_is_received_beside_the_steps(overlap: bool) -> None:
    """Requests begin and end while the sender is silent; then all is written at once, into those that run."""
    told_now = threading.Event()

    def sent() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(97 * 32)
        for i, (name, tensor) in enumerate(weights.named_weights(fresh(1), SPEC)):
            if i == 3:
                assert told_now.wait(30)
            yield name, buffer[: tensor.numel()].view_as(tensor).copy_(tensor)  # one memory for all

    async def main(e: AsyncEngine) -> None:
        update = asyncio.create_task(e.update_params(sent()))
        before = await gathered(e.generate(PROMPTS, GREEDY))
        assert told(before) == expected(fresh(0)), "the old parameters' until all have come"
        assert {v for o in before for v in o.completions[0].weight_versions} == {0}
        running = await e.add(PROMPTS[1], replace(GREEDY, max_tokens=80))
        seen = [event async for event, _ in zip_async(running, 5)]
        assert len(seen) == 5 and not update.done()
        told_now.set()
        assert await update == 1
        versions = (await running.output()).completions[0].weight_versions
        assert versions == sorted(versions) and versions[0] == 0
        assert told(await gathered(e.generate(PROMPTS, GREEDY))) == expected(fresh(1))

    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


async def zip_async(events: AsyncIterator[fastgen.Event], n: int) -> AsyncIterator[tuple[fastgen.Event, int]]:
    for i in range(n):
        yield await anext(events), i


def failing() -> Iterator[tuple[str, torch.Tensor]]:
    """Half of the tensors."""
    for i, pair in enumerate(weights.named_weights(fresh(1), SPEC)):
        if i == 8:
            raise ConnectionError("the trainer has gone")
        yield pair


def other_than(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(weights.named_weights(fresh(1), SPEC)) | {name: tensor}


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (failing, ConnectionError, "the trainer has gone"),
        (lambda: other_than("model.norm.weight", torch.ones(31)), ValueError, r"shape \(31,\)"),
        (lambda: other_than("model.more.weight", torch.ones(31)), ValueError, "unexpected: model.more.weight"),
        (lambda: {"model.norm.weight": torch.ones(32)}, ValueError, "missing: "),
        (lambda: fresh(1)._replace(final_norm=torch.ones(31)), ValueError, r"shape \(31,\)"),
        (lambda: other_than("model.norm.weight", torch.full((32,), torch.inf)), ValueError, "NaN or infinite"),
        (lambda: "folder", ValueError, "not str"),
    ],
)
def test_an_update_that_fails_changes_nothing(source: Any, error: type[Exception], said: str) -> None:
    """Neither a parameter, nor the version, nor what runs."""

    async def main(e: AsyncEngine) -> None:
        running = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        await until(lambda: steps(e) > 2)
        with pytest.raises(error, match=said):
            await e.update_params(source())
        assert told(await running) == wanted
        assert await e.call(lambda one: one.weight_version) == 0
        for mine, old in zip(logprobs.iter_weights(params), logprobs.iter_weights(fresh()), strict=True):
            assert torch.equal(mine, old)
        assert await e.update_params({"model.norm.weight": torch.ones(32)}, partial=True, recompute=True) == 1
        assert bool((params.final_norm == 1).all())

    params = fresh()
    wanted = expected(params)
    with engine(params) as one:
        with AsyncEngine(one) as e:
            run(main(e))
        with pytest.raises(RuntimeError, match="was closed"):
            run(e.update_params(fresh(1)))


def test_an_adopted_model_that_moves_ends_requests_and_not_the_thread() -> None:
    """Each consumer hears which parameter it is, and nothing goes on without tokens."""

    async def main(e: AsyncEngine) -> None:
        request = await e.add(PROMPTS[1], replace(GREEDY, max_tokens=100))
        await anext(request)
        model.model.norm.weight.data = torch.ones(32)
        with pytest.raises(RuntimeError, match="ended with it") as caught:
            await request.output()
        assert "model.norm.weight was moved" in str(caught.value.__cause__)
        assert not await e.call(lambda one: one.has_unfinished_requests)

    config = Qwen2Config(**tiny.config("Qwen2", vocab=97, context=128))
    model = Qwen2ForCausalLM(config).to(torch.get_default_device())
    spec, params = fastgen.adopt(model)
    with fastgen.Engine(params, spec, progress=False, cache_tokens=1024) as one, AsyncEngine(one) as e:
        run(main(e))


def test_updates_at_full_speed() -> None:
    """Without a pause: between any two steps. Each token is its version's own after the tokens before it."""

    async def main(e: AsyncEngine) -> list[fastgen.Output]:
        task = asyncio.create_task(gathered(e.generate(PROMPTS * 2, LONG)))
        while not task.done():
            await e.call(
                Engine.update_params, trees[(await e.call(lambda x: x.weight_version) + 1) % 2], recompute=True
            )
            await asyncio.sleep(0.01)
        return await task

    trees = [fresh(0), fresh(1)]
    with engine(fresh(0)) as one, AsyncEngine(one) as e:
        outputs = run(main(e))
    versions = {v for o in outputs for c in o.completions for v in c.weight_versions}
    assert len(versions) > 2
    for o in outputs[::3]:
        (c,) = o.completions
        for v, tree in enumerate(trees):
            scores = fastgen.score(
                tree, one.model_config, [[*o.prompt_token_ids, *c.token_ids]], first=len(o.prompt_token_ids)
            )
            mine = torch.tensor([x % 2 == v for x in c.weight_versions])
            torch.testing.assert_close(scores[0][mine], torch.tensor(c.logprobs)[mine], atol=1e-4, rtol=0)


def test_drain() -> None:
    """What runs is cut short, or something new gets in."""

    async def main(e: AsyncEngine) -> None:
        task = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        await until(lambda: steps(e) > 2)
        draining = asyncio.create_task(e.drain())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="only after resume"):
            await e.add(PROMPTS[0], GREEDY)
        await draining
        assert not e.engine.has_unfinished_requests and told(await task) == wanted
        await e.drain()
        await e.resume()
        assert told(await gathered(e.generate(PROMPTS, GREEDY)))[0] == wanted[0]

    wanted = expected(fresh())
    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(main(e))


def test_memory_given_back_under_load() -> None:
    """Steps fail meanwhile, or the thread never rests."""

    async def main(e: AsyncEngine) -> None:
        task = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        await until(lambda: steps(e) > 4)
        assert await e.call(Engine.sleep, "cache") > 0
        before = steps(e)
        await asyncio.sleep(0.02)
        assert steps(e) == before and not task.done()
        assert await e.call(Engine.wake_up) > 0
        assert told(await task) == wanted

    wanted = expected(fresh())
    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(main(e))


def test_follow_forks_and_snapshots() -> None:
    """Requests made by a call are lost, or their first events are."""

    async def main(e: AsyncEngine) -> None:
        source = await e.add(PROMPTS[1], GREEDY)
        await anext(source), await anext(source)
        copies = await e.follow(Engine.fork, source.request_id, 2)
        kept = await e.call(Engine.snapshot, source.request_id)
        back = await e.follow(Engine.restore, kept)
        outputs = [await source.output(), await copies.output(0), await copies.output(1), await back.output()]
        assert [o.completions[0].token_ids for o in outputs] == [wanted[1]] * 4
        assert [o.request_id for o in outputs[1:]] == [*copies.request_ids, back.request_id]
        assert len([x async for x in copies]) <= 2 * 10
        with pytest.raises(ValueError, match=r"requests \[0\] do not run here"):
            await e.follow(lambda x: 0)
        with pytest.raises(ValueError, match="not running here"):
            await e.call(Engine.fork, source.request_id)

    wanted = expected(fresh())
    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(main(e))


# --- ends -----------------------------------------------------------------------------------------------------------


@OVERLAP
@pytest.mark.parametrize("way", ["generate", "stream", "output", "iterate", "adding", "break"])
def test_cancelled_consumers(way: str, overlap: bool) -> None:
    """Their requests run on, or others suffer."""

    async def consume(e: AsyncEngine) -> None:
        if way == "generate":
            await gathered(e.generate(PROMPTS[:2], LONG))
        elif way == "stream":
            async for _ in e.stream(PROMPTS[:2], LONG):
                pass
        elif way == "break":
            async for event in e.stream(PROMPTS[:2], LONG):
                if len(event.token_ids):
                    break
        else:
            request = await e.add(PROMPTS[0], LONG)
            if way == "output":
                await request.output()
            async for _ in request:
                pass

    async def main(e: AsyncEngine) -> None:
        if way == "adding":
            await e.pause()
        task = asyncio.create_task(consume(e))
        other = asyncio.create_task(gathered(e.generate(PROMPTS[2:], LONG)))
        if way == "adding":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await e.resume()
        elif way != "break":
            await until(lambda: steps(e) > 3)
            task.cancel()
        if way == "break":
            await task
        else:
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: steps(e) > 8)
        assert len(await e.call(lambda x: x.core.sequence_states)) == 2
        assert len(e._requests) == 2
        assert [c[:12] for c in told(await other)] == wanted[2:]
        assert steps(e) <= 64

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))
        assert not one.has_unfinished_requests


@OVERLAP
def test_an_error_in_a_step(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer waits for ever, does not hear why, or the engine is of no use any more."""

    async def main(e: AsyncEngine) -> None:
        short = await e.add(PROMPTS[3], replace(GREEDY, max_tokens=1))
        assert len((await short.output()).completions[0].token_ids) == 1
        request = await e.add(PROMPTS[0], LONG)
        both = await e.follow(lambda x: [x.add(PROMPTS[3], replace(GREEDY, max_tokens=1)), x.add(PROMPTS[0], LONG)])
        tasks = [
            asyncio.create_task(x)
            for x in (gathered(e.generate(PROMPTS, LONG)), _all(e.stream(PROMPTS[1], LONG)), request.output())
        ]
        await until(lambda: steps(e) > 6)
        with monkeypatch.context() as m:
            m.setattr("fastgen.compiled.runner.forward_and_sample", _fails)
            done = await asyncio.gather(*tasks, return_exceptions=True)
        for x in done:
            assert isinstance(x, RuntimeError) and "a step failed" in str(x) and "of the device" in str(x)
            assert isinstance(x.__cause__, OSError)
        assert (await both.output(0)).completions[0].finish_reason == "length"
        with pytest.raises(RuntimeError, match="of the device"):
            await both.output(1)
        with pytest.raises(RuntimeError, match="of the device"):
            async for event in request:
                last = event
        assert last.output is not None and last.finish_reason == "abort", "what it has comes before the error"
        assert told(await gathered(e.generate(PROMPTS, GREEDY))) == wanted

    wanted = expected(fresh())
    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))
        assert not one.has_unfinished_requests


def _fails(*args: Any, **named: Any) -> Any:
    raise OSError("of the device")


async def _all(events: AsyncIterator[fastgen.Event]) -> list[fastgen.Event]:
    return [x async for x in events]


def test_errors_in_a_call() -> None:
    """They end somebody's request, or are lost."""

    async def main(e: AsyncEngine) -> None:
        task = asyncio.create_task(gathered(e.generate(PROMPTS, GREEDY)))
        with pytest.raises(ZeroDivisionError):
            await e.call(lambda x: 1 / 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await e.call(lambda x: next(iter(())))
        with pytest.raises(ValueError, match="missing: "):
            await e.call(Engine.update_params, {})
        assert len(await task) == 4

    with engine(fresh()) as one, AsyncEngine(one) as e:
        run(main(e))


def test_close() -> None:
    """Whoever waits gets what there is, and the engine is its owner's again."""

    async def main(one: Engine) -> None:
        async with AsyncEngine(one) as e:
            request = await e.add(PROMPTS[0], LONG)
            task = asyncio.create_task(gathered(e.generate(PROMPTS, LONG)))
            await until(lambda: steps(e) > 3)
        assert (await request.output()).completions[0].finish_reason == "abort"
        assert [o.completions[0].finish_reason for o in await task] == ["abort"] * 4
        with pytest.raises(RuntimeError, match="was closed"):
            await e.add(PROMPTS[0])
        e.close()
        request.close()

    with engine(fresh()) as one:
        run(main(one))
        assert not one.has_unfinished_requests
        assert told(one.generate(PROMPTS, GREEDY)) == expected(fresh())


def test_a_program_that_ends_without_close() -> None:
    """It ends, and not by a signal, in the middle of a step."""
    code = (
        "import asyncio, fastgen; from trainer import *\n"
        "async def main():\n"
        "    e = fastgen.AsyncEngine(engine(new_params()))\n"
        "    await anext(e.stream(PROMPTS[:3] * 20, SamplingParams(max_tokens=80, ignore_eos=True)))\n"
        "asyncio.run(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(tiny.__file__).parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- anything at any time -------------------------------------------------------------------------------------------


@OVERLAP
def test_random_operations(overlap: bool) -> None:
    """Every token is the one that a plain engine draws, and nobody waits for ever."""
    dice = random.Random(int(overlap))
    prompts = [[dice.randrange(97) for _ in range(dice.randrange(1, 40))] for _ in range(12)]
    with engine(fresh()) as plain:
        whole = told(plain.generate(prompts, replace(GREEDY, max_tokens=30)))
    seen = dict.fromkeys(("whole", "cut", "cancelled", "events"), 0)

    async def consume(e: AsyncEngine, i: int, n: int, way: int, running: set[int]) -> None:
        sampling = replace(GREEDY, max_tokens=n)
        if way == 0:
            ((_, output),) = [x async for x in e.generate(prompts[i], sampling)]
            tokens = output.completions[0].token_ids
        elif way == 1:
            request = await e.add(prompts[i], sampling, stream_text=dice.random() < 0.5)
            running.add(request.request_id)
            output = await request.output()
            running.discard(request.request_id)
            tokens = output.completions[0].token_ids
        else:
            events = [x async for x in e.stream(prompts[i], sampling)]
            tokens, output = [t for x in events for t in x.token_ids], events[-1].output
            assert output is not None and tokens == output.completions[0].token_ids
            seen["events"] += len(events)
        cut = output.completions[0].finish_reason == "abort"
        seen["cut" if cut else "whole"] += 1
        assert tokens == whole[i][: len(tokens)] and (cut or len(tokens) == n)

    def refused(x: object) -> bool:
        return isinstance(x, RuntimeError) and "the engine drains" in str(x)

    async def main(e: AsyncEngine) -> None:
        tasks, running, paused = list[asyncio.Task](), set[int](), False
        for _ in range(200):
            what = dice.random()
            if what < 0.5:
                job = consume(e, dice.randrange(12), dice.randrange(1, 31), dice.randrange(3), running)
                tasks.append(asyncio.create_task(job))
            elif what < 0.6 and tasks:
                dice.choice(tasks).cancel()
            elif what < 0.68 and running:
                await e.abort(dice.choice(sorted(running)))
            elif what < 0.76:
                await (e.resume() if paused else e.pause())
                paused = not paused
            elif what < 0.82:
                await e.call(Engine.params_changed)
            elif what < 0.86:
                await e.call(Engine.sleep, "cache")
                await asyncio.sleep(0.001)
                await e.call(Engine.wake_up)
            elif what < 0.88 and not paused:
                await e.drain()
                await e.resume()
            else:
                await asyncio.sleep(dice.random() * 0.01)
        await e.resume()
        for x in await asyncio.gather(*tasks, return_exceptions=True):
            seen["cancelled"] += isinstance(x, asyncio.CancelledError)
            assert x is None or isinstance(x, asyncio.CancelledError) or refused(x), x
        await e.drain()
        assert not e._requests and not e.engine.has_unfinished_requests and not e._callbacks_by_loop
        with pytest.raises(RuntimeError, match="the engine drains"):
            await e.add(prompts[0], GREEDY)

    with engine(fresh(), overlap=overlap, max_num_seqs=7, token_budget=24) as one, AsyncEngine(one) as e:
        run(main(e))
        tree = one.state.prefix_cache
        assert tree.num_available_pages() == tree.num_device_pages - 1, "every page is free or idle"
    assert all(seen.values()), seen


# --- what a loop of training asks of a plain engine -----------------------------------------------------------------


def test_samples_share_the_prompts_pages() -> None:
    """A prompt is computed for each of its samples."""
    prompt = [DICE.randrange(97) for _ in range(48)]
    with engine(fresh()) as one:
        (output,) = one.generate([prompt], SamplingParams(n=8, max_tokens=4, seed=1, ignore_eos=True))
        assert output.num_cached_tokens == 7 * 47  # the last token is computed for each, to draw from
        assert len({tuple(c.token_ids) for c in output.completions}) > 4


@OVERLAP
def test_turns_by_token_ids(overlap: bool) -> None:
    """What a turn has computed, its answer included, is computed again for the next."""

    async def main(e: AsyncEngine) -> None:
        tokens, more = PROMPTS[1], list[int]()
        for i in range(4):
            ((_, output),) = [x async for x in e.generate([tokens], GREEDY)]
            # All but the answer's last token, which was drawn and never read, and the one that was not known yet when
            # the last step was launched.
            assert output.num_cached_tokens == (0 if i == 0 else len(tokens) - len(more) - 1 - overlap)
            with engine(fresh()) as other:
                assert told(other.generate([tokens], GREEDY))[0] == output.completions[0].token_ids
            more = [DICE.randrange(97) for _ in range(5)]
            tokens = [*tokens, *output.completions[0].token_ids, *more]

    with engine(fresh(), overlap=overlap) as one, AsyncEngine(one) as e:
        run(main(e))


def test_new_parameters_between_steps() -> None:
    """An optimizer's step in the middle of a request: seen by the next token, with nobody telling the engine."""
    params, other = fresh(0), fresh(1)
    with engine(params) as one:
        id = one.add(PROMPTS[1], GREEDY)
        for _ in range(4):
            one.step()
        with torch.no_grad():
            for mine, new in zip(
                fastgen.training.logprobs.iter_weights(params),
                fastgen.training.logprobs.iter_weights(other),
                strict=True,
            ):
                mine.copy_(new)
        partial = one.abort(one.add(PROMPTS[0], GREEDY))
        assert partial is not None and partial.completions[0].token_ids == []
        for _ in range(3):
            one.step()
        output = one.abort(id)
        assert output is not None
        (c,) = output.completions
        assert (
            c.finish_reason == "abort"
            and c.weight_versions == [0] * 4 + [1] * (len(c.weight_versions) - 4)
            and 1 in c.weight_versions
        )
        old = expected(fresh(0))[1]
        assert c.token_ids[:4] == old[:4] and c.token_ids != old[: len(c.token_ids)]


def test_only_on_an_engine_of_its_own_ranks() -> None:
    class Group:
        pass

    with engine(fresh()) as one:
        one.tp_group = Group()  # type: ignore[assignment]
        with pytest.raises(ValueError, match="tensor_parallel=N"):
            AsyncEngine(one)
        one.tp_group = None
