"""Calls of functions: read from scripted output, enforced by grammars, and told to models by templates."""

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
from test_detokenizer import decode_at_once
from test_tokenizer import BYTE_LEVEL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastgen import SamplingParams
from fastgen.core import tokenizer
from fastgen.core.detokenizer import Detokenizer
from fastgen.server import endpoints, tool_calls
from fastgen.server.app_state import AppState
from fastgen.server.engine_client import EngineClient
from fastgen.server.errors import APIError
from fastgen.server.messages import TokenDelta
from fastgen.server.metrics import Metrics
from fastgen.server.requests import ChatMessage, ChatRequest, Tool, to_template_dicts
from fastgen.server.responses import ChatResponseBuilder, Choice, ChoiceDelta, TokenDecoder
from fastgen.server.sse import CompletionResponse
from fastgen.server.tokenizer_thread import TokenizerThread
from fastgen.server.tool_calls import ToolCallParser

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", 'a "b" \\ }{']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
GIVEN: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
TOOLS = [Tool.model_validate(tool) for tool in GIVEN]
NAMES = ("get", "get_time")
HARD = '{"city": "a \\"b\\" \\\\ }{", "more": {"x": [{}, "{"]}}'

# family, text, the content it leaves, and the calls in it
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


def read(
    form: tool_calls.ToolCallFormat, parts: Sequence[str], most: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """What a client puts together from the deltas, which have to be OpenAI's."""
    reader, content, found = ToolCallParser(form, NAMES, most), "", list[list[str]]()
    for i in range(len(parts) + 1):
        text, calls = reader.push("".join(parts[i : i + 1]), is_final=i == len(parts))
        content += text
        assert len({c["index"] for c in calls}) == len(calls)
        for call in calls:
            if call["index"] == len(found):
                assert call["id"].startswith("call_") and call["type"] == "function"
                found.append([call["function"].pop("name"), ""])
            else:
                assert call.keys() == {"index", "function"} and call["index"] == len(found) - 1
            assert call["function"].keys() == {"arguments"}
            found[-1][1] += call["function"]["arguments"]
    return content, [(name, arguments) for name, arguments in found]


@pytest.mark.parametrize("form, text, content, calls", TEXTS, ids=lambda x: x[:24] if isinstance(x, str) else "")
def test_calls_are_read_wherever_the_text_is_split(
    form: tool_calls.ToolCallFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    """Whole, in two parts, and by character."""
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)
    for i in range(len(text)):
        assert read(form, [text[:i], text[i:]]) == (content, calls), i


WORDS = sorted(
    {w for _, text, _, _ in TEXTS for w in (text[:13], text[-9:], text[5:30])} | {*tool_calls.MARKERS, *'{}"\\,; \n'}
)


@settings(deadline=None, max_examples=300)
@given(
    form=st.sampled_from(tool_calls.TOOL_CALL_FORMATS),
    parts=st.lists(st.sampled_from(WORDS) | st.sampled_from([t for _, t, _, _ in TEXTS]), max_size=6),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_any_split_of_any_text_reads_the_same(
    form: tool_calls.ToolCallFormat, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    assert read(form, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]) == read(form, [text])


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
@given(data=st.data(), form=st.sampled_from(tool_calls.TOOL_CALL_FORMATS), arguments=OBJECTS)
def test_objects_have_no_order(data: st.DataObject, form: tool_calls.ToolCallFormat, arguments: dict[str, Any]) -> None:
    """Any order of members, white space, escapes, and split of the text: the same call."""
    given = data.draw(st.sampled_from([arguments, json.dumps(arguments)]))
    members: dict[str, Any] = {"name": "get", data.draw(st.sampled_from(tool_calls.ARGUMENT_KEYS)): given}
    members |= data.draw(st.fixed_dictionaries({}, optional=MORE))
    members = dict(data.draw(st.permutations(list(members.items()))))
    space = st.text(" \n\t\r", max_size=2)
    separators = data.draw(space) + "," + data.draw(space), data.draw(space) + ":" + data.draw(space)
    text = json.dumps(members, separators=separators, ensure_ascii=data.draw(st.booleans()))
    text = "{" + data.draw(space) + text[1:-1] + data.draw(space) + "}"
    before, after = data.draw(st.sampled_from(AROUND[form]))
    text = before + text + after
    ends = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    content, [(name, found)] = read(form, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)])
    assert (content, name, json.loads(found)) == ("", "get", arguments)


