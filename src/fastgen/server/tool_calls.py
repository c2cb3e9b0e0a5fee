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

from fastgen.server import reasoning
from fastgen.server.requests import Tool

Json = dict[str, Any]
ToolCallFormat = Literal["llama", "mistral", "hermes"]
TOOL_CALL_FORMATS: tuple[ToolCallFormat, ...] = ("llama", "mistral", "hermes")
PYTHON_TAG, TOOL_CALLS, CALL_ID, ARGS, TOOL_CALL_OPEN, TOOL_CALL_CLOSE = MARKERS = (
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<tool_call>",
    "</tool_call>",
)

ARGUMENT_KEYS = ("arguments", "parameters")  # members that have them
CALL_KEYS = ("name", "type", "id", "index", *ARGUMENT_KEYS)  # all that an object with no marker before it may have
JSON_CHARACTERS = frozenset(' \t\r\n0123456789+-.,:{}[]"eEtrufalsn')  # outside of strings
BRACE = regex.compile(r"\{")
MEMBER = regex.compile(r'\s*+(?:\}|"(?P<key>(?:[^"\\]|\\.){0,64}+)"\s*+:\s*+(?=\S))', regex.DOTALL)
SEPARATOR = regex.compile(r"\s*+(?:,|(?=\}))")
SCALAR = regex.compile(r"[-+.\w]{1,64}+(?=[\s,}])")  # a number, true, false or null
STRING = regex.compile(r'(?:[^"\\]|\\.)*+', regex.DOTALL)  # up to the quotation mark that ends it
END_OF_REASONING = regex.compile("|".join(map(regex.escape, reasoning.TAGS.values())))


def detect_format(tokenizer: PreTrainedTokenizerBase | None) -> ToolCallFormat | None:
    """Whose form a model's calls have, by its chat template, or else by its special tokens; None: not known."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for known in (template, *find_marker_token_ids(tokenizer)):
        if TOOL_CALLS in known:
            return "mistral"
        if TOOL_CALL_OPEN in known:
            return "hermes"
        if PYTHON_TAG in known or '"parameters": dictionary' in known:
            return "llama"
    return None


def find_marker_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """The markers, of reasoning too, that are special tokens, which texts leave out unless they are asked for."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    known = (*MARKERS, *reasoning.MARKERS)
    return {token.content: id for id, token in added.items() if token.special and token.content in known}


def wants_text_arguments(render: Callable[[list[Json]], str]) -> bool:
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


def adapt_calls_to_template(
    messages: Sequence[Json], call_format: ToolCallFormat | None, *, arguments_as_text: bool = False
) -> list[Json]:
    """Calls and their results as the chat template takes them.

    Mistral's templates take no id but of nine letters and digits: others become such ones, the same each time.
    `as_text`: arguments are JSON text.
    """

    def short(id: str) -> str:
        fits = call_format != "mistral" or len(id) == 9 and id.isascii() and id.isalnum()
        return id if fits else hashlib.sha256(id.encode()).hexdigest()[:9]

    def told(call: Json) -> Json:
        function = call["function"]
        if arguments_as_text:
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


class _JsonEndFinder:
    """Finds where a JSON object or array ends, as its text comes. Only braces or only brackets are counted."""

    def __init__(self, opening: str) -> None:
        self.opening, self.closing = opening, "}" if opening == "{" else "]"
        self.depth, self.in_string, self.escaped = 0, False, False

    def find_end(self, text: str, *, strict: bool = False) -> int:
        """The index after its last character; -1 where more has to come. `strict`: outside of strings only what JSON
        has may stand there; _NotACall otherwise."""
        for i, c in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = c == "\\", c != '"'
            elif c == '"':
                self.in_string = True
            elif strict and c not in JSON_CHARACTERS:
                raise _NotACall
            else:
                self.depth += (c == self.opening) - (c == self.closing)
                if not self.depth:
                    return i + 1
        return -1


