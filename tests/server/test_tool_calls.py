"""Tests tool calls: parsed from text, enforced by grammars, and rendered by chat templates."""

import asyncio
import copy
import json
import random
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request
from test_detokenizer import decode_at_once
from test_tokenizer import BYTE_LEVEL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastgen import SamplingParams
from fastgen.server import endpoints, tool_calls
from fastgen.server.app_state import AppState, TokenizerThread
from fastgen.server.completion_response import CompletionResponse
from fastgen.server.engine_process import EngineInfo, TokenDelta
from fastgen.server.errors import APIError
from fastgen.server.requests import ChatMessage, ChatRequest, Tool, to_template_dicts
from fastgen.server.responses import ChatResponseBuilder, Choice, ChoiceDelta, TokenDecoder
from fastgen.server.tool_calls import ToolCallParser
from fastgen.text import chat_template
from fastgen.text.detokenizer import Detokenizer

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", 'a "b" \\ }{']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL_DICTS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
TOOLS = [Tool.model_validate(tool) for tool in TOOL_DICTS]
NAMES = ("get", "get_time")
HARD = '{"city": "a \\"b\\" \\\\ }{", "more": {"x": [{}, "{"]}}'

# format, text, and the content and calls parsed from it
TEXTS: list[tuple[tool_calls.ToolCallFormat, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello <b>there</b>, 1 < 2 <tool", "Hello <b>there</b>, 1 < 2 <tool", []),
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>', "", [("get", '{"a": 1}')]),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>{{"name":"get","arguments":{HARD}}}</tool_call>\n'
        '<tool_call>\n{"name": "get_time"}\n</tool_call>\n',
        "Let me see.",
        [("get", HARD), ("get_time", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "get", "arguments": {}} and more', " and more", [("get", "{}")]),
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": [1, "b', "", [("get", '{"a": [1, "b')]),
    ("hermes", '<tool_call>{"name": "got", "arguments": {}}', '<tool_call>{"name": "got", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "get", "argum', '<tool_call>{"name": "get", "argum', []),
    ("hermes", '<tool_call>\n<tool_call>{"name": "get"}', "<tool_call>", [("get", "{}")]),
    ("hermes", '{"name": "get", "arguments": {}}', '{"name": "get", "arguments": {}}', []),
    ("hermes", "  \n\n ", "  \n\n ", []),
    ("llama", '{"name": "get", "parameters": {"a": 1}}', "", [("get", '{"a": 1}')]),
    ("llama", f'\n<|python_tag|>{{"type": "function", "name": "get", "parameters": {HARD}}}', "", [("get", HARD)]),
    ("llama", 'Now: <|python_tag|>{"name": "get_time", "parameters": {}}', "Now:", [("get_time", "{}")]),
    ("llama", '{"name": "get", "parameters": {}}; {"name": "get_time", "parameters": {}}', "", [("get", "{}")]),
    ("llama", '{"city": "Paris"}', '{"city": "Paris"}', []),
    ("llama", 'So {"name": "get", "parameters": {}}', 'So {"name": "get", "parameters": {}}', []),
    ("llama", '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}]', "", [("get", '{"a": 1}')]),
    (
        "mistral",
        f'Well. [TOOL_CALLS][{{"name": "get", "arguments": {HARD}, "id": "abcdef123"}}, '
        '{"name": "get_time", "arguments": {}}]',
        "Well.",
        [("get", HARD), ("get_time", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]get_time[CALL_ID]x1[ARGS]{}',
        "",
        [("get", '{"a": 1}'), ("get_time", "{}")],
    ),
    ("mistral", 'get{"a": 1} [TOOL_CALLS]get{"a": 1}', 'get{"a": 1}', [("get", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS] [{"arguments": {"a": 1}, "name": "get"}]', "", [("get", '{"a": 1}')]),
    (
        "mistral",
        f'[TOOL_CALLS][{{"id": "a", "x": [{{"name": "no"}}], "arguments": {HARD}, "name": "get", "type": "f"}}, '
        '{"index":1,"name":"get_time"}]',
        "",
        [("get", HARD), ("get_time", "{}")],
    ),
    ("mistral", '[TOOL_CALLS] {"arguments": {}, "name": "get"} so', " so", [("get", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"arguments": null, "name": "get"}]', "", [("get", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": null}]', "", [("get", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": ""}]', "", [("get", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get", "arguments": "{\\"a\\": \\"\\\\u00e9\\"}"}]',
        "",
        [("get", '{"a": "\\u00e9"}')],
    ),
    ("mistral", '[TOOL_CALLS] [{"n\\u0061me": "\\u0067et", "arguments": {}}]', "", [("get", "{}")]),
    *(
        ("mistral", f'[TOOL_CALLS] [{{"name": "get", "arguments": {wrong}}}]')
        + (f'[TOOL_CALLS] [{{"name": "get", "arguments": {wrong}}}]', [])
        for wrong in ("[1]", "7", '"no"', '"[]"', "true", '"\\x"')
    ),
    ("mistral", '[TOOL_CALLS] [{"arguments": {"a": 1}}]', '[TOOL_CALLS] [{"arguments": {"a": 1}}]', []),
    (
        "mistral",
        '[TOOL_CALLS] [{"arguments": {x: 1}, "name": "get"}]',
        '[TOOL_CALLS] [{"arguments": {x: 1}, "name": "get"}]',
        [],
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"arguments": {"a": 1}, "name": "ge',
        '[TOOL_CALLS] [{"arguments": {"a": 1}, "name": "ge',
        [],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}, x}]', ", x}]", [("get", '{"a": 1}')]),
    ("hermes", '<tool_call>{"arguments":{"a":1},"name":"get"}</tool_call>.', ".", [("get", '{"a":1}')]),
    (
        "hermes",
        '<tool_call>\n[{"name": "get_time"}, {"arguments": {}, "name": "get"}]\n</tool_call>',
        "",
        [("get_time", "{}"), ("get", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": {}}</tool_call>', "", [("get", '{"a": {}}')]),
    (
        "hermes",
        'So <think>\n<tool_call>{"name": "get"}</tool_call></think> <tool_call>{"name": "get_time"}</tool_call>',
        'So <think>\n<tool_call>{"name": "get"}</tool_call></think>',
        [("get_time", "{}")],
    ),
    ("llama", '{"parameters": {"a": 1}, "name": "get"}', "", [("get", '{"a": 1}')]),
    ("llama", '[{"type": "function", "parameters": {}, "name": "get"}]', "", [("get", "{}")]),
    ("llama", '{"id": 3, "city": "Paris", "name": "get"}', '{"id": 3, "city": "Paris", "name": "get"}', []),
    ("llama", '<|python_tag|>{"why": "x", "name": "get"}', "", [("get", "{}")]),
    ("mistral", "[TOOL_CALLS] [] and [1, 2]", "[TOOL_CALLS] [] and [1, 2]", []),
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {}}, {"name": "g', ', {"name": "g', [("get", "{}")]),
]


def parse(
    call_format: tool_calls.ToolCallFormat, parts: Sequence[str], max_calls: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Returns the content and calls that a client assembles from OpenAI's deltas."""
    parser, content, assembled = ToolCallParser(call_format, NAMES, max_calls), "", list[list[str]]()
    for i in range(len(parts) + 1):
        text, calls = parser.push("".join(parts[i : i + 1]), is_final=i == len(parts))
        content += text
        assert len({c["index"] for c in calls}) == len(calls)
        for call in calls:
            if call["index"] == len(assembled):
                assert call["id"].startswith("call_") and call["type"] == "function"
                assembled.append([call["function"].pop("name"), ""])
            else:
                assert call.keys() == {"index", "function"} and call["index"] == len(assembled) - 1
            assert call["function"].keys() == {"arguments"}
            assembled[-1][1] += call["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in assembled]


@pytest.mark.parametrize("call_format, text, content, calls", TEXTS, ids=lambda x: x[:24] if isinstance(x, str) else "")
def test_calls_are_parsed_wherever_the_text_is_split(
    call_format: tool_calls.ToolCallFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    """The result is the same for the complete text, any two parts, and single characters."""
    assert parse(call_format, [text]) == (content, calls)
    assert parse(call_format, list(text)) == (content, calls)
    for i in range(len(text)):
        assert parse(call_format, [text[:i], text[i:]]) == (content, calls), i


WORDS = sorted(
    {w for _, text, _, _ in TEXTS for w in (text[:13], text[-9:], text[5:30])} | {*tool_calls.MARKERS, *'{}"\\,; \n'}
)


@settings(deadline=None, max_examples=300)
@given(
    call_format=st.sampled_from(tool_calls.TOOL_CALL_FORMATS),
    parts=st.lists(st.sampled_from(WORDS) | st.sampled_from([t for _, t, _, _ in TEXTS]), max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_any_split_of_any_text_has_the_same_result(
    call_format: tool_calls.ToolCallFormat, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    assert parse(call_format, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]) == parse(call_format, [text])


OBJECTS = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
MORE = {"id": st.text(max_size=5), "type": st.just("function"), "index": st.integers(0, 9)}
AROUND: dict[tool_calls.ToolCallFormat, list[tuple[str, str]]] = {
    "hermes": [("<tool_call>\n", "\n</tool_call>"), ("<tool_call>[", "]</tool_call>")],
    "llama": [("", ""), ("<|python_tag|>", "")],
    "mistral": [("[TOOL_CALLS] [", "]"), ("[TOOL_CALLS]", "")],
}


@settings(deadline=None, max_examples=60)
@given(data=st.data(), call_format=st.sampled_from(tool_calls.TOOL_CALL_FORMATS), arguments=OBJECTS)
def test_members_may_have_any_order(
    data: st.DataObject, call_format: tool_calls.ToolCallFormat, arguments: dict[str, Any]
) -> None:
    """Any order of members, white space, escapes and splits of the text result in the same call."""
    value = data.draw(st.sampled_from([arguments, json.dumps(arguments)]))
    members: dict[str, Any] = {"name": "get", data.draw(st.sampled_from(tool_calls.ARGUMENT_KEYS)): value}
    members |= data.draw(st.fixed_dictionaries({}, optional=MORE))
    members = dict(data.draw(st.permutations(list(members.items()))))
    space = st.text(" \n\t\r", max_size=2)
    separators = data.draw(space) + "," + data.draw(space), data.draw(space) + ":" + data.draw(space)
    text = json.dumps(members, separators=separators, ensure_ascii=data.draw(st.booleans()))
    text = "{" + data.draw(space) + text[1:-1] + data.draw(space) + "}"
    before, after = data.draw(st.sampled_from(AROUND[call_format]))
    text = before + text + after
    ends = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    content, [(name, parsed)] = parse(call_format, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)])
    assert (content, name, json.loads(parsed)) == ("", "get", arguments)


def test_parsing_takes_linear_time() -> None:
    """A hundred kilobytes that may become a call, token by token, take a second or so, not minutes."""
    text = '<tool_call>{"x": [' * 5_000 + '"' + "a" * 50_000 + '"' + "]" * 5_000
    start = time.monotonic()
    assert parse("hermes", [text[i : i + 4] for i in range(0, len(text), 4)]) == (text, [])
    long = '{"arguments": {"x": "' + "<tool_call>{ " * 10_000 + '"}, "name": "get"}'
    _, [(_, arguments)] = parse("llama", [long[i : i + 4] for i in range(0, len(long), 4)])
    assert len(arguments) > 100_000 and time.monotonic() - start < 20


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    """Arguments are returned as they arrive."""
    parser = ToolCallParser("hermes", NAMES)
    for new, sent in (
        ("Hi", "Hi"),
        (" the", " the"),
        ("re\n", "re"),
        ("<", ""),
        ("b>", "\n<b>"),
        (" <tool_call>", ""),
        ('{"x": [7], ', ""),
        ('"name": "got"', ' <tool_call>{"x": [7], "name": "got"'),
    ):
        assert parser.push(new) == (sent, [])
    parts = ('<tool_call>{"name": "get", "arguments": ', '{"a', '": 1', "}}</tool_call>")
    deltas = [parser.push(part)[1] for part in parts]
    assert [[call["function"]["arguments"] for call in calls] for calls in deltas] == [[], ['{"a'], ['": 1'], ["}"]]


def test_calls_beyond_max_calls_are_dropped() -> None:
    two = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>' * 2
    assert parse("hermes", list(two), max_calls=1) == ("", [("get", '{"a": 1}')])


# --- grammars ---------------------------------------------------------------------------------------------------------


def make_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"</s>": 256}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


TOKENIZERS = {
    "plain": make_tokenizer(),
    "llama": make_tokenizer(tool_calls.PYTHON_TAG),
    "mistral": make_tokenizer(tool_calls.TOOL_CALLS),
    "mistral 11": make_tokenizer(tool_calls.TOOL_CALLS, tool_calls.ARGS, tool_calls.CALL_ID),
    "hermes": make_tokenizer(tool_calls.TOOL_CALL_OPEN, tool_calls.TOOL_CALL_CLOSE),
}
SETUPS = [
    ("llama", "plain"),
    ("mistral", "plain"),
    ("hermes", "plain"),
    *((n.split()[0], n) for n in list(TOKENIZERS)[1:]),
]


@pytest.fixture(scope="module")
def backends() -> dict[str, Any]:
    pytest.importorskip("llguidance")
    from fastgen.structured_output.token_masks import GrammarBackend

    return {name: GrammarBackend(c, len(c), frozenset([256])) for name, c in TOKENIZERS.items()}


def strict(*names: str) -> list[Tool]:
    return [
        t.model_copy(update={"function": t.function.model_copy(update={"strict": t.function.name in names})})
        for t in TOOLS
    ]


@pytest.mark.parametrize("call_format, name", SETUPS)
@pytest.mark.parametrize("parallel_calls", [True, False])
def test_grammars_allow_only_calls(call_format: Any, name: str, parallel_calls: bool, backends: dict[str, Any]) -> None:
    """Random allowed tokens are parsed as calls whose arguments follow the schema, and no other text."""
    rng, vocabulary = random.Random(0), TOKENIZERS[name]
    markers = tool_calls.find_marker_token_ids(vocabulary)
    grammar = tool_calls.build_grammar(call_format, TOOLS, "required", markers, parallel_calls=parallel_calls)
    counts = set()
    for _ in range(4):
        matcher, tokens = backends[name].make_matchers(grammar)[0], list[int]()
        while not matcher.matcher.is_stopped():
            bits = backends[name].token_masks([(0, matcher)], 1)[0]
            tokens.append(rng.choice([t for t in range(len(vocabulary)) if bits[t // 32] >> t % 32 & 1]))
            matcher.accept_token(tokens[-1])
        shown = {id: text for text, id in markers.items()}
        decoder = Detokenizer(vocabulary, [], visible_special_tokens=shown)
        text = "".join(decoder.push(t)[0] for t in tokens) + decoder.flush()
        assert text == decode_at_once(
            Detokenizer(vocabulary, [], visible_special_tokens=shown, stream_text=False), tokens
        )
        content, calls = parse(call_format, [text])
        assert content == "" and calls, text
        counts.add(len(calls))
        for function, arguments in calls:
            value = json.loads(arguments)
            if function == "get":
                assert value.keys() == {"city", "days"} and value["city"] in WEATHER["properties"]["city"]["enum"]
                assert value["days"] in range(1, 10)
            else:
                assert value == {}
    assert counts == {1} if not parallel_calls or call_format == "llama" else max(counts) > 1


def allows(backends: Any, vocabulary: Any, grammar: str, text: str) -> bool:
    matcher = backends.make_matchers(grammar)[0]
    tokens = vocabulary(text, add_special_tokens=False).input_ids
    return matcher.matcher.validate_tokens(tokens) == len(tokens)


GOOD = {
    "llama": '{"name": "get", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Paris", "days": 3}}]',
    "mistral 11": '[TOOL_CALLS]get[ARGS]{"city": "Paris", "days": 3}',
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
}


@pytest.mark.parametrize("call_format, name", SETUPS)
def test_strict_functions_are_enforced_also_where_text_may_come(
    call_format: Any, name: str, backends: dict[str, Any]
) -> None:
    """Under `auto`, text is free, and calls follow the format; arguments of other functions are any object."""
    grammar = tool_calls.build_grammar(
        call_format, strict("get"), "auto", tool_calls.find_marker_token_ids(TOKENIZERS[name]), parallel_calls=True
    )
    check, good = partial(allows, backends[name], TOKENIZERS[name], grammar), GOOD.get(name, GOOD[call_format])
    before = "" if call_format == "llama" else "Well, 1 < 2 [or so].\n"
    assert check("Just\n\n text <, [TOOL.") and check(before + good)
    assert not check(before + good.replace("Paris", "Rome")) and not check(before + good.replace("get", "got"))
    assert check(before + good.replace("get", "get_time")) and check(
        before + good.replace("get", "get_time").replace("Paris", "Rome")
    )


# --- templates --------------------------------------------------------------------------------------------------------

BODY = "{{ {'name': c.function.name, %r: c.function.arguments} | tojson }}"
TEMPLATES: dict[str, str] = {
    "llama": "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% for c in m.tool_calls %}"
    + BODY % "parameters"
    + "{% endfor %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}{# <|python_tag|> #}",
    "mistral": "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    + BODY % "arguments"
    + "{{ ', ' if not loop.last }}{% endfor %}]{% else %}{{ m.content }}{% endif %}{{ m.tool_call_id }}\n{% endfor %}",
    "hermes": "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}{% for c in m.tool_calls %}<tool_call>\n"
    + BODY % "arguments"
    + "\n</tool_call>{% endfor %}{% if m.role == 'tool' %}({{ m.name }}){% endif %}\n{% endfor %}",
}
RENDER_TOOLS = "{% for t in tools or () %}{{ t | tojson }}\n{% endfor %}"
TEMPLATES = {call_format: RENDER_TOOLS + text for call_format, text in TEMPLATES.items()}


@pytest.mark.parametrize("call_format", tool_calls.TOOL_CALL_FORMATS)
def test_a_call_goes_to_the_model_and_comes_back(call_format: tool_calls.ToolCallFormat) -> None:
    """A call rendered by a template is parsed as the same call, and its result has the same id."""
    vocabulary = make_tokenizer()
    vocabulary.chat_template = TEMPLATES[call_format]
    assert tool_calls.detect_format(vocabulary) == call_format
    asked: dict[str, Any] = {
        "id": "call_0123456789abcdef",
        "type": "function",
        "function": {"name": "get", "arguments": HARD},
    }
    messages = [
        ChatMessage.model_validate({"role": "user", "content": "How is it?"}),
        ChatMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [asked]}),
        ChatMessage.model_validate({"role": "tool", "tool_call_id": asked["id"], "content": "Sunny."}),
    ]
    rendered_messages = to_template_dicts(messages)
    tool_calls.adapt_calls_to_template(rendered_messages, call_format)
    lines = chat_template.render(vocabulary, rendered_messages, [tool.to_template_dict() for tool in TOOLS]).split("\n")
    assert json.loads(lines[0]) == TOOL_DICTS[0] and json.loads(lines[1])["function"]["parameters"]["type"] == "object"
    text = "\n".join(lines).partition("assistant:")[2].partition("tool:")[0]
    content, [(name, arguments)] = parse(call_format, [text])
    assert (content.strip(), name, json.loads(arguments)) == ("", "get", json.loads(HARD))
    assert (
        rendered_messages[2]["name"] == "get"
        and rendered_messages[2]["tool_call_id"] == rendered_messages[1]["tool_calls"][0]["id"]
    )


# Idioms of published templates for rendering an answer's content and calls.
TEMPLATE_IDIOMS = {
    "QwQ": "{% set content = m.content.split('</think>')[-1].lstrip() %}{{ content if m.content }}"
    "{% for c in m.tool_calls %}<tool_call>" + BODY % "arguments" + "</tool_call>{% endfor %}",
    "Qwen3": "{% if m.content is string %}{% set content = m.content %}{% endif %}"
    "{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ content + '' }}"
    "{% for c in m.tool_calls %}<tool_call>" + BODY % "arguments" + "</tool_call>{% endfor %}",
    "R1": "{% if m['content'] is not none %}{{ m['content'] + '' }}{% endif %}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + '```json' + c['function']['arguments'] + '```' }}{% endfor %}",
    "SmolLM2": "{{ m['role'] + m['content'] }}",
    "Python": "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}",
    "items": "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}{% endfor %}",
}  # fmt: skip
PUBLISHED = Path(find_spec("trl").origin).parent / "chat_templates" if find_spec("trl") else Path()  # type: ignore[union-attr, arg-type]
NAMES_OF_TEMPLATES = ("deepseek_r1_distill", "deepseekv3", "glm4moe", "llama3_1", "llama3_2", "qwen2_5", "qwen3",
                      "qwen3_instruct_2507", "gptoss")  # fmt: skip
SECOND_TURN = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
     "reasoning_content": "Ask.", "tool_calls": [{"id": "call_0123456789abcdef", "index": 0, "type": "function",
     "function": {"name": "get", "arguments": '{"city": "Paris"}'}}]},
    {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": "Sunny."},
]  # fmt: skip


def second_turn(template: str, **more: Any) -> str:
    """Returns the prompt for a conversation with a tool call and its result, as clients send it back."""
    vocabulary = make_tokenizer()
    vocabulary.chat_template = template
    app_state = make_app_state(vocabulary)
    app_state.tool_call_format = tool_calls.detect_format(vocabulary)
    messages = [ChatMessage.model_validate(message) for message in SECOND_TURN]
    return vocabulary.decode(asyncio.run(app_state.encode_chat(messages, TOOLS, calls_enforced=True)))


@pytest.mark.parametrize("name", TEMPLATE_IDIOMS)
def test_second_turns_of_templates_of_all_kinds(name: str) -> None:
    """Missing content is rendered as an empty text; arguments are objects or text, as the template expects."""
    text = second_turn("{% for m in messages %}" + TEMPLATE_IDIOMS[name] + "|{% endfor %}")
    lines = text.split("|")
    assert lines[0].endswith("How is it?") and lines[2].endswith("Sunny.")
    assert (
        lines[1]
        == {
            "QwQ": '<tool_call>{"name": "get", "arguments": {"city": "Paris"}}</tool_call>',
            "Qwen3": '<think>Ask.</think><tool_call>{"name": "get", "arguments": {"city": "Paris"}}</tool_call>',
            "R1": 'get```json{"city": "Paris"}```',
            "SmolLM2": "assistant",
            "Python": 'get({"city": "Paris"})',
            "items": "get<city>Paris",
        }[name]
    )


@pytest.mark.parametrize("name", NAMES_OF_TEMPLATES)
def test_second_turns_of_published_templates(name: str) -> None:
    """The templates in TRL render calls, except R1's, which omits calls if the content is empty."""
    if not (path := PUBLISHED / f"{name}.jinja").is_file():
        pytest.skip("TRL does not have it")
    text = second_turn(path.read_text(encoding="utf-8"))
    assert "Sunny." in text and (
        '"city": "Paris"' in text or "<arg_value>Paris" in text or name == "deepseek_r1_distill"
    )
    assert "{'city'" not in text and '\\"city' not in text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_format_by_special_tokens(name: str) -> None:
    """Special tokens determine the format if there is no template."""
    assert tool_calls.detect_format(TOKENIZERS[name]) == (None if name == "plain" else name.split()[0])
    assert tool_calls.detect_format(None) is None and tool_calls.find_marker_token_ids(None) == {}


# --- answers ----------------------------------------------------------------------------------------------------------

SCRIPT = 'Well.\n<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>\n'
SCRIPT += '<tool_call>{"name": "get_time"}</tool_call>'


@pytest.mark.parametrize(
    "reason, named, wanted", [("stop", False, "tool_calls"), ("stop", True, "stop"), ("length", False, "length")]
)
@pytest.mark.parametrize("length", [len(SCRIPT), 70, 12, 5])
def test_chunks_add_up_to_the_whole_answer(reason: str, named: bool, wanted: str, length: int) -> None:
    """Chunks of several choices add up to their final choices, with each token's logprob once."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    tokens = BYTE_LEVEL(SCRIPT[:length], add_special_tokens=False).input_ids
    params = SamplingParams(n=2, logprobs=0, max_tokens=500)
    builder = ChatResponseBuilder(vocabulary, partial(ToolCallParser, "hermes", NAMES), is_function_named=named)
    choices = [Choice(i, vocabulary, [], params, stream_text=True, visible_special_tokens={}) for i in range(2)]
    for i, token in enumerate(tokens):
        for choice in choices:
            end = reason if i == len(tokens) - 1 else None
            part = builder.build_chunk(choice, choice.push(TokenDelta(choice.index, [token], [-1.0], None, end)))
            assembled = choice.__dict__.setdefault("assembled", {"content": "", "calls": [], "logprobs": 0})
            assert part is not None
            assembled["logprobs"] += len(part["logprobs"]["content"])
            assembled["content"] += part["delta"].get("content") or ""
            for call in part["delta"].get("tool_calls", ()):
                if call["index"] == len(assembled["calls"]):
                    assembled["calls"].append(call["function"])
                else:
                    assembled["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            assembled["reason"] = part["finish_reason"]
    for choice in choices:
        full, assembled = builder.build_choice(choice, None), choice.__dict__["assembled"]
        calls = [call["function"] for call in full["message"].get("tool_calls", ())]
        assert calls == assembled["calls"] and len(calls) == {12: 0, 5: 0, 70: 1}.get(length, 2)
        assert (full["message"]["content"] or "") == assembled["content"]
        assert full["finish_reason"] == assembled["reason"] == (wanted if calls else reason)
        assert assembled["logprobs"] == len(full["logprobs"]["content"]) == len(tokens)


DRAFTED_CALL = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
CALL = '<tool_call>{"name": "get_time"}</tool_call>'
# end of the prompt, generated text, and its reasoning, content and called functions
REASONING_CASES: list[tuple[str, str, str, str, list[str]]] = [
    ("", f"<think>\nFirst {DRAFTED_CALL}?\n</think>\n\n{CALL}", f"First {DRAFTED_CALL}?", "", ["get_time"]),
    ("", f"\n<think>{DRAFTED_CALL}</think>No.", DRAFTED_CALL, "No.", []),
    ("", f"<think>{DRAFTED_CALL}", DRAFTED_CALL, "", []),
    ("", "<think>\n\n</think>\n\nHi </think> there", "", "Hi </think> there", []),
    ("", f"<think>a < b </thin </think> Well.\n{CALL}", "a < b </thin", "Well.", ["get_time"]),
    ("", "<think>Hm. \n", "Hm.", "", []),
    ("", "<thin", "", "<thin", []),
    ("", " so <think>x</think>", "", " so <think>x</think>", []),
    ("", f"See <think>{DRAFTED_CALL}</think> {CALL}", "", f"See <think>{DRAFTED_CALL}</think>", ["get_time"]),
    ("assistant<think>\n", f"Hm {DRAFTED_CALL}</think>{CALL}", f"Hm {DRAFTED_CALL}", "", ["get_time"]),
    ("assistant<think>\n", f"{DRAFTED_CALL} and on", f"{DRAFTED_CALL} and on", "", []),
    ("<think>", "<think>\nHm\n</think>\nYes", "Hm", "Yes", []),
    ("<think>x</think>", "Yes", "", "Yes", []),
    ("", f"[THINK]Hm {DRAFTED_CALL}[/THINK]{CALL}", f"Hm {DRAFTED_CALL}", "", ["get_time"]),
    ("[THINK]", "a</think>b[/THINK]c", "a</think>b", "c", []),
]


@pytest.mark.parametrize("prompt, text, thought, content, names", REASONING_CASES, ids=lambda x: str(x)[:30])
def test_reasoning_is_separated_before_calls_are_parsed(
    prompt: str, text: str, thought: str, content: str, names: list[str]
) -> None:
    """The result is the same for any split. A call in the reasoning does not count."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    for has_tools in (True, False):
        builder = ChatResponseBuilder(vocabulary, partial(ToolCallParser, "hermes", NAMES) if has_tools else None)
        for cuts in ([], range(1, len(text)), *([i] for i in range(1, len(text)))):
            builder.parsers.clear()
            tokens = BYTE_LEVEL(prompt, add_special_tokens=False).input_ids
            choice = Choice(0, vocabulary, tokens, SamplingParams(), stream_text=True, visible_special_tokens={})
            ends, parts = [0, *cuts, len(text)], list[dict[str, Any]]()
            for a, b in zip(ends, ends[1:], strict=False):
                new = ChoiceDelta(text[a:b], finish_reason="stop" if b == len(text) else None)
                choice.accumulated.text, choice.accumulated.finish_reason = (
                    choice.accumulated.text + new.text,
                    new.finish_reason,
                )
                if part := builder.build_chunk(choice, new):
                    parts.append(part)
            deltas = [part["delta"] for part in parts]
            full = builder.build_choice(choice, None)
            message = full["message"]
            assert (
                "".join(d.get("reasoning_content", "") for d in deltas)
                == message.get("reasoning_content", "")
                == thought
            )
            complete = "".join(d.get("content") or "" for d in deltas)
            called = [c["function"]["name"] for d in deltas for c in d.get("tool_calls", ()) if "id" in c]
            assert complete == (message["content"] or "") and called == [
                c["function"]["name"] for c in message.get("tool_calls", ())
            ]
            assert full["finish_reason"] == parts[-1]["finish_reason"] == ("tool_calls" if called else "stop")
            if has_tools:
                assert (complete, called) == (content, names)
            assert message["content"] is not None or thought or called


def test_an_answer_that_follows_a_grammar_has_no_reasoning() -> None:
    """This holds even after a prompt that opens reasoning. With `auto`, an answer may begin with reasoning."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    prompt = BYTE_LEVEL("<think>\n", add_special_tokens=False).input_ids
    choice = Choice(0, vocabulary, prompt, SamplingParams(), stream_text=True, visible_special_tokens={})
    choice.accumulated.text = '{"a": 1}'
    assert (
        ChatResponseBuilder(vocabulary, may_reason=False).build_choice(choice, None)["message"]["content"] == '{"a": 1}'
    )
    app_state = make_app_state(make_tokenizer())
    app_state.tool_call_format = "hermes"
    for choice, reasons in (("auto", True), ("required", False)):
        body = make_request(tools=strict_tools(), tool_choice=choice)
        assert endpoints._make_chat_builder(app_state, body).may_reason == reasons


def strict_tools() -> list[dict[str, Any]]:
    return [TOOL_DICTS[0] | {"function": TOOL_DICTS[0]["function"] | {"strict": True}}]


def test_markers_that_are_special_tokens_are_visible() -> None:
    """Other special tokens are not, and without calls, no special token is visible."""
    vocabulary = TOKENIZERS["mistral"]
    id = tool_calls.find_marker_token_ids(vocabulary)[tool_calls.TOOL_CALLS]
    tokens = vocabulary('é[TOOL_CALLS] [{"name"').input_ids + [256]
    assert decode_at_once(Detokenizer(vocabulary, [], stream_text=False), tokens) == 'é [{"name"'
    for decoder in (
        Detokenizer(vocabulary, [1, id, 2], visible_special_tokens={id: tool_calls.TOOL_CALLS}),
        Detokenizer(vocabulary, [], visible_special_tokens={id: tool_calls.TOOL_CALLS}),
    ):
        assert "".join(decoder.push(t)[0] for t in tokens) + decoder.flush() == 'é[TOOL_CALLS] [{"name"'


# --- what is refused --------------------------------------------------------------------------------------------------


def make_app_state(vocabulary: PreTrainedTokenizerFast | None) -> AppState:
    """Returns the application state without an engine, for a model with an unknown format of calls."""
    app_state = AppState.__new__(AppState)
    app_state.token_decoder = TokenDecoder(vocabulary)
    app_state.engine_client = app_state.metrics = MagicMock()
    app_state.tool_call_format, app_state.marker_token_ids = None, {}
    app_state.template_supports_tools, app_state.wants_text_arguments = False, {}
    app_state.tokenizer_thread, app_state.max_prompt_chars = TokenizerThread("texts", vocabulary), 10**6
    app_state.engine_info = EngineInfo("", MagicMock(), 2048, 8, "text", False)
    return app_state


@pytest.mark.parametrize("part", ["tools", "calls", "messages"])
def test_rendered_text_is_limited(part: str) -> None:
    """Functions and calls count as text: long ones go to the thread for long texts, longer ones are rejected."""
    coder = copy.deepcopy(TOKENIZERS["hermes"])
    coder.chat_template = "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.tool_calls }}{% endfor %}"
    app_state = make_app_state(coder)
    app_state.long_text_thread = TokenizerThread("long")
    call = {"id": "a", "type": "function", "function": {"name": "get", "arguments": json.dumps({"x": "y" * 100_000})}}
    body = {
        "tools": make_request(tools=[{"type": "function", "function": {"name": "get", "description": "y" * 100_000}}]),
        "calls": make_request(messages=[{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]),
        "messages": make_request(messages=[{"role": "user", "content": ""}] * 8192),
    }[part]
    with pytest.raises(APIError, match="without a tokenizer"):  # the thread for long texts has none here
        asyncio.run(app_state.encode_chat(body.messages, body.tools))
    app_state.long_text_thread.tokenizer, app_state.max_prompt_chars = coder, 99_999
    with pytest.raises(APIError, match=r"messages: \d{6} characters are more than the 99999 ") as e:
        asyncio.run(app_state.encode_chat(body.messages, body.tools))
    assert (e.value.status, e.value.param, e.value.code) == (400, "messages", "context_length_exceeded")


def make_request(**given: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | given)


def test_conflicting_fields() -> None:
    """Errors name the field."""
    app_state, response_format = make_app_state(None), {"type": "json_object"}
    for body, param in (
        (make_request(tool_choice="auto"), "tool_choice"),
        (make_request(parallel_tool_calls=True), "parallel_tool_calls"),
        (make_request(tools=TOOL_DICTS, tool_choice={"type": "function", "function": {"name": "got"}}), "tool_choice"),
        (make_request(tools=TOOL_DICTS), "tools"),  # the format is unknown
        (make_request(tools=TOOL_DICTS, tool_choice="required", response_format=response_format), "response_format"),
    ):
        with pytest.raises(APIError) as e:
            endpoints._make_chat_builder(app_state, body)
        assert e.value.param == param and param in e.value.message
    assert (
        make_request(tools=TOOL_DICTS).tool_choice_mode == "auto"
        and make_request(tool_choice="none").tool_choice_mode == "none"
        and make_request().tool_choice_mode == "none"
    )


def test_functions_are_checked() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    for wrong in (
        {"tools": [TOOL_DICTS[0], TOOL_DICTS[0]]},
        {"tools": [{"type": "function", "function": {"name": "two words"}}]},
        {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]},
        {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]},
        {"messages": [{"role": "assistant", "tool_calls": [call | {"function": {"name": "get", "arguments": "[]"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [call | {"function": {"name": "get", "arguments": "{"}}]}]},
    ):
        with pytest.raises(ValidationError):
            make_request(**wrong)
    with pytest.raises(APIError, match="tool_call_id: no call before it"):
        to_template_dicts([ChatMessage.model_validate({"role": "tool", "content": "x", "tool_call_id": "b"})])


def test_templates_without_tools() -> None:
    """Templates that ignore tools, or fail on them, are errors that name the field."""
    vocabulary = make_tokenizer()
    app_state = make_app_state(vocabulary)
    user = ChatMessage.model_validate({"role": "user", "content": "x"})
    for template, param in (
        ("{{ messages[0].content }}", "tools"),
        ("{{ 'a' + tools[0] }}", "messages"),
        ("{{ raise_exception('no tools') if tools }}", "messages"),
    ):
        vocabulary.chat_template = template
        with pytest.raises(APIError) as e:
            asyncio.run(app_state.encode_chat([user], TOOLS))
        assert e.value.status == 400 and e.value.param == param, e.value.message
    vocabulary.chat_template = "{{ messages[0].content }}"  # enforced calls do not need the template
    assert asyncio.run(app_state.encode_chat([user], TOOLS, calls_enforced=True)) == vocabulary("x").input_ids


def test_special_tokens_of_calls_reach_the_parser() -> None:
    """The tokenizer's markers are visible in the decoded text, as in a server."""
    vocabulary = TOKENIZERS["mistral 11"]
    app_state = make_app_state(vocabulary)
    app_state.tool_call_format = tool_calls.detect_format(vocabulary)
    app_state.marker_token_ids = tool_calls.find_marker_token_ids(vocabulary)
    body = make_request(tools=TOOL_DICTS, parallel_tool_calls=False)
    builder = endpoints._make_chat_builder(app_state, body)
    assert body.to_sampling_params().grammar is None
    params, request = body.to_sampling_params(), Request({"type": "http", "entry": {"id": "x"}})
    [choice] = CompletionResponse(app_state, request, body, builder, "", [[1]], params).choices
    text = 'Hm.[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]get_time[ARGS]{}'
    choice.push(TokenDelta(0, [*vocabulary(text).input_ids, 256], None, None, "stop"))
    message = builder.build_choice(choice, None)["message"]
    [call] = message["tool_calls"]
    assert message["content"] == "Hm." and call["function"] == {"name": "get", "arguments": '{"a": 1}'}
    body = make_request(tools=strict_tools())
    endpoints._make_chat_builder(app_state, body)
    assert (body.to_sampling_params().grammar or "").startswith("lark:") and body.field_names["lark"] == "tools"
