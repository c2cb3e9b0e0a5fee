"""`fgchat`: a conversation with a model in the terminal. `fgchat --help`, and docs/chat.md."""

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import Engine, SamplingParams
from fastgen.checkpoint import hub, weights
from fastgen.cli.hydra_config import RunConfig, compose, explain_error, model_override
from fastgen.cli.run import build_engine
from fastgen.config import unknown_name_message
from fastgen.conversation import Conversation, ConversationTooLong, check_can_chat
from fastgen.core import tokenizer

EPILOG = """
In the terminal, /h lists the commands. With -p, or when stdin is no terminal, the whole of it is one message: the
answer alone goes to stdout, its figures to stderr.

The settings are those of fgrun (fgrun --help), with sampling=chat and schedule=latency unless told otherwise:
temperature 0.7 (0.2 for the small default model), top_p 0.9, and answers of at most 2048 tokens.

examples:
  fgchat
  fgchat qwen3_8b sampling.temperature=0.6 sampling.top_p=0.95
  fgchat path/to/checkpoint sampling=greedy model.dtype=bfloat16
  fgchat mistral.gguf --system "Answer in French."
  fgchat -p "Name three kinds of bread."
  git diff | fgchat llama31_8b --system "Write a commit message for this diff."
"""
COMMANDS = {  # command -> (what follows it, what it does)
    "/r": ("N", "go back to before round N, to ask something else; /r 1 begins anew"),
    "/m": ("", "a message of several lines, ended by a line with a single '.'"),
    "/s": ("NAME=VALUE …", "set sampling, such as temperature=0.7 top_p=0.9; alone, show it"),
    "/system": ("TEXT", "set the system prompt; - removes it; alone, show it"),
    "/p": ("", "the last answer's tokens: their probabilities, and what else could have come"),
    "/save": ("FILE", "write the conversation, JSON of messages and sampling"),
    "/load": ("FILE", "take up a conversation that was saved"),
    "/h": ("", "this list; also /help"),
    "/q": ("", "quit; also Ctrl-D"),
}
MIN_SHOWN_LOGPROB = math.log(0.0005)  # what would be shown as 0.0%
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a model should not do to a terminal


class CommandCompleter(Completer):
    """Commands at the start of a line, then names of sampling settings, or files."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        if command in ("/save", "/load") and space:
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            return
        words = [f"{name}=" for name in SamplingParams.__slots__] if command == "/s" and space else []
        word = rest.rpartition(" ")[2] if space else command
        for known in words if space else [*COMMANDS, "/help"]:
            if known.startswith(word):
                about = COMMANDS.get(known, ("", ""))[1]
                yield Completion(known, -len(word), display_meta=about)


def stream_answer(conversation: Conversation, message: str, write: Callable[[str], None]) -> bool:
    """Write the answer as it comes; whether Ctrl-C ended it, which what is cached survives.

    A step is not interrupted, since the engine would have to forget everything; the second Ctrl-C does that.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before, last = signal.signal(signal.SIGINT, stop), ""
    try:
        with closing(conversation.ask(message)) as pieces:
            for piece in pieces:
                if piece:
                    write(piece)
                    last = piece
                if stopped:
                    break
    finally:
        signal.signal(signal.SIGINT, before)
        if last and not last.endswith("\n"):
            write("\n")
    return stopped


def format_stats(conversation: Conversation) -> tuple[str, str]:
    """The line below the last answer, and what there is to say about how it ended."""
    last = conversation.turns[-1]
    drawn = len(last.answer.token_ids)
    line, note = f"--- [{drawn} tokens, {last.tokens_per_second:.3f}toks/s]", ""
    if last.answer.finish_reason == "length":
        full = len(last.prompt_token_ids) + drawn >= conversation.max_length
        note = (
            f"the {conversation.max_length} tokens of the context are full"
            if full
            else f"max_tokens={drawn} ended the answer"
        )
    return line, note


