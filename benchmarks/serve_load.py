"""Load test of `fgserve` with streaming clients that may disconnect: checks every token, and that nothing leaks.

    python benchmarks/serve_load.py --clients 200 --seconds 300 --out benchmarks/results/serve_load_cpu.json
    python benchmarks/serve_load.py --clients 20 --seconds 40 --idle 10000

Clients request greedy continuations, as tokens or as text, one after another. The answers must be those of the library
for the same prompts, token for token; prompts at which two tokens are nearly equally likely are not used. Afterwards
nothing may run, wait or hold a page, and the memory may not have grown since the first minute. --idle opens connections
that send nothing, or the head of a request byte by byte, beside requests; the server must close them.

The server is the embedded model in float32, started here. The exit status is 1 if anything is wrong.
"""

import argparse
import asyncio
import json
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from tqdm.auto import tqdm

import fastgen
from fastgen import SamplingParams
from fastgen.cli.bench.hardware import hardware_name

OUTPUT_LEN = 24  # tokens of an answer
SETTINGS = ("model.dtype=float32", "schedule.max_num_seqs=64", "kv_cache.cache_tokens=16384")
Prompt = tuple[list[int], list[int], str]  # its tokens, and the answer's tokens and text


def make_examples() -> list[Prompt]:
    """Returns prompts with the library's greedy answers, without those where two tokens are nearly equally likely."""
    subjects = ("lighthouse keeper", "train to Oslo", "old map", "baker", "river", "violin", "letter", "clock")
    starts = ("The", "Once a", "Nobody saw the", "Question: what is a", "def", "Dear", "In 1912 the", "A list of")
    texts = [f"{start} {subject}" for start in starts for subject in subjects]
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, logprobs=2)
    with fastgen.Engine.from_pretrained(dtype="float32", cache_tokens=16384) as engine:
        examples = []
        for output in engine.generate(texts, sampling):
            completion = output.completions[0]
            tops = [sorted(top.values()) for top in completion.top_logprobs or []]
            if min(top[-1] - top[-2] for top in tops) > 2e-3 and "\ufffd" not in completion.text:
                examples.append((output.prompt_token_ids, completion.token_ids, completion.text))
    return examples


class Server:
    """`fgserve` in processes of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "fastgen.cli.serve", *SETTINGS, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        log_text = ""
        while " is ready" not in log_text:
            line = self.process.stderr.readline()
            log_text += line
            if not line:
                raise SystemExit(f"the server did not start: {log_text}")
        self.url = re.findall(r"http://\S+?(?=/v1)", log_text)[0]
        self.log = asyncio.get_running_loop().run_in_executor(None, self._read)

    def _read(self) -> int:
        """Returns the number of log lines that do not belong to a request."""
        assert self.process.stderr
        return sum(not line.startswith("{") for line in self.process.stderr)

    def all(self) -> list[psutil.Process]:
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def memory(self) -> float:
        """Returns the proportional set size (PSS) of all server processes in MB."""
        return sum(p.memory_full_info().pss for p in self.all()) / 1e6

    def files(self) -> int:
        return max(p.num_fds() for p in self.all())


class Clients:
    """Sends requests, counts the answers and collects wrong ones."""

    def __init__(self, url: str, prompts: list[Prompt]) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)
        self.prompts = prompts
        self.counts = dict.fromkeys(("whole", "left", "tokens", "retries"), 0)
        self.wrong: list[str] = []

    async def ask(self, rng: random.Random) -> float:
        """Sends one request and checks its answer. Returns the time to first token in seconds; 0 if it was refused."""
        tokens, expected_ids, text = rng.choice(self.prompts)
        stop_after = rng.randrange(1, OUTPUT_LEN) if rng.random() < 0.3 else None
        sampling: dict[str, Any] = {"temperature": 0, "max_tokens": OUTPUT_LEN, "ignore_eos": True}
        path, body = "/inference/v1/generate", {"token_ids": tokens, "sampling_params": sampling}
        if as_text := rng.random() < 0.5:
            path, body = "/v1/completions", {"prompt": tokens} | sampling
        token_ids: list[int] = []
        text_so_far, ttft, start, count = "", 0.0, time.perf_counter(), 0
        async with self.http.stream("POST", path, json=body | {"stream": True}) as stream:
            if stream.status_code in (429, 503):
                self.counts["retries"] += 1
                await asyncio.sleep(1)
                return 0.0
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                ttft, count = ttft or time.perf_counter() - start, count + 1
                value = json.loads(line[6:])
                if "error" in value:
                    self.wrong.append(f"{value}")
                    return ttft
                if as_text:
                    text_so_far += value["choices"][0]["text"]
                else:
                    token_ids += value["choices"][0]["token_ids"]
                    self.counts["tokens"] += len(value["choices"][0]["token_ids"])
                if stop_after and count >= stop_after:
                    break
        is_complete = stop_after is None or count < stop_after
        self.counts["whole" if is_complete else "left"] += 1
        if as_text:
            actual, expected = text_so_far, text if is_complete else text[: len(text_so_far)]
        else:
            actual, expected = token_ids, expected_ids if is_complete else expected_ids[: len(token_ids)]
        if actual != expected:
            self.wrong.append(f"{tokens}: {actual} instead of {expected}")
        return ttft

    async def gauges(self) -> dict[str, float]:
        """Returns the gauges of /metrics by name."""
        text = (await self.http.get("/metrics")).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.partition("{")[0].removeprefix("vllm:"): float(value) for name, _, value in lines}

    async def idle(self) -> dict[str, float]:
        """Waits until nothing runs, at most half a minute. Returns the gauges of running and waiting requests."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(60):
            now = await self.gauges()
            if not any(now[name] for name in names):
                break
            await asyncio.sleep(0.5)
        return {name: now[name] for name in names}


