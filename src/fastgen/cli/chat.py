"""`fgchat`: chats with a model in the terminal. docs/chat.md describes it."""

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch.utils._pytree import tree_leaves

from fastgen import Engine, SamplingParams
from fastgen.checkpoint import hub, tokenizer
from fastgen.cli.console import ends_quietly
from fastgen.cli.hydra_config import (
    HYDRA_ERRORS,
    RunConfig,
    compose,
    model_override,
    parse_arguments,
    reject_fgrun_keys,
)
from fastgen.cli.parsers import chat_parser
from fastgen.cli.prompt_files import read_chat_template
from fastgen.cli.run import build_engine
from fastgen.config import unknown_name_message
from fastgen.conversation import Conversation, ConversationTooLong, check_can_chat

COMMANDS = {  # command -> (arguments, help)
    "/r": ("N", "rewind to before turn N; /r 1 starts over"),
    "/m": ("", "enter a message of several lines; a line with a single '.' ends it"),
    "/s": ("NAME=VALUE …", "set sampling parameters, as in temperature=0.7 top_p=0.9; without arguments, show them"),
    "/system": ("TEXT", "set the system prompt; - removes it; without arguments, show it"),
    "/p": ("", "show the tokens of the last answer, with their probabilities and the most likely alternatives"),
    "/save": ("FILE", "save the messages and sampling parameters as JSON"),
    "/load": ("FILE", "load a saved conversation"),
    "/h": ("", "show this list; also /help"),
    "/q": ("", "quit; also Ctrl-D"),
}
HELP_TEXTS = {name: text for name, (_, text) in COMMANDS.items()}
COMMAND_NAMES = WordCompleter([*COMMANDS, "/help"], meta_dict=HELP_TEXTS, WORD=True)
FILE_NAMES = PathCompleter(expanduser=True)
SETTINGS = WordCompleter([f"{name}=" for name in SamplingParams.__slots__], WORD=True)
ARGUMENT_COMPLETERS: dict[str, Completer] = {"/s": SETTINGS, "/save": FILE_NAMES, "/load": FILE_NAMES}
MIN_SHOWN_LOGPROB = math.log(0.0005)  # lower ones would be shown as 0.0%
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would move the cursor or change colors


class CommandCompleter(Completer):
    """Completes commands, names of sampling parameters after /s, and files after /save and /load."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, arguments = document.text_before_cursor.partition(" ")
        completer = ARGUMENT_COMPLETERS.get(command) if space else COMMAND_NAMES
        if command.startswith("/") and completer is not None:
            yield from completer.get_completions(Document(arguments if space else command), complete_event)


def stream_answer(conversation: Conversation, message: str, write: Callable[[str], None]) -> bool:
    """Writes the answer as it is generated. Returns whether Ctrl-C ended it.

    Ctrl-C takes effect between two steps, so that the KV cache survives. A second Ctrl-C interrupts the step itself,
    which resets the engine.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    previous_handler, last_text = signal.signal(signal.SIGINT, stop), "\n"
    try:
        with closing(conversation.ask(message)) as texts:
            for text in texts:
                write(text)
                last_text = text or last_text
                if stopped:
                    break
    finally:
        signal.signal(signal.SIGINT, previous_handler)
        if not last_text.endswith("\n"):
            write("\n")
    return stopped


def format_stats(conversation: Conversation) -> tuple[str, str]:
    """Returns the statistics of the last answer, and a note if a length limit ended it."""
    last, note = conversation.turns[-1], ""
    num_tokens = len(last.answer.token_ids)
    if last.answer.finish_reason == "length":
        note = f"max_tokens={num_tokens} ended the answer"
        if len(last.prompt_token_ids) + num_tokens >= conversation.max_length:
            note = f"the context of {conversation.max_length} tokens is full"
    return f"--- [{num_tokens} tokens, {last.tokens_per_second:.3f}toks/s]", note


