"""Bounds the work of a chat template, which is a program that came with the model's files.

jinja2's sandbox keeps a template from the machine, not from running for ever, and transformers hands nothing but data
to it. So the template itself is made to count: where it can repeat itself (loops, macros) and where a value can grow
from one repetition to the next.
"""

import re
from functools import lru_cache

from jinja2 import Environment, TemplateError

MAX_STEPS = 2**19  # of one rendering; a loop takes one for each round, and a macro, which is slower, eight
MAX_LENGTH = 2**24  # of a variable: characters or elements
MAX_NUMBER = 10**8  # that is written out: it may be a factor or width of text
STEP_COUNTER = "fastgen_steps"  # the template's variable: a generator, of which each step takes one element (0.5 us)
# In tags, `+` keeps them from taking white space of the text around them. `lipsum` writes any number of paragraphs.
PREAMBLE = f"{{%+ set {STEP_COUNTER} = ('x' * {MAX_STEPS}) | batch(1) +%}}{{%+ set lipsum = none +%}}"
STEP_CHECK = (
    f"{{%+ if not TAKEN +%}}{{{{ raise_exception('endless: stopped after {MAX_STEPS} steps') }}}}{{%+ endif +%}}"
)
LOOP_CHECK, CALL_CHECK = (
    STEP_CHECK.replace("TAKEN", "(" + " and ".join([f"{STEP_COUNTER} | first"] * n) + ")") for n in (1, 8)
)
SIZE_CHECK = (
    f"{{%+ if (NAME is sequence and NAME | length > {MAX_LENGTH}) or "
    "(NAME is number and (NAME > 1e30 or NAME < -1e30)) +%}{{ raise_exception('NAME is too large') }}{%+ endif +%}"
)
GROWTH_OPERATORS = {"~", "+", "*", "%", "|", "."}  # what makes long values of short ones: operators, filters, methods


@lru_cache(64)
def limit_template(source: str) -> str:
    """Return a chat template that renders the same text, or raises TemplateError where there would be no end of it.

    Raises TemplateError for powers, and for numbers that are written out and huge.
    """
    # Options as transformers has them, since they say which white space is part of a tag. Text that they strip is
    # stripped here already; the newline at the end, of which only one is, is left.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    out = [PREAMBLE]
    statement: list[tuple[str, str]] | None = None  # kind and text of its tokens, without white space
    blocks: list[str] = []  # names that `{% set name %}` gives to the text up to its end
    before = ""
    for line, kind, text in environment.lex(source):
        out.append(text)
        if kind == "block_begin":
            statement = []
        elif kind == "block_end" and statement is not None:
            word = statement[0][1] if statement else ""
            out.append({"for": LOOP_CHECK, "macro": CALL_CHECK, "call": CALL_CHECK}.get(word, ""))
            out += [SIZE_CHECK.replace("NAME", name) for name in _assigned_names(statement, blocks)]
            statement = None
        elif kind != "whitespace" and statement is not None:
            statement.append((kind, text))
        if kind == "operator" and text == "**" and before not in "(,":  # where keywords are unpacked
            raise TemplateError(f"line {line}: it computes a power")
        if kind == "integer" and re.fullmatch(r"[\d_]{8,}", text) and (len(text) > 40 or int(text) > MAX_NUMBER):
            raise TemplateError(f"line {line}: the number {text[:40]}")
        before = before if kind == "whitespace" else text
    return "".join(out)


def _assigned_names(statement: list[tuple[str, str]], open_set_blocks: list[str]) -> list[str]:
    """The variables that a statement sets, as far as they are known once it is read."""
    texts = [text for _, text in statement]
    match texts[:1]:
        case ["macro"]:  # its parameters
            depth, names = 0, list[str]()
            for i, (kind, text) in enumerate(statement):
                if kind == "name" and depth == 1 and texts[i - 1] in ("(", ","):
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
