"""`fgrun`: generation from the command line, configured by Hydra. `fgrun --help` shows how.

The same configuration in a notebook or a script:

    from fastgen.cli.run import compose, engine

    config = compose("model=debug", "sampling=greedy", "schedule.token_budget=512")
    with engine(config) as e:
        outputs = e.generate([1, 2, 3], config.sampling)
"""

import json
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fastgen import Engine, Output, Replicas, SamplingParams, Settings
from fastgen.cli.config import Config, Task, compose, conf_dir, explain, quote, typed
from fastgen.grpo import Trainer, find, train
from fastgen.profiler import listen
from fastgen.tokenizer import Prompt, is_one

__all__ = ["compose", "engine", "engines", "main", "run"]


def generate(engine: Engine | Replicas, prompts: list[Prompt], sampling: SamplingParams) -> list[Output]:
    """Print the completions when all are done."""
    outputs = engine.generate(prompts, sampling)
    alone = len(outputs) == sampling.n == 1
    for output in outputs:
        for j, c in enumerate(output.completions):
            text = c.text if engine.tokenizer else str(c.token_ids)
            print(text if alone else f"[{output.request_id}.{j}] {text}")
    return outputs


def stream(engine: Engine | Replicas, prompts: list[Prompt], sampling: SamplingParams) -> list[Output]:
    """Print tokens as they come. Several completions take turns, each on a line of its own."""
    outputs, last = {}, None
    alone = len(prompts) == sampling.n == 1
    for event in engine.stream(prompts, sampling):
        who = f"[{event.request_id}.{event.index}] "
        text = event.text if engine.tokenizer else "".join(f"{t} " for t in event.token_ids)
        if text and not alone and who != last:
            text, last = ("\n" if last else "") + who + text, who
        print(text, end="", flush=True)
        if event.output:
            outputs[event.request_id] = event.output
    print()
    return [outputs[i] for i in sorted(outputs)]


def profile(engine: Engine, prompts: list[Prompt], sampling: SamplingParams, task: Task) -> list[Output]:
    """Print where the time of some steps goes, and where their trace is."""
    with engine.profile(task.steps, task.trace) as p:
        outputs = engine.generate(prompts, sampling)
    print(p.summary)
    print(f"trace: {p.trace}")
    return outputs


def grpo(config: Config, folder: Path = Path()) -> None:
    """Learn from rewards (see `fastgen.grpo`), and say what it came to."""
    if config.prompt is not None or config.task.prompts is not None or config.out is not None:
        raise ValueError("task=grpo draws its own prompts, and writes to grpo.folder: leave prompt and out as they are")
    if config.seed is None:
        raise ValueError("task=grpo needs a seed, so that it can be repeated and resumed: seed=0")
    g, problem, start = config.grpo, find(config.grpo.problem), time.perf_counter()
    with engine(config) as e:
        listen(e.profiler, folder)
        rows = train(Trainer(e, problem, g, config.sampling, config.seed), folder / g.folder, resume=g.resume)
    print(f"reward {rows[0]['reward']:.3f} at step 1, {rows[-1]['reward']:.3f} at step {len(rows)}")
    print(f"{time.perf_counter() - start:.1f} s, in {folder / g.folder}", file=sys.stderr, flush=True)


def engine(config: Config, *, progress: bool = True) -> Engine:
    """The engine of a configuration, its model loaded."""
    return Engine.from_pretrained(**_made(config, progress))


def engines(config: Config, *, progress: bool = True) -> Engine | Replicas:
    """The engine of a configuration, or its replicas."""
    count = config.parallel.replicas
    return (
        engine(config, progress=progress)
        if count == 1
        else Replicas.from_pretrained(replicas=count, **_made(config, progress))
    )


def _made(config: Config, progress: bool) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    m, settings = config.model, {f.name: getattr(config, f.name) for f in fields(Settings)}
    loading = {"dtype": m.dtype, "device": m.device, "random": m.random, "random_seed": m.random_seed}
    loading["adapters"] = m.adapters
    return {"model": m.path, "progress": progress, **loading, **settings}


