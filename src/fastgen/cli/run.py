"""`fgrun`: generation from the command line, configured by Hydra. `fgrun --help` shows how.

The same configuration in a notebook or a script:

    from fastgen.cli.run import compose, engine

    config = compose("model=debug", "sampling=greedy", "schedule.token_budget=512")
    with engine(config) as e:
        outputs = e.generate([1, 2, 3], config.sampling)
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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm.auto import tqdm

import fastgen
from fastgen import Engine, EngineConfig, Output, Replicas, SamplingParams
from fastgen.cli.hydra_config import RunConfig, Task, compose, conf_dir, explain_error, to_dataclass, to_hydra_arguments
from fastgen.cli.prompt_files import STANDARD_OUTPUT, check_output, read_prompts
from fastgen.core.tokenizer import Prompt, is_single_prompt
from fastgen.profiling.profiler import profile_on_signal
from fastgen.training.grpo import Trainer, train
from fastgen.training.problems import load_problem

__all__ = ["compose", "build_engine", "build_engines", "main", "run"]


class OutputCollector:
    """Collects the outputs of a run by their prompt's index, and prints them."""

    def __init__(self, prompts: list[Prompt], sampling: SamplingParams, has_text: bool) -> None:
        self.prompts, self.has_text = prompts, has_text
        self.is_single = len(prompts) == sampling.n == 1
        self.outputs: dict[int, Output] = {}

    def print_completions(self) -> None:
        """Prints the completions in the order of their prompts."""
        for i in sorted(self.outputs):
            for j, c in enumerate(self.outputs[i].completions):
                text = c.text if self.has_text else str(c.token_ids)
                print(text if self.is_single else f"[{i}.{j}] {text}")

    def json_lines(self) -> Iterator[str]:
        """Yields a JSON line for each prompt that has an output, in order."""
        for i, output in sorted(self.outputs.items()):
            yield json.dumps({"prompt": self.prompts[i]} | asdict(output), ensure_ascii=False) + "\n"


def generate(
    engine: Engine | Replicas, prompts: list[Prompt], sampling: SamplingParams, collector: OutputCollector
) -> None:
    """Collects the outputs as they finish."""
    with tqdm(total=len(prompts), unit="request", delay=2, leave=False, disable=None) as bar:
        for i, output in engine.as_completed(prompts, sampling):
            collector.outputs[i] = output
            bar.update()


def stream(
    engine: Engine | Replicas, prompts: list[Prompt], sampling: SamplingParams, collector: OutputCollector
) -> None:
    """Prints tokens as they come. Several completions take turns, each on a line of its own."""
    last = None
    for event in engine.stream(prompts, sampling):
        who = f"[{event.request_id}.{event.index}] "
        text = event.text if engine.tokenizer else "".join(f"{t} " for t in event.token_ids)
        if text and not collector.is_single and who != last:
            text, last = ("\n" if last else "") + who + text, who
        print(text, end="", flush=True)
        if event.output:
            collector.outputs[event.request_id] = event.output
    print()


def profile(
    engine: Engine, prompts: list[Prompt], sampling: SamplingParams, collector: OutputCollector, task: Task
) -> None:
    """Prints where the time of some steps goes, and where their trace is."""
    with engine.profile(task.steps, task.trace) as p:
        collector.outputs |= enumerate(engine.generate(prompts, sampling))
    print(p.summary)
    print(f"trace: {p.trace}")


def grpo(config: RunConfig, folder: Path = Path()) -> None:
    """Learn from rewards (see `fastgen.training.grpo`), and say what it came to."""
    if config.prompt is not None or config.task.prompts is not None or config.out is not None:
        raise ValueError(
            "task=grpo draws its own prompts, and writes to grpo.output_dir: leave prompt and out as they are"
        )
    if config.seed is None:
        raise ValueError("task=grpo needs a seed, so that it can be repeated and resumed: seed=0")
    g, problem, start = config.grpo, load_problem(config.grpo.problem), time.perf_counter()
    with build_engine(config) as e:
        profile_on_signal(e.profiler, folder)
        rows = train(Trainer(e, problem, g, config.sampling, config.seed), folder / g.output_dir, resume=g.resume)
    print(f"reward {rows[0]['reward']:.3f} at step 1, {rows[-1]['reward']:.3f} at step {len(rows)}")
    print(f"{time.perf_counter() - start:.1f} s, in {folder / g.output_dir}", file=sys.stderr, flush=True)


def build_engine(config: RunConfig, *, progress: bool = True) -> Engine:
    """The engine of a configuration, its model loaded."""
    return Engine.from_pretrained(**_from_pretrained_kwargs(config, progress))


def build_engines(config: RunConfig, *, progress: bool = True) -> Engine | Replicas:
    """The engine of a configuration, or its replicas."""
    count = config.parallel.replicas
    return (
        build_engine(config, progress=progress)
        if count == 1
        else Replicas.from_pretrained(replicas=count, **_from_pretrained_kwargs(config, progress))
    )


