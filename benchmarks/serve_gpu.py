"""A server's rate beside the engine's own, and its latency over the number of clients.

    python benchmarks/serve_gpu.py mistral-7b-instruct-v0.3 --workers 4 --offline rows.json
    python benchmarks/serve_gpu.py mistral-7b-instruct-v0.3 --engine vllm --env PYTHONPATH=/tmp/peer/site
    python benchmarks/serve_gpu.py mistral-7b-instruct-v0.3 --plot serve.png              # measures nothing

Rates: all chats are sent at once and answered whole. Latency: each client sends a chat, reads its stream, and sends the
next. Weights and prompts are random; a tokenizer with one token per word makes the length of a prompt exact. Server
and clients run in separate processes. Another engine's server gets the same folder and the same requests. Rows replace
those of the same engine and model in --out.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

HERE = Path(__file__).parent
PORT = 5679
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
COMMANDS = {
    "fastgen": ["-m", "fastgen.cli.serve", "{model}", "model.random_weights=true", "model.dtype=bfloat16",
                "--port", "{port}", "--workers", "{workers}", "--served-model-name", "it"],
    "vllm": ["-m", "vllm.entrypoints.cli.main", "serve", "{model}", "--load-format", "dummy", "--port", "{port}",
             "--max-model-len", "4096", "--served-model-name", "it", "--dtype", "bfloat16"],
}  # fmt: skip
Load = tuple[int, int, int]  # requests, tokens of a prompt, tokens of an answer


def words(n: int, rng: random.Random, vocab: int) -> str:
    """Returns a text of n tokens."""
    return " ".join(f"w{rng.randrange(10, vocab)}" for _ in range(n))


def make_model(folder: Path, config: Path) -> int:
    """Writes a model folder without weights, whose tokenizer has one token per word. Returns the vocabulary size."""
    import tokenizers  # here, since clients read this file too
    from transformers import PreTrainedTokenizerFast

    folder.joinpath("config.json").write_text(config.read_text())
    vocab = json.loads(config.read_text())["vocab_size"]
    names = {"<unk>": 0, "</s>": 2} | {f"w{i}": i for i in range(vocab) if i not in (0, 2)}
    model = tokenizers.models.WordLevel(names, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return vocab


def chat(prompt: str, output: int, **more: Any) -> dict[str, Any]:
    message = [{"role": "user", "content": prompt}]
    return {"model": "it", "messages": message, "max_tokens": output, "temperature": 0.7, "ignore_eos": True} | more


def client(task: tuple[str, list[str], int, float | None, float]) -> list[dict[str, Any]]:
    """Runs clients in one process: all chats at once at `start`, or, for `seconds`, streamed one after another."""
    url, prompts, output, seconds, start = task

    async def send_chat(http: httpx.AsyncClient, prompt: str) -> dict[str, Any]:
        answer = await http.post(f"{url}/v1/chat/completions", json=chat(prompt, output))
        return {"tokens": answer.raise_for_status().json()["usage"]["completion_tokens"], "end": time.time()}

    async def stream_chats(http: httpx.AsyncClient, prompt: str, seed: int, end: float) -> list[dict[str, Any]]:
        rows, rng, prompt_words = [], random.Random(seed), prompt.split()
        while time.time() < end:
            rng.shuffle(prompt_words)  # a prompt of its own each time
            times = [time.perf_counter()]
            body = chat(" ".join(prompt_words), output, stream=True)
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and (choice := json.loads(line[6:])["choices"]):
                        if choice[0]["delta"].get("content"):
                            times.append(time.perf_counter())
            gaps = [1e3 * (b - a) for a, b in zip(times[1:], times[2:], strict=False)]
            rows.append({"first": 1e3 * (times[1] - times[0]), "gaps": gaps, "end": time.time(), "tokens": output})
        return rows

    async def run() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits) as http:
            await asyncio.sleep(max(0.0, start - time.time()))
            if seconds is None:
                return await asyncio.gather(*(send_chat(http, prompt) for prompt in prompts))
            end = start + seconds
            results = await asyncio.gather(*(stream_chats(http, p, hash(p), end) for p in prompts))
            return [row for rows in results for row in rows]

    return asyncio.run(run())


class Clients:
    """Client processes, which have all started before the first request is sent."""

    def __init__(self, url: str, vocab: int, processes: int):
        self.url, self.vocab, self.processes = url, vocab, processes
        self.pool = multiprocessing.get_context("spawn").Pool(processes)
        self.pool.map(time.sleep, [1] * processes, chunksize=1)

    def send(self, load: Load, seconds: float | None, seed: int) -> tuple[float, list[dict[str, Any]]]:
        """Sends a load. Returns the seconds from the first request to the last answer, and a row for each answer."""
        count, length, output = load
        rng = random.Random(seed)
        prompts = [words(length, rng, self.vocab) for _ in range(count)]
        used = min(self.processes, count)
        start = time.time() + 1
        tasks = [(self.url, prompts[i::used], output, seconds, start) for i in range(used)]
        rows = [row for results in self.pool.map(client, tasks, chunksize=1) for row in results]
        return max(row["end"] for row in rows) - start, rows


def quantiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values if len(values) > 1 else [*values] * 2, n=100, method="inclusive")
    return {f"p{p}": cuts[p - 1] for p in (50, 90, 99)}


def measure(url: str, vocab: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows, clients = [], Clients(url, vocab, args.processes)
    clients.send(args.loads[0], None, 1)  # warm
    for load in args.loads:
        runs = []
        for i in tqdm(range(args.repeats), desc="x".join(map(str, load)), disable=None):
            seconds, answers = clients.send(load, None, 2 + i)
            assert sum(row["tokens"] for row in answers) == load[0] * load[2]
            runs.append(seconds)
        rate = load[0] * load[2] / statistics.median(runs)
        rows.append({"kind": "rate", "workload": "x".join(map(str, load)), "seconds_all": runs, "output_tok_s": rate})
        print(rows[-1], flush=True)
    length, output = args.latency
    for count in tqdm(args.clients, desc="clients", disable=None):
        seconds, answers = clients.send((count, length, output), args.seconds, 100 + count)
        rows.append({
            "kind": "latency", "workload": f"{length}x{output}", "clients": count, "requests": len(answers),
            "first_token_ms": quantiles([row["first"] for row in answers]),
            "inter_token_ms": quantiles([gap for row in answers for gap in row["gaps"]]),
            "output_tok_s": sum(row["tokens"] for row in answers) / seconds,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def serve(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the server, measures it and stops it. Returns the rows."""
    with tempfile.TemporaryDirectory() as name:
        vocab = make_model(Path(name), HERE / "configs" / f"{args.model}.json")
        values = {"model": name, "port": str(PORT), "workers": str(args.workers)}
        command = [sys.executable, *(part.format(**values) for part in COMMANDS[args.engine]), *args.extra]
        environment = os.environ | dict(pair.split("=", 1) for pair in args.env)
        url, start = f"http://127.0.0.1:{PORT}", time.time()
        with open(args.log, "w") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                if server.poll() is not None or time.time() > start + 300:
                    raise SystemExit(f"the server did not start: {Path(args.log).read_text()[-2000:]}")
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            start_up_seconds = time.time() - start
            print(f"{args.engine} took {start_up_seconds:.0f} s to start", flush=True)
            rows = measure(url, vocab, args)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    common = {"engine": args.engine, "model": args.model, "workers": args.workers, "start_up": start_up_seconds}
    return [common | row for row in rows]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    names = {"first_token_ms": "to the first token, ms", "inter_token_ms": "between tokens, ms"}
    for axes, (key, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for i, engine in enumerate(sorted({r["engine"] for r in rows})):
            points = [r for r in rows if r["engine"] == engine and r["kind"] == "latency"]
            for p, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                x, y = [r["clients"] for r in points], [r[key][p] for r in points]
                axes.plot(x, y, f"C{i}{style}", marker=".", label=f"{engine} {p}")
        axes.set(xscale="log", yscale="log", xlabel="clients", title=title)
        axes.set_xticks(sorted({r["clients"] for r in rows if "clients" in r}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split("x")))

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a name in configs/")
    p.add_argument("--engine", choices=[*COMMANDS], default="fastgen")
    p.add_argument("--loads", type=numbers, nargs="+", default=[(512, 1024, 128), (2000, 32, 32)], metavar="NxPxD")
    p.add_argument("--latency", type=numbers, default=(1024, 128), metavar="PxD", help="of each client's chats")
    p.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64, 256])
    p.add_argument("--seconds", type=float, default=12, help="for each number of clients")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--workers", type=int, default=4, help="HTTP processes of fgserve")
    p.add_argument("--processes", type=int, default=8, help="of clients")
    p.add_argument("--env", nargs="*", default=[], metavar="NAME=VALUE", help="for the server alone")
    p.add_argument("--extra", nargs="*", default=[], metavar="WORD", help="of the server's command")
    p.add_argument("--log", default="server.log", help="what the server says")
    p.add_argument("--offline", type=Path, help="fgbench's rows, for the ratio")
    p.add_argument("--out", type=Path, default=HERE / "results" / "serve_gpu.json")
    p.add_argument("--plot", type=Path, help="draw --out, and do nothing else")
    args = p.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    if args.plot:
        return plot(rows, args.plot)
    results = serve(args)
    if args.offline:
        rates = {r["workload"]: r["output_tok_s"] for r in json.loads(args.offline.read_text())
                 if r["engine"] == "fastgen" and r["model"] == args.model and "output_tok_s" in r}  # fmt: skip
        for row in results:
            if row["kind"] == "rate" and row["workload"] in rates:
                row["of_offline"] = row["output_tok_s"] / rates[row["workload"]]
                print(row["workload"], f"{row['of_offline']:.1%} of the engine alone")
    rows = [r for r in rows if (r["engine"], r["model"]) != (args.engine, args.model)] + results
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