class _CallObjectParser:
    """Reads a call, `{"name": …, "arguments": {…}, …}`, as its text comes, with its members in any order.

    `is_call` turns true once the name is one of `names` and the arguments begin, or there are none. `ended` turns true
    where the object ends, or is none: `rest` is then the text after it, or, of what is no call, all of it. What follows
    the arguments of a call and is no JSON counts as text after it.
    """

    def __init__(self, function_names: Sequence[str], allowed_keys: Collection[str] | None) -> None:
        """`keys`: the members that a call may have; None: any."""
        self.function_names, self.allowed_keys = function_names, allowed_keys
        self.name: str | None = None
        self.is_call = self.ended = self.has_arguments = False
        self.unread = ""  # text that has not been read
        self._consumed: list[str] = []  # what has been, and goes back to `rest` where it is no part of a call
        self._new_arguments: list[str] = []  # what nobody has taken yet
        self._parse_steps = self._parse_members()

    def push(self, text: str) -> None:
        """Reads on."""
        self.unread += text
        try:
            next(self._parse_steps)
        except StopIteration:
            self.ended = True
        except _NotACall:
            self.ended, self.unread = True, "".join(self._consumed) + self.unread

    def undecided_text(self) -> str:
        """The text that is neither a call's nor known to be none."""
        return "" if self.is_call else "".join(self._consumed) + self.unread

    def take_arguments(self) -> str:
        """What is new of the arguments, as the model wrote them."""
        found, self._new_arguments = "".join(self._new_arguments), []
        return found

    def _parse_members(self) -> Generator[None, None, None]:
        """Reads the whole object; yields where more text has to come."""
        yield from self._match(BRACE)
        while (key := (yield from self._match(MEMBER))["key"]) is not None:
            key = self._decode_string(f'"{key}"')
            if self.allowed_keys is not None and key not in self.allowed_keys:
                raise _NotACall
            value = yield from self._parse_value(is_arguments := key in ARGUMENT_KEYS and not self.has_arguments)
            if key == "name" and self.name is None:
                self.name = self._decode_string(value)
                if self.name not in self.function_names:
                    raise _NotACall
            elif is_arguments and not self.has_arguments:  # no object, which tells itself as it is read
                self._emit_arguments("{}" if value == "null" else self._decode_object(value))
            self._update_is_call()
            yield from self._match(SEPARATOR)
        if self.name is None:
            raise _NotACall
        if not self.has_arguments:
            self._emit_arguments("{}")
            self._update_is_call()

    def _parse_value(self, is_arguments: bool) -> Generator[None, None, str]:
        """Reads a value and returns its text, empty if it is an array or an object."""
        first = self.unread[0]
        if first == '"':
            parts = [self._consume(1)]
            while True:
                parts.append(self._consume(STRING.match(self.unread).end()))  # type: ignore[union-attr]
                if self.unread.startswith('"'):
                    return "".join([*parts, self._consume(1)])
                yield
        if first not in "{[":
            return (yield from self._match(SCALAR))[0]
        if is_arguments and first != "{":
            raise _NotACall
        value = _JsonEndFinder(first)
        while True:
            self.has_arguments |= is_arguments
            self._update_is_call()
            end = value.find_end(self.unread, strict=not self.is_call)
            part = self._consume(len(self.unread) if end < 0 else end)
            if is_arguments:
                self._new_arguments.append(part)
            if end >= 0:
                return ""
            yield

    def _update_is_call(self) -> None:
        """Once it is a call, nothing that came before can be text."""
        self.is_call = self.name is not None and self.has_arguments
        if self.is_call:
            self._consumed.clear()

    def _emit_arguments(self, arguments: str) -> None:
        self._new_arguments.append(arguments)
        self.has_arguments = True

    def _match(self, pattern: Any) -> Generator[None, None, Any]:
        """Reads what matches; returns the match."""
        while (match := pattern.match(self.unread, partial=True)) is None or match.partial:
            if match is None:
                raise _NotACall
            yield
        self._consume(match.end())
        return match

    def _consume(self, count: int) -> str:
        text, self.unread = self.unread[:count], self.unread[count:]
        self._consumed.append(text)
        return text

    def _decode_string(self, value: str) -> str:
        """What a JSON string says. Models write line breaks into them, too."""
        try:
            text = json.loads(value, strict=False)
        except ValueError as e:
            raise _NotACall from e
        if not isinstance(text, str):
            raise _NotACall
        return text

    def _decode_object(self, value: str) -> str:
        """The text of an object in a JSON string; nothing, or null, is one without members."""
        text = self._decode_string(value)
        try:
            if (found := json.loads(text or "null", strict=False)) is None:
                return "{}"
            if isinstance(found, dict):
                return text
        except (ValueError, RecursionError):
            pass
        raise _NotACall


