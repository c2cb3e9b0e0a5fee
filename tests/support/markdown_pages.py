"""Runs the code blocks of a Markdown page in order, as a reader pastes them into one shell and one Python session.

Blocks of `sh` and `bash` share a shell, blocks of `python` share an interpreter (with top-level await). An HTML comment
above a block says what is special about it:

    <!-- needs: gpu -->          skipped, unless what it needs is there (any words; several are separated by commas)
    <!-- background: URL -->     a shell block that keeps running, such as a server; the next block waits for the URL
    <!-- output -->              not code, but what the block before printed on stdout

In an expected output `…` stands for any text, amounts of whitespace do not matter, and decimal fractions are compared
within 2 percent.

As a script, it runs whole pages on a machine that may have more than CI has, in a copy of the repository:

    python tests/support/markdown_pages.py README.md --have network gpu
"""

import argparse
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
SHELL, PYTHON = ("sh", "bash"), ("py", "python")
TIMEOUT = 300  # seconds of one block, on a busy machine
COMMENT = re.compile(r"<!--\s*(needs|background|output)\b:?\s*(.*?)\s*-->")
PORT_FREE_TIMEOUT = 30

# Reads blocks as JSON strings from stdin, runs them in `__main__`, and writes one line for each to the file descriptor.
INTERPRETER = """
import ast, asyncio, gc, inspect, json, os, sys, traceback
def _run_blocks(loop):
    main = sys.modules["__main__"].__dict__
    kept = set(main)
    for line in sys.stdin:
        message = json.loads(line)
        if "folder" in message:
            for name in main.keys() - kept:
                del main[name]
            gc.collect()
            os.chdir(message["folder"])
            continue
        status = "ok"
        try:
            code = compile(message["code"], message["name"], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, main)
            if inspect.iscoroutine(result):
                loop.run_until_complete(result)
        except BaseException:
            traceback.print_exc()
            status = "failed"
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(int(os.environ["STATUS_FD"]), (status + "\\n").encode())
_run_blocks(asyncio.new_event_loop())
"""