def test_what_may_be_a_call_is_read_once() -> None:
    """A hundred kilobytes that may still become a call, token by token, takes a second or so and not minutes."""
    text = '<tool_call>{"x": [' * 5_000 + '"' + "a" * 50_000 + '"' + "]" * 5_000
    began = time.monotonic()
    assert read("hermes", [text[i : i + 4] for i in range(0, len(text), 4)]) == (text, [])
    long = '{"arguments": {"x": "' + "<tool_call>{ " * 10_000 + '"}, "name": "get"}'
    _, [(_, arguments)] = read("llama", [long[i : i + 4] for i in range(0, len(long), 4)])
    assert len(arguments) > 100_000 and time.monotonic() - began < 20


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    """And arguments are passed on as they come."""
    reader = ToolCallParser("hermes", NAMES)
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
        assert reader.push(new) == (sent, [])
    said = [
        reader.push(part)[1] for part in ('<tool_call>{"name": "get", "arguments": ', '{"a', '": 1', "}}</tool_call>")
    ]
    assert [[call["function"]["arguments"] for call in calls] for calls in said] == [[], ['{"a'], ['": 1'], ["}"]]


def test_calls_beyond_the_most_are_dropped() -> None:
    two = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>' * 2
    assert read("hermes", list(two), most=1) == ("", [("get", '{"a": 1}')])


# --- grammars ---------------------------------------------------------------------------------------------------------


def coder(*added: str) -> PreTrainedTokenizerFast:
    """Bytes, with special tokens beside them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"</s>": 256}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": list(added)})
    return found


CODERS = {
    "plain": coder(),
    "llama": coder(tool_calls.PYTHON_TAG),
    "mistral": coder(tool_calls.TOOL_CALLS),
    "mistral 11": coder(tool_calls.TOOL_CALLS, tool_calls.ARGS, tool_calls.CALL_ID),
    "hermes": coder(tool_calls.TOOL_CALL_OPEN, tool_calls.TOOL_CALL_CLOSE),
}
SETUPS = [("llama", "plain"), ("mistral", "plain"), ("hermes", "plain"), *((n.split()[0], n) for n in list(CODERS)[1:])]


@pytest.fixture(scope="module")
def guides() -> dict[str, Any]:
    pytest.importorskip("llguidance")
    from fastgen.structured_output.backend import GrammarBackend

    return {name: GrammarBackend(c, len(c), frozenset([256])) for name, c in CODERS.items()}


def strict(*names: str) -> list[Tool]:
    return [
        t.model_copy(update={"function": t.function.model_copy(update={"strict": t.function.name in names})})
        for t in TOOLS
    ]


@pytest.mark.parametrize("form, name", SETUPS)
@pytest.mark.parametrize("many", [True, False])
def test_whatever_a_grammar_allows_is_read_as_calls(form: Any, name: str, many: bool, guides: dict[str, Any]) -> None:
    """Tokens drawn at random from what it allows: arguments that follow the schema, and no other text."""
    dice, vocabulary = random.Random(0), CODERS[name]
    markers = tool_calls.find_marker_token_ids(vocabulary)
    grammar = tool_calls.build_grammar(form, TOOLS, "required", markers, parallel_calls=many)
    counts = set()
    for _ in range(4):
        guide, tokens = guides[name].make_matchers(grammar)[0], list[int]()
        while not guide.matcher.is_stopped():
            bits = guides[name].compute_token_masks([(0, guide)], 1)[0]
            tokens.append(dice.choice([t for t in range(len(vocabulary)) if bits[t // 32] >> t % 32 & 1]))
            guide.accept_token(tokens[-1])
        shown = {id: text for text, id in markers.items()}
        decoder = Detokenizer(vocabulary, [], visible_special_tokens=shown)
        text = "".join(decoder.push(t)[0] for t in tokens) + decoder.flush()
        assert text == decode_at_once(
            Detokenizer(vocabulary, [], visible_special_tokens=shown, stream_text=False), tokens
        )
        content, calls = read(form, [text])
        assert content == "" and calls, text
        counts.add(len(calls))
        for function, arguments in calls:
            value = json.loads(arguments)
            if function == "get":
                assert value.keys() == {"city", "days"} and value["city"] in WEATHER["properties"]["city"]["enum"]
                assert value["days"] in range(1, 10)
            else:
                assert value == {}
    assert counts == {1} if not many or form == "llama" else max(counts) > 1


def allows(guides: Any, vocabulary: Any, grammar: str, text: str) -> bool:
    guide = guides.make_matchers(grammar)[0]
    tokens = vocabulary(text, add_special_tokens=False).input_ids
    return guide.matcher.validate_tokens(tokens) == len(tokens)


GOOD = {
    "llama": '{"name": "get", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Paris", "days": 3}}]',
    "mistral 11": '[TOOL_CALLS]get[ARGS]{"city": "Paris", "days": 3}',
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
}


@pytest.mark.parametrize("form, name", SETUPS)
def test_strict_functions_are_enforced_also_where_text_may_come(form: Any, name: str, guides: dict[str, Any]) -> None:
    """Any text, and calls that follow; arguments of the others are any object."""
    grammar = tool_calls.build_grammar(
        form, strict("get"), "auto", tool_calls.find_marker_token_ids(CODERS[name]), parallel_calls=True
    )
    check, good = partial(allows, guides[name], CODERS[name], grammar), GOOD.get(name, GOOD[form])
    before = "" if form == "llama" else "Well, 1 < 2 [or so].\n"
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
TOLD = "{% for t in tools or () %}{{ t | tojson }}\n{% endfor %}"
TEMPLATES = {form: TOLD + text for form, text in TEMPLATES.items()}


@pytest.mark.parametrize("form", tool_calls.TOOL_CALL_FORMATS)
def test_a_call_goes_to_the_model_and_comes_back(form: tool_calls.ToolCallFormat) -> None:
    """What the template makes of a call is read as that call; its result is told with the same id."""
    vocabulary = coder()
    vocabulary.chat_template = TEMPLATES[form]
    assert tool_calls.detect_format(vocabulary) == form
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
    said = tool_calls.adapt_calls_to_template(to_template_dicts(messages), form)
    lines = tokenizer.render(vocabulary, said, [tool.to_template_dict() for tool in TOOLS]).split("\n")
    assert json.loads(lines[0]) == GIVEN[0] and json.loads(lines[1])["function"]["parameters"]["type"] == "object"
    text = "\n".join(lines).partition("assistant:")[2].partition("tool:")[0]
    content, [(name, arguments)] = read(form, [text])
    assert (content.strip(), name, json.loads(arguments)) == ("", "get", json.loads(HARD))
    assert said[2]["name"] == "get" and said[2]["tool_call_id"] == said[1]["tool_calls"][0]["id"]


# Idioms of templates that have been published: what they do with an answer's content and its calls.
IDIOMS = {
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
    """The prompt of a conversation in which a tool was called: what the server's clients send back."""
    vocabulary = coder()
    vocabulary.chat_template = template
    service = worker(vocabulary)
    service.tool_call_format = tool_calls.detect_format(vocabulary)
    messages = [ChatMessage.model_validate(message) for message in SECOND_TURN]
    return vocabulary.decode(asyncio.run(service.encode_chat(messages, TOOLS, calls_enforced=True)))