class ToolCallParser:
    """Tells calls from text, as it comes.

    A call counts once its function, one of `names`, is known and its arguments begin; until then it may turn out to be
    text. Its members may come in any order. Arguments are passed on as the model wrote them. `most` calls are given,
    and those after them are dropped: Llama's templates have no place for more than one in a message. What stands
    between the tags of reasoning is text.
    """

    def __init__(
        self, call_format: ToolCallFormat, function_names: Sequence[str], max_calls: int | None = None
    ) -> None:
        marker = {"llama": PYTHON_TAG, "mistral": TOOL_CALLS, "hermes": TOOL_CALL_OPEN}[call_format]
        first = r"(?:\[\s*+)?(?=\{)"  # of one or of a list
        call = first
        if call_format == "mistral":
            name = f"(?P<name>{'|'.join(map(regex.escape, function_names))})"
            bare = rf"{name}(?:{regex.escape(CALL_ID)}\w*+)?(?:{regex.escape(ARGS)})?\s*+(?=\{{)"
            call = rf"(?:{first}|{bare})"
        tags = "|".join(map(regex.escape, reasoning.TAGS))
        # White space before a call belongs to it; a run of it is looked at once.
        self.call_pattern = regex.compile(
            rf"(?<!\s)\s*+(?:(?P<think>{tags})|(?P<marker>{regex.escape(marker)})\s*+{call})"
        )
        self.bare_call_pattern = regex.compile(rf"\s*+{first}") if call_format == "llama" else None
        self.next_call_pattern = regex.compile(rf"\s*+{'[;,]' if call_format == 'llama' else ','}\s*+(?=\{{)")
        ends = [r"\]", TOOL_CALL_CLOSE] if call_format == "hermes" else [r"\]"]
        self.end_patterns = [regex.compile(rf"\s*+{end}") for end in ends]
        self.function_names, self.max_calls = function_names, 1 if call_format == "llama" else max_calls
        self.undecided_text, self.num_calls = "", 0  # text that is not decided; calls seen
        self.state: Literal["start", "text", "reasoning", "call", "bare", "after"] = "start"
        self.remaining_end_patterns: list[Any] = []  # of `ends`, those that may still come
        self.current_call, self.is_call_known = (
            _CallObjectParser(function_names, None),
            False,
        )  # the one being read; whether it is known to be a call
        self.call_head = "", ""  # what stood before it, as text and as what is to be read again, should it be none
        self.bare_arguments = _JsonEndFinder("{")  # the arguments being read, where they stand by themselves
        self.new_text, self.new_calls = "", dict[int, Json]()  # found since the last push

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, list[Json]]:
        """Text that is no call, and what is new of calls: OpenAI's deltas, one for each call."""
        self.undecided_text += text
        self.new_text, self.new_calls = "", {}
        while self.undecided_text and getattr(self, f"_{self.state}")():
            pass
        if is_final:
            if self.state == "call" and not self.is_call_known:
                self.undecided_text = "".join([*self.call_head, self.current_call.undecided_text()])
            self.new_text, self.undecided_text = (
                self.new_text + self.undecided_text * (not self.undecided_text.isspace() or not self.num_calls),
                "",
            )
        return self.new_text, [*self.new_calls.values()]

    # Each state takes what it can of `rest`, and says whether another one may go on.

    def _start(self) -> bool:
        match = self.bare_call_pattern.match(self.undecided_text, partial=True) if self.bare_call_pattern else None
        if match is None:
            self.state = "text"
            return True
        return self._start_call(match, "", match[0], CALL_KEYS)

    def _text(self) -> bool:
        match = self.call_pattern.search(self.undecided_text, partial=True)
        self.new_text += self.undecided_text[: match.start()] if match else self.undecided_text
        self.undecided_text = self.undecided_text[match.start() :] if match else ""
        if match is None or match.partial:
            return False
        if match["think"]:
            self.new_text, self.undecided_text = self.new_text + match[0], self.undecided_text[len(match[0]) :]
            self.state = "reasoning"
            return True
        at = match.end("marker") - match.start()
        return self._start_call(match, match[0][:at], match[0][at:])

    def _reasoning(self) -> bool:
        match = END_OF_REASONING.search(self.undecided_text, partial=True)
        end = len(self.undecided_text) if match is None else match.start() if match.partial else match.end()
        self.new_text, self.undecided_text = self.new_text + self.undecided_text[:end], self.undecided_text[end:]
        if match is None or match.partial:
            return False
        self.state = "text"
        return True

    def _start_call(self, match: Any, text: str, unread: str, allowed_keys: Collection[str] | None = None) -> bool:
        if match.partial:
            return False
        self.undecided_text = self.undecided_text[len(match[0]) :]
        self.remaining_end_patterns = [*self.end_patterns]
        if match.groupdict().get("name"):
            self.state, self.bare_arguments = "bare", _JsonEndFinder("{")
            self.num_calls += 1
            self._emit_call("", match["name"])
        else:
            self.state, self.current_call, self.is_call_known, self.call_head = (
                "call",
                _CallObjectParser(self.function_names, allowed_keys),
                False,
                (text, unread),
            )
        return True

    def _emit_call(self, arguments: str, name: str | None = None) -> None:
        if self.max_calls is not None and self.num_calls > self.max_calls:
            return
        index = self.num_calls - 1
        new: Json = {"index": index, "function": {"arguments": ""}}
        if name is not None:
            id = f"call_{uuid.uuid4().hex[:24]}"
            new = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        self.new_calls.setdefault(index, new)["function"]["arguments"] += arguments

    def _call(self) -> bool:
        call = self.current_call
        call.push(self.undecided_text)
        self.undecided_text = ""
        if call.is_call and not self.is_call_known:
            self.is_call_known = True
            self.num_calls += 1
            self._emit_call(call.take_arguments(), call.name)
        elif arguments := call.take_arguments() if self.is_call_known else "":
            self._emit_call(arguments)
        if not call.ended:
            return False
        self.state, self.undecided_text = "after", call.unread
        if not call.is_call:
            self.state, self.new_text, self.undecided_text = (
                "text",
                self.new_text + self.call_head[0],
                self.call_head[1] + call.unread,
            )
        return True

    def _bare(self) -> bool:
        end = self.bare_arguments.find_end(self.undecided_text)
        end, ended = (len(self.undecided_text), False) if end < 0 else (end, True)
        self._emit_call(self.undecided_text[:end])
        self.undecided_text = self.undecided_text[end:]
        self.state = "after" if ended else "bare"
        return ended

    def _after(self) -> bool:
        """Another call of a list, or what closes one; each of these may be missing."""
        match = self.next_call_pattern.match(self.undecided_text, partial=True)
        if match is not None and not match.partial:
            return self._start_call(match, match[0], "")
        waits = match is not None
        for i, end in enumerate(self.remaining_end_patterns):
            if found := end.match(self.undecided_text, partial=True):
                if not found.partial:
                    self.undecided_text, self.remaining_end_patterns = (
                        self.undecided_text[found.end() :],
                        self.remaining_end_patterns[i + 1 :],
                    )
                    return True
                waits = True
        if not waits:
            self.state = "text"
        return not waits


