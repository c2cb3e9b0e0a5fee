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
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Literal

import regex  # unlike re, it knows what may still become a match
from transformers import PreTrainedTokenizerBase

from fastgen.serve import reasoning
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

ARGUMENTS = ("arguments", "parameters")  # members that have them
CALL_KEYS = ("name", "type", "id", "index", *ARGUMENTS)  # all that an object with no marker before it may have
JSON_CHARACTERS = frozenset(' \t\r\n0123456789+-.,:{}[]"eEtrufalsn')  # outside of strings
BRACE = regex.compile(r"\{")
MEMBER = regex.compile(r'\s*+(?:\}|"(?P<key>(?:[^"\\]|\\.){0,64}+)"\s*+:\s*+(?=\S))', regex.DOTALL)
SEPARATOR = regex.compile(r"\s*+(?:,|(?=\}))")
SCALAR = regex.compile(r"[-+.\w]{1,64}+(?=[\s,}])")  # a number, true, false or null
STRING = regex.compile(r'(?:[^"\\]|\\.)*+', regex.DOTALL)  # up to the quotation mark that ends it
END_OF_REASONING = regex.compile("|".join(map(regex.escape, reasoning.TAGS.values())))


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
    """The markers, of reasoning too, that are special tokens, which texts leave out unless they are asked for."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    known = (*MARKERS, *reasoning.MARKERS)
    return {token.content: id for id, token in added.items() if token.special and token.content in known}


def takes_text(render: Callable[[list[Json]], str]) -> bool:
    """Whether a chat template, `render`, wants the arguments of calls as JSON text and not as objects.

    Tried with a conversation of its own: the right form is the one of which the template makes plain JSON, or anything
    that has the argument without Python's quotation marks. Objects, where neither is.
    """

    def fits(arguments: Json | str) -> bool:
        function = {"name": "probe", "arguments": arguments}
        call = {"id": "probecall", "type": "function", "function": function}
        said: list[Json] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x", "name": "probe", "tool_call_id": "probecall"},
        ]
        try:
            text = render(said)
        except ValueError:
            return False
        return "probe_key" in text and "'probe_key'" not in text and '\\"probe_key' not in text

    return not fits({"probe_key": "x"}) and fits('{"probe_key": "x"}')


def for_template(messages: Sequence[Json], form: FamilyName | None, *, as_text: bool = False) -> list[Json]:
    """Calls and their results as the chat template takes them.

    Mistral's templates take no id but of nine letters and digits: others become such ones, the same each time.
    `as_text`: arguments are JSON text.
    """

    def short(id: str) -> str:
        fits = form != "mistral" or len(id) == 9 and id.isascii() and id.isalnum()
        return id if fits else hashlib.sha256(id.encode()).hexdigest()[:9]

    def told(call: Json) -> Json:
        function = call["function"]
        if as_text:
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return call | {"id": short(call["id"]), "function": function}

    found = list[Json]()
    for message in messages:
        if "tool_calls" in message:
            told_calls: Any = [told(call) for call in message["tool_calls"]]
            message = message | {"tool_calls": told_calls}
        if "tool_call_id" in message:
            message = message | {"tool_call_id": short(message["tool_call_id"])}
        found.append(message)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


class _NotACall(Exception):
    """The text is not what a call looks like."""


class _Value:
    """Finds where a JSON object or array ends, as its text comes. Only braces or only brackets are counted."""

    def __init__(self, opening: str) -> None:
        self.opening, self.closing = opening, "}" if opening == "{" else "]"
        self.depth, self.quoted, self.escaped = 0, False, False

    def end(self, text: str, *, strict: bool = False) -> int:
        """The index after its last character; -1 where more has to come. `strict`: outside of strings only what JSON
        has may stand there; _NotACall otherwise."""
        for i, c in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = c == "\\", c != '"'
            elif c == '"':
                self.quoted = True
            elif strict and c not in JSON_CHARACTERS:
                raise _NotACall
            else:
                self.depth += (c == self.opening) - (c == self.closing)
                if not self.depth:
                    return i + 1
        return -1


class _CallObject:
    """Reads a call, `{"name": …, "arguments": {…}, …}`, as its text comes, with its members in any order.

    `is_call` turns true once the name is one of `names` and the arguments begin, or there are none. `ended` turns true
    where the object ends, or is none: `rest` is then the text after it, or, of what is no call, all of it. What follows
    the arguments of a call and is no JSON counts as text after it.
    """

    def __init__(self, names: Sequence[str], keys: Collection[str] | None) -> None:
        """`keys`: the members that a call may have; None: any."""
        self.names, self.keys = names, keys
        self.name: str | None = None
        self.is_call = self.ended = self.has_arguments = False
        self.rest = ""  # text that has not been read
        self._read: list[str] = []  # what has been, and goes back to `rest` where it is no part of a call
        self._arguments: list[str] = []  # what nobody has taken yet
        self._steps = self._members()

    def push(self, text: str) -> None:
        """Reads on."""
        self.rest += text
        try:
            next(self._steps)
        except StopIteration:
            self.ended = True
        except _NotACall:
            self.ended, self.rest = True, "".join(self._read) + self.rest

    def undecided(self) -> str:
        """The text that is neither a call's nor known to be none."""
        return "" if self.is_call else "".join(self._read) + self.rest

    def arguments(self) -> str:
        """What is new of the arguments, as the model wrote them."""
        found, self._arguments = "".join(self._arguments), []
        return found

    def _members(self) -> Generator[None, None, None]:
        """Reads the whole object; yields where more text has to come."""
        yield from self._match(BRACE)
        while (key := (yield from self._match(MEMBER))["key"]) is not None:
            key = self._text(f'"{key}"')
            if self.keys is not None and key not in self.keys:
                raise _NotACall
            value = yield from self._value(is_arguments := key in ARGUMENTS and not self.has_arguments)
            if key == "name" and self.name is None:
                self.name = self._text(value)
                if self.name not in self.names:
                    raise _NotACall
            elif is_arguments and not self.has_arguments:  # no object, which tells itself as it is read
                self._tell("{}" if value == "null" else self._object(value))
            self._check()
            yield from self._match(SEPARATOR)
        if self.name is None:
            raise _NotACall
        if not self.has_arguments:
            self._tell("{}")
            self._check()

    def _value(self, is_arguments: bool) -> Generator[None, None, str]:
        """Reads a value and returns its text, empty if it is an array or an object."""
        first = self.rest[0]
        if first == '"':
            parts = [self._take(1)]
            while True:
                parts.append(self._take(STRING.match(self.rest).end()))  # type: ignore[union-attr]
                if self.rest.startswith('"'):
                    return "".join([*parts, self._take(1)])
                yield
        if first not in "{[":
            return (yield from self._match(SCALAR))[0]
        if is_arguments and first != "{":
            raise _NotACall
        value = _Value(first)
        while True:
            self.has_arguments |= is_arguments
            self._check()
            end = value.end(self.rest, strict=not self.is_call)
            part = self._take(len(self.rest) if end < 0 else end)
            if is_arguments:
                self._arguments.append(part)
            if end >= 0:
                return ""
            yield

    def _check(self) -> None:
        """Once it is a call, nothing that came before can be text."""
        self.is_call = self.name is not None and self.has_arguments
        if self.is_call:
            self._read.clear()

    def _tell(self, arguments: str) -> None:
        self._arguments.append(arguments)
        self.has_arguments = True

    def _match(self, pattern: Any) -> Generator[None, None, Any]:
        """Reads what matches; returns the match."""
        while (match := pattern.match(self.rest, partial=True)) is None or match.partial:
            if match is None:
                raise _NotACall
            yield
        self._take(match.end())
        return match

    def _take(self, count: int) -> str:
        text, self.rest = self.rest[:count], self.rest[count:]
        self._read.append(text)
        return text

    def _text(self, value: str) -> str:
        """What a JSON string says. Models write line breaks into them, too."""
        try:
            text = json.loads(value, strict=False)
        except ValueError as e:
            raise _NotACall from e
        if not isinstance(text, str):
            raise _NotACall
        return text

    def _object(self, value: str) -> str:
        """The text of an object in a JSON string; nothing, or null, is one without members."""
        text = self._text(value)
        try:
            if (found := json.loads(text or "null", strict=False)) is None:
                return "{}"
            if isinstance(found, dict):
                return text
        except (ValueError, RecursionError):
            pass
        raise _NotACall


