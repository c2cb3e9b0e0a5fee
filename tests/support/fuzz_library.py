"""Fuzzes the library: random calls with random arguments, in every state of an engine, against an untouched engine.

python tests/support/fuzz_library.py [calls] [seed]

Each round makes an engine, runs reference requests on it, and makes random calls around them. A call may end with a
documented error only. The reference requests, what `restore` and `fork` made of them, and a fresh batch at the end of
the round must have the tokens of an untouched engine. A crash or a hang names the round: its calls depend on
(seed, round) alone and can be repeated with `python tests/support/fuzz_library.py --round seed round`.
"""

import asyncio
import copy
import faulthandler
import gc
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen import AsyncEngine, Engine, SamplingParams, Snapshot

sys.path.insert(0, str(Path(__file__).parent))
import tiny

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
CONFIG = fastgen.from_hf_config(tiny.config())
PARAMS = tiny.weights(CONFIG, device="cpu")
FOLDER = Path(tempfile.mkdtemp())
fastgen.save(FOLDER / "model", CONFIG, PARAMS)
DOCUMENTED = (ValueError, RuntimeError, FileNotFoundError)
STATE = ("is closed", "AsyncEngine", "start processes with spawn", "was left before its end", "a step failed")
CALLS_PER_ROUND = 40
MAX_ROUND_SECONDS = 120
PROBLEMS: dict[str, str] = {}
REFERENCE_REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    ([1, 2, 3], {"temperature": 0, "max_tokens": 9}),
    ([5] * 17, {"seed": 7, "max_tokens": 12, "logprobs": 1}),
    ([1, 2, 3, 9, 9, 4], {"seed": 1, "max_tokens": 10, "repetition_penalty": 1.3, "top_k": 9}),
]
JUNK: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**70), 1.5, -0.0, 1e-44, 1e308, math.nan, math.inf, "", "a",
    "\ud800", "none", b"\x00", [], [[]], [1, 2], [[1, 2], [3]], [60], [61], [-1], [1.5], ["a", 1], (1, 2), {}, {1: 2},
    {"prompt": [1]}, {"a": [1]}, set(), object(), range(3), iter([1]), [None], [True], [2**70], [[[1]]], Exception,
    torch.zeros(2), torch.ones(3, dtype=torch.long), torch.tensor(1), lambda: 1, [1] * 63, [1] * 64, [1] * 500,
    "x" * 300, PARAMS, CONFIG,
]  # fmt: skip