# --- grammars ---------------------------------------------------------------------------------------------------------


def build_grammar(
    call_format: ToolCallFormat | None,
    tools: Sequence[Tool],
    tool_choice: str,
    marker_token_ids: dict[str, int],
    *,
    parallel_calls: bool,
) -> str:
    """llguidance's, of a turn that consists of calls; with `choice` auto, of one that may have them.

    `markers` are those of `special`. Where the form is not known, it is Llama's, which is plain JSON.
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md#tool-calling
    """
    auto = tool_choice == "auto"

    def mark(text: str) -> str:
        return f"<[{marker_token_ids[text]}]>" if text in marker_token_ids else json.dumps(text)

    def any_of(before: str, key: str, after: str) -> str:
        """One of the functions, between what stands before its name and what follows its arguments."""
        options = []
        for tool in tools:
            head = json.dumps(before + tool.function.name + key) if key else f'"{tool.function.name}" {mark(ARGS)}'
            enforced = tool.function.strict or not auto
            options.append(f"{head} %json {json.dumps(_arguments_schema(tool, enforced=enforced))} {json.dumps(after)}")
        return "call: " + "\n    | ".join(options)

    lines = ["TEXT: /(.|\\n)*/"] if auto else []
    if call_format == "hermes":
        call, opening = any_of('{"name": "', '", "arguments": ', "}"), mark(TOOL_CALL_OPEN)
        body = f'"\\n" call "\\n" {mark(TOOL_CALL_CLOSE)}'
        repeat = ' ("\\n" one)*' if parallel_calls else ""
    elif call_format == "mistral" and ARGS in marker_token_ids:
        call, opening, body, repeat = any_of("", "", ""), mark(TOOL_CALLS), "call", " one*" if parallel_calls else ""
    elif call_format == "mistral":
        call, opening = any_of('{"name": "', '", "arguments": ', "}"), mark(TOOL_CALLS)
        body, repeat = '" "? "[" call (", " call)* "]"' if parallel_calls else '" "? "[" call "]"', ""
    else:
        call = any_of('{"name": "', '", "parameters": ', "}")
        if not auto:
            return f"lark:start: call\n{call}"
        tagged = f" | {mark(PYTHON_TAG)} call" if PYTHON_TAG in marker_token_ids else ""
        return f"lark:start: TEXT | call{tagged}\nTEXT: /(\\s*[^\\s{{](.|\\n)*)?/\n{call}"
    if not auto:
        lines += [f"start: one{repeat}", f"one: {opening} {body}"]
    elif opening.startswith("<["):  # text cannot run into a special token
        lines += ["start: one* TEXT", f"one: TEXT {opening} {body}"]
    else:
        lines += ["start: one* TEXT", f"head[lazy]: TEXT {opening}", f"one: head {body}"]
    return "lark:" + "\n".join([*lines, call])


def _arguments_schema(tool: Tool, *, enforced: bool) -> Json:
    """Of arguments, written as `json.dumps` does: models could go on with white space for ever."""
    given = tool.function.parameters
    schema = {"additionalProperties": False} if not given else given
    spaces = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
    return {"type": "object"} | (schema if enforced else {}) | {"x-guidance": spaces}