class TerminalChat:
    """The conversation on a terminal: `run` reads lines until /q."""

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.conversation, self.console = conversation, console
        self.saved_file: Path | None = None  # that was saved or loaded, and may be written again
        self.session: PromptSession[str] = PromptSession(
            history=_open_history(), completer=CommandCompleter(), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would want eight empty lines below every prompt
        )  # fmt: skip
        self.command_handlers: dict[str, Callable[[str], None]] = {
            "/r": self._reset, "/m": self._ask_multiline, "/s": self._set_sampling, "/system": self._set_system,
            "/p": self._show_alternatives, "/save": self._save, "/load": self._load, "/h": self._show_help, "/help": self._show_help,
        }  # fmt: skip

    def run(self) -> None:
        """Rounds until /q or the end of input. What goes wrong is said in a line, and the conversation goes on."""
        self.console.print("[bold]Ready to chat![/] /r N back to round N, /m several lines, /q quit, /h all commands")
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
                self._print_error(f"{e}. /r N goes back to before round N, /r 1 begins anew, /save FILE keeps it")
            except (ValueError, OSError, torch.OutOfMemoryError) as e:
                self._print_error(str(e))

    def _handle_line(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line)
        elif name in self.command_handlers:
            self.command_handlers[name](rest.strip())
        else:
            raise ValueError(
                f"{unknown_name_message('command', name, [*self.command_handlers, '/q'])}; a message that begins with / goes by /m"
            )

    def _ask(self, message: str) -> None:
        if not message:
            return
        rounds = len(self.conversation.turns)
        stopped = stream_answer(
            self.conversation,
            message,
            lambda text: self.console.out(_replace_control_characters(text), end="", highlight=False),
        )
        if len(self.conversation.turns) == rounds:
            return self._print_note("stopped before the first token; the message is not kept")
        line, note = format_stats(self.conversation)
        self._print_note(line)
        if stopped:
            self._print_note("stopped; what there is counts as the answer")
        elif note:
            self._print_note(
                f"{note}: {'/s max_tokens=null' if 'max_tokens' in note else '/r N goes back to before round N'}"
            )

    def _ask_multiline(self, _: str) -> None:
        lines: list[str] = []
        try:
            while (line := self.session.prompt("... ")) != ".":
                lines.append(line)
        except EOFError:
            pass
        self._ask("\n".join(lines).strip())

    def _reset(self, rest: str) -> None:
        if not rest.isdecimal():
            raise ValueError("/r N: which round? /r 1 begins anew")
        self.conversation.rewind(int(rest))

    def _set_sampling(self, rest: str) -> None:
        try:
            given = [OverridesParser.create().parse_override(word) for word in re.split(r"\s+(?=\w+=)", rest) if word]
            self.conversation.update_sampling(**{o.key_or_group: o.value() for o in given})
        except HydraException as e:
            raise ValueError(f"/s {rest}: settings are NAME=VALUE, such as temperature=0.7 stop=[END]") from e
        shown = " ".join(f"{name}={json.dumps(value)}" for name, value in self.conversation.notable_settings().items())
        self.console.print(Text(shown))

    def _set_system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest == "-" else rest
        self.console.print(
            Text(self.conversation.system or "no system prompt of yours; the model's template may bring one")
        )

    def _save(self, rest: str) -> None:
        file = Path(rest or _raise_missing_file("/save")).expanduser()
        if file.exists() and file != self.saved_file:
            raise ValueError(f"{file} is there already: choose another name, or remove it first")
        self.conversation.save(file)
        self.saved_file = file
        self._print_note(f"{len(self.conversation.turns)} rounds in {file}")

    def _load(self, rest: str) -> None:
        file = Path(rest or _raise_missing_file("/load")).expanduser()
        self.conversation.load(file)
        self.saved_file = file
        for number, r in enumerate(self.conversation.turns, 1):
            self.console.print(Text(_replace_control_characters(f"{number}> {r.message}\n{r.answer.text}")))

    def _show_alternatives(self, _: str) -> None:
        last, coder = (
            self.conversation.turns[-1] if self.conversation.turns else None,
            self.conversation.engine.tokenizer,
        )
        if last is None or last.answer.logprobs is None or last.answer.top_logprobs is None or coder is None:
            raise ValueError("there is no answer of this session to show the tokens of")
        table = Table("token", "probability", "the likeliest there", box=None)
        for token, logprob, top in zip(
            last.answer.token_ids, last.answer.logprobs, last.answer.top_logprobs, strict=True
        ):
            others = "  ".join(
                f"{coder.decode([t])!r} {math.exp(p):.1%}" for t, p in top.items() if p > MIN_SHOWN_LOGPROB
            )
            style = "green" if (p := math.exp(logprob)) > 0.5 else "yellow" if p > 0.1 else "red"
            table.add_row(Text(repr(coder.decode([token])), style), f"{p:.1%}", Text(others, "dim"))
        self.console.print(table)
        self._print_note(f"{last.num_cached_tokens} of the prompt's {len(last.prompt_token_ids)} tokens were cached")

    def _show_help(self, _: str) -> None:
        table = Table(box=None, show_header=False)
        for name, (follows, about) in COMMANDS.items():
            table.add_row(Text(f"{name} {follows}", "bold"), Text(about))
        self.console.print(table)
        self._print_note("Ctrl-C stops an answer; Tab completes, ↑ brings back earlier lines")

    def _print_note(self, text: str) -> None:
        self.console.print(Text(text, "dim"))

    def _print_error(self, text: str) -> None:
        self.console.print(Text(text, "red"))