@pytest.mark.parametrize("name", IDIOMS)
def test_second_turns_of_templates_of_all_kinds(name: str) -> None:
    """An answer without content has it empty, and arguments are objects or text, as the template takes them."""
    text = second_turn("{% for m in messages %}" + IDIOMS[name] + "|{% endfor %}")
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
    """As TRL brings them. R1's leaves out calls beside content that is empty; the others tell of them."""
    if not (path := PUBLISHED / f"{name}.jinja").is_file():
        pytest.skip("TRL does not bring it")
    text = second_turn(path.read_text(encoding="utf-8"))
    assert "Sunny." in text and (
        '"city": "Paris"' in text or "<arg_value>Paris" in text or name == "deepseek_r1_distill"
    )
    assert "{'city'" not in text and '\\"city' not in text


@pytest.mark.parametrize("name", CODERS)
def test_families_by_their_tokens(name: str) -> None:
    """Where the template says nothing."""
    assert tool_calls.detect_format(CODERS[name]) == (None if name == "plain" else name.split()[0])
    assert tool_calls.detect_format(None) is None and tool_calls.find_marker_token_ids(None) == {}


# --- answers ----------------------------------------------------------------------------------------------------------

SCRIPT = 'Well.\n<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>\n'
SCRIPT += '<tool_call>{"name": "get_time"}</tool_call>'


