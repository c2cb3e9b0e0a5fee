"""What must not end or stall a server, tested without one."""

import asyncio
import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import zmq
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from test_tokenizer import BYTE_LEVEL

import fastgen
from fastgen import Output, SamplingParams
from fastgen.core.batch import build_logit_edits
from fastgen.core.request import Completion, SequenceState
from fastgen.core.scheduler import Span
from fastgen.distributed import processes
from fastgen.server import engine_process, http_worker, log, middleware, supervisor
from fastgen.server.app_state import TokenizerThread
from fastgen.server.completion_response import dump_json, iter_json_chunks
from fastgen.server.errors import APIError
from fastgen.server.metrics import (
    GENERATION_TOKENS,
    INTER_TOKEN_LATENCY,
    REQUEST_SUCCESS,
    TTFT,
    Metrics,
    render_metrics,
)
from fastgen.server.requests import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest
from fastgen.text.detokenizer import StopString
from fastgen.text.tokenizer import max_prompt_chars


def test_accepting_pauses_without_files(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker tries once per pause and warns once; once there are files again, it accepts connections."""
    monkeypatch.setattr(http_worker, "ACCEPT_PAUSE_SECONDS", 0.01)
    num_tries = 0
    is_full = True

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal num_tries
            num_tries += 1
            if is_full:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def run() -> None:
        nonlocal is_full
        accepted = asyncio.Event()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.set()
                transport.close()

        with Listener() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(16)
            listener.setblocking(False)
            accepting = asyncio.create_task(http_worker.accept_connections(listener, Protocol))
            clients = [socket.create_connection(listener.getsockname()) for _ in range(8)]
            while num_tries < 5:
                await asyncio.sleep(0.001)
            began, num_before = time.monotonic(), num_tries
            await asyncio.sleep(0.05)
            assert num_tries - num_before <= (time.monotonic() - began) / http_worker.ACCEPT_PAUSE_SECONDS + 1
            assert not accepted.is_set()
            is_full = False
            await asyncio.wait_for(accepted.wait(), 5)
            accepting.cancel()
            for client in clients:
                client.close()

    asyncio.run(run())
    assert capfd.readouterr().err.count("no more connections can be accepted for now: ulimit -n is reached") == 1


CHATTY = """
import sys
from fastgen.server.log import log_line, nonblocking_stderr
with nonblocking_stderr():
    for i in range(20_000):
        print(f"line {i} of a process that says much to whoever listens", file=sys.stderr)
    log_line("the last line")
print("served", flush=True)
"""


@pytest.mark.parametrize("reader", ["not reading", "gone", "reading", "closed"])
def test_standard_error_without_a_reader(reader: str) -> None:
    """The process continues and ends well if standard error is a full pipe, a broken pipe, or closed."""
    source, sink = os.pipe()
    if reader == "gone":
        os.close(source)
    closing = {"preexec_fn": lambda: os.close(2)} if reader == "closed" else {"stderr": sink}
    process = subprocess.Popen([sys.executable, "-c", CHATTY], stdout=subprocess.PIPE, **closing)  # type: ignore[call-overload]
    os.close(sink)
    output = b""
    while reader == "reading" and (data := os.read(source, 2**16)):
        output += data
    out, _ = process.communicate(timeout=60)
    assert out == b"served\n" and process.returncode == 0
    if reader == "reading":
        assert output.endswith(b"the last line\n") and output.startswith(b"line 0 of")
    if reader != "gone":
        os.close(source)


def test_dropped_lines_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    before = os.dup(2)
    monkeypatch.setattr(log, "_num_dropped_lines", 0)
    try:
        os.dup2(sink, 2)
        for i in range(200):
            log.log_line(f"{i} " + "x" * 1000)
        output = os.read(source, 2**20).decode()
        log.log_line("again")
        output += os.read(source, 2**20).decode()
    finally:
        os.dup2(before, 2)
        for file in (source, sink, before):
            os.close(file)
    lines = output.splitlines()
    *written, dropped, last = lines
    assert last == "again" and dropped == f"fgserve: {200 - len(written)} lines were dropped, since nothing read them"
    assert [int(line.split()[0]) for line in written] == [*range(len(written))] and len(written) > 48


def test_folders_of_killed_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are removed at the next start; the folders of running servers, and other folders, stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    for name in ("killed", "runs"):
        (tmp_path / f"fgserve-{name}").mkdir()
        (tmp_path / f"fgserve-{name}" / "lock").touch()
    (tmp_path / "fgserve-starts").mkdir()  # has no lock yet
    (tmp_path / "fgserve-killed" / "pymp-x").mkdir()
    with open(tmp_path / "fgserve-runs" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with supervisor.temporary_folder() as folder:
            names = {p.name for p in tmp_path.iterdir()}
            assert names == {"fgserve-runs", "fgserve-starts", Path(folder).name}
            assert Path(folder).stat().st_mode & 0o777 == 0o700
            with supervisor.temporary_folder() as other:  # a second server's
                assert Path(folder).exists() and other != folder
    assert {p.name for p in tmp_path.iterdir()} == {"fgserve-runs", "fgserve-starts"}


def test_stopped_descendants() -> None:
    """Stopped children and grandchildren are listed until they continue."""
    sleeper = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        grandchild = int(child.stdout.readline())
        try:
            assert grandchild not in processes.find_stopped_descendants()
            os.kill(grandchild, signal.SIGSTOP)
            end = time.monotonic() + 10
            while processes.find_stopped_descendants() != [grandchild]:
                assert time.monotonic() < end
            os.kill(grandchild, signal.SIGCONT)
            while processes.find_stopped_descendants():
                assert time.monotonic() < end
        finally:
            os.kill(grandchild, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                child.kill()


def test_metrics_are_added_up() -> None:
    """The counts of two workers, one of which has ended, are added up in Prometheus's format."""
    total = engine_process.EngineServer(
        MagicMock(spec=fastgen.Engine), MagicMock(spec=zmq.Socket), MagicMock(spec=engine_process.EngineInfo)
    )

    async def work(*gaps: float) -> None:
        sent: list[dict] = []
        metrics = Metrics(sent.append)
        metrics.count(GENERATION_TOKENS, 3)
        for gap in gaps:
            metrics.observe(INTER_TOKEN_LATENCY, gap)
        metrics.count(REQUEST_SUCCESS, label="stop")
        assert not sent
        metrics.flush()
        metrics.flush()
        metrics.observe(TTFT, 1000.0)
        while len(sent) < 2:  # by itself, a little later
            await asyncio.sleep(0.01)
        for changes in sent:
            total.add_counts(engine_process.Sender(b"", ""), changes)

    asyncio.run(work(0.25, 0.25, 0.5))
    asyncio.run(work(0.75))
    stats = dict.fromkeys(("running", "waiting", "cache_usage", "prefix_queries", "prefix_hits", "preemptions"), 1)
    lines = render_metrics(total.metric_counts, stats, "m").decode().splitlines()
    for line in (
        'vllm:generation_tokens_total{model_name="m"} 6.0',
        'vllm:prompt_tokens_total{model_name="m"} 0.0',
        'vllm:inter_token_latency_seconds_bucket{le="0.3",model_name="m"} 2.0',
        'vllm:inter_token_latency_seconds_bucket{le="0.75",model_name="m"} 4.0',
        'vllm:inter_token_latency_seconds_bucket{le="+Inf",model_name="m"} 4.0',
        'vllm:inter_token_latency_seconds_sum{model_name="m"} 1.75',
        'vllm:time_to_first_token_seconds_bucket{le="160.0",model_name="m"} 0.0',
        'vllm:time_to_first_token_seconds_count{model_name="m"} 2.0',
        'vllm:request_success_total{finished_reason="stop",model_name="m"} 2.0',
        'vllm:num_preemptions_total{model_name="m"} 1.0',
    ):
        assert line in lines, "\n".join(lines)


# --- limits, and work that is linear ---------------------------------------------------------------------------------


def held_and_cut(text: str, stop: list[str]) -> tuple[int, int]:
    """The end of a text that begins a stop string, and where the first one begins; by the definition."""
    held = max(n for s in stop for n in range(len(s)) if text.endswith(s[:n]))
    return held, min((i for s in stop if (i := text.find(s)) >= 0), default=-1)


def test_stop_strings_in_a_stream() -> None:
    """As by the definition, in pieces of any length, and for those that overlap themselves and each other."""
    dice = random.Random(0)
    for _ in range(300):
        stop = ["".join(dice.choices("ab", k=dice.randrange(1, 7))) for _ in range(dice.randrange(1, 4))]
        strings, text = [StopString(s) for s in stop], ""
        while len(text) < 40:
            new = "".join(dice.choices("abc", weights=(5, 5, 1), k=dice.randrange(1, 6)))
            cuts = [len(text) + n - len(s.text) for s in strings if (n := s.push(new)) is not None]
            text += new
            held, cut = held_and_cut(text, stop)
            if cut >= 0:
                assert min(cuts) == cut
                break
            assert not cuts and max(s.num_matched for s in strings) == held


def test_long_stop_strings_cost_little() -> None:
    """A megabyte of them, against a text that almost is one: no more than the text's length in steps."""
    stop = StopString("a" * 10**6 + "b")
    began = time.monotonic()
    for _ in range(2000):
        assert stop.push("a" * 50) is None
    assert stop.num_matched == 10**5 and time.monotonic() - began < 2
    assert stop.push("c") is None and stop.num_matched == 0


def changes(s: SequenceState) -> dict[int, tuple[float, float, bool]]:
    """What a sample changes of logits, one by one."""
    p, found = s.params, dict[int, tuple[float, float, bool]]()
    if p.repetition_penalty != 1:
        found |= {t: (0.0, 0, True) for t in s.token_ids}
    if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
        found |= {t: (0.0, n, True) for t, n in s.output_token_counts.items()}
    for token, bias in p.logit_bias.items():
        found[token] = (bias, *found.get(token, (0.0, 0, False))[1:])
    if len(s.completion.token_ids) < p.min_tokens:
        found |= {t: (float("-inf"), *found.get(t, (0.0, 0, False))[1:]) for t in s.end_token_ids}
    return found


def test_edits_are_each_samples_own() -> None:
    """What many samples change together is what each changes; samples that change nothing have none."""
    dice = random.Random(1)
    samples: dict[int, SequenceState] = {}
    for i in range(40):
        params = SamplingParams(
            max_tokens=64,
            repetition_penalty=dice.choice([1, 1.5]),
            presence_penalty=dice.choice([0, 0.25]),
            frequency_penalty=dice.choice([0, 0.5]),
            logit_bias={dice.randrange(50): dice.choice([-100, 2.5]) for _ in range(dice.choice([0, 5]))},
            min_tokens=dice.choice([0, 4]),
            stop_token_ids=tuple(dice.sample(range(50), 3)),
        )
        output = Output(i, [dice.randrange(50) for _ in range(6)], [Completion()])
        samples[i] = SequenceState(output, 0, params, 0, 99, frozenset({1}), None)
        for _ in range(dice.randrange(8)):
            samples[i].append_token(dice.randrange(50), 0.0, ())
    plan = tuple(Span(i, 0, 1, i % 5 > 0, ()) for i in range(40))
    found = build_logit_edits(plan, samples, torch.device("cpu"))
    assert found is not None and found.rows.dtype == torch.long and found.bias.dtype == torch.float32
    wanted = [
        (r, t, *x, s.params.presence_penalty, s.params.frequency_penalty, s.params.repetition_penalty)
        for r, s in samples.items()
        if r % 5
        for t, x in sorted(changes(s).items())
    ]
    names = (
        "rows",
        "token_ids",
        "bias",
        "output_counts",
        "seen",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
    assert [*zip(*(getattr(found, name).tolist() for name in names), strict=True)] == wanted
    plain = SequenceState(Output(0, [1], [Completion()]), 0, SamplingParams(), 0, 9, frozenset({1}), None)
    assert build_logit_edits((Span(0, 0, 1, True, ()),), {0: plain}, torch.device("cpu")) is None


HEAVY: list[tuple[type, dict[str, Any], str]] = [
    (CompletionRequest, {"prompt": ["x"] * 300_000 + [1]}, "at most 16384"),
    (CompletionRequest, {"prompt": [""] * 10_000}, "at least 1 character"),
    (CompletionRequest, {"prompt": ["x", *[1] * 10_000]}, "valid string"),
    (CompletionRequest, {"prompt": [1, *["x"] * 10_000]}, "valid integer"),
    (CompletionRequest, {"prompt": [[1], *["x"] * 10_000]}, "valid list"),
    (CompletionRequest, {"prompt": "x", "stop": "x" * 10**6}, "at most 2048 characters"),
    (CompletionRequest, {"prompt": "x", "stop": ["x"] * 65}, "at most 64"),
    (CompletionRequest, {"prompt": "x", "stop_token_ids": [*range(50_000)]}, "at most 1024"),
    (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(50_000)}}, "at most 1024"),
    (CompletionRequest, {"prompt": "x"} | {f"x{i}": 0 for i in range(10_000)}, "more than 256 fields"),
    (ChatRequest, {"messages": [{}] * 300_000}, "at most 8192"),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_000}]}, "at most 8192"),
    (ChatRequest, {"messages": [{"role": "nobody"}] * 8000}, "system"),
    (DetokenizeRequest, {"tokens": [0] * 300_000}, "at most 262144"),
    (GenerateRequest, {"token_ids": ["x"] * 10_000}, "valid integer"),
]