def _raise_missing_file(command: str) -> str:
    raise ValueError(f"{command} FILE: which file?")


def _replace_control_characters(text: str) -> str:
    """Text of a model without what would move the cursor or change colours."""
    return CONTROL_CHARACTERS.sub("\ufffd", text.replace("\r", ""))


def _open_history() -> History:
    """Of the lines typed, in a file that only the user can read; in memory where there can be none."""
    file = user_state_path("fastgen") / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)


# --- the command ------------------------------------------------------------------------------------------------------


def _make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "fgchat", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {fastgen.__version__}")
    p.add_argument("words", nargs="*", metavar="MODEL KEY=VALUE", help="at most one folder, hub id, .gguf or "
                   ".safetensors file or name of conf/model (none: a small default model); settings")  # fmt: skip
    p.add_argument("--tensor-parallel", type=int, metavar="N", help="GPUs to spread the model over")
    p.add_argument("--system", metavar="TEXT", help="the system prompt")
    p.add_argument("-p", "--prompt", metavar="TEXT", help="answer this once, and exit")
    return p


def _compose_config(args: argparse.Namespace) -> RunConfig:
    """The model and settings. ValueError for what fgrun would refuse too."""
    given = [w for w in args.words if ("=" in w or w.startswith("~")) and not Path(w).expanduser().exists()]
    models = [w for w in args.words if w not in given]
    if len(models) > 1:
        raise ValueError(f"one model, not {' and '.join(models)}; settings are KEY=VALUE")
    for override in given:
        if re.match(r"(prompt|chat|task|out)\b", override):
            raise ValueError(f"{override}: is fgrun's; messages are typed, piped or given with -p")
    first = [model_override(m) for m in models]
    for group, choice in (("sampling", "chat"), ("schedule", "latency")):
        first += [] if any(o.startswith(f"{group}=") for o in given) else [f"{group}={choice}"]
    if not models and "sampling=chat" in first:
        first.append("sampling.temperature=0.2")  # the small default model wanders at 0.7
    if args.tensor_parallel is not None:
        given = [*given, f"parallel.tensor_parallel={args.tensor_parallel}"]
    return compose(*first, *given)


def _start_engine(config: RunConfig) -> Engine:
    """The engine, after a look at what a chat needs: weights take longer to load than it takes to say no."""
    m = config.model
    if config.parallel.replicas > 1:
        raise ValueError("a conversation is one request at a time: parallel.replicas must be 1; tensor_parallel helps")
    path = hub.default_model_path() if m.path is None else weights.resolve(m.path)
    check_can_chat(tokenizer.load(path), str(m.path or hub.REPO_ID), config.sampling)
    return build_engine(config, progress=sys.stderr.isatty())


def _answer_once(conversation: Conversation, message: str) -> int:
    """One answer: the text on stdout, figures on stderr."""
    clean = _replace_control_characters if sys.stdout.isatty() else str
    stopped = stream_answer(conversation, message, lambda text: print(clean(text), end="", flush=True))
    if conversation.turns:
        print(" ".join(filter(None, format_stats(conversation))), file=sys.stderr)
    return 130 if stopped else 0


def main(argv: list[str] | None = None) -> int:
    """The console script; the exit status: 2 for a command that is wrong, 1 for what failed."""
    args = _make_parser().parse_intermixed_args(argv)
    try:
        config = _compose_config(args)
        message = args.prompt if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read().strip()
        if message is not None and not message.strip():
            raise ValueError("the message is empty: give it with -p or on stdin")
        with _start_engine(config) as e:
            talk = Conversation(e, config.sampling, args.system)
            if message is not None:
                return _answer_once(talk, message)
            size = sum(w.nbytes for w in tree_leaves(e.params) if w is not None)
            dtype, console = str(e.dtype).removeprefix("torch."), Console(highlight=False)
            name = Path(config.model.path or hub.FOLDER).name
            about = f"{name}: {size / 1e9:.1f} GB, {dtype} on {e.device}, a context of {talk.max_length} tokens"
            console.print(Text(about, "dim"))
            TerminalChat(talk, console).run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        form = isinstance(e.__cause__, HydraException | OmegaConfBaseException)
        print(f"fgchat: {explain_error(e) if isinstance(e, HydraException) else e}", file=sys.stderr)
        return 2 if form else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