@pytest.mark.parametrize(
    "reason, named, wanted", [("stop", False, "tool_calls"), ("stop", True, "stop"), ("length", False, "length")]
)
@pytest.mark.parametrize("length", [len(SCRIPT), 70, 12, 5])
def test_chunks_add_up_to_the_whole_answer(reason: str, named: bool, wanted: str, length: int) -> None:
    """For each of several choices; every token's logprob is told once."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    tokens = BYTE_LEVEL(SCRIPT[:length], add_special_tokens=False).input_ids
    params = SamplingParams(n=2, logprobs=0, max_tokens=500)
    form = ChatResponseBuilder(vocabulary, partial(ToolCallParser, "hermes", NAMES), is_function_named=named)
    choices = [Choice(i, vocabulary, [], params, stream_text=True, visible_special_tokens={}) for i in range(2)]
    for i, token in enumerate(tokens):
        for choice in choices:
            end = reason if i == len(tokens) - 1 else None
            part = form.build_chunk(choice, choice.push(TokenDelta(choice.index, [token], [-1.0], None, end)))
            found = choice.__dict__.setdefault("found", {"content": "", "calls": [], "logprobs": 0})
            assert part is not None
            found["logprobs"] += len(part["logprobs"]["content"])
            found["content"] += part["delta"].get("content") or ""
            for call in part["delta"].get("tool_calls", ()):
                if call["index"] == len(found["calls"]):
                    found["calls"].append(call["function"])
                else:
                    found["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            found["reason"] = part["finish_reason"]
    for choice in choices:
        full, found = form.build_choice(choice, None), choice.__dict__["found"]
        calls = [call["function"] for call in full["message"].get("tool_calls", ())]
        assert calls == found["calls"] and len(calls) == {12: 0, 5: 0, 70: 1}.get(length, 2)
        assert (full["message"]["content"] or "") == found["content"]
        assert full["finish_reason"] == found["reason"] == (wanted if calls else reason)
        assert found["logprobs"] == len(full["logprobs"]["content"]) == len(tokens)


DRAFT = '<tool_call>{"name": "get", "arguments": {}}</tool_call>'
CALL = '<tool_call>{"name": "get_time"}</tool_call>'
# the prompt's end, text, and of it: reasoning, content, names called
REASONED: list[tuple[str, str, str, str, list[str]]] = [
    ("", f"<think>\nFirst {DRAFT}?\n</think>\n\n{CALL}", f"First {DRAFT}?", "", ["get_time"]),
    ("", f"\n<think>{DRAFT}</think>No.", DRAFT, "No.", []),
    ("", f"<think>{DRAFT}", DRAFT, "", []),
    ("", "<think>\n\n</think>\n\nHi </think> there", "", "Hi </think> there", []),
    ("", f"<think>a < b </thin </think> Well.\n{CALL}", "a < b </thin", "Well.", ["get_time"]),
    ("", "<think>Hm. \n", "Hm.", "", []),
    ("", "<thin", "", "<thin", []),
    ("", " so <think>x</think>", "", " so <think>x</think>", []),
    ("", f"See <think>{DRAFT}</think> {CALL}", "", f"See <think>{DRAFT}</think>", ["get_time"]),
    ("assistant<think>\n", f"Hm {DRAFT}</think>{CALL}", f"Hm {DRAFT}", "", ["get_time"]),
    ("assistant<think>\n", f"{DRAFT} and on", f"{DRAFT} and on", "", []),
    ("<think>", "<think>\nHm\n</think>\nYes", "Hm", "Yes", []),
    ("<think>x</think>", "Yes", "", "Yes", []),
    ("", f"[THINK]Hm {DRAFT}[/THINK]{CALL}", f"Hm {DRAFT}", "", ["get_time"]),
    ("[THINK]", "a</think>b[/THINK]c", "a</think>b", "c", []),
]


@pytest.mark.parametrize("prompt, text, thought, content, names", REASONED, ids=lambda x: str(x)[:30])
def test_reasoning_is_taken_out_before_calls_are_read(
    prompt: str, text: str, thought: str, content: str, names: list[str]
) -> None:
    """Whole, and streamed wherever the text is cut; a call that is drafted there is none."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    for tooled in (True, False):
        form = ChatResponseBuilder(vocabulary, partial(ToolCallParser, "hermes", NAMES) if tooled else None)
        for cuts in ([], range(1, len(text)), *([i] for i in range(1, len(text)))):
            form.parsers.clear()
            tokens = BYTE_LEVEL(prompt, add_special_tokens=False).input_ids
            choice = Choice(0, vocabulary, tokens, SamplingParams(), stream_text=True, visible_special_tokens={})
            ends, parts = [0, *cuts, len(text)], list[dict[str, Any]]()
            for a, b in zip(ends, ends[1:], strict=False):
                new = ChoiceDelta(text[a:b], finish_reason="stop" if b == len(text) else None)
                choice.accumulated.text, choice.accumulated.finish_reason = (
                    choice.accumulated.text + new.text,
                    new.finish_reason,
                )
                if part := form.build_chunk(choice, new):
                    parts.append(part)
            deltas = [part["delta"] for part in parts]
            full = form.build_choice(choice, None)
            message = full["message"]
            assert (
                "".join(d.get("reasoning_content", "") for d in deltas)
                == message.get("reasoning_content", "")
                == thought
            )
            whole = "".join(d.get("content") or "" for d in deltas)
            called = [c["function"]["name"] for d in deltas for c in d.get("tool_calls", ()) if "id" in c]
            assert whole == (message["content"] or "") and called == [
                c["function"]["name"] for c in message.get("tool_calls", ())
            ]
            assert full["finish_reason"] == parts[-1]["finish_reason"] == ("tool_calls" if called else "stop")
            if tooled:
                assert (whole, called) == (content, names)
            assert message["content"] is not None or thought or called


