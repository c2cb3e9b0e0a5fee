"""`fgrun`: generates text from the command line, configured by Hydra. `fgrun --help` shows examples.

torch is imported by jobs only: --help, --cfg and shell completion start without it.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import fastgen
from fastgen.cli import hydra_config
from fastgen.cli.console import SHELLS, Terminated, ends_at_interrupt, ends_quietly, handle_closed_stdout
from fastgen.cli.hydra_config import HYDRA_ERRORS, conf_dir
from fastgen.config import check_choice


def _on_sigterm(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM ends the process at once
    raise Terminated


def _report_error(e: Exception) -> int:
    """Prints an error that the user can fix. Returns the exit status: 2 for Hydra's errors, 1 for all others."""
    is_hydra = isinstance(e, HYDRA_ERRORS)
    print(f"fgrun: {hydra_config.explain_error(e) if is_hydra else e}", file=sys.stderr)
    return 2 if is_hydra else 1


def _completion_arguments(arguments: Sequence[str]) -> list[str]:
    """Converts `--print-completion SHELL`, an option of all tools, to Hydra's."""
    name, _, shell = arguments[0].partition("=")
    if name != "--print-completion":
        return list(arguments)
    shell = shell or " ".join(arguments[1:])
    check_choice("--print-completion", shell, SHELLS)
    return ["--shell-completion", f"install={shell}"]


@ends_quietly("fgrun")
def main() -> int:
    """Runs the console script. HYDRA_FULL_ERROR=1 shows tracebacks."""
    full_error = os.environ.get("HYDRA_FULL_ERROR")

    def job(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            print(f"# {settings.job.override_dirname}", flush=True)
        try:
            with ends_at_interrupt("fgrun"):
                from fastgen.cli.run import run
            run(hydra_config.to_dataclass(cfg), Path(settings.runtime.output_dir))
        except BrokenPipeError:
            sys.exit(handle_closed_stdout())
        except (ValueError, OSError) as e:
            if full_error == "1":
                raise
            sys.exit(_report_error(e))  # Hydra would print lines of its own for an exception

    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"fgrun {fastgen.__version__}")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        sys.argv[1:] = hydra_config.to_hydra_arguments(_completion_arguments(arguments)) if arguments else []
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
    except BrokenPipeError:
        raise
    except (*HYDRA_ERRORS, ValueError, OSError) as e:
        if full_error == "1":
            raise
        return _report_error(e)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if full_error is None else os.environ.update(HYDRA_FULL_ERROR=full_error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
