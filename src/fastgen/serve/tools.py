"""Calls of functions, in the forms in which families of models write them: read from text, and as grammars.

    llama     {"name": "f", "parameters": {...}}                        alone, or after <|python_tag|>
    mistral   [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]     with a vocabulary that has [ARGS]:
              [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]...
    hermes    <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>...      Qwen's too

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
https://github.com/mistralai/mistral-common/blob/main/src/mistral_common/tokens/tokenizers/instruct.py
https://qwen.readthedocs.io/en/latest/framework/function_call.html
https://github.com/NousResearch/Hermes-Function-Calling#prompt-format-for-function-calling
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import regex  # unlike re, it knows what may still become a match
from transformers import PreTrainedTokenizerBase

from fastgen.serve.protocol import Tool

Json = dict[str, Any]
FamilyName = Literal["llama", "mistral", "hermes"]
FAMILIES: tuple[FamilyName, ...] = ("llama", "mistral", "hermes")
PYTHON, CALLS, ID, ARGS, OPEN, CLOSE = MARKERS = (
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<tool_call>",
    "</tool_call>",
)


def family(tokenizer: PreTrainedTokenizerBase | None) -> FamilyName | None:
    """Whose form a model's calls have, by its chat template, or else by its special tokens; None: not known."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for known in (template, *special(tokenizer)):
        if CALLS in known:
            return "mistral"
        if OPEN in known:
            return "hermes"
        if PYTHON in known or '"parameters": dictionary' in known:
            return "llama"
    return None


def special(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """The markers that are special tokens, which texts leave out unless they are asked for."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: id for id, token in added.items() if token.special and token.content in MARKERS}


def for_template(messages: Sequence[Json], form: FamilyName | None) -> list[Json]:
    """Mistral's templates take no id but of nine letters and digits: others become such ones, the same each time."""

    def short(id: str) -> str:
        fits = len(id) == 9 and id.isascii() and id.isalnum()
        return id if fits else hashlib.sha256(id.encode()).hexdigest()[:9]

    if form != "mistral":
        return list(messages)
    found = list[Json]()
    for message in messages:
        if "tool_calls" in message:
            shorter: Any = [call | {"id": short(call["id"])} for call in message["tool_calls"]]
            message = message | {"tool_calls": shorter}
        if "tool_call_id" in message:
            message = message | {"tool_call_id": short(message["tool_call_id"])}
        found.append(message)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """Tells calls from text, as it comes.

    A call counts once its function, one of `names`, is known and its arguments begin; until then it may turn out to be
    text. Arguments are passed on as the model wrote them. `most` calls are given, and those after them are dropped:
    Llama's templates have no place for more than one in a message.
    """

    def __init__(self, form: FamilyName, names: Sequence[str], most: int | None = None) -> None:
        name = f"(?P<name>{'|'.join(map(regex.escape, names))})"
        key = '"(?:arguments|parameters)"'
        call = rf'\{{\s*+(?:"type"\s*+:\s*+"function"\s*+,\s*+)?"name"\s*+:\s*+"{name}"\s*+'
        call += rf"(?:,\s*+{key}\s*+:\s*+(?=\{{)|(?=\}}))"
        first, begin, again, ends = "", "", "", [r"\}"]
        if form == "llama":
            first, begin, again = call, rf"{regex.escape(PYTHON)}\s*+{call}", rf"[;,]\s*+{call}"
        elif form == "hermes":
            begin, ends = rf"{OPEN}\s*+{call}", [*ends, CLOSE]
        else:
            bare = rf"{name}(?:{regex.escape(ID)}\w*+)?(?:{regex.escape(ARGS)})?\s*+(?=\{{)"
            begin, again = rf"{regex.escape(CALLS)}\s*+(?:\[\s*+{call}|{bare})", rf",\s*+{call}"
            ends = [r',\s*+"id"\s*+:\s*+"[^"]*+"', *ends, r"\]"]
        # White space before a call belongs to it; a run of it is looked at once.
        self.first, self.again = (regex.compile(rf"\s*+{p}") if p else None for p in (first, again))
        self.begin = regex.compile(rf"(?<!\s)\s*+{begin}")
        self.ends = [regex.compile(rf"\s*+{p}") for p in ends]
        self.most = 1 if form == "llama" else most
        self.rest, self.count = "", 0  # text that is not decided; calls seen
        self.state: Literal["start", "text", "arguments", "after"] = "start"
        self.left: list[Any] = []  # of `ends`, those that may still come
        self.depth, self.quoted, self.escaped = 0, False, False  # within arguments
        self.text, self.calls = "", dict[int, Json]()  # found since the last push

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[Json]]:
        """Text that is no call, and what is new of calls: OpenAI's deltas, one for each call."""
        self.rest += text
        self.text, self.calls = "", {}
        while self.rest and getattr(self, f"_{self.state}")():
            pass
        if last:
            self.text, self.rest = self.text + self.rest * (not self.rest.isspace() or not self.count), ""
        return self.text, [*self.calls.values()]

    # Each state takes what it can of `rest`, and says whether another one may go on.

    def _start(self) -> bool:
        match = self.first.match(self.rest, partial=True) if self.first else None
        if match is None:
            self.state = "text"
            return True
        return self._enter(match)

    def _text(self) -> bool:
        match = self.begin.search(self.rest, partial=True)
        self.text += self.rest[: match.start()] if match else self.rest
        self.rest = self.rest[match.start() :] if match else ""
        return match is not None and self._enter(match, match.start())

    def _enter(self, match: Any, at: int = 0) -> bool:
        if match.partial:
            return False
        self.rest = self.rest[match.end() - at :]
        self.count += 1
        has = self.rest.startswith("{")
        self.state, self.left = ("arguments" if has else "after"), [*self.ends]
        self._tell("" if has else "{}", match["name"])
        return True

    def _tell(self, arguments: str, name: str | None = None) -> None:
        if self.most is not None and self.count > self.most:
            return
        index = self.count - 1
        new: Json = {"index": index, "function": {"arguments": ""}}
        if name is not None:
            id = f"call_{uuid.uuid4().hex[:24]}"
            new = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        self.calls.setdefault(index, new)["function"]["arguments"] += arguments

    def _arguments(self) -> bool:
        for i, c in enumerate(self.rest):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = c == "\\", c != '"'
            elif c == '"':
                self.quoted = True
            else:
                self.depth += (c == "{") - (c == "}")
                if not self.depth:
                    self._tell(self.rest[: i + 1])
                    self.rest, self.state = self.rest[i + 1 :], "after"
                    return True
        self._tell(self.rest)
        self.rest = ""
        return False

    def _after(self) -> bool:
        """Another call of a list, or what closes one; each of these may be missing."""
        match = self.again.match(self.rest, partial=True) if self.again else None
        if match is not None and not match.partial:
            return self._enter(match)
        waits = match is not None
        for i, end in enumerate(self.left):
            if found := end.match(self.rest, partial=True):
                if not found.partial:
                    self.rest, self.left = self.rest[found.end() :], self.left[i + 1 :]
                    return True
                waits = True
        if not waits:
            self.state = "text"
        return not waits