def test_an_answer_that_follows_a_grammar_is_no_reasoning() -> None:
    """Even after a prompt that opens it; a turn in which calls are free may begin with some."""
    vocabulary = TokenDecoder(BYTE_LEVEL)
    prompt = BYTE_LEVEL("<think>\n", add_special_tokens=False).input_ids
    made = Choice(0, vocabulary, prompt, SamplingParams(), stream_text=True, visible_special_tokens={})
    made.accumulated.text = '{"a": 1}'
    assert (
        ChatResponseBuilder(vocabulary, may_reason=False).build_choice(made, None)["message"]["content"] == '{"a": 1}'
    )
    service = worker(coder())
    service.tool_call_format = "hermes"
    for choice, reasons in (("auto", True), ("required", False)):
        body = asks(tools=strictly(), tool_choice=choice)
        assert (
            endpoints._make_tool_call_builder(service, body, body.tool_choice_mode, parallel_calls=True).may_reason
            == reasons
        )


def strictly() -> list[dict[str, Any]]:
    return [GIVEN[0] | {"function": GIVEN[0]["function"] | {"strict": True}}]


def test_markers_that_are_special_tokens_are_seen() -> None:
    """Other special tokens are not; nothing changes without calls."""
    vocabulary = CODERS["mistral"]
    id = tool_calls.find_marker_token_ids(vocabulary)[tool_calls.TOOL_CALLS]
    tokens = vocabulary('é[TOOL_CALLS] [{"name"').input_ids + [256]
    assert decode_at_once(Detokenizer(vocabulary, [], stream_text=False), tokens) == 'é [{"name"'
    for decoder in (
        Detokenizer(vocabulary, [1, id, 2], visible_special_tokens={id: tool_calls.TOOL_CALLS}),
        Detokenizer(vocabulary, [], visible_special_tokens={id: tool_calls.TOOL_CALLS}),
    ):
        assert "".join(decoder.push(t)[0] for t in tokens) + decoder.flush() == 'é[TOOL_CALLS] [{"name"'


# --- what is refused --------------------------------------------------------------------------------------------------


def worker(vocabulary: PreTrainedTokenizerFast | None) -> AppState:
    """What the endpoints use, without an engine. The form of its model's calls is not known."""
    made = AppState.__new__(AppState)
    made.tokenizer, made.token_decoder, made.tool_call_format, made.marker_token_ids = (
        vocabulary,
        TokenDecoder(vocabulary),
        None,
        {},
    )
    made.template_supports_tools, made.tokenizer_thread, made.wants_text_arguments, made.max_prompt_chars = (
        False,
        TokenizerThread("texts"),
        {},
        10**6,
    )
    made.special_tokens_in_content = "text"
    return made