def _from_pretrained_kwargs(config: RunConfig, progress: bool) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    m, settings = config.model, {f.name: getattr(config, f.name) for f in fields(EngineConfig)}
    loading = {"dtype": m.dtype, "device": m.device, "random_weights": m.random_weights, "random_seed": m.random_seed}
    loading["adapters"] = m.adapters
    return {"model": m.path, "progress": progress, **loading, **settings}


def _collect_prompts(config: RunConfig) -> list[Prompt]:
    """Those of `prompt`, or of the file `task.prompts`. ValueError, with the line, where there are none."""
    given, file = config.prompt, config.task.prompts
    if (given in (None, "", [])) == (file is None):
        problem = "no prompt" if file is None else "both prompt and task.prompts"
        raise ValueError(f'{problem}: give prompt="a text", task.prompts=FILE or +experiment=NAME; see fgrun --help')
    if file is None:
        return given if isinstance(given, list) and not is_single_prompt(given) else [given]
    return read_prompts(file, config.task.format)


def run(config: RunConfig, folder: Path = Path()) -> list[Output]:
    """Does the task: results on stdout, a line of timing on stderr. `config.out` is relative to `folder`.

    Where `config.out` is standard output (`-`), its JSON lines take the place of the texts. When the task ends early,
    by an interrupt or an error, the outputs that had finished are printed and saved all the same.
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
        raise ValueError("task=profile looks at one engine: parallel.replicas must be 1")
    failure: BaseException | None = None
    with build_engines(config) as e:
        if isinstance(e, Engine):
            profile_on_signal(e.profiler, folder)  # kill -USR2 PID records what runs
        templated = config.chat and e.tokenizer is not None and e.tokenizer.chat_template
        asked = [[{"role": "user", "content": p}] if templated and isinstance(p, str) else p for p in prompts]
        answers = OutputCollector(prompts, config.sampling, e.tokenizer is not None)
        start = time.perf_counter()
        try:
            if config.task.name == "profile" and isinstance(e, Engine):
                profile(e, asked, config.sampling, answers, config.task)
            else:
                {"generate": generate, "stream": stream}[config.task.name](e, asked, config.sampling, answers)
        except ValueError:  # of a prompt that cannot run: nothing has begun
            raise
        except BaseException as error:
            failure = error
        seconds = time.perf_counter() - start
    if out and (answers.outputs or failure is None):
        try:
            out.write_text("".join(answers.json_lines()), encoding="utf-8")
        except OSError as error:  # the disk is full, say: then they are printed at least
            failure, out = failure or error, None
    if to_stdout:
        sys.stdout.writelines(answers.json_lines())
    elif config.task.name == "generate":
        answers.print_completions()
    outputs = [output for _, output in sorted(answers.outputs.items())]
    num_read = sum(len(o.prompt_token_ids) for o in outputs)
    num_made = sum(len(c.token_ids) for o in outputs for c in o.completions)
    lines = [f"{num_read} prompt tokens, {num_made} output tokens, {seconds:.2f} s, {num_made / seconds:.1f} tokens/s"]
    if failure is not None:
        saved = f"; they are in {out}" if out and outputs else ""
        lines.insert(0, f"fgrun: ended early: {len(outputs)} of {len(prompts)} requests had finished{saved}")
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    if failure is not None:
        raise failure
    return outputs


class Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a run as Ctrl-C does."""


def _on_sigterm(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


def _report_error(e: Exception) -> int:
    """Print what the user can change; the exit status: 2 for the configuration's form, 1 for its values."""
    form = isinstance(e, HydraException | OmegaConfBaseException)
    print(f"fgrun: {explain_error(e) if form else e}", file=sys.stderr)
    return 2 if form else 1


def _handle_closed_stdout() -> int:
    """Returns the exit status when nobody reads stdout any more, as with `head` or a pager that was left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit complains
    return 128 + signal.SIGPIPE


def main() -> int:
    """The console script. HYDRA_FULL_ERROR=1 shows tracebacks."""
    full = os.environ.get("HYDRA_FULL_ERROR")

    def job(cfg: DictConfig) -> None:
        about = HydraConfig.get()
        if about.mode == RunMode.MULTIRUN:
            print(f"# {about.job.override_dirname}", flush=True)
        try:
            run(to_dataclass(cfg), Path(about.runtime.output_dir))
        except BrokenPipeError:
            sys.exit(_handle_closed_stdout())
        except (ValueError, OSError) as e:
            if full == "1":
                raise
            sys.exit(_report_error(e))  # past Hydra, which would add lines of its own

    if "--version" in sys.argv[1:]:
        print(f"fgrun {fastgen.__version__}")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors instead of printing them
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        sys.argv[1:] = to_hydra_arguments(sys.argv[1:])
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
        sys.stdout.flush()
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return _handle_closed_stdout()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as e:
        if full == "1":
            raise
        return _report_error(e)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)
    return 0
