"""The argument parsers of fgchat, fgserve and fgbench, which need no torch, so that --help and completion are fast."""

import argparse
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgen.cli.console import make_parser

CHAT_EPILOG = """
In the terminal, /h lists the commands. With -p, or if stdin is not a terminal, fgchat answers one message and exits:
the answer goes to stdout, its statistics to stderr.

The settings are those of fgrun (fgrun --help). The defaults are sampling=chat and schedule=latency: temperature 0.7
(0.2 for the small default model), top_p 0.9, and answers of at most 2048 tokens.

examples:
  fgchat
  fgchat qwen3_8b sampling.temperature=0.6 sampling.top_p=0.95
  fgchat path/to/checkpoint sampling=greedy model.dtype=bfloat16
  fgchat mistral.gguf --system "Answer in French."
  fgchat qwen3_8b chat_template_kwargs.enable_thinking=false
  fgchat -p "Name three kinds of bread."
  git diff | fgchat llama31_8b --system "Write a commit message for this diff."
"""
SERVE_EPILOG = """
Without MODEL, fgserve serves the small default model. docs/serving.md describes the endpoints and their parameters.

examples:
  fgserve
  fgserve mistral_7b --port 8000 --api-key "$KEY" schedule=latency
  fgserve path/to/checkpoint --served-model-name mine --workers 4 kv_cache.gpu_memory_utilization=0.9
  fgserve path/to/checkpoint --lora poet=path/to/adapter
  curl localhost:5678/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'
"""
BENCH_EPILOG = """
workloads: NxPROMPTxOUTPUT[xSAMPLES] is N requests with PROMPT random prompt tokens each. Every request generates
  exactly OUTPUT tokens for each of SAMPLES completions (default: 1). Each repeat uses new prompts.
rows: a new row replaces the row of the same engine, model, workload, hardware and number of devices. Lines of
  --peer-log read 'vllm MODEL tp1 512x1024x128 rep0: 16.3s 4026 out tok/s'.
limit: the roofline limit, the highest throughput that the machine allows. fastgen/profiling/roofline.py has the
  formula. Known GPUs have a limit from constants. Every row also has a limit from the GEMM rate measured right after
  the run. The table and the plot show the first where it exists.

examples:
  fgbench debug --workload 8x64x16 2x64x16x4
  fgbench benchmarks/configs/mistral-7b-instruct-v0.3.json --workload 512x1024x128 1x128x256 --out rows.json
  fgbench path/to/config.json --workload 512x1024x128 --outputs 16,64,128,512 --plot plot.png max_num_seqs=512
  fgbench mistral_7b --weights --workload 32x1024x256 --shared-prefix 768 --latency schedule=latency
  fgbench --out rows.json --peer-log vllm.txt --peer-version 0.23.0 --plot plot.png     # measures nothing
"""


def chat_parser() -> argparse.ArgumentParser:
    """Returns the parser of fgchat."""
    p = make_parser("fgchat", "fgchat chats with a model in the terminal, or answers one message.", CHAT_EPILOG)
    gpus = "Number of GPUs that the model is sharded over, as parallel.tensor_parallel=N."
    p.add_argument("--tensor-parallel", type=int, metavar="N", help=gpus)
    p.add_argument("--system", metavar="TEXT", help="The system prompt.")
    p.add_argument("-p", "--prompt", metavar="TEXT", help="Answer this message and exit.")
    return p