class Reader:
    """Tells calls from text, as it comes.

    A call counts once its function, one of `names`, is known and its arguments begin; until then it may turn out to be
    text. Its members may come in any order. Arguments are passed on as the model wrote them. `most` calls are given,
    and those after them are dropped: Llama's templates have no place for more than one in a message. What stands
    between the tags of reasoning is text.
    """

    def __init__(self, form: FamilyName, names: Sequence[str], most: int | None = None) -> None:
        marker = {"llama": PYTHON, "mistral": CALLS, "hermes": OPEN}[form]
        first = r"(?:\[\s*+)?(?=\{)"  # of one or of a list
        call = first
        if form == "mistral":
            name = f"(?P<name>{'|'.join(map(regex.escape, names))})"
            bare = rf"{name}(?:{regex.escape(ID)}\w*+)?(?:{regex.escape(ARGS)})?\s*+(?=\{{)"
            call = rf"(?:{first}|{bare})"
        tags = "|".join(map(regex.escape, reasoning.TAGS))
        # White space before a call belongs to it; a run of it is looked at once.
        self.begin = regex.compile(rf"(?<!\s)\s*+(?:(?P<think>{tags})|(?P<marker>{regex.escape(marker)})\s*+{call})")
        self.first = regex.compile(rf"\s*+{first}") if form == "llama" else None
        self.again = regex.compile(rf"\s*+{'[;,]' if form == 'llama' else ','}\s*+(?=\{{)")
        ends = [r"\]", CLOSE] if form == "hermes" else [r"\]"]
        self.ends = [regex.compile(rf"\s*+{end}") for end in ends]
        self.names, self.most = names, 1 if form == "llama" else most
        self.rest, self.count = "", 0  # text that is not decided; calls seen
        self.state: Literal["start", "text", "reasoning", "call", "bare", "after"] = "start"
        self.left: list[Any] = []  # of `ends`, those that may still come
        self.call, self.told = _CallObject(names, None), False  # the one being read; whether it is known to be a call
        self.head = "", ""  # what stood before it, as text and as what is to be read again, should it be none
        self.value = _Value("{")  # the arguments being read, where they stand by themselves
        self.text, self.calls = "", dict[int, Json]()  # found since the last push

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[Json]]:
        """Text that is no call, and what is new of calls: OpenAI's deltas, one for each call."""
        self.rest += text
        self.text, self.calls = "", {}
        while self.rest and getattr(self, f"_{self.state}")():
            pass
        if last:
            if self.state == "call" and not self.told:
                self.rest = "".join([*self.head, self.call.undecided()])
            self.text, self.rest = self.text + self.rest * (not self.rest.isspace() or not self.count), ""
        return self.text, [*self.calls.values()]

    # Each state takes what it can of `rest`, and says whether another one may go on.

    def _start(self) -> bool:
        match = self.first.match(self.rest, partial=True) if self.first else None
        if match is None:
            self.state = "text"
            return True
        return self._enter(match, "", match[0], CALL_KEYS)

    def _text(self) -> bool:
        match = self.begin.search(self.rest, partial=True)
        self.text += self.rest[: match.start()] if match else self.rest
        self.rest = self.rest[match.start() :] if match else ""
        if match is None or match.partial:
            return False
        if match["think"]:
            self.text, self.rest = self.text + match[0], self.rest[len(match[0]) :]
            self.state = "reasoning"
            return True
        at = match.end("marker") - match.start()
        return self._enter(match, match[0][:at], match[0][at:])

    def _reasoning(self) -> bool:
        match = END_OF_REASONING.search(self.rest, partial=True)
        end = len(self.rest) if match is None else match.start() if match.partial else match.end()
        self.text, self.rest = self.text + self.rest[:end], self.rest[end:]
        if match is None or match.partial:
            return False
        self.state = "text"
        return True

    def _enter(self, match: Any, text: str, again: str, keys: Collection[str] | None = None) -> bool:
        if match.partial:
            return False
        self.rest = self.rest[len(match[0]) :]
        self.left = [*self.ends]
        if match.groupdict().get("name"):
            self.state, self.value = "bare", _Value("{")
            self.count += 1
            self._tell("", match["name"])
        else:
            self.state, self.call, self.told, self.head = "call", _CallObject(self.names, keys), False, (text, again)
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

    def _call(self) -> bool:
        call = self.call
        call.push(self.rest)
        self.rest = ""
        if call.is_call and not self.told:
            self.told = True
            self.count += 1
            self._tell(call.arguments(), call.name)
        elif arguments := call.arguments() if self.told else "":
            self._tell(arguments)
        if not call.ended:
            return False
        self.state, self.rest = "after", call.rest
        if not call.is_call:
            self.state, self.text, self.rest = "text", self.text + self.head[0], self.head[1] + call.rest
        return True

    def _bare(self) -> bool:
        end = self.value.end(self.rest)
        end, ended = (len(self.rest), False) if end < 0 else (end, True)
        self._tell(self.rest[:end])
        self.rest = self.rest[end:]
        self.state = "after" if ended else "bare"
        return ended

    def _after(self) -> bool:
        """Another call of a list, or what closes one; each of these may be missing."""
        match = self.again.match(self.rest, partial=True)
        if match is not None and not match.partial:
            return self._enter(match, match[0], "")
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
