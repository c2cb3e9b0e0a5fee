"""Bounds the work of a chat template, a program that comes with the model's files.

jinja2's sandbox isolates a template from the machine but does not stop an endless one. `limit_template` therefore
inserts counters into the template itself: a step counter into loops and macros, and a size check behind assignments
that can make a value grow from one repetition to the next.
"""

import re
from functools import lru_cache

from jinja2 import Environment, TemplateError

MAX_STEPS = 2**19  # steps of one rendering: one per loop iteration, eight per macro call, which is slower
MAX_LENGTH = 2**24  # characters or elements of a variable
MAX_NUMBER = 10**8  # largest integer literal, which may multiply or pad text
STEP_COUNTER = "fastgen_steps"  # a template variable: a generator from which each step takes one element (0.5 us)
# `+` in a tag preserves the white space around the tag. jinja2's `lipsum` would generate any number of paragraphs.
PREAMBLE = f"{{%+ set {STEP_COUNTER} = ('x' * {MAX_STEPS}) | batch(1) +%}}{{%+ set lipsum = none +%}}"
TOO_MANY_STEPS = f"endless: stopped after {MAX_STEPS} steps"
STEP_CHECK = f"{{%+ if not TAKEN +%}}{{{{ raise_exception('{TOO_MANY_STEPS}') }}}}{{%+ endif +%}}"
LOOP_CHECK, CALL_CHECK = (
    STEP_CHECK.replace("TAKEN", "(" + " and ".join([f"{STEP_COUNTER} | first"] * n) + ")") for n in (1, 8)
)
SIZE_CHECK = (
    f"{{%+ if (NAME is sequence and NAME | length > {MAX_LENGTH}) or "
    "(NAME is number and (NAME > 1e30 or NAME < -1e30)) +%}{{ raise_exception('NAME is too large') }}{%+ endif +%}"
)
GROWTH_OPERATORS = {"~", "+", "*", "%", "|", "."}  # may return values longer than their operands


@lru_cache(64)
def limit_template(source: str) -> str:
    """Returns a chat template that renders the same text, or raises TemplateError beyond `MAX_STEPS` or `MAX_LENGTH`.

    Raises TemplateError itself for powers and for integer literals above `MAX_NUMBER`.
    """
    # The options of transformers, which decide what white space belongs to a tag. White space that they strip is
    # already stripped here; only the newline at the end is kept, since rendering strips one.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    out = [PREAMBLE]
    statement: list[tuple[str, str]] | None = None  # (type, text) of the open tag's tokens, no white space
    open_set_blocks: list[str] = []  # names of `{% set name %}` blocks without their `{% endset %}`
    previous = ""
    for line, token_type, text in environment.lex(source):
        out.append(text)
        if token_type == "block_begin":
            statement = []
        elif token_type == "block_end" and statement is not None:
            keyword = statement[0][1] if statement else ""
            out.append({"for": LOOP_CHECK, "macro": CALL_CHECK, "call": CALL_CHECK}.get(keyword, ""))
            out += [SIZE_CHECK.replace("NAME", name) for name in _assigned_names(statement, open_set_blocks)]
            statement = None
        elif token_type != "whitespace" and statement is not None:
            statement.append((token_type, text))
        if token_type == "operator" and text == "**" and previous not in "(,":  # after these it unpacks keywords
            raise TemplateError(f"line {line}: it computes a power")
        if token_type == "integer" and re.fullmatch(r"[\d_]{8,}", text) and (len(text) > 40 or int(text) > MAX_NUMBER):
            raise TemplateError(f"line {line}: the number {text[:40]}")
        previous = previous if token_type == "whitespace" else text
    return "".join(out)


def _assigned_names(statement: list[tuple[str, str]], open_set_blocks: list[str]) -> list[str]:
    """Returns the variables that a statement may set to a longer value; block assignments count at their end."""
    texts = [text for _, text in statement]
    match texts[:1]:
        case ["macro"]:  # its parameters
            depth, names = 0, list[str]()
            for i, (token_type, text) in enumerate(statement):
                if token_type == "name" and depth == 1 and texts[i - 1] in ("(", ","):
                    names.append(text)
                depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
            return names
        case ["endset"] if open_set_blocks:
            return [open_set_blocks.pop()]
        case ["set"] if "=" in texts:
            if not GROWTH_OPERATORS & {*texts[texts.index("=") :]}:
                return []
            targets = "".join(texts[1 : texts.index("=")]).strip("()").split(",")
            return [name for name in targets if re.fullmatch(r"\w+(\.\w+)?", name)]
        case ["set"]:
            open_set_blocks.append(texts[1] if len(texts) > 1 else "")
    return []
