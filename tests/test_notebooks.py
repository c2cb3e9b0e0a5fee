"""Tests that the notebooks run from top to bottom, and that the outputs committed with them are what they print."""

import re
from difflib import SequenceMatcher
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
MIN_SIMILARITY = 0.7  # of a cell's text without its numbers: sampled words may differ between machines


def printed(cell: NotebookNode) -> str:
    """Returns what a cell prints to stdout, and its last value."""
    texts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif output.output_type == "execute_result":
            texts.append(output.data["text/plain"])
    return "".join(texts)


def num_plots(cell: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def is_similar(a: str, b: str) -> bool:
    """Compares texts without their numbers: the same number of lines, and most of the characters."""
    a, b = NUMBER.sub("#", a), NUMBER.sub("#", b)
    same_lines = abs(a.count("\n") - b.count("\n")) <= 0.2 * max(a.count("\n"), b.count("\n"))
    return same_lines and SequenceMatcher(None, a, b, autojunk=False).ratio() >= MIN_SIMILARITY


# Jupyter's packages warn about each other's versions and about sockets that are closed late.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path: Path) -> None:
    """Every cell runs without a warning and shows what was committed; one of the outputs is a plot."""
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    for before, cell in zip(committed.cells, notebook.cells, strict=True):
        assert is_similar(printed(before), printed(cell)), (
            f"{cell.source}\ncommitted\n{printed(before)}\nnow\n{printed(cell)}"
        )
        assert num_plots(before) == num_plots(cell), cell.source
        errors = [o.text for o in cell.get("outputs", []) if o.get("name") == "stderr"]
        assert not any("Warning" in text for text in errors), errors
        assert not any(o.get("name") == "stderr" for o in before.get("outputs", [])), "committed with text on stderr"
    assert sum(map(num_plots, notebook.cells)) > 0


def test_outputs_are_compared() -> None:
    """Numbers and a few words may differ, but not a line or most of the text."""
    assert is_similar("a 1.5 fox\n", "a 2 fox\n") and is_similar("one two three four\n", "one two thirty four\n")
    assert not is_similar("Paris", "") and not is_similar("a\n", "a\na\n") and not is_similar("a fox", "TypeError: no")
