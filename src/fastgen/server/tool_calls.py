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
        call = {"id": "probecall", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        user, result = {"role": "user", "content": "x"}, {"role": "tool", "content": "x", "name": "probe"}
        assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            text = render([user, assistant, result | {"tool_call_id": "probecall"}])
        except ValueError:
            return False
        return "probe_key" in text and "'probe_key'" not in text and '\\"probe_key' not in text

    return not fits({"probe_key": "x"}) and fits('{"probe_key": "x"}')


def adapt_calls_to_template(
    messages: Sequence[Json], call_format: ToolCallFormat | None, *, arguments_as_text: bool = False
) -> None:
    """Changes the calls and their results in messages to what the chat template expects.

    Mistral's templates require call ids of nine letters and digits; other ids are replaced by such hashes. With
    `arguments_as_text`, arguments become JSON text.
    """

    def adapt_id(id: str) -> str:
        is_valid = call_format != "mistral" or len(id) == 9 and id.isascii() and id.isalnum()
        return id if is_valid else hashlib.sha256(id.encode()).hexdigest()[:9]

    for message in messages:
        if "tool_call_id" in message:
            message["tool_call_id"] = adapt_id(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            call["id"], function = adapt_id(call["id"]), call["function"]
            if arguments_as_text:
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)


# --- parsing ----------------------------------------------------------------------------------------------------------


class _NotACall(Exception):
    """Raised when a text cannot be a call."""


def _decode(value: str, expected_type: Any) -> Any:
    """Decodes a JSON value. Line breaks in strings, which models write, are accepted. Raises _NotACall."""
    with suppress(ValueError, RecursionError):
        if isinstance(decoded := json.loads(value, strict=False), expected_type):
            return decoded
    raise _NotACall


class ToolCallParser:
    """Separates calls from text, incrementally.

    A text counts as a call once its function is known to be one of `function_names` and its arguments begin; until then
    it is held back. Members may come in any order. Arguments are returned as the model wrote them; invalid JSON after
    them is text. Calls beyond `max_calls` are dropped; Llama's limit is one, since its templates take one call per
    message. Text between reasoning tags is never a call.

    The methods that return generators consume the buffer, and yield where they need more text.
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
        self.buffer, self.num_calls = "", 0  # text that is not parsed yet; calls so far
        self.held: list[str] = []  # parsed text that is text of the answer unless it turns out to be a call
        # The call that is being parsed: whether it is known to be one, its function, and its arguments not sent yet.
        self.is_call, self.name, self.arguments = False, None, None
        self.new_text, self.new_calls = "", dict[int, Json]()  # results of the current push
        self._steps = self._parse()

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, list[Json]]:
        """Parses more text. Returns new text that is no call, and the new parts of calls as OpenAI's deltas."""
        self.buffer += text
        self.new_text, self.new_calls = "", {}
        next(self._steps)
        if is_final and not self.is_call:
            remaining = "".join(self.held) + self.buffer
            self.new_text += "" if self.num_calls and remaining.isspace() else remaining
        return self.new_text, [*self.new_calls.values()]

    def _parse(self) -> Generator[None, None, None]:
        """Parses an answer."""
        if self.bare_call_pattern and (match := (yield from self._match(self.bare_call_pattern))):
            yield from self._parse_calls(match, 0, CALL_KEYS)
        while True:
            match = yield from self._search(self.call_pattern)
            if match["think"]:
                self._emit_text(len(match[0]))
                match = yield from self._search(END_OF_REASONING)
                self._emit_text(len(match[0]))
            else:
                self._consume(len(match[0]))
                yield from self._parse_calls(match, match.end("marker") - match.start())

    def _parse_calls(
        self, match: Any, marker_length: int, allowed_keys: Collection[str] | None = None
    ) -> Generator[None, None, None]:
        """Parses the call whose start has matched, then end markers, which may be missing, and calls that follow.

        If it is no call, the first `marker_length` characters of the match are text, and those after them are parsed
        again. `allowed_keys` are the members that the call may have; None allows any.
        """
        while match:
            self.is_call, self.name, self.arguments = False, match.groupdict().get("name"), None
            try:
                yield from self._parse_call(allowed_keys) if self.name is None else self._parse_value(True)
            except _NotACall:
                text, self.held = "".join(self.held), []
                if not self.is_call:
                    self.new_text, self.buffer = (
                        self.new_text + text[:marker_length],
                        text[marker_length:] + self.buffer,
                    )
                    return
                self.buffer = text + self.buffer
            self.is_call, ends = False, self.end_patterns
            self.held.clear()
            while (match := (yield from self._match(self.next_call_pattern, *ends))) and match.re in ends:
                self.held.clear()
                ends = ends[ends.index(match.re) + 1 :]
            marker_length, allowed_keys = len(match[0]) if match else 0, None

    def _parse_call(self, allowed_keys: Collection[str] | None) -> Generator[None, None, None]:
        """Parses a call of the form `{"name": …, "arguments": {…}, …}`. Raises _NotACall."""
        yield from self._expect(BRACE)
        while (key := (yield from self._expect(MEMBER))["key"]) is not None:
            key = _decode(f'"{key}"', str)
            if allowed_keys is not None and key not in allowed_keys:
                raise _NotACall
            value = yield from self._parse_value(key in ARGUMENT_KEYS and self.arguments is None)
            if key == "name" and self.name is None:
                self.name = _decode(value, str)
                if self.name not in self.function_names:
                    raise _NotACall
            elif key in ARGUMENT_KEYS and self.arguments is None:  # not an object, but null or the text of an object
                text = "null" if value == "null" else _decode(value, str) or "null"
                self.arguments = ["{}" if _decode(text, dict | None) is None else text]
            self._update_call()
            yield from self._expect(SEPARATOR)
        if self.name is None:
            raise _NotACall
        if self.arguments is None:
            self.arguments = ["{}"]
            self._update_call()

    def _parse_value(self, is_arguments: bool) -> Generator[None, None, str]:
        """Parses a JSON value; returns its text. Arguments that are an object are sent as they arrive."""
        opening = self.buffer[0]
        if opening not in '"{[':
            return (yield from self._expect(SCALAR))[0]
        if is_arguments and opening == "[":
            raise _NotACall
        if is_arguments := is_arguments and opening == "{":
            self.arguments = []
            self._update_call()
        closing, parts, depth, in_string, is_escaped = "}" if opening == "{" else "]", list[str](), 0, False, False
        while True:
            end = 0
            for end, c in enumerate(self.buffer, 1):  # noqa: B007
                if is_escaped:
                    is_escaped = False
                elif in_string:
                    is_escaped, in_string = c == "\\", c != '"'
                elif c == '"':
                    in_string = True
                elif not self.is_call and c not in JSON_CHARACTERS:
                    raise _NotACall
                else:
                    depth += (c == opening) - (c == closing)
                if not (depth or in_string):
                    break
            parts.append(self._consume(end))
            if is_arguments:
                self.arguments = [*(self.arguments or ()), parts[-1]]
                self._update_call()
            if not (depth or in_string):
                return "".join(parts)
            yield

    def _update_call(self) -> None:
        """Sends new arguments once the call's function is known too. From then on it is a call and no text."""
        if self.name is None or self.arguments is None:
            return
        self.held.clear()
        function: Json = {"arguments": ""}
        delta: Json = {"index": self.num_calls - 1, "function": function}
        if is_new := not self.is_call:
            self.is_call, self.num_calls, function = True, self.num_calls + 1, {"name": self.name, "arguments": ""}
            id = f"call_{uuid.uuid4().hex[:24]}"
            delta = {"index": self.num_calls - 1, "id": id, "type": "function", "function": function}
        arguments, self.arguments = "".join(self.arguments), []
        if (is_new or arguments) and (self.max_calls is None or self.num_calls <= self.max_calls):
            self.new_calls.setdefault(delta["index"], delta)["function"]["arguments"] += arguments

    def _search(self, pattern: Any) -> Generator[None, None, Any]:
        """Finds the pattern in the buffer; sends the text before it. Returns the match, which is not consumed."""
        while True:
            match = pattern.search(self.buffer, partial=True)
            self._emit_text(match.start() if match else len(self.buffer))
            if match and not match.partial:
                return match
            yield

    def _match(self, *patterns: Any) -> Generator[None, None, Any]:
        """Consumes what the first pattern that fits matches at the start of the buffer; returns the match or None."""
        while any(matches := [pattern.match(self.buffer, partial=True) for pattern in patterns]):
            if match := next((match for match in matches if match and not match.partial), None):
                self._consume(match.end())
                return match
            yield
        return None

    def _expect(self, pattern: Any) -> Generator[None, None, Any]:
        """Consumes what the pattern matches at the start of the buffer; returns the match or raises _NotACall."""
        if (match := (yield from self._match(pattern))) is None:
            raise _NotACall
        return match

    def _consume(self, num_chars: int) -> str:
        text, self.buffer = self.buffer[:num_chars], self.buffer[num_chars:]
        self.held.append(text)
        return text

    def _emit_text(self, num_chars: int) -> None:
        self.new_text += self._consume(num_chars)
        self.held.clear()


# --- grammars ---------------------------------------------------------------------------------------------------------


def build_grammar(
    call_format: ToolCallFormat | None, tools: list[Tool], choice: str, markers: dict[str, int], parallel_calls: bool
) -> str:
    """Returns an llguidance grammar for an answer that consists of calls, or, with `choice` auto, may have calls.

    `markers` are those of `find_marker_token_ids`. An unknown format falls back to Llama's plain JSON.
    https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md#tool-calling
    """
    is_auto = choice == "auto"
    has_bare_names = call_format == "mistral" and ARGS in markers
    arguments_key = "arguments" if call_format in ("mistral", "hermes") else "parameters"
    # Fixed spacing prevents endless white space.
    spaces = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}

    def mark(text: str) -> str:
        return f"<[{markers[text]}]>" if text in markers else json.dumps(text)

    options = []  # one for each function: the start of the call, its arguments, the end
    for function in (tool.function for tool in tools):
        start = json.dumps(f'{{"name": "{function.name}", "{arguments_key}": ')
        start, end = (f'"{function.name}" {mark(ARGS)}', "") if has_bare_names else (start, "}")
        schema: Json = {"type": "object"}
        if function.strict or not is_auto:
            schema |= function.parameters or {"additionalProperties": False}
        options.append(f"{start} %json {json.dumps(schema | {'x-guidance': spaces})} {json.dumps(end)}")
    call = "call: " + "\n    | ".join(options)
    match call_format:
        case "hermes":
            opening, body = mark(TOOL_CALL_OPEN), f'"\\n" call "\\n" {mark(TOOL_CALL_CLOSE)}'
            repeat = ' ("\\n" one)*' if parallel_calls else ""
        case "mistral" if has_bare_names:
            opening, body, repeat = mark(TOOL_CALLS), "call", " one*" if parallel_calls else ""
        case "mistral":
            opening, repeat = mark(TOOL_CALLS), ""
            body = '" "? "[" call (", " call)* "]"' if parallel_calls else '" "? "[" call "]"'
        case _ if is_auto:
            tagged = f" | {mark(PYTHON_TAG)} call" if PYTHON_TAG in markers else ""
            return f"lark:start: TEXT | call{tagged}\nTEXT: /(\\s*[^\\s{{](.|\\n)*)?/\n{call}"
        case _:
            return f"lark:start: call\n{call}"
    if not is_auto:
        rules = f"start: one{repeat}\none: {opening} {body}"
    elif opening.startswith("<["):  # a special token, which TEXT cannot contain
        rules = f"TEXT: /(.|\\n)*/\nstart: one* TEXT\none: TEXT {opening} {body}"
    else:
        rules = f"TEXT: /(.|\\n)*/\nstart: one* TEXT\nhead[lazy]: TEXT {opening}\none: head {body}"
    return f"lark:{rules}\n{call}"
