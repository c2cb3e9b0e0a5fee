"""`fgserve`: an OpenAI-compatible server. `fgserve --help`. Its processes are in `fastgen.server.supervisor`."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from fastgen import Engine, Replicas, lora
from fastgen.checkpoint import hub
from fastgen.cli import run
from fastgen.cli.console import ends_quietly
from fastgen.cli.hydra_config import RunConfig, compose, model_override, parse_arguments, reject_fgrun_keys
from fastgen.cli.parsers import serve_parser
from fastgen.cli.prompt_files import read_chat_template
from fastgen.extras import install_command
from fastgen.server.log import nonblocking_stderr, print_message
from fastgen.server.supervisor import Supervisor, listen, temporary_folder

REQUIRED_PACKAGES = ("fastapi", "uvicorn", "zmq", "prometheus_client")
FREE_TEXT_OPTIONS = ("--lora", "--api-key", "--served-model-name")  # options whose value may look like a setting


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
    args = parse_arguments(serve_parser(), argv, FREE_TEXT_OPTIONS)
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
