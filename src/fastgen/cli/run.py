"""`fgrun`: generates text from the command line, configured by Hydra. `fgrun --help` shows examples.

Notebooks and scripts can use the same configuration:

    from fastgen.cli.run import build_engine, compose

    config = compose("model=debug", "sampling=greedy", "schedule.token_budget=512")
    with build_engine(config) as engine:
        outputs = engine.generate([1, 2, 3], config.sampling)
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm.auto import tqdm

import fastgen
from fastgen import Engine, EngineConfig, Output, Replicas
from fastgen.cli import hydra_config
from fastgen.cli.hydra_config import HYDRA_ERRORS, RunConfig, compose, conf_dir
from fastgen.cli.prompt_files import STANDARD_OUTPUT, check_output, read_prompts
from fastgen.profiling.profiler import profile_on_signal
from fastgen.text.tokenizer import Prompt, is_single_prompt
from fastgen.training.grpo import Trainer, train
from fastgen.training.problems import load_problem

__all__ = ["compose", "build_engine", "build_engines", "main", "run"]


class PromptRun:
    """A run of prompts on an engine. Each task collects the outputs by prompt index as they finish."""

    def __init__(self, engine: Engine | Replicas, prompts: list[Prompt], config: RunConfig) -> None:
        self.engine, self.prompts, self.sampling, self.task = engine, prompts, config.sampling, config.task
        use_template = config.chat and engine.tokenizer is not None and engine.tokenizer.chat_template
        self.requests: list[Prompt] = [
            [{"role": "user", "content": p}] if use_template and isinstance(p, str) else p for p in prompts
        ]
        self.is_single = len(prompts) == config.sampling.n == 1
        self.outputs: dict[int, Output] = {}

    def generate(self) -> None:
        """Generates behind a progress bar."""
        with tqdm(total=len(self.prompts), unit="request", delay=2, leave=False, disable=None) as bar:
            for i, output in self.engine.as_completed(self.requests, self.sampling):
                self.outputs[i] = output
                bar.update()

    def stream(self) -> None:
        """Prints tokens as they are sampled. A line has the tokens of one completion; completions take turns."""
        last_label = None
        for event in self.engine.stream(self.requests, self.sampling):
            label = f"[{event.request_id}.{event.index}] "
            text = event.text if self.engine.tokenizer else "".join(f"{t} " for t in event.token_ids)
            if text and not self.is_single and label != last_label:
                text, last_label = ("\n" if last_label else "") + label + text, label
            print(text, end="", flush=True)
            if event.output:
                self.outputs[event.request_id] = event.output
        print()

    def profile(self) -> None:
        """Generates while profiling `task.steps` steps. Prints the profile's summary and the path of its trace."""
        assert isinstance(self.engine, Engine)
        with self.engine.profile(self.task.steps, self.task.trace) as p:
            self.generate()
        print(p.summary, f"trace: {p.trace}", sep="\n")

    def format_completions(self) -> Iterator[str]:
        """Yields the completions, in the order of their prompts, as lines to print."""
        for i, output in sorted(self.outputs.items()):
            for j, c in enumerate(output.completions):
                text = str(c.token_ids) if self.engine.tokenizer is None else c.text
                yield f"{text}\n" if self.is_single else f"[{i}.{j}] {text}\n"

    def json_lines(self) -> Iterator[str]:
        """Yields a JSON line for each prompt that has an output, in order."""
        for i, output in sorted(self.outputs.items()):
            yield json.dumps({"prompt": self.prompts[i]} | asdict(output), ensure_ascii=False) + "\n"


def grpo(config: RunConfig, folder: Path = Path()) -> None:
    """Trains with GRPO (see `fastgen.training.grpo`), and prints the mean reward at the first and the last step."""
    if config.prompt is not None or config.task.prompts is not None or config.out is not None:
        advice = "leave out prompt, task.prompts and out"
        raise ValueError(f"task=grpo samples prompts from grpo.problem and writes to grpo.output_dir: {advice}")
    if config.seed is None:
        raise ValueError("task=grpo needs a seed, so that it can be repeated and resumed: seed=0")
    g, problem, start = config.grpo, load_problem(config.grpo.problem), time.perf_counter()
    with build_engine(config) as engine:
        profile_on_signal(engine.profiler, folder)
        trainer = Trainer(engine, problem, g, config.sampling, config.seed)
        rows = train(trainer, folder / g.output_dir, resume=g.resume)
    print(f"reward {rows[0]['reward']:.3f} at step 1, {rows[-1]['reward']:.3f} at step {len(rows)}")
    print(f"{time.perf_counter() - start:.1f} s, in {folder / g.output_dir}", file=sys.stderr, flush=True)


def build_engine(config: RunConfig, *, progress: bool = True) -> Engine:
    """Loads the configured model and builds its engine."""
    return Engine.from_pretrained(config.model.path, progress=progress, **_collect_settings(config))


def build_engines(config: RunConfig, *, progress: bool = True) -> Engine | Replicas:
    """Builds the configured engine, or Replicas if `parallel.replicas` is above 1."""
    path, replicas = config.model.path, config.parallel.replicas
    if replicas == 1:
        return build_engine(config, progress=progress)
    return Replicas.from_pretrained(path, replicas=replicas, progress=progress, **_collect_settings(config))