# --- grammars ---------------------------------------------------------------------------------------------------------


def grammar(form: FamilyName | None, tools: Sequence[Tool], choice: str, markers: dict[str, int], *, many: bool) -> str:
    """llguidance's, of a turn that consists of calls; with `choice` auto, of one that may have them.

    `markers` are those of `special`. Where the form is not known, it is Llama's, which is plain JSON.
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md#tool-calling
    """
    auto = choice == "auto"

    def mark(text: str) -> str:
        return f"<[{markers[text]}]>" if text in markers else json.dumps(text)

    def any_of(before: str, key: str, after: str) -> str:
        """One of the functions, between what stands before its name and what follows its arguments."""
        options = []
        for tool in tools:
            head = json.dumps(before + tool.function.name + key) if key else f'"{tool.function.name}" {mark(ARGS)}'
            enforced = tool.function.strict or not auto
            options.append(f"{head} %json {json.dumps(_schema(tool, enforced=enforced))} {json.dumps(after)}")
        return "call: " + "\n    | ".join(options)

    lines = ["TEXT: /(.|\\n)*/"] if auto else []
    if form == "hermes":
        call, opening = any_of('{"name": "', '", "arguments": ', "}"), mark(OPEN)
        body = f'"\\n" call "\\n" {mark(CLOSE)}'
        repeat = ' ("\\n" one)*' if many else ""
    elif form == "mistral" and ARGS in markers:
        call, opening, body, repeat = any_of("", "", ""), mark(CALLS), "call", " one*" if many else ""
    elif form == "mistral":
        call, opening = any_of('{"name": "', '", "arguments": ', "}"), mark(CALLS)
        body, repeat = '" "? "[" call (", " call)* "]"' if many else '" "? "[" call "]"', ""
    else:
        call = any_of('{"name": "', '", "parameters": ', "}")
        if not auto:
            return f"lark:start: call\n{call}"
        tagged = f" | {mark(PYTHON)} call" if PYTHON in markers else ""
        return f"lark:start: TEXT | call{tagged}\nTEXT: /(\\s*[^\\s{{](.|\\n)*)?/\n{call}"
    if not auto:
        lines += [f"start: one{repeat}", f"one: {opening} {body}"]
    elif opening.startswith("<["):  # text cannot run into a special token
        lines += ["start: one* TEXT", f"one: TEXT {opening} {body}"]
    else:
        lines += ["start: one* TEXT", f"head[lazy]: TEXT {opening}", f"one: head {body}"]
    return "lark:" + "\n".join([*lines, call])


def _schema(tool: Tool, *, enforced: bool) -> Json:
    """Of arguments, written as `json.dumps` does: models could go on with white space for ever."""
    given = tool.function.parameters
    schema = {"additionalProperties": False} if not given else given
    spaces = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
    return {"type": "object"} | (schema if enforced else {}) | {"x-guidance": spaces}