class Round:
    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number, self.rng = seed, number, random.Random(f"{seed},{number}")
        r = self.rng
        self.settings = {
            "page_size": r.choice([1, 4, 16]), "cache_tokens": r.choice([64, 128, 512]), "overlap": r.random() < 0.5,
            "max_num_seqs": r.choice([2, 8]), "token_budget": r.choice([16, 64]), "prefix_cache": r.random() < 0.8,
            "max_adapters": 2, "seed": 0,
        }  # fmt: skip
        self.owns_params = r.random() < 0.6
        if self.owns_params:
            self.engine = Engine.from_pretrained(FOLDER / "model", device="cpu", progress=False, **self.settings)
        else:
            self.engine = Engine(tiny.weights(CONFIG, device="cpu"), CONFIG, progress=False, **self.settings)
        self.ids: dict[int, int] = {}  # request id -> index of its reference request
        self.streams: list[Any] = []
        self.snapshots: list[tuple[Snapshot, int | None]] = []
        self.changed = False  # whether the parameters are no longer those of the reference tokens
        self.done: dict[int, fastgen.Output] = {}
        self.num_calls = Counter[str]()

    # --- arguments

    def junk(self) -> Any:
        r = self.rng
        x = r.choice(JUNK)
        return [x] * r.randint(1, 3) if r.random() < 0.15 else x

    def maybe(self, valid: Any, p: float = 0.6) -> Any:
        return valid() if self.rng.random() < p else self.junk()

    def id(self) -> Any:
        return self.maybe(lambda: self.rng.choice([*self.ids, *self.ids, *self.ids, 0, 1, 99, -1]))

    def prompt(self) -> Any:
        r = self.rng
        return self.maybe(lambda: [r.randrange(61) for _ in range(r.choice([1, 2, 5, 30, 62]))], 0.5)

    def sampling(self) -> Any:
        r = self.rng
        pick: dict[str, list[Any]] = {
            "temperature": [0, 1, 100, 1e-44, 1e-30, 1.2e-38, 5], "top_p": [1, 1e-30, 0.5, 1e-44], "min_p": [0, 1, 0.3],
            "top_k": [0, 1, 60, 61, 10**9, 2**40], "seed": [0, -(2**63), 2**63 - 1, None], "n": [1, 2, 5],
            "max_tokens": [1, 3, 20, None, 2**40], "min_tokens": [0, 1],
            "stop_token_ids": [(), (1, 2), (60,), (61,), (2**40,)],
            "presence_penalty": [0, 2, -2], "frequency_penalty": [2, -2], "repetition_penalty": [1e-3, 100, 1],
            "logit_bias": [{}, {1: 100}, {60: -100.0}, {61: 1}, {i: -100 for i in range(61)}], "stop": [(), "a"],
            "logprobs": [None, 0, 3, 61, 62], "prompt_logprobs": [None, 0, 3], "logprob_mode": ["raw", "processed"],
            "adapter": [None, "a", "b"], "ignore_eos": [True, False], "grammar": [None, "regex:a"],
        }  # fmt: skip
        names = r.sample([*pick], r.randint(0, 5))
        settings = {name: self.junk() if r.random() < 0.15 else r.choice(pick[name]) for name in names}
        settings.setdefault("max_tokens", r.randint(1, 8))
        return SamplingParams(**settings)

    def tree(self) -> Any:
        r = self.rng
        choice = r.randrange(9)
        if choice == 0:
            return tiny.weights(CONFIG, device="cpu")
        if choice == 1:
            return [("model.norm.weight", PARAMS.final_norm.clone())]
        if choice == 2:
            return {"model.norm.weight": torch.full_like(PARAMS.final_norm, r.choice([math.nan, math.inf]))}
        if choice == 3:
            return [("model.norm.weight", torch.zeros(r.choice([1, 7])))]
        if choice == 4:
            return [("nobody", PARAMS.final_norm)]
        if choice == 5:
            return PARAMS._replace(final_norm=self.junk())
        if choice == 6:
            return PARAMS._replace(layers=PARAMS.layers[:1])
        if choice == 7:
            return [("model.norm.weight", self.junk())]
        return self.junk()

    def adapter(self) -> Any:
        r = self.rng
        valid = fastgen.lora.init(CONFIG, r.choice([1, 4]))
        choice = r.randrange(6)
        if choice == 0:
            return valid._replace(scale=self.junk())
        if choice == 1:
            return valid._replace(layers=valid.layers[:1])
        if choice == 2:
            return self.junk()
        return valid

    def snapshot(self) -> Any:
        r = self.rng
        if not self.snapshots or r.random() < 0.1:
            return self.junk(), None
        snapshot, reference_idx = r.choice(self.snapshots)
        if r.random() < 0.4:
            return copy.deepcopy(snapshot), reference_idx
        s = copy.deepcopy(snapshot)
        change = r.choice([0, 0, 0, 0, 0, 0, *range(1, 9)])  # mostly pages, which would reach other requests
        if change == 0 and s.pages:
            i = r.choice([*s.pages])
            x = s.pages[i]
            s.pages[i] = r.choice(
                [x * 0, x * 0, x + 1, -x, x * math.nan, x.int(), x[:1], x[:, :, :0], x[0], self.junk()]
            )
        elif change == 1:
            s.seeds = {k: self.junk() for k in s.seeds}
        elif change == 2:
            s.prompt_token_ids = self.junk()
        elif change == 3:
            s.completions[0].token_ids = self.junk()
        elif change == 4:
            s.sampling = self.junk()
        elif change == 5:
            s.completions = self.junk()
        elif change == 6:
            s.pages = self.junk()
        elif change == 7:
            s.completions[0].logprobs = self.junk()
        else:
            s.checksum = self.junk()
        return s, None

    # --- calls

    def request(self, reference_idx: int | None = None) -> None:
        reference_idx = self.rng.randrange(len(REFERENCE_REQUESTS)) if reference_idx is None else reference_idx
        prompt, settings = REFERENCE_REQUESTS[reference_idx]
        self.ids[self.engine.add(prompt, SamplingParams(**settings))] = reference_idx

    def step(self) -> None:
        self.take(self.engine.step())

    def take(self, events: list[fastgen.Event]) -> None:
        for event in events:
            if event.output is not None:
                self.done[event.request_id] = event.output

    def call(self) -> None:
        r, e = self.rng, self.engine
        names = [n for n in dir(self) if n.startswith("do_")]
        name = r.choice([*names, *["request", "step", "do_snapshot", "do_restore"] * 3])
        self.num_calls[name] += 1
        self.last = name
        getattr(self, name)()
        assert e is self.engine

    def do_add(self) -> None:
        self.engine.add(self.prompt(), self.maybe(self.sampling), stream_text=self.rng.random() < 0.5)

    def do_generate(self) -> None:
        prompts = [self.prompt() for _ in range(self.rng.randint(0, 3))] if self.rng.random() < 0.6 else self.prompt()
        on_error = self.rng.choice(["raise", "skip", "skip", self.junk()])
        sampling = self.maybe(self.sampling, 0.8)
        outputs = self.engine.generate(prompts, sampling, progress=False, on_error=on_error)
        assert all(o.finished for o in outputs)

    def do_stream(self) -> None:
        stream = self.engine.stream(self.prompt(), self.maybe(self.sampling, 0.8))
        next(stream, None)
        if self.rng.random() < 0.5:
            self.streams.append(stream)

    def do_next(self) -> None:
        if self.streams:
            next(self.rng.choice(self.streams), None)

    def do_leave(self) -> None:
        if self.streams:
            stream = self.streams.pop()
            if self.rng.random() < 0.5:
                stream.close()
            else:
                thread = threading.Thread(target=lambda x: None, args=(stream,))
                del stream
                thread.start()
                thread.join()

    def do_as_completed(self) -> None:
        for _ in self.engine.as_completed([self.prompt()], self.maybe(self.sampling, 0.8)):
            break

    def do_abort(self) -> None:
        id = self.id()
        self.engine.abort(id)
        if isinstance(id, int):
            self.ids.pop(id, None)

    def do_fork(self) -> None:
        id = self.id()
        reference_idx = self.ids.get(id) if isinstance(id, int) else None
        for new in self.engine.fork(id, self.maybe(lambda: self.rng.randint(1, 3)), index=self.maybe(lambda: 0, 0.8)):
            if reference_idx is not None and REFERENCE_REQUESTS[reference_idx][1].get("temperature") == 0:
                self.ids[new] = reference_idx

    def do_snapshot(self) -> None:
        id = self.id()
        snapshot = self.engine.snapshot(id, include_pages=self.rng.random() < 0.7)
        reference_idx = None if self.changed or not isinstance(id, int) else self.ids.get(id)
        if self.rng.random() < 0.5:
            file = FOLDER / "s.safetensors"
            snapshot.save(file)
            if self.rng.random() < 0.5:
                data = bytearray(file.read_bytes())
                for _ in range(self.rng.randint(1, 3)):
                    data[self.rng.randrange(len(data))] = self.rng.randrange(256)
                file.write_bytes(data[: self.rng.choice([len(data), len(data), self.rng.randrange(len(data))])])
            snapshot = Snapshot.load(file)
        self.snapshots.append((snapshot, reference_idx))

    def do_load(self) -> None:
        Snapshot.load(self.rng.choice([FOLDER, FOLDER / "none", FOLDER / "model" / "model.safetensors", self.junk()]))

    def do_restore(self) -> None:
        snapshot, reference_idx = self.snapshot()
        if snapshot is None:
            return
        if self.rng.random() < 0.5:
            self.engine.params_changed()  # the cache has nothing but the snapshot's pages now
        id = self.engine.restore(snapshot)
        if reference_idx is not None:
            self.ids[id] = reference_idx
        else:  # its pages must not reach other requests
            for reference_idx in range(len(REFERENCE_REQUESTS)):
                self.request(reference_idx)

    def do_sleep(self) -> None:
        self.engine.sleep(self.rng.choice(["cache", "params", "all", "all", self.junk()]))

    def do_wake_up(self) -> None:
        self.engine.wake_up()

    def do_params_changed(self) -> None:
        self.engine.params_changed()

    def do_score(self) -> None:
        e, r = self.engine, self.rng
        settings = {
            k: self.maybe(lambda: 1, 0.3) for k in r.sample(["first", "temperature", "token_budget"], r.randint(0, 2))
        }
        call = r.choice([e.score, lambda *a, **k: fastgen.score(PARAMS, CONFIG, *a, **k)])
        call(r.choice([[[1, 2, 3]], [[1, 2], [3, 4, 5]], self.junk(), [self.junk()]]), **settings)

    def do_update(self) -> None:
        version = self.engine.weight_version
        try:
            self.engine.update_params(self.tree(), **{k: self.rng.random() < 0.5 for k in ("partial", "recompute")})
        finally:
            if self.engine.weight_version != version:
                self.changed = True
                self.ids.clear()  # some tokens may come from other parameters
                self.snapshots.clear()

    def do_adapter(self) -> None:
        e, r = self.engine, self.rng
        name = self.maybe(lambda: r.choice("ab"), 0.8)
        r.choice([
            lambda: e.add_adapter(name, self.adapter()), lambda: e.add_adapter(name, self.adapter(), self.junk()),
            lambda: e.update_adapter(name, self.maybe(self.adapter)), lambda: e.remove_adapter(name),
            lambda: e.adapter_params(name), lambda: e.load_adapters(self.junk()), lambda: e.adapters,
        ])()  # fmt: skip

    def do_read(self) -> None:
        e = self.engine
        self.rng.choice([
            lambda: [x.sum() for x in (*e.cache.k, e.params.embed)], lambda: (e.cache_stats, e.has_unfinished_requests),
            lambda: e.last_batch and fastgen.forward(e.params, e.cache, e.last_batch, CONFIG), e.summary, gc.collect,
        ])()  # fmt: skip

    def do_construct(self) -> None:
        r = self.rng
        r.choice([
            lambda: Engine(self.junk(), self.junk()), lambda: Engine(PARAMS, self.junk()), lambda: Engine(self.junk()),
            lambda: Engine(PARAMS, CONFIG, progress=False, **{r.choice(["page_size", "seed", "cash"]): self.junk()}),
            lambda: SamplingParams(**{r.choice(["n", "seed", "stop", "logit_bias"]): self.junk()}),
            lambda: AsyncEngine(self.junk()), lambda: fastgen.lora.init(CONFIG, self.junk()),
            lambda: Engine.from_pretrained(FOLDER / "model", dtype=self.junk(), progress=False),
        ])()  # fmt: skip

    def do_modes(self) -> None:
        with self.rng.choice([lambda: torch.autocast("cpu"), torch.inference_mode, torch.enable_grad, torch.no_grad])():
            self.rng.choice([self.step, self.do_generate, self.do_restore, self.do_score, self.do_snapshot])()

    def do_thread(self) -> None:
        """Calls from another thread at the same time."""
        errors: list[BaseException] = []

        def other() -> None:
            try:
                for _ in range(3):
                    assert self.engine.cache_stats and self.engine.has_unfinished_requests is not None
                    self.engine.abort(99)
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            self.step()
        finally:
            thread.join()
        assert all(isinstance(e, RuntimeError) for e in errors), errors

    def do_hold(self) -> None:
        e, r = self.engine, self.rng
        with AsyncEngine(e) as a:
            for call in r.sample(
                [lambda: e.step(), lambda: e.add([1]), lambda: AsyncEngine(e), e.close, lambda: e.score([[1]])], 2
            ):
                try:
                    call()
                    raise AssertionError("not refused")
                except RuntimeError as error:
                    assert "AsyncEngine" in str(error)

            async def use() -> None:
                # running requests go on, but their events are lost here
                self.ids.clear()
                reference_idx = r.randrange(len(REFERENCE_REQUESTS))
                prompt, settings = REFERENCE_REQUESTS[reference_idx]
                if r.random() < 0.5:
                    await a.call(r.choice([Engine.params_changed, Engine.wake_up]))
                async with asyncio.timeout(60):
                    request = await a.add(prompt, SamplingParams(**settings))
                    if e.memory.resident:
                        self.check_tokens(await request.output(), reference_idx)
                    async for _ in a.generate([self.prompt(), self.prompt()], on_error="skip"):
                        break

            asyncio.run(use())

    def do_fork_process(self) -> None:
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                self.engine.step()
            except RuntimeError as e:
                code = 0 if "spawn" in str(e) or "is closed" in str(e) else 4
            finally:
                os._exit(code)
        end = time.monotonic() + 60
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError("a fork hangs")
            time.sleep(0.002)
        assert done[1] == 0, done

    def do_close(self) -> None:
        if self.rng.random() < 0.15:
            self.engine.close()

    # --- checks

    def check_tokens(self, output: fastgen.Output, reference_idx: int) -> None:
        if self.changed:
            return
        completion, expected = output.completions[0], REFERENCE_TOKENS[reference_idx]
        if completion.finish_reason == "abort":
            expected = expected[: len(completion.token_ids)]
        assert completion.token_ids == expected, f"reference {reference_idx}: {completion.token_ids} for {expected}"

    def run(self) -> int:
        for _ in range(CALLS_PER_ROUND):
            self.last = ""
            try:
                self.call()
            except torch.OutOfMemoryError:
                pass
            except Exception as e:
                is_undocumented = not isinstance(e, DOCUMENTED) or isinstance(e, UnicodeError)
                if is_undocumented or (isinstance(e, RuntimeError) and not any(word in str(e) for word in STATE)):
                    self.problem(e)
            if self.engine.access_guard.closed:
                break
        self.end()
        return sum(self.num_calls.values())

    def problem(self, error: Exception) -> None:
        """Records an undocumented error, once for each line that raises it."""
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "fastgen" in f.filename and "tests" not in f.filename), frames[-1])
        key = f"{self.last}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno} {place.name}"
        PROBLEMS.setdefault(key, f"{error!s:.200} (round {self.seed} {self.number})")

    def end(self) -> None:
        e = self.engine
        if e.access_guard.closed:
            return
        self.streams.clear()
        e.wake_up()
        while e.has_unfinished_requests:
            self.take(e.step())
        for id, reference_idx in self.ids.items():
            if id in self.done:
                self.check_tokens(self.done[id], reference_idx)
        if self.changed:
            e.update_params(PARAMS)
            self.changed = False
        fresh = e.generate(
            [p for p, _ in REFERENCE_REQUESTS], [SamplingParams(**s) for _, s in REFERENCE_REQUESTS], progress=False
        )
        for reference_idx, output in enumerate(fresh):
            self.check_tokens(output, reference_idx)
        assert not e.has_unfinished_requests and not e.state.running and not e.state.waiting
        e.close()