def _collect_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the keyword arguments of `from_pretrained`."""
    load = {f.name: getattr(config.model, f.name) for f in fields(config.model) if f.name != "path"}
    return load | {f.name: getattr(config, f.name) for f in fields(EngineConfig)}


def _collect_prompts(config: RunConfig) -> list[Prompt]:
    """Returns the prompts of `prompt` or of the file `task.prompts`. Raises ValueError unless one of them is set."""
    prompt, file = config.prompt, config.task.prompts
    if (prompt in (None, "", [])) == (file is None):
        problem = "no prompt" if file is None else "both prompt and task.prompts"
        raise ValueError(f'{problem}: give prompt="a text", task.prompts=FILE or +experiment=NAME; see fgrun --help')
    if file is None:
        return prompt if isinstance(prompt, list) and not is_single_prompt(prompt) else [prompt]
    return read_prompts(file, config.task.format)


def run(config: RunConfig, folder: Path = Path()) -> list[Output]:
    """Runs the configured task. Prints results to stdout and a line of statistics to stderr.

    `config.out`, relative to `folder`, receives a JSON line for each prompt; with `-`, stdout receives the JSON lines
    instead of the texts. If the task ends early, by an interrupt or an error, the outputs that have finished are
    printed and saved before the exception is raised.
    """
    if config.task.name == "grpo":
        grpo(config, folder)
        return []
    to_stdout = config.out in STANDARD_OUTPUT
    out = folder / Path(config.out).expanduser() if config.out and not to_stdout else None
    if out:
        check_output("out", out, [config.task.prompts])
    if config.task.trace:
        check_output("task.trace", Path(config.task.trace), [config.task.prompts, config.out])
    prompts = _collect_prompts(config)
    if config.task.name == "profile" and config.parallel.replicas > 1:
        raise ValueError("task=profile profiles one engine: parallel.replicas must be 1")
    failure: BaseException | None = None
    with build_engines(config) as engine:
        if isinstance(engine, Engine):
            profile_on_signal(engine.profiler, folder)  # kill -USR2 PID profiles the running process
        prompt_run = PromptRun(engine, prompts, config)
        start = time.perf_counter()
        try:
            getattr(prompt_run, config.task.name)()  # generate, stream or profile
        except ValueError:  # an invalid prompt, found before anything has run
            raise
        except BaseException as error:
            failure = error
        seconds = time.perf_counter() - start
    if out and (prompt_run.outputs or failure is None):
        try:
            out.write_text("".join(prompt_run.json_lines()), encoding="utf-8")
        except OSError as error:  # for example, the disk is full; the outputs are still printed
            failure, out = failure or error, None
    if to_stdout:
        sys.stdout.writelines(prompt_run.json_lines())
    elif config.task.name == "generate":
        sys.stdout.writelines(prompt_run.format_completions())
    outputs = [output for _, output in sorted(prompt_run.outputs.items())]
    if failure is not None:
        saved = f"; they are in {out}" if out and outputs else ""
        print(f"fgrun: ended early: {len(outputs)} of {len(prompts)} requests had finished{saved}", file=sys.stderr)
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    num_output = sum(len(c.token_ids) for o in outputs for c in o.completions)
    rate = f"{seconds:.2f} s, {num_output / seconds:.1f} tokens/s"
    print(f"{num_prompt} prompt tokens, {num_output} output tokens, {rate}", file=sys.stderr, flush=True)
    if failure is not None:
        raise failure
    return outputs


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, which ends a run as Ctrl-C does."""


def _on_sigterm(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM ends the process at once
    raise Terminated


def _report_error(e: Exception) -> int:
    """Prints an error that the user can fix. Returns the exit status: 2 for Hydra's errors, 1 for all others."""
    is_hydra = isinstance(e, HYDRA_ERRORS)
    print(f"fgrun: {hydra_config.explain_error(e) if is_hydra else e}", file=sys.stderr)
    return 2 if is_hydra else 1


def _handle_closed_stdout() -> int:
    """Returns the exit status for a closed stdout, as behind `head` or a pager that was quit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at exit would fail again
    return 128 + signal.SIGPIPE


def main() -> int:
    """Runs the console script. HYDRA_FULL_ERROR=1 shows tracebacks."""
    full_error = os.environ.get("HYDRA_FULL_ERROR")

    def job(cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            print(f"# {settings.job.override_dirname}", flush=True)
        try:
            run(hydra_config.to_dataclass(cfg), Path(settings.runtime.output_dir))
        except BrokenPipeError:
            sys.exit(_handle_closed_stdout())
        except (ValueError, OSError) as e:
            if full_error == "1":
                raise
            sys.exit(_report_error(e))  # Hydra would print lines of its own for an exception

    if "--version" in sys.argv[1:]:
        print(f"fgrun {fastgen.__version__}")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        sys.argv[1:] = hydra_config.to_hydra_arguments(sys.argv[1:])
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
        sys.stdout.flush()
    except KeyboardInterrupt as e:
        return 128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        return _handle_closed_stdout()
    except (*HYDRA_ERRORS, ValueError, OSError) as e:
        if full_error == "1":
            raise
        return _report_error(e)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if full_error is None else os.environ.update(HYDRA_FULL_ERROR=full_error)
    return 0