@pytest.mark.parametrize("model, body, message", HEAVY)
def test_bodies_that_hold_too_much(model: type[BaseModel], body: dict[str, Any], message: str) -> None:
    """The first thing that is wrong ends it: few errors, little work, and a short message."""
    began = time.monotonic()
    with pytest.raises(ValidationError, match=message) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 8 and time.monotonic() - began < 1
    request = RequestValidationError([e | {"loc": ("body", *e["loc"])} for e in caught.value.errors()])
    reply = asyncio.run(middleware.handle_error(MagicMock(spec=Request), request))
    assert reply.status_code == 400 and len(reply.body) < 500 and time.monotonic() - began < 1


def test_texts_that_can_never_fit() -> None:
    """As many characters as the longest token times the context; what fits is no longer."""
    longest = max_prompt_chars(BYTE_LEVEL, 100)
    token = max(BYTE_LEVEL.get_vocab().items(), key=lambda item: len(item[0]))[1]
    assert len(BYTE_LEVEL.decode([token] * 100)) <= longest <= 100 * 4 * 64
    assert max_prompt_chars(None, 100) == 0


@pytest.mark.parametrize(("value", "most"), [("1,", 2**21), ("[],", 419_430), ('{"a":1},', 233_016)])
def test_bodies_of_too_many_values(value: str, most: int) -> None:
    """Lists, objects and keys are read more slowly than numbers, and count for more."""
    body = value.encode() * most
    assert middleware._check_num_values(body) is body
    with pytest.raises(APIError, match="2097152 commas") as e:
        middleware._check_num_values(body + value.encode())
    assert e.value.status == 413


