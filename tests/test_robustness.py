"""What a server must not end or stall by, shown without one."""

import asyncio
import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import zmq

import fastgen
from fastgen.cli import serve
from fastgen.serve import core, log, worker
from fastgen.serve.metrics import Metrics, exposition


def test_accepting_pauses_without_files(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One try a pause and one line for all of them; once there are files again, connections are taken."""
    monkeypatch.setattr(worker, "PAUSE", 0.01)
    tries = 0
    full = True

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if full:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def run() -> None:
        nonlocal full
        taken = asyncio.Event()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                taken.set()
                transport.close()

        with Listener() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(16)
            listener.setblocking(False)
            acceptor = worker.Acceptor(listener, Protocol)
            acceptor.start()
            clients = [socket.create_connection(listener.getsockname()) for _ in range(8)]
            while tries < 5:
                await asyncio.sleep(0.001)
            began, before = time.monotonic(), tries
            await asyncio.sleep(0.05)
            assert tries - before <= (time.monotonic() - began) / worker.PAUSE + 1
            assert not taken.is_set()
            full = False
            await asyncio.wait_for(taken.wait(), 5)
            acceptor.stop()
            for client in clients:
                client.close()

    asyncio.run(run())
    assert capfd.readouterr().err.count("no more connections can be accepted for now: ulimit -n is reached") == 1


CHATTY = """
import sys
from fastgen.serve.log import always_read, say
with always_read():
    for i in range(20_000):
        print(f"line {i} of a process that says much to whoever listens", file=sys.stderr)
    say("the last line")
print("served", flush=True)
"""


@pytest.mark.parametrize("reader", ["nobody reads", "gone", "reads", "closed"])
def test_a_log_that_nobody_reads(reader: str) -> None:
    """Standard error is a pipe that is full, or broken, or no file at all: the process goes on and ends well."""
    source, sink = os.pipe()
    if reader == "gone":
        os.close(source)
    closing = {"preexec_fn": lambda: os.close(2)} if reader == "closed" else {"stderr": sink}
    process = subprocess.Popen([sys.executable, "-c", CHATTY], stdout=subprocess.PIPE, **closing)  # type: ignore[call-overload]
    os.close(sink)
    said = b""
    while reader == "reads" and (data := os.read(source, 2**16)):
        said += data
    out, _ = process.communicate(timeout=60)
    assert out == b"served\n" and process.returncode == 0
    if reader == "reads":
        assert said.endswith(b"the last line\n") and said.startswith(b"line 0 of")
    if reader != "gone":
        os.close(source)


def test_lines_that_find_no_room_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    source, sink = os.pipe()
    before = os.dup(2)
    monkeypatch.setattr(log, "_dropped", 0)
    try:
        os.dup2(sink, 2)
        for i in range(200):
            log.say(f"{i} " + "x" * 1000)
        found = os.read(source, 2**20).decode()
        log.say("again")
        found += os.read(source, 2**20).decode()
    finally:
        os.dup2(before, 2)
        for file in (source, sink, before):
            os.close(file)
    lines = found.splitlines()
    assert (
        lines[-1] == "again"
        and lines[-2] == f"fgserve: {200 - (len(lines) - 2)} lines were dropped, since nobody read them"
    )
    assert [int(line.split()[0]) for line in lines[:-2]] == [*range(len(lines) - 2)] and len(lines) > 50


def test_folders_of_killed_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are removed at the next start; those of servers that run, and what is no server's, stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})
    for name in ("killed", "runs"):
        (tmp_path / f"fgserve-{name}").mkdir()
        (tmp_path / f"fgserve-{name}" / "lock").touch()
    (tmp_path / "fgserve-starts").mkdir()  # has no lock yet
    (tmp_path / "fgserve-killed" / "pymp-x").mkdir()
    with open(tmp_path / "fgserve-runs" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with serve.temporary_folder() as folder:
            left = {p.name for p in tmp_path.iterdir()}
            assert left == {"fgserve-runs", "fgserve-starts", Path(folder).name}
            assert Path(folder).stat().st_mode & 0o777 == 0o700
            with serve.temporary_folder() as other:  # a second server's
                assert Path(folder).exists() and other != folder
    assert {p.name for p in tmp_path.iterdir()} == {"fgserve-runs", "fgserve-starts"}


def test_stopped_descendants() -> None:
    """Children and their children; none once they go on."""
    sleeper = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        grandchild = int(child.stdout.readline())
        try:
            assert grandchild not in core.stopped_children()
            os.kill(grandchild, signal.SIGSTOP)
            end = time.monotonic() + 10
            while core.stopped_children() != [grandchild]:
                assert time.monotonic() < end
            os.kill(grandchild, signal.SIGCONT)
            while core.stopped_children():
                assert time.monotonic() < end
        finally:
            os.kill(grandchild, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                child.kill()


def test_counts_are_added_up() -> None:
    """Of two workers, one of which is gone; as Prometheus reads them."""
    total = core.Core(MagicMock(spec=fastgen.Engine), MagicMock(spec=zmq.Socket), 1, {})

    async def work(*gaps: float) -> None:
        sent: list[dict] = []
        metrics = Metrics(sent.append)
        metrics.tokens.inc(3)
        for gap in gaps:
            metrics.gap.observe(gap)
        metrics.finished("stop")
        assert not sent
        metrics.flush()
        metrics.flush()
        metrics.first.observe(1000.0)
        while len(sent) < 2:  # by itself, a little later
            await asyncio.sleep(0.01)
        for changes in sent:
            total.on_count(b"", changes)

    asyncio.run(work(0.25, 0.25, 0.5))
    asyncio.run(work(0.75))
    stats = dict.fromkeys(("running", "waiting", "cache_usage", "prefix_queries", "prefix_hits", "preemptions"), 1)
    lines = exposition(total.counts, stats, "m").decode().splitlines()
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