def _option_type(convert: Callable[[str], Any], is_valid: Callable[[Any], Any], valid: str) -> Callable[[str], Any]:
    """Returns the `type` of an option for argparse: converts a text, and rejects values that are not valid."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {valid}, got {text!r}")

    return parse


def serve_parser() -> argparse.ArgumentParser:
    """Returns the parser of fgserve."""
    p = make_parser("fgserve", "fgserve serves a model over HTTP with OpenAI's API.", SERVE_EPILOG)
    add = p.add_argument
    count = _option_type(int, lambda n: n >= 1, "a whole number of at least 1")
    port = _option_type(int, lambda n: 0 <= n <= 65535, "a port between 0 and 65535")
    seconds = _option_type(float, lambda s: 0 <= s < math.inf, "a number of at least 0")
    is_host = re.compile(r"[\w.-]+", re.ASCII).fullmatch
    host = _option_type(str, is_host, "a name without port or path, such as example.org")
    add("--host", default="127.0.0.1", help="The address to listen on; 0.0.0.0 is all addresses. Default: %(default)s.")
    add("--port", type=port, default=5678, help="The port to listen on; 0 is any free port. Default: %(default)s.")
    add("--workers", type=count, default=1, metavar="N", help="Number of HTTP processes. Default: %(default)s.")
    add(
        "--tensor-parallel",
        type=count,
        metavar="N",
        help="Number of GPUs of one engine, as parallel.tensor_parallel=N.",
    )
    add("--replicas", type=count, metavar="N", help="Number of engines, as parallel.replicas=N.")
    repeated: dict[str, Any] = {"action": "append", "default": []}
    keys = "A key that requests may have; without one, no key is needed. May be repeated, and set as FGSERVE_API_KEY."
    add("--api-key", **repeated, metavar="KEY", help=keys)
    names = "A name of the model for clients. May be repeated. Default: the model's own."
    add("--served-model-name", **repeated, metavar="NAME", help=names)
    add("--strict-model", action="store_true", help="Refuse requests that name another model.")
    hosts = "A name by which clients and web pages may address the server, besides this machine's own. May be repeated."
    add("--allowed-host", **repeated, type=host, metavar="NAME", help=hosts)
    add(
        "--lora",
        **repeated,
        metavar="NAME=PATH",
        help="A LoRA adapter that requests may name as their model. Repeatable.",
    )
    grace = "Seconds that running requests have to finish after Ctrl-C or SIGTERM. Default: %(default)s."
    add("--grace", type=seconds, default=30, metavar="SECONDS", help=grace)
    queue = "Number of completions that may run or wait at a time. Default: four times max_num_seqs."
    add("--max-queue", type=count, metavar="N", help=queue)
    tools = "Format of the model's tool calls. Default: that of its chat template."
    add("--tool-parser", choices=("llama", "mistral", "hermes"), help=tools)
    body = "Largest body of a request, in bytes. Default: %(default)s, which is 16 MiB."
    add("--max-body", type=count, default=16 * 2**20, metavar="BYTES", help=body)
    add("--lora-dir", metavar="FOLDER", help="Folder from which POST /load_lora_adapter may load. Default: none.")
    add("--profile-dir", metavar="FOLDER", help="Folder to which POST /profile may write traces. Default: none.")
    return p


def bench_parser() -> argparse.ArgumentParser:
    """Returns the parser of fgbench."""
    description = (
        "fgbench measures throughput and latency, and compares them with the machine's limit and with other engines."
    )
    p = make_parser("fgbench", description, BENCH_EPILOG)
    add = p.add_argument
    workload = "Workloads to run, in this order; see below."
    add("--workload", nargs="+", default=[], metavar="NxPROMPTxOUTPUT", help=workload)
    add("--outputs", metavar="16,64,…", help="Run each workload with each of these output lengths, in tokens.")
    shared_prefix = "Number of tokens that all prompts begin with. Default: %(default)s."
    add("--shared-prefix", type=int, default=0, metavar="TOKENS", help=shared_prefix)
    add("--weights", action="store_true", help="Load the model's weights. Default: random weights of the same shapes.")
    repeats = "Number of runs of each workload, of which the median is reported. Default: %(default)s."
    add("--repeats", type=int, default=3, metavar="N", help=repeats)
    warm_up = "Duration of the warm-up in seconds. Default: one run of the first workload, of at most 30 s."
    add("--warm-up", type=float, metavar="SECONDS", help=warm_up)
    add("--temperature", type=float, default=0.7, metavar="T", help="Sampling temperature. Default: %(default)s.")
    latency = "Run each workload once more, for percentiles of the time to first token and between tokens, in ms."
    add("--latency", action="store_true", help=latency)
    start_up = "Add a row with the seconds from the start of the process to the first token."
    add("--start-up", action="store_true", help=start_up)
    add("--out", type=Path, metavar="FILE", help="JSON file that is created or updated with the rows.")
    add("--peer", type=Path, nargs="+", default=[], metavar="FILE", help="Files with more rows for the table and plot.")
    add("--peer-log", type=Path, metavar="FILE", help="Log of another engine, whose results become rows; see below.")
    add("--peer-version", default="unknown", metavar="TEXT", help="Version of the engine of --peer-log.")
    add("--hardware", metavar="NAME", help="Hardware of --peer-log. Default: that of the other rows.")
    add("--plot", type=Path, metavar="FILE", help="Image of the output tokens/s over the output length.")
    return p
