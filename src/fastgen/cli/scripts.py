"""Console scripts, and `python -m fastgen TOOL`. A tool is imported when it runs, and Ctrl-C meanwhile ends it."""

import argparse
import sys
from functools import partial
from importlib import import_module

import fastgen
from fastgen.cli import parsers
from fastgen.cli.console import ends_at_interrupt, ends_quietly

TOOLS = {  # name after `python -m fastgen` -> (console script, module of fastgen.cli, help)
    "run": ("fgrun", "fgrun", "Generates text for prompts on the command line or in a file; also trains and profiles."),
    "chat": ("fgchat", "chat", "Chats with a model in the terminal."),
    "serve": ("fgserve", "serve", "Serves a model over HTTP with OpenAI's API."),
    "bench": ("fgbench", "bench.benchmark", "Measures throughput and latency."),
}
PARSERS = {"chat": parsers.chat_parser, "serve": parsers.serve_parser, "bench": parsers.bench_parser}


def _parse_only(name: str) -> int:
    """Parses sys.argv with a tool's parser, which may print something and exit."""
    PARSERS[name]().parse_known_args()
    return 0


def _run_tool(name: str) -> int:
    """Imports a tool and runs its `main` on sys.argv. Returns the exit status.

    Options that print something and exit, such as --help, do so before the tool, and with it torch, is imported.
    """
    tool, module, _ = TOOLS[name]
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    if name in PARSERS and words & {"-h", "--help", "--version", "--print-completion"}:
        ends_quietly(tool)(_parse_only)(name)
    with ends_at_interrupt(tool):
        main = import_module(f"fastgen.cli.{module}").main
    return main()


fgrun, fgbench, fgchat, fgserve = (partial(_run_tool, name) for name in ("run", "bench", "chat", "serve"))


@ends_quietly("fastgen")
def main() -> int:
    """Runs the tool that the first argument names on the other arguments. Returns the exit status."""
    lines = [f"  {name:6} {help} The same as {tool}." for name, (tool, _, help) in TOOLS.items()]
    parser = argparse.ArgumentParser(
        "python -m fastgen", usage="%(prog)s [--help] [--version] TOOL [ARGUMENT …]",
        description="fastgen is an LLM inference engine. This command runs one of its tools.",
        epilog="\n".join(["tools:", *lines, "", "Each tool has its own help: python -m fastgen run --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    version = f"fastgen {fastgen.__version__}"
    parser.add_argument("--version", action="version", version=version, help="Print the version and exit.")
    parser.add_argument("tool", nargs="?", choices=TOOLS, metavar="TOOL", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool is None:
        parser.print_help()
        return 0
    sys.argv = [TOOLS[args.tool][0], *args.arguments]
    return _run_tool(args.tool)