async def run_load(server: Server, clients: Clients, number: int, seconds: float, bar: tqdm) -> dict[str, Any]:
    """Sends requests for `seconds` and returns counts, latency and the server's memory."""
    end = time.monotonic() + seconds
    first_token_seconds: list[float] = []

    async def client(i: int) -> None:
        rng = random.Random(i)
        while time.monotonic() < end:
            if ttft := await clients.ask(rng):
                first_token_seconds.append(ttft)

    async def watch() -> list[float]:
        samples = []
        while time.monotonic() < end:
            samples.append(server.memory())
            await asyncio.sleep(1)
            bar.update()
        return samples

    memory, *_ = await asyncio.gather(watch(), *(client(i) for i in range(number)))
    fifth = max(1, len(memory) // 5)
    early, late = (statistics.median(part) for part in (memory[fifth : 2 * fifth] or memory, memory[-fifth:]))
    if late > 1.05 * early + 20:
        clients.wrong.append(f"memory grew from {early:.0f} to {late:.0f} MB")
    remaining = await clients.idle()
    if any(remaining.values()):
        clients.wrong.append(f"something is left: {remaining}")
    return {
        "clients": number, "seconds": seconds, **clients.counts,
        "ttft_median_s": round(statistics.median(first_token_seconds), 3), "afterwards": remaining,
        "memory_mb": {"second fifth": round(early), "last fifth": round(late)},
    }  # fmt: skip


async def run_idle(server: Server, clients: Clients, number: int, slow: int, bar: tqdm) -> dict[str, Any]:
    """Opens idle and slow connections beside requests, and returns how many the server closed."""
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    url, before, rng = httpx.URL(clients.http.base_url), server.files(), random.Random(1)
    opened, stop = [], time.monotonic() + 300
    for start in range(0, number, 500):
        connections = (asyncio.open_connection(url.host, url.port) for _ in range(min(500, number - start)))
        opened += await asyncio.gather(*connections)
        bar.update(min(500, number - start))
    at_once = server.files() - before

    async def trickle(writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nx: " + b"y" * 400:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.5)

    trickles = [asyncio.create_task(trickle(writer)) for _, writer in opened[:slow]]
    times = [await clients.ask(rng) for _ in range(20)]
    while server.files() > before + 50 and time.monotonic() < stop:
        await asyncio.sleep(1)
    for task in trickles:
        task.cancel()
    for _, writer in opened:
        writer.close()
    if (remaining := server.files() - before) > 50:
        clients.wrong.append(f"{remaining} connections are still open")
    return {"connections": number, "of these slow": slow, "at once": at_once, "closed": number - max(0, remaining),
            "ttft_median_s": round(statistics.median(times), 3), "ttft_most_s": round(max(times), 3)}  # fmt: skip


async def run(args: argparse.Namespace) -> int:
    prompts = make_examples()
    server = Server()
    hardware = hardware_name(torch.device("cpu"))
    row: dict[str, Any] = {"hardware": hardware, "settings": SETTINGS, "prompts": len(prompts)}
    try:
        clients = Clients(server.url, prompts)
        with tqdm(total=round(args.seconds), desc="load", unit="s", disable=None) as bar:
            row["load"] = await run_load(server, clients, args.clients, args.seconds, bar)
        if args.idle:
            with tqdm(total=args.idle, desc="idle", unit="connection", disable=None) as bar:
                row["idle"] = await run_idle(server, clients, args.idle, min(100, args.idle), bar)
        await clients.http.aclose()
        row["wrong"] = clients.wrong[:20]
    finally:
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
    row["exit status"], row["lines on stderr"] = status, await server.log
    print(json.dumps(row, indent=1))
    if args.out:
        args.out.write_text(json.dumps(row, indent=1) + "\n")
    return 1 if clients.wrong or status else 0


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--clients", type=int, default=200, metavar="N", help="at a time (%(default)s)")
    p.add_argument("--seconds", type=float, default=300, metavar="S", help="of load (%(default)s)")
    p.add_argument("--idle", type=int, default=0, metavar="N", help="connections that ask for nothing (%(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON of the result")
    return asyncio.run(run(p.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