class TerminalChat:
    """A conversation in the terminal. `run` reads lines and answers them until /q."""

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.conversation, self.console = conversation, console
        self.saved_file: Path | None = None  # the file last saved or loaded, which /save may overwrite
        self.session: PromptSession[str] = PromptSession(
            history=_open_history(), completer=CommandCompleter(), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu needs eight empty lines below every prompt
        )  # fmt: skip
        self.command_handlers: dict[str, Callable[[str], None]] = {
            "/r": self._rewind, "/m": self._ask_multiline, "/s": self._set_sampling, "/system": self._set_system,
            "/p": self._show_alternatives, "/save": self._save, "/load": self._load,
            "/h": self._show_help, "/help": self._show_help,
        }  # fmt: skip

    def run(self) -> None:
        """Reads lines until /q or the end of input. An error prints one line and ends neither chat nor conversation."""
        commands = " /r N rewind to turn N, /m several lines, /q quit, /h all commands"
        self.console.print(Text.assemble(("Ready to chat!", "bold"), commands))
        while True:
            try:
                line = self.session.prompt(f"{len(self.conversation.turns) + 1}> ").strip()
                if line == "/q":
                    return
                self._handle_line(line)
            except KeyboardInterrupt:
                self._print_note("stopped; /q quits")
            except EOFError:
                return
            except ConversationTooLong as e:
                advice = "/r N rewinds to before turn N, /r 1 starts over, /save FILE saves it"
                self.console.print(f"{e}. {advice}", style="red")
            except (ValueError, OSError, torch.OutOfMemoryError) as e:
                self.console.print(str(e), style="red")

    def _handle_line(self, line: str) -> None:
        name, _, arguments = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line)
        elif name in self.command_handlers:
            self.command_handlers[name](arguments.strip())
        else:
            problem = unknown_name_message("command", name, [*self.command_handlers, "/q"])
            raise ValueError(f"{problem}; to send a message that begins with /, use /m")

    def _ask(self, message: str) -> None:
        if not message:
            return
        conversation, num_turns = self.conversation, len(self.conversation.turns)
        write = partial(self.console.out, end="")
        stopped = stream_answer(conversation, message, lambda text: write(_replace_control_characters(text)))
        if len(conversation.turns) == num_turns:
            return self._print_note("stopped before the first token; the message is discarded")
        stats, note = format_stats(conversation)
        if stopped:
            note = "stopped; the text so far is the answer"
        elif note:
            advice = "/s max_tokens=null removes the limit" if "max_tokens" in note else "/r N rewinds to before turn N"
            note = f"{note}: {advice}"
        self._print_note("\n".join(filter(None, (stats, note))))

    def _ask_multiline(self, _: str) -> None:
        lines: list[str] = []
        try:
            while (line := self.session.prompt("... ")) != ".":
                lines.append(line)
        except EOFError:
            pass
        self._ask("\n".join(lines).strip())

    def _rewind(self, number: str) -> None:
        if not number.isdecimal():
            raise ValueError("/r N: which turn? /r 1 starts over")
        self.conversation.rewind(int(number))

    def _set_sampling(self, settings: str) -> None:
        try:
            words = [word for word in re.split(r"\s+(?=\w+=)", settings) if word]
            overrides = OverridesParser.create().parse_overrides(words)
            self.conversation.update_sampling(**{o.key_or_group: o.value() for o in overrides})
        except HydraException as e:
            raise ValueError(f"/s {settings}: settings are NAME=VALUE, such as temperature=0.7 stop=[END]") from e
        items = self.conversation.notable_settings().items()
        self.console.print(" ".join(f"{name}={json.dumps(value)}" for name, value in items))

    def _set_system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        self.console.print(self.conversation.system or "no system prompt; the model's template may add its own")

    def _save(self, name: str) -> None:
        file = _parse_file("/save", name)
        if file.exists() and file != self.saved_file:
            raise ValueError(f"{file} exists already: choose another name, or remove it first")
        self.conversation.save(file)
        self.saved_file = file
        self._print_note(f"saved {len(self.conversation.turns)} turns to {file}")

    def _load(self, name: str) -> None:
        file = _parse_file("/load", name)
        self.conversation.load(file)
        self.saved_file = file
        for number, turn in enumerate(self.conversation.turns, 1):
            self.console.print(_replace_control_characters(f"{number}> {turn.message}\n{turn.answer.text}"))

    def _show_alternatives(self, _: str) -> None:
        turns, tokenizer = self.conversation.turns, self.conversation.engine.tokenizer
        answer = turns[-1].answer if turns else None
        if answer is None or answer.logprobs is None or answer.top_logprobs is None or tokenizer is None:
            raise ValueError("this session has no answer yet whose tokens could be shown")
        table = Table("token", "probability", Column("most likely tokens", style="dim"), box=None)
        for token, logprob, top in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
            shown = [(tokenizer.decode([t]), math.exp(p)) for t, p in top.items() if p > MIN_SHOWN_LOGPROB]
            alternatives = "  ".join(f"{text!r} {p:.1%}" for text, p in shown)
            style = "green" if (p := math.exp(logprob)) > 0.5 else "yellow" if p > 0.1 else "red"
            table.add_row(Text(repr(tokenizer.decode([token])), style), f"{p:.1%}", alternatives)
        self.console.print(table)
        num_cached, num_prompt = turns[-1].num_cached_tokens, len(turns[-1].prompt_token_ids)
        self._print_note(f"{num_cached} of {num_prompt} prompt tokens were cached")

    def _show_help(self, _: str) -> None:
        table = Table(Column(style="bold"), Column(), box=None, show_header=False)
        for name, (arguments, text) in COMMANDS.items():
            table.add_row(f"{name} {arguments}", text)
        self.console.print(table)
        self._print_note("Ctrl-C stops an answer; Tab completes; ↑ recalls earlier lines")

    def _print_note(self, text: str) -> None:
        self.console.print(text, style="dim")


