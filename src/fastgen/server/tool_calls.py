"""Tool calls in the formats of model families: parsing calls from generated text, and grammars that enforce them.

    llama     {"name": "f", "parameters": {...}}                        at the start, or after <|python_tag|>
    mistral   [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]     or, if the vocabulary has [ARGS]:
              [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]...
    hermes    <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>...      also Qwen

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
https://github.com/mistralai/mistral-common/blob/main/src/mistral_common/tokens/tokenizers/instruct.py
https://qwen.readthedocs.io/en/latest/framework/function_call.html
https://github.com/NousResearch/Hermes-Function-Calling#prompt-format-for-function-calling
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from typing import Any, Literal

import regex  # matches partially, unlike re
from transformers import PreTrainedTokenizerBase

from fastgen.server import reasoning
from fastgen.server.requests import Tool

Json = dict[str, Any]
ToolCallFormat = Literal["llama", "mistral", "hermes"]
TOOL_CALL_FORMATS: tuple[ToolCallFormat, ...] = ("llama", "mistral", "hermes")
MARKERS = ("<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<tool_call>", "</tool_call>")
PYTHON_TAG, TOOL_CALLS, CALL_ID, ARGS, TOOL_CALL_OPEN, TOOL_CALL_CLOSE = MARKERS

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = ("name", "type", "id", "index", *ARGUMENT_KEYS)  # the keys that a call without a marker may have
JSON_CHARACTERS = frozenset(' \t\r\n0123456789+-.,:{}[]"eEtrufalsn')  # outside of strings
BRACE = regex.compile(r"\{")
MEMBER = regex.compile(r'\s*+(?:\}|"(?P<key>(?:[^"\\]|\\.){0,64}+)"\s*+:\s*+(?=\S))', regex.DOTALL)
SEPARATOR = regex.compile(r"\s*+(?:,|(?=\}))")
SCALAR = regex.compile(r"[-+.\w]{1,64}+(?=[\s,}])")  # a number, true, false or null
STRING = regex.compile(r'(?:[^"\\]|\\.)*+', regex.DOTALL)  # up to the closing quotation mark
END_OF_REASONING = regex.compile("|".join(map(regex.escape, reasoning.TAGS.values())))


def detect_format(tokenizer: PreTrainedTokenizerBase | None) -> ToolCallFormat | None:
    """Returns the format of a model's calls by its chat template, or else by its special tokens; None if unknown."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for text in (template, *find_marker_token_ids(tokenizer)):
        if TOOL_CALLS in text:
            return "mistral"
        if TOOL_CALL_OPEN in text:
            return "hermes"
        if PYTHON_TAG in text or '"parameters": dictionary' in text:
            return "llama"
    return None


