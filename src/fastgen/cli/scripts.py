"""Starts the command line tools. Ctrl-C before a tool is imported, which takes a second or two, ends it silently."""

import signal
import sys
from importlib import import_module


def _run_tool(tool: str) -> int:
    """Imports the module of a tool and runs it; returns the exit status."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # and not where SIGINT is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(f"fastgen.cli.{tool}").main
    signal.signal(signal.SIGINT, interrupt)
    return main()


def fgrun() -> int:
    """Runs generation from the command line."""
    return _run_tool("run")


def fgbench() -> int:
    """Runs benchmarks."""
    return _run_tool("bench.benchmark")


def fgchat() -> int:
    """Runs a chat in the terminal."""
    return _run_tool("chat")


def fgserve() -> int:
    """Runs the OpenAI-compatible server."""
    return _run_tool("serve")


if __name__ == "__main__":
    sys.exit(_run_tool(sys.argv.pop(1)))
