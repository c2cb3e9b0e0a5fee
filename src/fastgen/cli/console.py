"""Shared code of the tools: how they end, and the options --version, --model and --print-completion.

This module imports the standard library only, so that Ctrl-C ends a tool quietly from its first moments on.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

P = ParamSpec("P")
SHELLS = ("bash", "zsh", "fish")
MODEL_HELP = "The model: a folder, a hub id, a .safetensors or .gguf file, or a name in conf/model."


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, which ends a run as Ctrl-C does."""


def interrupt_message(tool: str, error: KeyboardInterrupt) -> str:
    """Returns the line that a tool prints when Ctrl-C or SIGTERM ends it, with the exception's own text if any."""
    how = "terminated" if isinstance(error, Terminated) else "interrupted"
    return f"{tool}: {how}: {error}" if error.args else f"{tool}: {how}"


def handle_closed_stdout() -> int:
    """Returns the exit status for a closed stdout, as behind `head` or a pager that was quit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at exit would fail again
    return 128 + signal.SIGPIPE


def ends_quietly(tool: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates the `main` of a tool: Ctrl-C prints one line and returns 130, a closed stdout prints nothing.

    The exit status is that of the signal: 128 + SIGINT, SIGTERM or SIGPIPE.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                try:
                    return main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # what is still buffered, the text of --help too, may meet a closed pipe
            except KeyboardInterrupt as e:
                print(interrupt_message(tool, e), file=sys.stderr)
                return 128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT)
            except BrokenPipeError:
                return handle_closed_stdout()

        return wrapper

    return decorate


@contextmanager
def ends_at_interrupt(tool: str) -> Iterator[None]:
    """Ends the process at Ctrl-C, with one line, while packages are imported: an exception there prints a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # background jobs ignore SIGINT, which must stay so
        yield
        return

    def end(*_: object) -> None:
        os.write(2, f"{tool}: interrupted\n".encode())
        os._exit(128 + signal.SIGINT)

    try:
        signal.signal(signal.SIGINT, end)
    except ValueError:  # not the main thread, which alone receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class _PrintCompletion(argparse.Action):
    """Prints the shell's completion script for the parser, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        from fastgen.cli.completion import completion_script

        print(completion_script(parser, values))
        parser.exit()


def make_parser(tool: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Returns a tool's parser with the arguments that all tools share: MODEL, KEY=VALUE and three options.

    `hydra_config.parse_arguments` parses with it.
    """
    from fastgen import __version__

    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(tool, description=description, epilog=epilog, formatter_class=formatter)
    p.add_argument("model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} Also --model MODEL or model=MODEL.")
    settings = "Settings, as for fgrun: fgrun --help lists them. The group may be left out: token_budget=4096."
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=settings)
    p.add_argument("--model", dest="models", action="append", default=[], metavar="MODEL", help=argparse.SUPPRESS)
    p.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="Print the version and exit.")
    completion = "Print a completion script for the shell and exit. docs/cli.md says where it goes."
    p.add_argument("--print-completion", action=_PrintCompletion, choices=SHELLS, metavar="SHELL", help=completion)
    return p