def _prompts(config: Config) -> list[Prompt]:
    """Those of `prompt`, or of the file `task.prompts`. ValueError, with the line, where there are none."""
    given, file = config.prompt, config.task.prompts
    if (given in (None, "", [])) == (file is None):
        problem = "no prompt" if file is None else "both prompt and task.prompts"
        raise ValueError(f'{problem}: give prompt="a text", task.prompts=FILE or +experiment=NAME; see fgrun --help')
    if file is None:
        return given if isinstance(given, list) and not is_one(given) else [given]
    if not Path(file).is_file():
        raise ValueError(f"task.prompts: there is no file {file}")
    prompts = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line) if file.endswith(".jsonl") else line.strip()
            prompts.append(value.get("messages") or value["prompt"] if isinstance(value, dict) else value)
        except (json.JSONDecodeError, KeyError) as e:
            wanted = "a JSON text, list of token ids, list of messages, or an object with 'prompt' or 'messages'"
            raise ValueError(f"{file}, line {number}: must be {wanted}, got {line[:60]!r}") from e
    if not prompts:
        raise ValueError(f"task.prompts: {file} is empty")
    return prompts


def run(config: Config, folder: Path = Path()) -> list[Output]:
    """Do the task: results on stdout, a line of timing on stderr. `config.out` is relative to `folder`."""
    if config.task.name == "grpo":
        grpo(config, folder)
        return []
    prompts = _prompts(config)
    out = folder / config.out if config.out else None
    if out and not out.parent.is_dir():
        raise ValueError(f"out: there is no folder {out.parent}")
    if config.task.name == "profile" and config.parallel.replicas > 1:
        raise ValueError("task=profile looks at one engine: parallel.replicas must be 1")
    with engines(config) as e:
        if isinstance(e, Engine):
            listen(e.profiler, folder)  # kill -USR2 PID records what runs
        templated = config.chat and e.tokenizer is not None and e.tokenizer.chat_template
        asked = [[{"role": "user", "content": p}] if templated and isinstance(p, str) else p for p in prompts]
        start = time.perf_counter()
        if config.task.name == "profile" and isinstance(e, Engine):
            outputs = profile(e, asked, config.sampling, config.task)
        else:
            outputs = {"generate": generate, "stream": stream}[config.task.name](e, asked, config.sampling)
        seconds = time.perf_counter() - start
    if out:
        rows = ({"prompt": p} | asdict(o) for p, o in zip(prompts, outputs, strict=True))
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    read = sum(len(o.prompt_token_ids) for o in outputs)
    made = sum(len(c.token_ids) for o in outputs for c in o.completions)
    line = f"{read} prompt tokens, {made} output tokens, {seconds:.2f} s, {made / seconds:.1f} tokens/s"
    print(line, file=sys.stderr, flush=True)
    return outputs


def _fail(e: Exception) -> int:
    """Print what the user can change; the exit status: 2 for the configuration's form, 1 for its values."""
    form = isinstance(e, HydraException | OmegaConfBaseException)
    print(f"fgrun: {explain(e) if form else e}", file=sys.stderr)
    return 2 if form else 1


def main() -> int:
    """The console script. HYDRA_FULL_ERROR=1 shows tracebacks."""
    full = os.environ.get("HYDRA_FULL_ERROR")

    def job(cfg: DictConfig) -> None:
        about = HydraConfig.get()
        if about.mode == RunMode.MULTIRUN:
            print(f"# {about.job.override_dirname}", flush=True)
        try:
            run(typed(cfg), Path(about.runtime.output_dir))
        except (ValueError, OSError) as e:
            if full == "1":
                raise
            sys.exit(_fail(e))  # past Hydra, which would add lines of its own

    sys.argv[1:] = [quote(argument) for argument in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises its errors instead of printing them
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()
    except KeyboardInterrupt:
        return 130
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as e:
        if full == "1":
            raise
        return _fail(e)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)
    return 0
