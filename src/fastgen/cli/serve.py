"""`fgserve`: an OpenAI-compatible server. `fgserve --help`. Its processes are in `fastgen.server.supervisor`."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fastgen import Engine, Replicas, lora
from fastgen.checkpoint import hub
from fastgen.cli import run
from fastgen.cli.console import ends_quietly, make_parser
from fastgen.cli.hydra_config import RunConfig, compose, model_override, parse_arguments, reject_fgrun_keys
from fastgen.cli.prompt_files import read_chat_template
from fastgen.extras import install_command
from fastgen.server.log import nonblocking_stderr, print_message
from fastgen.server.supervisor import Supervisor, listen, temporary_folder

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "zmq", "prometheus_client")
FREE_TEXT_OPTIONS = ("--lora", "--api-key", "--served-model-name")  # options whose value may look like a setting
EPILOG = """
Without MODEL, fgserve serves the small default model. docs/serving.md describes the endpoints and their parameters.

examples:
  fgserve
  fgserve mistral_7b --port 8000 --api-key "$KEY" schedule=latency
  fgserve path/to/checkpoint --served-model-name mine --workers 4 kv_cache.gpu_memory_utilization=0.9
  fgserve path/to/checkpoint --lora poet=path/to/adapter
  curl localhost:5678/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'
"""


def _option_type(convert: Callable[[str], Any], is_valid: Callable[[Any], Any], valid: str) -> Callable[[str], Any]:
    """Returns the `type` of an option for argparse: converts a text, and rejects values that are not valid."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {valid}, got {text!r}")

    return parse


def _make_parser() -> argparse.ArgumentParser:
    p = make_parser("fgserve", "fgserve serves a model over HTTP with OpenAI's API.", EPILOG)
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


def collect_api_keys(arguments: Sequence[str], environment_key: str | None) -> tuple[str, ...]:
    """Returns the keys of --api-key and FGSERVE_API_KEY. Raises ValueError if a key is empty or fits no header."""
    keys = [("--api-key", key) for key in arguments]
    keys += [] if environment_key is None else [("FGSERVE_API_KEY", environment_key)]
    for source, key in keys:
        if not key.strip():
            raise ValueError(f"{source} is empty: give a key, or leave it out to serve without one")
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ValueError(f"{source}: a key must be printable ASCII without blanks around it, to fit in a header")
    return tuple(key for _, key in keys)


def list_allowed_hosts(host: str, address: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the host names that requests to a server at `address` may name; () allows every name.

    Names are checked if `names` are given, and on a loopback address, so that pages of other sites get no answers.
    """
    if not (names or ip_address(address.partition("%")[0]).is_loopback):
        return ()
    return tuple(dict.fromkeys(name.lower() for name in ("localhost", host, *names)))


def configure(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """Returns the engine's configuration and the model's name. Raises ValueError for settings that fgrun rejects."""
    reject_fgrun_keys(args.overrides, "requests bring this themselves", "sampling", allowed=("chat_template",))
    parallel = {name: getattr(args, name) for name in ("tensor_parallel", "replicas")}
    overrides = [*args.overrides, *(f"parallel.{name}={n}" for name, n in parallel.items() if n is not None)]
    model_choice = [] if args.model is None else [model_override(args.model)]
    config = compose(*model_choice, *overrides)
    adapters = config.model.adapters | parse_adapters(args.lora)
    lora_config = lora.expand_lora_config(config.lora, adapters)
    config = replace(config, model=replace(config.model, adapters=adapters), lora=lora_config)
    if args.model is None:
        return config, hub.FOLDER
    path = Path(args.model).expanduser()
    if model_choice != [f"model={args.model}"] and path.exists():
        return config, path.resolve().name
    if model_choice != [f"model={args.model}"] and args.model.count("/") != 1:
        hub.resolve(args.model)  # not a hub id either: raises before anything starts
    return config, args.model


def parse_adapters(arguments: Sequence[str]) -> dict[str, str]:
    """Returns paths by adapter name. Raises ValueError for texts that are not NAME=PATH, and for duplicate names."""
    adapters: dict[str, str] = {}
    for text in arguments:
        name, _, path = text.partition("=")
        if not (name and path) or name in adapters:
            raise ValueError(f"--lora {text}: must be NAME=PATH, each name once")
        adapters[name] = path
    return adapters


def load_engine(config: RunConfig) -> tuple[Engine | Replicas, str]:
    """Returns a configuration's engine or replicas, without a tokenizer, and the path of the model."""
    m = config.model
    path = hub.default_model_path() if m.path is None else hub.resolve(m.path)
    engine = run.build_engines(replace(config, model=replace(m, path=str(path))))
    engine.tokenizer = None  # the engine knows the end-of-text tokens by now; HTTP workers turn tokens into text
    return engine, str(path)


@ends_quietly("fgserve")
def main(argv: list[str] | None = None) -> int:
    """Runs the console script; returns the exit status: 2 for a wrong command, 1 for a server that failed."""
    args = parse_arguments(_make_parser(), argv, FREE_TEXT_OPTIONS)
    if missing := [name for name in REQUIRED_PACKAGES if not find_spec(name)]:
        print(f"fgserve needs {', '.join(missing)}: {install_command('serve')}", file=sys.stderr)
        return 1
    try:
        keys = collect_api_keys(args.api_key, os.environ.pop("FGSERVE_API_KEY", None))
        for option, path in (("--profile-dir", args.profile_dir), ("--lora-dir", args.lora_dir)):
            if path and not os.path.isdir(path):
                raise ValueError(f"{option}: there is no folder {path}")
        config, name = configure(args)
        template = read_chat_template(config.chat_template)
        if args.lora_dir and not config.lora.max_adapters:
            raise ValueError("--lora-dir: no adapter can be loaded; add max_adapters=N, and max_rank=R if not 16")
        names = tuple(args.served_model_name) or (name,)
        if conflicts := sorted({*names} & {*config.model.adapters}):
            raise ValueError(f"--lora {conflicts[0]}: this is the model's own name")
        listener = listen(args.host, args.port)
        hosts = list_allowed_hosts(args.host, listener.getsockname()[0], args.allowed_host)
    except (ValueError, OSError) as e:
        print_message(str(e))
        return 2
    from fastgen.server.app_state import ServerOptions  # imports packages of the extra

    with temporary_folder() as folder, nonblocking_stderr():
        profile_dir, lora_dir = (path and os.path.realpath(path) for path in (args.profile_dir, args.lora_dir))
        options = ServerOptions(
            engine_address=f"ipc://{folder}/engine", model_names=names, api_keys=keys, grace_seconds=args.grace,
            max_body_bytes=args.max_body, chat_template=template, tool_parser=args.tool_parser,
            profile_dir=profile_dir, lora_dir=lora_dir, strict_model=args.strict_model, allowed_hosts=hosts,
        )  # fmt: skip
        host, port = listener.getsockname()[:2]
        print_message(f"loading; http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        return Supervisor(partial(load_engine, config), options, listener, args.workers, args.max_queue).run()


if __name__ == "__main__":
    sys.exit(main())
