"""Runs what fgrun's configuration says: builds the engine, reads the prompts, and prints and saves the outputs.

Notebooks and scripts can use the same configuration:

    from fastgen.cli.run import build_engine, compose

    config = compose("model=debug", "sampling=greedy", "schedule.token_budget=512")
    with build_engine(config) as engine:
        outputs = engine.generate([1, 2, 3], config.sampling)
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastgen import ChatPrompt, Engine, EngineConfig, Output, Replicas, generate_dataset, join_dataset
from fastgen.cli.hydra_config import RunConfig, compose
from fastgen.cli.prompt_files import (
    STANDARD_INPUT,
    STANDARD_OUTPUT,
    check_output,
    read_chat_template,
    read_prompts,
    read_tools,
)
from fastgen.profiling.profiler import profile_on_signal
from fastgen.text.tokenizer import Prompt, is_single_prompt
from fastgen.training.grpo import Trainer, train
from fastgen.training.problems import load_problem

__all__ = ["compose", "build_engine", "build_engines", "run"]


class PromptRun:
    """A run of prompts on an engine. Each task collects the outputs by prompt index as they finish."""

    def __init__(
        self, engine: Engine | Replicas, prompts: list[Prompt], config: RunConfig, template_options: dict[str, Any]
    ) -> None:
        """`template_options` are those of `ChatPrompt`."""
        self.engine, self.prompts, self.sampling, self.task = engine, prompts, config.sampling, config.task
        tokenizer = engine.tokenizer
        self.has_text = tokenizer is not None and self.sampling.detokenize
        has_template = tokenizer is not None and (tokenizer.chat_template or template_options["chat_template"])
        self.requests = [_to_chat(prompt, config.chat and bool(has_template), template_options) for prompt in prompts]
        defaults = ChatPrompt([]).template_options | {"tools": None}
        changed = [name for name, value in template_options.items() if value != defaults[name]]
        if changed and not any(isinstance(request, ChatPrompt) for request in self.requests):
            raise ValueError(f"{changed[0]}: no prompt is a chat; texts are with chat=true and a chat template")
        self.is_single = len(prompts) == config.sampling.n == 1
        self.outputs: dict[int, Output] = {}

    def generate(self) -> None:
        """Generates behind a progress bar."""
        for i, output in self.engine.as_completed(self.requests, self.sampling, progress=None):
            self.outputs[i] = output

    def stream(self) -> None:
        """Prints tokens as they are sampled. A line has the tokens of one completion; completions take turns."""
        last_label = None
        for event in self.engine.stream(self.requests, self.sampling):
            label = f"[{event.request_id}.{event.index}] "
            text = event.text if self.has_text else "".join(f"{t} " for t in event.token_ids)
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
                text = c.text if self.has_text else str(c.token_ids)
                yield f"{text}\n" if self.is_single else f"[{i}.{j}] {text}\n"

    def json_lines(self) -> Iterator[str]:
        """Yields a JSON line for each prompt that has an output, in order."""
        for i, output in sorted(self.outputs.items()):
            yield json.dumps(asdict(output) | {"prompt": self.prompts[i]}, ensure_ascii=False) + "\n"


def _to_chat(prompt: Prompt, is_message: bool, template_options: dict[str, Any]) -> Prompt:
    """Returns messages, or a text that `is_message` of the user, as a ChatPrompt; other prompts unchanged."""
    if isinstance(prompt, str) and is_message:
        prompt = [{"role": "user", "content": prompt}]
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    return ChatPrompt(prompt, **template_options) if is_chat else prompt  # type: ignore[arg-type]


def _read_template_options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of `ChatPrompt`, with the contents of the files that the configuration names."""
    return {
        "tools": read_tools(config.tools), "chat_template": read_chat_template(config.chat_template),
        "chat_template_kwargs": config.chat_template_kwargs, "add_generation_prompt": config.add_generation_prompt,
        "continue_final_message": config.continue_final_message,
    }  # fmt: skip


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


def dataset(config: RunConfig, folder: Path = Path()) -> None:
    """Generates for each row of the file `task.prompts`, into the folder `out`; prints the summary as JSON."""
    if config.task.prompts is None or config.task.prompts in STANDARD_INPUT or not config.out:
        raise ValueError("task=dataset needs task.prompts=FILE, which is read more than once, and out=FOLDER")
    if config.prompt is not None or config.task.format is not None or config.out in STANDARD_OUTPUT:
        raise ValueError("task=dataset reads task.prompts and writes a folder: leave out prompt, task.format and out=-")
    if config.parallel.replicas > 1:
        raise ValueError("task=dataset runs one engine: start a process for each GPU with shard=0/8 to shard=7/8")
    d, options = config.dataset, _read_template_options(config)
    source, out = Path(config.task.prompts).expanduser(), folder / Path(config.out).expanduser()
    arguments: dict[str, Any] = {"seed": config.seed or 0, "model": config.model.path or "default"}
    settings = {f.name: getattr(d, f.name) for f in fields(d)}
    with build_engine(config) as engine:
        profile_on_signal(engine.profiler, folder)
        arguments |= {"chat": config.chat, "template_options": options}
        summary = generate_dataset(engine, source, out, config.sampling, **arguments, **settings)
    print(json.dumps(summary, indent=1))


def join(config: RunConfig, folder: Path = Path()) -> None:
    """Checks the files that all jobs of a dataset run have written to `out`; prints the summary as JSON."""
    if not config.out:
        raise ValueError("task=join needs out=FOLDER, the folder of task=dataset")
    print(json.dumps(join_dataset(folder / Path(config.out).expanduser()), indent=1))


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
    printed and saved before the exception is raised; a KeyboardInterrupt then says how many these are.
    """
    if (task := {"grpo": grpo, "dataset": dataset, "join": join}.get(config.task.name)) is not None:
        task(config, folder)
        return []
    to_stdout = config.out in STANDARD_OUTPUT
    out = folder / Path(config.out).expanduser() if config.out and not to_stdout else None
    if out:
        check_output("out", out, [config.task.prompts])
    if config.task.trace:
        check_output("task.trace", Path(config.task.trace), [config.task.prompts, config.out])
    prompts, template_options = _collect_prompts(config), _read_template_options(config)
    if config.task.name == "profile" and config.parallel.replicas > 1:
        raise ValueError("task=profile profiles one engine: parallel.replicas must be 1")
    failure: BaseException | None = None
    with build_engines(config) as engine:
        if isinstance(engine, Engine):
            profile_on_signal(engine.profiler, folder)  # kill -USR2 PID profiles the running process
        prompt_run = PromptRun(engine, prompts, config, template_options)
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
        ended_early = f"{len(outputs)} of {len(prompts)} requests had finished{saved}"
        if isinstance(failure, KeyboardInterrupt):
            failure.args = (ended_early,)
        elif not isinstance(failure, BrokenPipeError):
            print(f"fgrun: ended early: {ended_early}", file=sys.stderr)
        raise failure
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    num_output = sum(len(c.token_ids) for o in outputs for c in o.completions)
    rate = f"{seconds:.2f} s, {num_output / seconds:.1f} tokens/s"
    print(f"{num_prompt} prompt tokens, {num_output} output tokens, {rate}", file=sys.stderr, flush=True)
    return outputs