def _parse_file(command: str, name: str) -> Path:
    if not name:
        raise ValueError(f"{command} FILE: which file?")
    return Path(name).expanduser()


def _replace_control_characters(text: str) -> str:
    """Replaces characters of a model's text that would move the cursor or change colors."""
    return CONTROL_CHARACTERS.sub("\ufffd", text.replace("\r", ""))


def _open_history() -> History:
    """Opens the history of typed lines: a file that only the user can read, or memory if it cannot be created."""
    file = user_state_path("fastgen") / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    return parse_arguments(chat_parser(), argv, text_options=("-p", "--prompt", "--system"))


def _compose_config(args: argparse.Namespace) -> RunConfig:
    """Composes the model and settings. Raises ValueError for settings that fgrun refuses, and for those of its task."""
    overrides, models = [*args.overrides], [] if args.model is None else [args.model]
    allowed = ("chat_template", "chat_template_kwargs")
    reject_fgrun_keys(overrides, "is a setting of fgrun; type or pipe messages, or use -p", allowed=allowed)
    defaults = [model_override(m) for m in models]
    for group, choice in (("sampling", "chat"), ("schedule", "latency")):
        defaults += [] if any(o.startswith(f"{group}=") for o in overrides) else [f"{group}={choice}"]
    if not models and "sampling=chat" in defaults:
        defaults.append("sampling.temperature=0.2")  # at 0.7, the small default model digresses
    if args.tensor_parallel is not None:
        overrides.append(f"parallel.tensor_parallel={args.tensor_parallel}")
    return compose(*defaults, *overrides)


def _start_engine(config: RunConfig, chat_template: str | None) -> Engine:
    """Builds the engine. Checks first, before the weights are loaded, that the model can chat."""
    m = config.model
    if config.parallel.replicas > 1:
        raise ValueError("a chat runs one request at a time: parallel.replicas must be 1; use tensor_parallel instead")
    path = hub.default_model_path() if m.path is None else hub.resolve(m.path)
    check_can_chat(tokenizer.load(path), str(m.path or hub.REPO_ID), config.sampling, chat_template)
    return build_engine(config, progress=sys.stderr.isatty())


def _answer_once(conversation: Conversation, message: str) -> int:
    """Answers one message: the text goes to stdout, its statistics to stderr. Returns the exit status."""
    clean = _replace_control_characters if sys.stdout.isatty() else str
    stopped = stream_answer(conversation, message, lambda text: print(clean(text), end="", flush=True))
    stats = " ".join(filter(None, format_stats(conversation))) if conversation.turns else "before the first token"
    if stopped:
        raise KeyboardInterrupt(stats)
    print(stats, file=sys.stderr)
    return 0


@ends_quietly("fgchat")
def main(argv: list[str] | None = None) -> int:
    """Runs the console script. Returns the exit status: 2 for a wrong command, 1 for a chat that failed."""
    args = _parse(argv)
    try:
        config = _compose_config(args)
        message = args.prompt if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read().strip()
        if message is not None and not message.strip():
            raise ValueError("the message is empty: give it with -p or on stdin")
        template = read_chat_template(config.chat_template)
        with _start_engine(config, template) as engine:
            template_options: Any = {"chat_template": template, "chat_template_kwargs": config.chat_template_kwargs}
            conversation = Conversation(engine, config.sampling, args.system, **template_options)
            if message is not None:
                return _answer_once(conversation, message)
            num_bytes = sum(w.nbytes for w in tree_leaves(engine.params) if w is not None)
            name, dtype = Path(config.model.path or hub.FOLDER).name, str(engine.dtype).removeprefix("torch.")
            placement = f"{num_bytes / 1e9:.1f} GB, {dtype} on {engine.device}"
            console = Console(highlight=False, markup=False, emoji=False)
            console.print(f"{name}: {placement}, a context of {conversation.max_length} tokens", style="dim")
            TerminalChat(conversation, console).run()
    except BrokenPipeError:
        raise
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"fgchat: {e}", file=sys.stderr)
        return 2 if isinstance(e.__cause__, HYDRA_ERRORS) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
