"""Many streaming clients, some of whom leave, against `fgserve`: is every token right, and is anything left afterwards?

    python benchmarks/serve_load.py --clients 200 --seconds 300 --out benchmarks/results/serve_load_cpu.json
    python benchmarks/serve_load.py --clients 20 --seconds 40 --idle 10000

Clients ask for greedy continuations, as tokens or as text, one request after the other. What they get has to be what
the library gives for the same prompts, token for token; prompts at which two tokens are nearly as likely are not used.
Then nothing may run, wait or hold a page any more, and the processes may not have grown since the first minute. --idle
opens connections that send nothing, or a request's head byte by byte, beside requests; the server has to close them.

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

NEW = 24  # tokens of an answer
SETTINGS = ("model.dtype=float32", "schedule.max_num_seqs=64", "kv_cache.cache_tokens=16384")
Prompt = tuple[list[int], list[int], str]  # its tokens, and the answer's tokens and text


def expected() -> list[Prompt]:
    """Prompts, and what the library says to them alone or together: none has a step where two tokens are close."""
    subjects = ("lighthouse keeper", "train to Oslo", "old map", "baker", "river", "violin", "letter", "clock")
    starts = ("The", "Once a", "Nobody saw the", "Question: what is a", "def", "Dear", "In 1912 the", "A list of")
    texts = [f"{start} {subject}" for start in starts for subject in subjects]
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2)
    with fastgen.Engine.from_pretrained(dtype="float32", cache_tokens=16384) as engine:
        found = []
        for output in engine.generate(texts, sampling):
            done = output.completions[0]
            tops = [sorted(top.values()) for top in done.top_logprobs or []]
            if min(top[-1] - top[-2] for top in tops) > 2e-3 and "\ufffd" not in done.text:
                found.append((output.prompt_token_ids, done.token_ids, done.text))
    return found


class Server:
    """`fgserve` in processes of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "fastgen.cli.serve", *SETTINGS, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        said = ""
        while " is ready" not in said:
            line = self.process.stderr.readline()
            said += line
            if not line:
                raise SystemExit(f"the server did not start: {said}")
        self.url = re.findall(r"http://\S+?(?=/v1)", said)[0]
        self.log = asyncio.get_running_loop().run_in_executor(None, self._read)

    def _read(self) -> int:
        """The number of lines that are no request's."""
        assert self.process.stderr
        return sum(not line.startswith("{") for line in self.process.stderr)

    def all(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def memory(self) -> float:
        """MB that its processes have for themselves, and their share of what they share."""
        return sum(p.memory_full_info().pss for p in self.all()) / 1e6

    def files(self) -> int:
        return max(p.num_fds() for p in self.all())


class Clients:
    """What they saw."""

    def __init__(self, url: str, prompts: list[Prompt]) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)
        self.prompts = prompts
        self.counts = dict.fromkeys(("whole", "left", "tokens", "retries"), 0)
        self.wrong: list[str] = []

    async def ask(self, dice: random.Random) -> float:
        """One request; seconds to its first token."""
        tokens, wanted, text = dice.choice(self.prompts)
        leaves = dice.randrange(1, NEW) if dice.random() < 0.3 else None
        sampling: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
        path, body = "/inference/v1/generate", {"token_ids": tokens, "sampling_params": sampling}
        if as_text := dice.random() < 0.5:
            path, body = "/v1/completions", {"prompt": tokens} | sampling
        found: list[int] = []
        said, ttft, began, count = "", 0.0, time.perf_counter(), 0
        async with self.http.stream("POST", path, json=body | {"stream": True}) as stream:
            if stream.status_code in (429, 503):
                self.counts["retries"] += 1
                await asyncio.sleep(1)
                return 0.0
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                ttft, count = ttft or time.perf_counter() - began, count + 1
                value = json.loads(line[6:])
                if "error" in value:
                    self.wrong.append(f"{value}")
                    return ttft
                if as_text:
                    said += value["choices"][0]["text"]
                else:
                    found += value["choices"][0]["token_ids"]
                    self.counts["tokens"] += len(value["choices"][0]["token_ids"])
                if leaves and count >= leaves:
                    break
        whole = leaves is None or count < leaves
        self.counts["whole" if whole else "left"] += 1
        right = (said == text if whole else text.startswith(said)) if as_text else found == wanted[: len(found)]
        if not right or (whole and not as_text and len(found) != NEW):
            self.wrong.append(f"{tokens}: {said if as_text else found} instead of {text if as_text else wanted}")
        return ttft

    async def gauges(self) -> dict[str, float]:
        """Of /metrics."""
        text = (await self.http.get("/metrics")).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.partition("{")[0].removeprefix("vllm:"): float(value) for name, _, value in lines}

    async def idle(self) -> dict[str, float]:
        """The gauges once nothing runs, or after half a minute."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(60):
            now = await self.gauges()
            if not any(now[name] for name in names):
                break
            await asyncio.sleep(0.5)
        return {name: now[name] for name in names}


async def load(server: Server, clients: Clients, number: int, seconds: float, bar: tqdm) -> dict[str, Any]:
    """Requests for so long, and what they did to the server."""
    end = time.monotonic() + seconds
    first: list[float] = []

    async def client(i: int) -> None:
        dice = random.Random(i)
        while time.monotonic() < end:
            if ttft := await clients.ask(dice):
                first.append(ttft)

    async def watch() -> list[float]:
        seen = []
        while time.monotonic() < end:
            seen.append(server.memory())
            await asyncio.sleep(1)
            bar.update()
        return seen

    memory, *_ = await asyncio.gather(watch(), *(client(i) for i in range(number)))
    fifth = max(1, len(memory) // 5)
    early, late = (statistics.median(part) for part in (memory[fifth : 2 * fifth] or memory, memory[-fifth:]))
    if late > 1.05 * early + 20:
        clients.wrong.append(f"memory grew from {early:.0f} to {late:.0f} MB")
    left = await clients.idle()
    if any(left.values()):
        clients.wrong.append(f"something is left: {left}")
    return {
        "clients": number,
        "seconds": seconds,
        **clients.counts,
        "ttft_median_s": round(statistics.median(first), 3),
        "afterwards": left,
        "memory_mb": {"second fifth": round(early), "last fifth": round(late)},
    }


async def idle(server: Server, clients: Clients, number: int, slow: int, bar: tqdm) -> dict[str, Any]:
    """Connections that ask for nothing, beside requests."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    url, before, dice = httpx.URL(clients.http.base_url), server.files(), random.Random(1)
    opened, stop = [], time.monotonic() + 300
    for start in range(0, number, 500):
        some = (asyncio.open_connection(url.host, url.port) for _ in range(min(500, number - start)))
        opened += await asyncio.gather(*some)
        bar.update(min(500, number - start))
    at_once = server.files() - before

    async def trickle(writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nx: " + b"y" * 400:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.5)

    trickles = [asyncio.create_task(trickle(writer)) for _, writer in opened[:slow]]
    times = [await clients.ask(dice) for _ in range(20)]
    while server.files() > before + 50 and time.monotonic() < stop:
        await asyncio.sleep(1)
    for task in trickles:
        task.cancel()
    for _, writer in opened:
        writer.close()
    if (left := server.files() - before) > 50:
        clients.wrong.append(f"{left} connections are still open")
    return {"connections": number, "of these slow": slow, "at once": at_once, "closed": number - max(0, left),
            "ttft_median_s": round(statistics.median(times), 3), "ttft_most_s": round(max(times), 3)}  # fmt: skip


async def run(args: argparse.Namespace) -> int:
    prompts = expected()
    server = Server()
    row: dict[str, Any] = {
        "hardware": hardware_name(torch.device("cpu")),
        "settings": SETTINGS,
        "prompts": len(prompts),
    }
    try:
        clients = Clients(server.url, prompts)
        with tqdm(total=round(args.seconds), desc="load", unit="s", disable=None) as bar:
            row["load"] = await load(server, clients, args.clients, args.seconds, bar)
        if args.idle:
            with tqdm(total=args.idle, desc="idle", unit="connection", disable=None) as bar:
                row["idle"] = await idle(server, clients, args.idle, min(100, args.idle), bar)
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
