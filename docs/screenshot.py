"""Draws docs/fgchat.svg from a real session with the default model. Needs the extra `dev`: python docs/screenshot.py"""

import re
import sys
from io import StringIO
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 100, 60
PROMPTS = ["What is the capital of France?", "And of Germany?", "Write two sentences about the sea.",
           "/r 2", "And of Japan?", "/p"]  # fmt: skip
NAMES = {"brown": "yellow", "brightblack": "bright_black", "default": None}  # pyte's color names -> rich's


def session() -> pyte.Screen:
    """Returns the screen after PROMPTS, each sent when fgchat shows its prompt."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)

    class Log(StringIO):
        def write(self, text: str, /) -> int:
            stream.feed(text)
            return len(text)

    child = pexpect.spawn(
        sys.executable, ["-m", "fastgen.cli.chat", "model.device=cpu", "seed=1"],
        dimensions=(ROWS, COLUMNS), encoding="utf-8", timeout=300, echo=False,
    )  # fmt: skip
    child.logfile_read = Log()
    turn = r"\d+>[^\n]*\x1b\[\?25h"  # the turn's number, then the cursor
    child.expect(turn)
    for prompt in PROMPTS:
        child.send(prompt)
        child.expect_exact(prompt[-1])
        child.send("\r")
        child.expect(r"\r\n")
        child.expect(turn)
    child.send("/q\r")
    child.expect(pexpect.EOF)
    return screen


def line(row: dict[int, Char]) -> Text:
    """Returns a row of the screen with its colors."""
    text = Text()
    for (color, bold), cells in groupby((row[i] for i in range(COLUMNS)), lambda c: (c.fg, c.bold)):
        for part in re.findall(r" +|\S+(?: \S+)*", "".join(c.data for c in cells)):  # some drop leading spaces
            text.append(part, Style(color=NAMES.get(color, color), bold=bold))
    text.rstrip()
    return text


def main() -> None:
    screen = session()
    rows = [line(screen.buffer[i]) for i in range(ROWS)]
    lines = rows[next(i for i, r in enumerate(rows) if "Ready" in r.plain) - 1 :]
    while not lines[-1].plain or lines[-1].plain.endswith("/q"):
        lines.pop()
    console = Console(record=True, width=COLUMNS, file=StringIO())
    console.print(Text("$ fgchat"))
    for text in lines:
        console.print(text)
    (Path(__file__).parent / "fgchat.svg").write_text(console.export_svg(title="fgchat"))


if __name__ == "__main__":
    main()
