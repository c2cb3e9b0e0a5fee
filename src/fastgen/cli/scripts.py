"""Console scripts. Ctrl-C while a tool is being imported, which takes a second or two, ends the process silently."""

import signal
import sys
from functools import partial
from importlib import import_module


def _run_tool(module: str) -> int:
    """Imports a module of fastgen.cli and runs its `main`. Returns the exit status."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # background jobs ignore SIGINT, which must stay so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(f"fastgen.cli.{module}").main
    signal.signal(signal.SIGINT, handler)
    return main()


fgrun, fgbench, fgchat, fgserve = (partial(_run_tool, module) for module in ("run", "bench.benchmark", "chat", "serve"))

if __name__ == "__main__":
    sys.exit(_run_tool(sys.argv.pop(1)))