def test_short_texts_go_first() -> None:
    """Of what waits for a thread the shortest, and of equals the first; what waited long enough goes before all."""
    done, begin, free = list[str](), threading.Event(), threading.Event()

    def block(_: Any) -> None:
        begin.set()
        free.wait(10)

    async def run() -> None:
        thread = TokenizerThread("texts")
        tasks = [asyncio.create_task(thread.run(block))]
        await asyncio.to_thread(begin.wait, 10)
        tasks.append(asyncio.create_task(thread.run(lambda _: done.append("patient"), -(10**9))))
        for name, size in (("long", 30_000), ("short", 10), ("left", 20), ("short too", 10)):
            tasks.append(asyncio.create_task(thread.run(lambda _, name=name: done.append(name), size)))
        await asyncio.sleep(0)
        tasks[4].cancel()
        await asyncio.sleep(0)
        free.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda _: 1 // 0)

    asyncio.run(run())
    assert done == ["patient", "short", "short too", "long"]


def test_json_in_pieces() -> None:
    """The bytes are those of one go, for lists of any length, and for what is empty or no text."""
    top = [{"token": "é\u2028", "logprob": -0.5, "bytes": [1, 2]}] * 3
    long = [{"token": "x", "top_logprobs": top}] * 150
    values = [
        {"logprobs": {"content": long, "refusal": None}, "index": 0},
        {},
        [],
        [*range(64)],
        [*range(65)],
        "\ud800",
    ]
    for value in values:
        assert b"".join(iter_json_chunks(value)) == dump_json(value)
    assert max(map(len, iter_json_chunks(values[0]))) < len(dump_json(values[0])) / 2