@dataclass(frozen=True)
class Block:
    """A code block: where it is, what it needs, and what it prints (None: not said)."""

    page: Path
    line: int
    language: str
    code: str
    needs: tuple[str, ...] = ()
    background: str = ""  # URL that answers when the server of this block is up
    output: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Returns the Python and shell blocks of a page. Raises ValueError for a comment that belongs to no block."""
    blocks: list[Block] = []
    comments: dict[str, str] = {}
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block":
            comments |= {kind: text for kind, text in COMMENT.findall(token.content)}
        elif token.type == "fence" and token.map:
            language = token.info.split()[0] if token.info.split() else ""
            if "output" in comments:
                if not blocks:
                    raise ValueError(f"{page}:{token.map[0] + 1}: an output without a block before it")
                last = blocks.pop()
                blocks.append(Block(**vars(last) | {"output": token.content}))
            elif language in SHELL + PYTHON:
                needs = tuple(word.strip() for word in comments.get("needs", "").split(",") if word.strip())
                background = comments.get("background", "")
                blocks.append(Block(page, token.map[0] + 1, language, token.content, needs, background))
            comments = {}
        elif token.type in ("paragraph_open", "heading_open") and comments:
            raise ValueError(f"{page}: <!-- {', '.join(comments)} --> must stand above a code block")
    return blocks


def count_fences(page: Path) -> int:
    """Returns the number of Python and shell fences by their first lines, those included that are nested in a list."""
    return len(re.findall(rf"^\s*(?:```|~~~)(?:{'|'.join(SHELL + PYTHON)})\b", page.read_text(), re.MULTILINE))


def matches(expected: str, printed: str) -> bool:
    """Compares an output with what a page says: see the top of this file."""
    number = r"-?\d+\.\d+"
    pattern = []
    for piece in re.findall(rf"…|\s+|{number}|.", expected.strip()):
        if piece == "…":
            pattern.append(r"[\s\S]*?")
        elif piece.isspace():
            pattern.append(r"\s+")
        else:
            pattern.append(f"({number})" if re.fullmatch(number, piece) else re.escape(piece))
    found = re.fullmatch("".join(pattern), printed.strip())
    numbers = [x for x in re.findall(rf"…|{number}", expected) if x != "…"]
    return found is not None and all(
        math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=0.02)
        for a, b in zip(numbers, found.groups(), strict=True)
    )


class Session:
    """A process that runs one block after the other: a shell or a Python interpreter."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.is_shell = command[0] == "bash"
        self.status, write_end = os.pipe()
        self.output, self.errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.output, stderr=self.errors, pass_fds=[write_end], cwd=folder,
            env=environment | {"STATUS_FD": str(write_end)}, text=True, start_new_session=True,
        )  # fmt: skip
        os.close(write_end)
        if self.is_shell:
            self.send("set -eo pipefail")

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def run(self, block: Block) -> str:
        """Runs a block and returns its stdout. Raises AssertionError if the block fails or does not end."""
        starts = [os.fstat(f.fileno()).st_size for f in (self.output, self.errors)]
        if self.is_shell:  # as a group, so that no command reads the next line of ours
            self.send(f"{{\n{block.code}\n}} < /dev/null; echo ok >&$STATUS_FD")
        else:
            self.send(json.dumps({"code": block.code, "name": block.name}))
        ready, _, _ = select.select([self.status], [], [], TIMEOUT)
        status = os.read(self.status, 100) if ready else b"timeout"
        printed, errors = (_read_from(f, n) for f, n in zip((self.output, self.errors), starts, strict=True))
        said = status.decode().strip() or f"the session ended with status {self.process.wait()}"
        assert said == "ok", f"{block.name}: {said}\n{block.code}\n{printed[-3000:]}\n{errors[-6000:]}"
        return printed

    def close(self) -> None:
        """Ends the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.output.close()
        self.errors.close()
        os.close(self.status)


def _read_from(file: IO[str], start: int) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size - start, start).decode(errors="replace")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class Reader:
    """Pastes pages. One Python process serves all pages, with an empty namespace for each."""

    def __init__(self, environment: dict[str, str], have: tuple[str, ...] = ()) -> None:
        self.environment, self.have = environment, have
        self.python: Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.python:
            self.python.close()

    def run(self, page: Path, folder: Path) -> Iterator[tuple[Block, str | None, float]]:
        """Runs a page in a folder; yields each block with its stdout (None: skipped) and seconds.

        Raises AssertionError for a block that fails or prints something else than the page says.
        """
        sessions: list[Session] = []
        shell: Session | None = None
        entered = False
        try:
            for block in read_blocks(page):
                if not set(block.needs) <= set(self.have):
                    yield block, None, 0.0
                    continue
                start = time.perf_counter()
                printed = ""
                if block.background:
                    sessions.append(self._start_server(block, folder))
                elif block.language in SHELL:
                    if shell is None:
                        shell = Session(["bash"], folder, self.environment)
                        sessions.append(shell)
                    printed = shell.run(block)
                else:
                    if self.python is None:
                        self.python = Session([sys.executable, "-c", INTERPRETER], folder, self.environment)
                    if not entered:
                        self.python.send(json.dumps({"folder": str(folder)}))
                        entered = True
                    printed = self.python.run(block)
                if block.output is not None:
                    assert matches(block.output, printed), (
                        f"{block.name}\n{block.code}\nprinted\n{printed}\nexpected\n{block.output}"
                    )
                yield block, printed, time.perf_counter() - start
        finally:
            for session in reversed(sessions):
                session.close()

    def _start_server(self, block: Block, folder: Path) -> Session:
        end = time.monotonic() + PORT_FREE_TIMEOUT
        while _answers(block.background):  # of another test run
            assert time.monotonic() < end, f"{block.name}: another server answers at {block.background}; end it"
            time.sleep(1)
        server = Session(["bash"], folder, self.environment)
        server.send(f"{{\n{block.code}\n}} < /dev/null")
        end = time.monotonic() + TIMEOUT
        while not _answers(block.background):
            errors = _read_from(server.errors, 0)
            failure = f"{block.name}: no answer from {block.background}\n{errors[-6000:]}"
            if server.process.poll() is not None or time.monotonic() > end:
                server.close()
                raise AssertionError(failure)
            time.sleep(0.2)
        return server


def link_checkout(folder: Path) -> Path:
    """Makes a folder look like a checkout: links to what the repository's root holds. Returns the folder."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in sorted({name.partition("/")[0] for name in names if name}):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def main() -> None:
    """Runs pages given on the command line, and reports each block."""
    parser = argparse.ArgumentParser(description="Run the code blocks of Markdown pages.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--have", nargs="*", default=[], help="what blocks may need: network, gpu, …")
    arguments = parser.parse_args()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as scratch, Reader(environment, tuple(arguments.have)) as reader:
        for page in arguments.pages:
            folder = Path(scratch) / page.stem
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            for block, printed, seconds in reader.run(page.resolve(), folder):
                result = f"skipped, needs {', '.join(block.needs)}" if printed is None else f"ok, {seconds:.1f} s"
                print(f"{block.page.name}:{block.line} {block.language}: {result}", flush=True)
                if printed:
                    print("    " + printed.strip().replace("\n", "\n    "), flush=True)


if __name__ == "__main__":
    main()