def find_marker_token_ids(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    """Returns the markers of calls and reasoning that are special tokens, which decoding omits by default."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    markers = (*MARKERS, *reasoning.MARKERS)
    return {token.content: id for id, token in added.items() if token.special and token.content in markers}


def wants_text_arguments(render: Callable[[list[Json]], str]) -> bool:
    """Returns whether a chat template expects the arguments of calls as JSON text instead of objects.

    Calls `render` with a probe conversation in both forms. A form fits if the result contains the argument without
    Python's quotation marks and without escapes. Returns False if neither form fits.
    """

    def fits(arguments: Json | str) -> bool:
        function = {"name": "probe", "arguments": arguments}
        call = {"id": "probecall", "type": "function", "function": function}
        messages: list[Json] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x", "name": "probe", "tool_call_id": "probecall"},
        ]
        try:
            text = render(messages)
        except ValueError:
            return False
        return "probe_key" in text and "'probe_key'" not in text and '\\"probe_key' not in text

    return not fits({"probe_key": "x"}) and fits('{"probe_key": "x"}')


def adapt_calls_to_template(
    messages: Sequence[Json], call_format: ToolCallFormat | None, *, arguments_as_text: bool = False
) -> list[Json]:
    """Returns the messages with calls and results as the chat template expects them.

    Mistral's templates require call ids of nine letters and digits; other ids are replaced by such hashes. With
    `arguments_as_text`, arguments become JSON text.
    """

    def adapt_id(id: str) -> str:
        is_valid = call_format != "mistral" or len(id) == 9 and id.isascii() and id.isalnum()
        return id if is_valid else hashlib.sha256(id.encode()).hexdigest()[:9]

    def adapt_call(call: Json) -> Json:
        function = call["function"]
        if arguments_as_text:
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return call | {"id": adapt_id(call["id"]), "function": function}

    adapted = list[Json]()
    for message in messages:
        changes: Json = {}
        if "tool_calls" in message:
            changes["tool_calls"] = [adapt_call(call) for call in message["tool_calls"]]
        if "tool_call_id" in message:
            changes["tool_call_id"] = adapt_id(message["tool_call_id"])
        adapted.append(message | changes)
    return adapted


# --- parsing ----------------------------------------------------------------------------------------------------------


class _NotACall(Exception):
    """Raised when a text cannot be a call."""


class _JsonEndFinder:
    """Finds the end of a JSON object or array in streamed text. Counts braces only, or brackets only."""

    def __init__(self, opening: str) -> None:
        self.opening, self.closing = opening, "}" if opening == "{" else "]"
        self.depth, self.in_string, self.escaped = 0, False, False

    def find_end(self, text: str, *, strict: bool = False) -> int:
        """Returns the index after the last character, or -1 if the end is not in `text`.

        With `strict`, raises _NotACall at a character that JSON does not have outside of strings.
        """
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
    """Incremental parser of one call, `{"name": …, "arguments": {…}, …}`, whose members may come in any order.

    `is_call` becomes true when the name is one of `function_names` and the arguments have begun, or the object has
    ended without arguments. `ended` becomes true when the object ends, or turns out to be no call. `buffer` is then the
    text after the call, or all of the text if it is no call. Invalid JSON after a call's arguments counts as text.
    """

    def __init__(self, function_names: Sequence[str], allowed_keys: Collection[str] | None) -> None:
        """`allowed_keys` are the members that a call may have; None allows any."""
        self.function_names, self.allowed_keys = function_names, allowed_keys
        self.name: str | None = None
        self.is_call = self.ended = self.has_arguments = False
        self.buffer = ""  # text that is not parsed yet
        self._parsed: list[str] = []  # parsed text, which returns to the buffer if this is no call
        self._new_arguments: list[str] = []  # arguments since the last take_arguments()
        self._steps = self._parse_members()

    def push(self, text: str) -> None:
        """Parses more text."""
        self.buffer += text
        try:
            next(self._steps)
        except StopIteration:
            self.ended = True
        except _NotACall:
            self.ended, self.buffer = True, "".join(self._parsed) + self.buffer

    def unconfirmed_text(self) -> str:
        """Returns all text while it is not known to be a call, else an empty string."""
        return "" if self.is_call else "".join(self._parsed) + self.buffer

    def take_arguments(self) -> str:
        """Returns the new part of the arguments, as the model wrote them."""
        arguments, self._new_arguments = "".join(self._new_arguments), []
        return arguments

    def _parse_members(self) -> Generator[None, None, None]:
        """Parses the object; yields when it needs more text."""
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
            elif is_arguments and not self.has_arguments:  # not an object, whose text _parse_value has taken already
                self._new_arguments.append("{}" if value == "null" else self._decode_object(value))
                self.has_arguments = True
            self._update_is_call()
            yield from self._match(SEPARATOR)
        if self.name is None:
            raise _NotACall
        if not self.has_arguments:
            self._new_arguments.append("{}")
            self.has_arguments = self.is_call = True

    def _parse_value(self, is_arguments: bool) -> Generator[None, None, str]:
        """Parses a value. Returns its text, or an empty string for an array or object."""
        first = self.buffer[0]
        if first == '"':
            parts = [self._consume(1)]
            while True:
                parts.append(self._consume(STRING.match(self.buffer).end()))  # type: ignore[union-attr]
                if self.buffer.startswith('"'):
                    return "".join([*parts, self._consume(1)])
                yield
        if first not in "{[":
            return (yield from self._match(SCALAR))[0]
        if is_arguments and first != "{":
            raise _NotACall
        finder = _JsonEndFinder(first)
        while True:
            self.has_arguments |= is_arguments
            self._update_is_call()
            end = finder.find_end(self.buffer, strict=not self.is_call)
            part = self._consume(len(self.buffer) if end < 0 else end)
            if is_arguments:
                self._new_arguments.append(part)
            if end >= 0:
                return ""
            yield

    def _update_is_call(self) -> None:
        self.is_call = self.name is not None and self.has_arguments
        if self.is_call:
            self._parsed.clear()  # can no longer turn out to be text

    def _match(self, pattern: Any) -> Generator[None, None, Any]:
        """Consumes what the pattern matches at the start of the buffer. Returns the match."""
        while (match := pattern.match(self.buffer, partial=True)) is None or match.partial:
            if match is None:
                raise _NotACall
            yield
        self._consume(match.end())
        return match

    def _consume(self, count: int) -> str:
        text, self.buffer = self.buffer[:count], self.buffer[count:]
        self._parsed.append(text)
        return text

    def _decode_string(self, value: str) -> str:
        """Decodes a JSON string. Line breaks in it, which models write, are accepted."""
        with suppress(ValueError):
            if isinstance(text := json.loads(value, strict=False), str):
                return text
        raise _NotACall

    def _decode_object(self, value: str) -> str:
        """Returns the text of the object in a JSON string. An empty string and null are an empty object."""
        text = self._decode_string(value)
        with suppress(ValueError, RecursionError):
            if (decoded := json.loads(text or "null", strict=False)) is None:
                return "{}"
            if isinstance(decoded, dict):
                return text
        raise _NotACall


class ToolCallParser:
    """Separates calls from text, incrementally.

    A text counts as a call once its function is known to be one of `function_names` and its arguments begin; until then
    it is held back. Members may come in any order. Arguments are returned as the model wrote them. Calls beyond
    `max_calls` are dropped; Llama's limit is one, since its templates take one call per message. Text between reasoning
    tags is never a call.
    """

    def __init__(
        self, call_format: ToolCallFormat, function_names: Sequence[str], max_calls: int | None = None
    ) -> None:
        marker = {"llama": PYTHON_TAG, "mistral": TOOL_CALLS, "hermes": TOOL_CALL_OPEN}[call_format]
        call = first = r"(?:\[\s*+)?(?=\{)"  # the beginning of an object, or of an array of objects
        if call_format == "mistral":
            name = f"(?P<name>{'|'.join(map(regex.escape, function_names))})"
            bare = rf"{name}(?:{regex.escape(CALL_ID)}\w*+)?(?:{regex.escape(ARGS)})?\s*+(?=\{{)"
            call = rf"(?:{first}|{bare})"
        tags = "|".join(map(regex.escape, reasoning.TAGS))
        # White space before a call belongs to the call. (?<!\s) keeps a run of white space from being scanned again.
        calls = rf"(?:(?P<think>{tags})|(?P<marker>{regex.escape(marker)})\s*+{call})"
        self.call_pattern = regex.compile(rf"(?<!\s)\s*+{calls}")
        self.bare_call_pattern = regex.compile(rf"\s*+{first}") if call_format == "llama" else None
        self.next_call_pattern = regex.compile(rf"\s*+{'[;,]' if call_format == 'llama' else ','}\s*+(?=\{{)")
        ends = [r"\]", TOOL_CALL_CLOSE] if call_format == "hermes" else [r"\]"]
        self.end_patterns = [regex.compile(rf"\s*+{end}") for end in ends]
        self.function_names, self.max_calls = function_names, 1 if call_format == "llama" else max_calls
        self.state: Literal["start", "text", "reasoning", "call", "bare", "after"] = "start"
        self.buffer, self.num_calls = "", 0  # text that is not parsed yet; calls so far
        self.remaining_end_patterns: list[Any] = []  # end patterns that may still follow the call
        self.current_call, self.is_call_known = _CallObjectParser(function_names, None), False
        self.call_head = (
            "",
            "",
        )  # text before the object: if it is no call, the first part is text, the second is parsed
        self.bare_arguments = _JsonEndFinder("{")  # for arguments that directly follow the function's name
        self.new_text, self.new_calls = "", dict[int, Json]()  # results of the current push

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, list[Json]]:
        """Parses more text. Returns new text that is no call, and the new parts of calls as OpenAI's deltas."""
        self.buffer += text
        self.new_text, self.new_calls = "", {}
        while self.buffer and getattr(self, f"_{self.state}")():
            pass
        if is_final:
            if self.state == "call" and not self.is_call_known:
                self.buffer = "".join([*self.call_head, self.current_call.unconfirmed_text()])
            if not self.num_calls or not self.buffer.isspace():
                self.new_text += self.buffer
            self.buffer = ""
        return self.new_text, [*self.new_calls.values()]

    def _consume(self, count: int) -> str:
        text, self.buffer = self.buffer[:count], self.buffer[count:]
        return text

    # Each state consumes what it can of the buffer. It returns whether the next state may parse the rest at once.

    def _start(self) -> bool:
        match = self.bare_call_pattern.match(self.buffer, partial=True) if self.bare_call_pattern else None
        if match is None:
            self.state = "text"
            return True
        return self._start_call(match, "", match[0], CALL_KEYS)

    def _text(self) -> bool:
        match = self.call_pattern.search(self.buffer, partial=True)
        self.new_text += self._consume(match.start() if match else len(self.buffer))
        if match is None or match.partial:
            return False
        if match["think"]:
            self.new_text += self._consume(len(match[0]))
            self.state = "reasoning"
            return True
        end = match.end("marker") - match.start()
        return self._start_call(match, match[0][:end], match[0][end:])

    def _reasoning(self) -> bool:
        match = END_OF_REASONING.search(self.buffer, partial=True)
        end = len(self.buffer) if match is None else match.start() if match.partial else match.end()
        self.new_text += self._consume(end)
        if match is None or match.partial:
            return False
        self.state = "text"
        return True

    def _start_call(self, match: Any, text: str, unparsed: str, allowed_keys: Collection[str] | None = None) -> bool:
        if match.partial:
            return False
        self._consume(len(match[0]))
        self.remaining_end_patterns = [*self.end_patterns]
        if match.groupdict().get("name"):
            self.state, self.bare_arguments = "bare", _JsonEndFinder("{")
            self.num_calls += 1
            self._emit_call("", match["name"])
        else:
            self.state, self.is_call_known, self.call_head = "call", False, (text, unparsed)
            self.current_call = _CallObjectParser(self.function_names, allowed_keys)
        return True

    def _emit_call(self, arguments: str, name: str | None = None) -> None:
        if self.max_calls is not None and self.num_calls > self.max_calls:
            return
        index = self.num_calls - 1
        delta: Json = {"index": index, "function": {"arguments": ""}}
        if name is not None:
            id = f"call_{uuid.uuid4().hex[:24]}"
            delta = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        self.new_calls.setdefault(index, delta)["function"]["arguments"] += arguments

    def _call(self) -> bool:
        call = self.current_call
        call.push(self._consume(len(self.buffer)))
        if call.is_call and not self.is_call_known:
            self.is_call_known = True
            self.num_calls += 1
            self._emit_call(call.take_arguments(), call.name)
        elif arguments := call.take_arguments() if self.is_call_known else "":
            self._emit_call(arguments)
        if not call.ended:
            return False
        self.state, self.buffer = "after", call.buffer
        if not call.is_call:
            self.state, self.buffer = "text", self.call_head[1] + call.buffer
            self.new_text += self.call_head[0]
        return True

    def _bare(self) -> bool:
        end = self.bare_arguments.find_end(self.buffer)
        self._emit_call(self._consume(len(self.buffer) if end < 0 else end))
        self.state = "bare" if end < 0 else "after"
        return end >= 0

    def _after(self) -> bool:
        """Parses a separator and the start of the next call, or an end marker. Either may be missing."""
        match = self.next_call_pattern.match(self.buffer, partial=True)
        if match is not None and not match.partial:
            return self._start_call(match, match[0], "")
        needs_more = match is not None
        for i, pattern in enumerate(self.remaining_end_patterns):
            if end := pattern.match(self.buffer, partial=True):
                if not end.partial:
                    self._consume(end.end())
                    del self.remaining_end_patterns[: i + 1]
                    return True
                needs_more = True
        if not needs_more:
            self.state = "text"
        return not needs_more


# --- grammars ---------------------------------------------------------------------------------------------------------


def build_grammar(
    call_format: ToolCallFormat | None,
    tools: Sequence[Tool],
    tool_choice: str,
    marker_token_ids: dict[str, int],
    *,
    parallel_calls: bool,
) -> str:
    """Returns an llguidance grammar for an answer that consists of calls, or, with `tool_choice` auto, may have calls.

    `marker_token_ids` are those of `find_marker_token_ids`. An unknown format falls back to Llama's plain JSON.
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md#tool-calling
    """
    auto = tool_choice == "auto"

    def mark(text: str) -> str:
        return f"<[{marker_token_ids[text]}]>" if text in marker_token_ids else json.dumps(text)

    def call_rule(prefix: str, key: str, suffix: str) -> str:
        """Returns the rule for a call of any function: prefix, name, key, arguments, suffix."""
        options = []
        for tool in tools:
            head = json.dumps(prefix + tool.function.name + key) if key else f'"{tool.function.name}" {mark(ARGS)}'
            enforced = tool.function.strict or not auto
            schema = json.dumps(_arguments_schema(tool, enforced=enforced))
            options.append(f"{head} %json {schema} {json.dumps(suffix)}")
        return "call: " + "\n    | ".join(options)

    lines, repeat = ["TEXT: /(.|\\n)*/"] if auto else [], ""
    if call_format == "hermes":
        call, opening = call_rule('{"name": "', '", "arguments": ', "}"), mark(TOOL_CALL_OPEN)
        body, repeat = f'"\\n" call "\\n" {mark(TOOL_CALL_CLOSE)}', ' ("\\n" one)*'
    elif call_format == "mistral" and ARGS in marker_token_ids:
        call, opening, body, repeat = call_rule("", "", ""), mark(TOOL_CALLS), "call", " one*"
    elif call_format == "mistral":
        call, opening = call_rule('{"name": "', '", "arguments": ', "}"), mark(TOOL_CALLS)
        body = '" "? "[" call (", " call)* "]"' if parallel_calls else '" "? "[" call "]"'
    else:
        call = call_rule('{"name": "', '", "parameters": ', "}")
        if not auto:
            return f"lark:start: call\n{call}"
        tagged = f" | {mark(PYTHON_TAG)} call" if PYTHON_TAG in marker_token_ids else ""
        return f"lark:start: TEXT | call{tagged}\nTEXT: /(\\s*[^\\s{{](.|\\n)*)?/\n{call}"
    if not auto:
        lines += [f"start: one{repeat if parallel_calls else ''}", f"one: {opening} {body}"]
    elif opening.startswith("<["):  # a special token, which TEXT cannot contain
        lines += ["start: one* TEXT", f"one: TEXT {opening} {body}"]
    else:
        lines += ["start: one* TEXT", f"head[lazy]: TEXT {opening}", f"one: head {body}"]
    return "lark:" + "\n".join([*lines, call])


def _arguments_schema(tool: Tool, *, enforced: bool) -> Json:
    """Returns the JSON schema of a tool's arguments. Fixed spacing prevents endless white space."""
    schema = tool.function.parameters or {"additionalProperties": False}
    spaces = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
    return {"type": "object"} | (schema if enforced else {}) | {"x-guidance": spaces}