with Engine(PARAMS, CONFIG, progress=False, cache_tokens=512) as _e:
    REFERENCE_TOKENS = [
        o.completions[0].token_ids
        for o in _e.generate([p for p, _ in REFERENCE_REQUESTS], [SamplingParams(**s) for _, s in REFERENCE_REQUESTS])
    ]


def main() -> None:
    faulthandler.enable()
    if sys.argv[1:2] == ["--round"]:
        faulthandler.dump_traceback_later(MAX_ROUND_SECONDS, exit=True)
        Round(int(sys.argv[2]), int(sys.argv[3])).run()
        print(PROBLEMS)
        return
    calls, seed = (int(x) for x in (*sys.argv[1:], *("300", "0")[len(sys.argv) - 1 :]))
    num_calls, number, total = 0, 0, Counter[str]()
    while num_calls < calls:
        faulthandler.dump_traceback_later(MAX_ROUND_SECONDS, exit=True)  # a hang is a crash that names its round
        print(f"round {seed} {number}", file=sys.stderr, flush=True)
        round = Round(seed, number)
        try:
            round.run()
        except Exception as e:
            round.problem(e)
            traceback.print_exc()
        num_calls += sum(round.num_calls.values())
        total += round.num_calls
        number += 1
    for key, text in sorted(PROBLEMS.items()):
        print(f"{key}: {text}")
    print(f"{num_calls} calls in {number} rounds, {len(PROBLEMS)} problems: {dict(total)}")
    sys.exit(bool(PROBLEMS))


if __name__ == "__main__":
    main()