@pytest.mark.parametrize("part", ["tools", "calls", "messages"])
def test_what_a_template_writes_is_bounded(part: str) -> None:
    """Functions and calls count as texts do: a lot of them is for the thread of long texts, and more is refused."""
    coder = copy.deepcopy(CODERS["hermes"])
    coder.chat_template = "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.tool_calls }}{% endfor %}"
    service = worker(coder)
    service.long_text_thread, service.long_text_tokenizer, service.num_long_texts, service.context_length = (
        TokenizerThread("long"),
        None,
        0,
        2048,
    )
    call = {"id": "a", "type": "function", "function": {"name": "get", "arguments": json.dumps({"x": "y" * 100_000})}}
    body = {
        "tools": asks(tools=[{"type": "function", "function": {"name": "get", "description": "y" * 100_000}}]),
        "calls": asks(messages=[{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]),
        "messages": asks(messages=[{"role": "user", "content": ""}] * 8192),
    }[part]
    with pytest.raises(APIError, match="without a tokenizer"):  # as the thread of long texts has none here
        asyncio.run(service.encode_chat(body.messages, body.tools))
    service.long_text_tokenizer, service.max_prompt_chars = service.tokenizer, 99_999
    with pytest.raises(APIError, match=r"messages: \d{6} characters are more than the 99999 ") as e:
        asyncio.run(service.encode_chat(body.messages, body.tools))
    assert (e.value.status, e.value.param, e.value.code) == (400, "messages", "context_length_exceeded")


def asks(**given: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | given)


def test_what_does_not_go_together() -> None:
    """By the name of the field."""
    service, form = worker(None), {"type": "json_object"}
    for body, param in (
        (asks(tool_choice="auto"), "tool_choice"),
        (asks(parallel_tool_calls=True), "parallel_tool_calls"),
        (asks(tools=GIVEN, tool_choice={"type": "function", "function": {"name": "got"}}), "tool_choice"),
        (asks(tools=GIVEN), "tools"),  # with a family that is not known
        (asks(tools=GIVEN, tool_choice="required", response_format=form), "response_format"),
    ):
        with pytest.raises(APIError) as e:
            endpoints._make_tool_call_builder(service, body, body.tool_choice_mode, parallel_calls=True)
        assert e.value.param == param and param in e.value.message
    assert (
        asks(tools=GIVEN).tool_choice_mode == "auto"
        and asks(tool_choice="none").tool_choice_mode == "none"
        and asks().tool_choice_mode == "none"
    )


def test_functions_are_checked() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    for wrong in (
        {"tools": [GIVEN[0], GIVEN[0]]},
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
            asks(**wrong)
    with pytest.raises(APIError, match="tool_call_id: no call before it"):
        to_template_dicts([ChatMessage.model_validate({"role": "tool", "content": "x", "tool_call_id": "b"})])


def test_templates_that_cannot_have_it() -> None:
    """A template that ignores tools, and one that fails on what calls are made of."""
    vocabulary = coder()
    service = worker(vocabulary)
    user = ChatMessage.model_validate({"role": "user", "content": "x"})
    for template, param in (
        ("{{ messages[0].content }}", "tools"),
        ("{{ 'a' + tools[0] }}", "messages"),
        ("{{ raise_exception('no tools') if tools }}", "messages"),
    ):
        vocabulary.chat_template = template
        with pytest.raises(APIError) as e:
            asyncio.run(service.encode_chat([user], TOOLS))
        assert e.value.status == 400 and e.value.param == param, e.value.message
    vocabulary.chat_template = "{{ messages[0].content }}"  # grammars need no template's help
    assert asyncio.run(service.encode_chat([user], TOOLS, calls_enforced=True)) == vocabulary("x").input_ids


def test_special_tokens_of_calls_reach_their_reader() -> None:
    """From the tokenizer's markers to the answer, as a server has it."""
    vocabulary = CODERS["mistral 11"]
    service = worker(vocabulary)
    service.tool_call_format, service.marker_token_ids = (
        tool_calls.detect_format(vocabulary),
        tool_calls.find_marker_token_ids(vocabulary),
    )
    body = asks(tools=GIVEN, parallel_tool_calls=False)
    form = endpoints._make_tool_call_builder(service, body, body.tool_choice_mode, parallel_calls=False)
    assert body.to_sampling_params().grammar is None
    client, metrics = MagicMock(spec=EngineClient), MagicMock(spec=Metrics)
    [choice] = CompletionResponse(
        client, metrics, form, "", "", [[1]], body.to_sampling_params(), {}, stream=False
    ).choices
    text = 'Hm.[TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]get_time[ARGS]{}'
    choice.push(TokenDelta(0, [*vocabulary(text).input_ids, 256], None, None, "stop"))
    message = form.build_choice(choice, None)["message"]
    [call] = message["tool_calls"]
    assert message["content"] == "Hm." and call["function"] == {"name": "get", "arguments": '{"a": 1}'}
    body = asks(tools=strictly())
    endpoints._make_tool_call_builder(service, body, body.tool_choice_mode, parallel_calls=True)
    assert (body.to_sampling_params().grammar or "").startswith("lark:") and body.client_field_names()[
        "lark"
    ] == "tools"
