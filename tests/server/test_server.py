"""`fgserve` over HTTP: responses equal the library's output, also while clients, workers or the engine fail."""

import asyncio
import contextlib
import gzip
import json
import multiprocessing
import os
import pickle
import random
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal
from unittest.mock import AsyncMock, MagicMock

import httpx
import openai
import pydantic
import pytest
import zmq
from serving import SETTINGS, SPEC, Server, checkpoint
from test_tokenizer import BYTE_LEVEL, TEMPLATE

import fastgen
from fastgen import Output, SamplingParams
from fastgen.cli import parsers, serve
from fastgen.cli.hydra_config import parse_arguments
from fastgen.extras import install_command
from fastgen.server import app_state, http_worker, middleware
from fastgen.server.completion_response import dump_json
from fastgen.server.engine_client import EngineClient
from fastgen.server.engine_process import EngineInfo, EngineServer, Reply, Sender, TokenDelta
from fastgen.server.errors import APIError, bad_request
from fastgen.structured_output.trial_process import GrammarCancelled

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KEY = "sesame"
QUESTION = [{"role": "user", "content": "Hello, world!"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose chat template renders tools in the format of Qwen."""
    folder = checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    names = "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call>{% endif %}"
    template = TEMPLATE.replace("m['content']", "m['content'] or ''").replace(
        "<|im_end|>", "{{ m.tool_calls }}<|im_end|>", 1
    )
    (folder / "chat_template.jinja").write_text(names + template)
    return folder


@pytest.fixture(scope="module")
def library(tiny: Path) -> Iterator[fastgen.Engine]:
    """An engine without a server, for reference outputs."""
    settings: dict[str, Any] = dict(page_size=16, cache_tokens=4096, max_num_seqs=24, token_budget=256)
    with fastgen.Engine.from_pretrained(tiny, progress=False, **settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for traces of the server without a tokenizer."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def servers(tiny: Path, profiles: Path) -> Iterator[tuple[Server, Server]]:
    """A server with two workers and a key, and one whose model has no tokenizer, started in parallel."""
    options = ("--workers", "2", "--max-queue", "160", "--max-body", "200000", "--grace", "8")
    names = ("--served-model-name", "tiny", "--served-model-name", "alias")
    servers = (
        Server(str(tiny), *SETTINGS, *options, *names, key=KEY),
        Server("debug", *SETTINGS, "--profile-dir", str(profiles)),
    )
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(servers: tuple[Server, Server]) -> Server:
    """The server with a tokenizer; the last test shuts it down."""
    return servers[0].ready()


@pytest.fixture(scope="module")
def bare(servers: tuple[Server, Server]) -> Server:
    """The server without a tokenizer; the last test kills its engine."""
    return servers[1].ready()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ask(library: fastgen.Engine, prompt: Any, **sampling: Any) -> Output:
    return library.generate([prompt], SamplingParams(**sampling), progress=False)[0]


def texts(output: Output) -> list[str]:
    return [c.text for c in output.completions]


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yields the values of a stream, which must end with [DONE] or an error."""
    last = None
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: "), line
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                yield json.loads(last)
    assert last == "[DONE]" or "error" in json.loads(last or "{}")


def quiet(server: Server) -> None:
    """Waits until no request runs or waits and no page is in use."""

    def idle() -> bool:
        now = server.status()
        return (now["running"], now["waiting"], now["held_pages"]) == (0, 0, 0)

    server.until(idle, 20)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """A chat returns the library's text and the token counts."""
    expected = ask(library, QUESTION, **GREEDY)
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, **GREEDY)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == texts(expected)[0]
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage and usage.prompt_tokens == len(expected.prompt_token_ids) and usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12


class Person(pydantic.BaseModel):
    """The schema of an answer."""

    name: Literal["Ann", "Bo"]
    age: Annotated[int, pydantic.Field(ge=0, le=99)]


def test_arguments_of_vllm(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """Options of the chat template, constraints and the form of the text are as in the library."""
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ab"}]
    template = {"add_generation_prompt": False, "continue_final_message": True, "chat_template_kwargs": {"x": 1}}
    sampling: dict[str, Any] = {"allowed_token_ids": [*range(40, 90)], "bad_words": ["A"], "skip_special_tokens": False}
    sampling |= {"truncate_prompt_tokens": 5}
    (expected,) = library.chat(messages, SamplingParams(temperature=0, max_tokens=8, **sampling), **template)
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=8, extra_body=template | sampling
    )
    assert answer.choices[0].message.content == expected.completions[0].text
    assert answer.usage is not None and answer.usage.prompt_tokens == 5
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"continue_final_message": True})
    with pytest.raises(openai.BadRequestError, match="'tokenize' is no variable"):
        body = {"chat_template_kwargs": {"tokenize": True}}
        client.chat.completions.create(model="tiny", messages=messages, extra_body=body)


def test_answers_that_follow_a_schema(client: openai.OpenAI) -> None:
    """The official client parses answers into a pydantic model."""
    parsed = []
    for seed in range(6):
        with contextlib.suppress(openai.LengthFinishReasonError):  # a random model may go on with white space
            answer = client.chat.completions.parse(
                model="tiny", messages=QUESTION, response_format=Person, seed=seed, max_tokens=120
            )  # type: ignore[call-overload]
            parsed.append(answer.choices[0].message.parsed)
    assert parsed and all(isinstance(p, Person) for p in parsed)


def test_hard_grammars_are_refused_beside_others(server: Server) -> None:
    """Grammars that would crash or stall the engine are rejected, and other clients' streams continue."""
    letters = [{"type": "string", "pattern": f".*{chr(97 + i)}.*{chr(98 + i)}.*"} for i in range(25)]
    chain = "\n".join(["start: r0", *(f'r{i}: "a" r{i + 1}' for i in range(9000)), 'r9000: "b"'])
    hard = [
        ({"guided_json": '{"items": ' * 500 + "{}" + "}" * 500}, "guided_json grammar: it is nested 501 levels deep"),
        ({"guided_grammar": chain}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"allOf": letters}}}, "n": 8},
         "response_format grammar: it takes (longer than 2 s|more than 256 MiB)"),
    ]  # fmt: skip
    gaps, done = list[float](), threading.Event()

    def watch() -> None:
        while not done.is_set():
            body = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
            last = time.monotonic()
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=server.headers) as stream:
                for _ in events(stream):
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            post = [pool.submit(server.http.post, "/v1/completions", json={"prompt": "x"} | body) for body, _ in hard]
            replies = [p.result() for p in post]
    finally:
        done.set()
        watcher.join()
    for reply, (_, message) in zip(replies, hard, strict=True):
        if message is None:  # only an engine's own stack is too small for it
            assert set(reply.raise_for_status().json()["choices"][0]["text"]) == {"a"}
        else:
            assert reply.status_code == 400 and re.match(message, reply.json()["error"]["message"]), reply.text
    assert max(gaps) < 2, "others' streams stand still"


GUIDED: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"guided_regex": "[0-9]{3}(ab|cd)"}, lambda text: re.fullmatch("[0-9]{3}(ab|cd)", text)),
    ({"guided_choice": ['say "yes"', "no\n"]}, lambda text: text in ('say "yes"', "no\n")),
    ({"guided_grammar": 'start: "a" | "(" start ")"'}, lambda text: re.fullmatch(r"\(*a\)*", text)),
    ({"guided_json": {"enum": [1, "x"]}}, lambda text: json.loads(text) in (1, "x")),
    ({"response_format": {"type": "json_object"}, "max_tokens": 300}, lambda text: isinstance(json.loads(text), dict)),
]


@pytest.mark.parametrize("body, fits", GUIDED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_answers_that_follow_a_grammar(server: Server, body: dict[str, Any], fits: Callable[[str], Any]) -> None:
    """Finished output of a random model matches the grammar, and streams return the same text."""
    fields = {"prompt": "Hello", "n": 6, "seed": 3, "max_tokens": 60} | body
    complete = server.http.post("/v1/completions", json=fields).raise_for_status().json()["choices"]
    ended = [c["text"] for c in complete if c["finish_reason"] == "stop"]
    assert ended and all(fits(text) for text in ended), ended
    parts = [""] * 6
    with server.http.stream("POST", "/v1/completions", json=fields | {"stream": True}) as stream:
        for event in events(stream):
            parts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert parts == [c["text"] for c in complete]


def function(name: str, **more: Any) -> Any:
    """Returns a tool, or a tool choice, as clients send it."""
    return {"type": "function", "function": {"name": name} | more}


PARAMETERS = Person.model_json_schema() | {"additionalProperties": False}
FUNCTIONS = [function("meet", parameters=PARAMETERS, strict=True), function("wave")]


def called(calls: Any) -> list[tuple[str, str]]:
    """Returns names and arguments of calls, after checking the arguments against the schema."""
    for call in calls:
        assert call.id.startswith("call_") and call.type == "function"
        value = json.loads(call.function.arguments)
        assert call.function.name in ("meet", "wave")
        assert Person.model_validate(value) if call.function.name == "meet" else value == {}
    return [(call.function.name, call.function.arguments) for call in calls]


@pytest.mark.parametrize("choice", ["required", function("meet")], ids=["required", "named"])
def test_calls(client: openai.OpenAI, server: Server, choice: Any) -> None:
    """Enforced calls of a random model follow their schemas. The official client assembles the same calls from
    streams, and accepts the calls' results."""
    ask_for: dict[str, Any] = dict(model="tiny", messages=QUESTION, tools=FUNCTIONS, tool_choice=choice, n=2, seed=4)
    ask_for |= {"max_tokens": 300, "parallel_tool_calls": False, "logprobs": True}
    complete = client.chat.completions.create(**ask_for)
    ended = "tool_calls" if choice == "required" else "stop"
    expected = [called(c.message.tool_calls) for c in complete.choices]
    assert [len(calls) for calls in expected] == [1, 1]
    assert all(c.finish_reason == ended and c.message.content is None for c in complete.choices)
    with client.chat.completions.stream(**ask_for, stream_options={"include_usage": True}) as stream:
        actual = stream.get_final_completion()
    assert [called(c.message.tool_calls) for c in actual.choices] == expected
    assert [c.finish_reason for c in actual.choices] == [ended] * 2 and actual.usage and complete.usage
    assert actual.usage.completion_tokens == complete.usage.completion_tokens
    for a, b in zip(actual.choices, complete.choices, strict=True):
        assert a.logprobs and b.logprobs and a.logprobs.content and b.logprobs.content and not a.message.content
        assert [x.token for x in a.logprobs.content] == [x.token for x in b.logprobs.content]

    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as api:
            arguments = ""
            async for chunk in await api.chat.completions.create(**ask_for | {"n": 1}, stream=True):
                for call in chunk.choices[0].delta.tool_calls or ():
                    arguments += call.function.arguments
            return arguments

    assert asyncio.run(streamed()) == expected[0][0][1]
    message = complete.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    answer = client.chat.completions.create(model="tiny", messages=[*QUESTION, message, result], **GREEDY)  # type: ignore[list-item]
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"


def test_calls_that_may_be_or_are_cut(client: openai.OpenAI) -> None:
    """A response may have several calls, text without a call, or a call cut at the limit."""
    ask_for: dict[str, Any] = dict(model="tiny", messages=QUESTION, tools=FUNCTIONS, seed=1)
    unending: dict[str, Any] = {"logit_bias": {str(BYTE_LEVEL.eos_token_id): -100}, "max_tokens": 250}
    many = client.chat.completions.create(**ask_for, tool_choice="required", **unending).choices[0]
    assert many.finish_reason == "length" and len(called(many.message.tool_calls[:-1])) > 1
    free = client.chat.completions.create(**ask_for, max_tokens=20).choices[0]
    assert free.message.content and free.message.tool_calls is None
    cut = client.chat.completions.create(**ask_for, tool_choice=function("meet"), max_tokens=50).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls
    assert '{"name": "'.startswith(cut.message.tool_calls[0].function.arguments[:4])
    none = client.chat.completions.create(**ask_for, tool_choice="none", max_tokens=8)
    response = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
    assert none.usage and response.usage and none.usage.prompt_tokens == response.usage.prompt_tokens


def test_chat_without_a_limit_ends_with_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, extra_body={"ignore_eos": True}
    )  # type: ignore[call-overload]
    assert answer.usage and answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"


def test_chat_content_in_parts_and_from_a_developer(client: openai.OpenAI, library: fastgen.Engine) -> None:
    conversation = [{"role": "system", "content": "ab c"}, {"role": "user", "content": "Hello"}]
    expected = texts(ask(library, conversation, **GREEDY))
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages: Any = [{"role": "developer", "content": "ab c"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="alias", messages=messages, **GREEDY)
    assert [answer.choices[0].message.content] == expected and answer.model == "alias"


def test_streams_are_what_whole_answers_are(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """Streams of chats and completions join to the full text; a last chunk has token counts only if requested."""
    expected = ask(library, QUESTION, **GREEDY)
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == texts(expected)[0]
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1

    parts = list(client.completions.create(model="tiny", prompt="Hello", stream=True, n=2, seed=3))
    actual = ["".join(c.choices[0].text for c in parts if c.choices[0].index == i) for i in range(2)]
    assert actual == texts(ask(library, "Hello", n=2, seed=3, max_tokens=16))


PROMPTS: list[Any] = ["Hello", ["Hello", "abc abc"], [41, 70, 77], [[41, 70, 77], [5, 6]]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "texts", "tokens", "lists of tokens"])
def test_forms_of_prompts(client: openai.OpenAI, library: fastgen.Engine, prompt: Any) -> None:
    """Each form of a prompt returns the library's completions in order."""
    many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    expected = [t for p in many for t in texts(ask(library, p, n=2, seed=7, max_tokens=9))]
    answer = client.completions.create(model="tiny", prompt=prompt, n=2, seed=7, max_tokens=9)
    assert [c.text for c in answer.choices] == expected
    assert [c.index for c in answer.choices] == list(range(len(expected)))
    assert answer.usage and answer.usage.completion_tokens == 9 * len(expected)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": -(2**63), "temperature": 0.5, "top_p": 0.8},
    {"seed": 2, "top_k": 3},
    {"seed": 3, "min_p": 0.3},
    {"seed": 4, "presence_penalty": 2.0, "frequency_penalty": -1.5},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 0, "logit_bias": {11: 100}},
    {"temperature": 0, "stop_token_ids": [11], "logit_bias": {11: 100}, "min_tokens": 5},
    {"temperature": 0, "logit_bias": {BYTE_LEVEL.eos_token_id: 100}},
    {"temperature": 0, "logit_bias": {BYTE_LEVEL.eos_token_id: 100}, "ignore_eos": True},
    {"seed": 5, "n": 3},
    {"seed": 6, "max_tokens": 1},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: " ".join(s))
def test_sampling(server: Server, library: fastgen.Engine, sampling: dict[str, Any]) -> None:
    """Sampling parameters return the library's tokens and text."""
    fields = {"max_tokens": 16} | sampling
    expected = ask(library, [41, 70, 77], **fields).completions
    for path, body in (
        ("/inference/v1/generate", {"token_ids": [41, 70, 77], "sampling_params": fields}),
        ("/v1/completions", {"prompt": [41, 70, 77]} | fields),
    ):
        choices = server.http.post(path, json=body).raise_for_status().json()["choices"]
        assert [c["finish_reason"] for c in choices] == [c.finish_reason for c in expected]
        if "generate" in path:
            assert [c["token_ids"] for c in choices] == [c.token_ids for c in expected]
        else:
            assert [c["text"] for c in choices] == [c.text for c in expected]


def test_stop_strings(server: Server, client: openai.OpenAI, library: fastgen.Engine) -> None:
    """Stop strings cut single completions, streamed or not, and the engine stops generating them."""
    fields: dict[str, Any] = {"n": 3, "seed": 1, "max_tokens": 100}
    plain = texts(ask(library, "Hello", **fields))
    stop = [plain[0][4:6], plain[1][30:32]]
    expected = ask(library, "Hello", stop=tuple(stop), **fields).completions
    assert {c.finish_reason for c in expected[:2]} == {"stop"}
    before = server.status()["generation_tokens"]
    answer = client.completions.create(model="tiny", prompt="Hello", stop=stop, **fields)
    assert [(c.text, c.finish_reason) for c in answer.choices] == [(c.text, c.finish_reason) for c in expected]
    reasons = [c.stop_reason for c in expected]
    assert set(reasons[:2]) == set(stop) and [(c.model_extra or {})["stop_reason"] for c in answer.choices] == reasons
    assert answer.usage and answer.usage.completion_tokens == sum(len(c.token_ids) for c in expected)
    assert server.status()["generation_tokens"] - before <= answer.usage.completion_tokens + 3 * 10
    chunks = list(client.completions.create(model="tiny", prompt="Hello", stop=stop, stream=True, **fields))
    assert ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(3)] == [
        c.text for c in expected
    ]
    ends = {c.choices[0].index: c.choices[0].model_extra for c in chunks if c.choices[0].finish_reason}
    assert [ends[i] for i in range(3)] == [{"stop_reason": reason} for reason in reasons]
    quiet(server)


def test_stop_reason_of_chats(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """It is the id of stop_token_ids that ended the answer, streamed or not, and null where max_tokens did."""
    fields: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 6}
    tokens = ask(library, QUESTION, temperature=0, max_tokens=6).completions[0].token_ids
    for stop_token_ids, reason in (([tokens[3]], tokens[3]), ([], None)):
        body = {"stop_token_ids": stop_token_ids}
        choice = client.chat.completions.create(**fields, extra_body=body).choices[0]
        last = [*client.chat.completions.create(**fields, stream=True, extra_body=body)][-1].choices[0]
        assert choice.model_extra == last.model_extra == {"stop_reason": reason}
        assert choice.finish_reason == last.finish_reason == ("length" if reason is None else "stop")


def test_logprobs_of_chats(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """Each token has its logprob and the most likely tokens; streams return the same."""
    expected = ask(library, QUESTION, logprobs=2, seed=1, max_tokens=6).completions[0]
    ask_for: dict[str, Any] = {"messages": QUESTION, "logprobs": True, "top_logprobs": 2, "seed": 1, "max_tokens": 6}
    complete = client.chat.completions.create(model="tiny", **ask_for).choices[0].logprobs.content
    stream = client.chat.completions.create(model="tiny", stream=True, **ask_for)
    pieces = [x for c in stream if c.choices[0].logprobs for x in c.choices[0].logprobs.content]
    assert expected.logprobs and expected.top_logprobs
    for actual in (complete, pieces):
        assert [x.token for x in actual] == [BYTE_LEVEL.decode([t]) for t in expected.token_ids]
        assert [x.logprob for x in actual] == pytest.approx(expected.logprobs, abs=1e-4)
        tops = [[y.logprob for y in x.top_logprobs] for x in actual]
        assert tops == [pytest.approx(list(x.values()), abs=1e-4) for x in expected.top_logprobs]
        assert all(x.bytes and bytes(x.bytes).decode(errors="replace") == x.token for x in actual)


def test_logprobs_of_completions_and_echo(client: openai.OpenAI, library: fastgen.Engine) -> None:
    """Logprobs begin with the prompt's, None for the first token; offsets locate tokens in the text."""
    expected = ask(library, "Hello, world!", logprobs=1, prompt_logprobs=1, temperature=0, max_tokens=6)
    answer = client.completions.create(
        model="tiny", prompt="Hello, world!", echo=True, logprobs=1, n=2, temperature=0, max_tokens=6
    )
    for choice in answer.choices:
        assert choice.text == "Hello, world!" + texts(expected)[0]
        actual = choice.logprobs
        assert actual and actual.tokens and actual.token_logprobs and actual.text_offset and actual.top_logprobs
        values = [*(expected.prompt_logprobs or []), *(expected.completions[0].logprobs or [])]
        assert actual.token_logprobs[0] is None
        assert actual.token_logprobs[1:] == pytest.approx(values[1:], abs=1e-4)
        assert actual.tokens == [
            BYTE_LEVEL.decode([t]) for t in expected.prompt_token_ids + expected.completions[0].token_ids
        ]
        assert len(actual.tokens) == len(actual.text_offset) == len(actual.top_logprobs)
        for token, at in zip(actual.tokens, actual.text_offset, strict=True):
            assert "\ufffd" in token or choice.text[at:].startswith(token)
    plain = client.completions.create(model="tiny", prompt="Hello, world!", echo=True, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in plain).startswith("Hello, world!" + texts(expected)[0])


def test_generate_gives_tokens_and_logprobs(server: Server, library: fastgen.Engine) -> None:
    """Token ids and logprobs equal the library's, streamed or not, and the prompt's too."""
    fields = {"seed": 2, "max_tokens": 7, "logprobs": 0}
    expected = ask(library, [5, 6, 7], prompt_logprobs=0, **fields)
    body = {"token_ids": [5, 6, 7], "sampling_params": fields | {"prompt_logprobs": 0}}
    actual = server.http.post("/inference/v1/generate", json=body).json()["choices"][0]
    assert actual["prompt_logprobs"][1:] == pytest.approx((expected.prompt_logprobs or [])[1:], abs=1e-4)
    with server.http.stream(
        "POST", "/v1/inference/v1/generate", json={"token_ids": [5, 6, 7], "sampling_params": fields, "stream": True}
    ) as stream:
        parts = [e["choices"][0] for e in events(stream)]
    for tokens, logprobs in (
        (actual["token_ids"], actual["logprobs"]["content"]),
        (
            [t for p in parts for t in p["token_ids"]],
            [x for p in parts if p["logprobs"] for x in p["logprobs"]["content"]],
        ),
    ):
        assert tokens == expected.completions[0].token_ids
        assert [x["logprob"] for x in logprobs] == pytest.approx(expected.completions[0].logprobs, abs=1e-4)
        assert [x["token"] for x in logprobs] == [f"token_id:{t}" for t in tokens]


def test_no_text_breaks_a_line() -> None:
    """JSON escapes all characters that split lines, and decodes to the same text."""
    text = "".join(map(chr, range(0x3000))) + "\U0001f600"
    assert len(dump_json(text).decode().splitlines()) == 1 and json.loads(dump_json(text)) == text
    assert json.loads(dump_json("a\ud800")) == "a?"


def test_cached_tokens(client: openai.OpenAI) -> None:
    prompt = [*range(100, 180)]
    used = [client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    cached = [u.prompt_tokens_details.cached_tokens for u in used if u and u.prompt_tokens_details]
    assert cached[0] == 0 and cached[1] is not None and 64 <= cached[1] < 80


def test_cached_tokens_tell_nothing_across_salts(server: Server) -> None:
    """Prefix cache hits occur only between requests with the same salt."""
    http, tokens = server.http, [*range(60, 140)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "My PIN is 4711. " * 4}]
    for path, body in (
        ("/v1/completions", {"prompt": tokens, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 1}),
    ):
        for salt, is_hit in (("mine", False), ("other", False), (None, False), ("mine", True), ("other", True)):
            usage = http.post(path, json=body | {"cache_salt": salt}).raise_for_status().json()["usage"]
            assert (usage["prompt_tokens_details"]["cached_tokens"] >= 48) == is_hit, (path, salt, usage)
    for path, body in (
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", {"messages": QUESTION}),
        ("/inference/v1/generate", {"token_ids": [5]}),
    ):
        for wrong in ("", "x" * 257, 3):
            reply = http.post(path, json=body | {"cache_salt": wrong})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "cache_salt", reply.text


def test_fields_that_are_null_are_not_given(server: Server, library: fastgen.Engine) -> None:
    """A field that is null counts as missing."""
    messages = [{**QUESTION[0], "name": None}, {"role": "assistant", "content": None, "tool_calls": None}]
    names = ("stop", "tools", "top_p", "seed", "logit_bias", "stream_options", "max_completion_tokens", "user", "n")
    body = {"messages": messages, "response_format": {"type": "text"}, **GREEDY, **dict.fromkeys(names)}
    answer = server.http.post("/chat/completions", json=body).raise_for_status().json()
    conversation = [QUESTION[0], {"role": "assistant", "content": ""}]
    assert answer["choices"][0]["message"]["content"] == texts(ask(library, conversation, **GREEDY))[0]


def test_tokens_and_models(server: Server, client: openai.OpenAI) -> None:
    http = server.http
    assert [m.id for m in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    for root in ("", "/v1"):
        actual = http.post(f"{root}/tokenize", json={"prompt": "Hello, world!"}).json()
        assert actual["tokens"] == BYTE_LEVEL("Hello, world!").input_ids and actual["count"] == len(actual["tokens"])
        assert actual["max_model_len"] == 512
        assert http.post(f"{root}/detokenize", json={"tokens": actual["tokens"]}).json() == {"prompt": "Hello, world!"}
    chat = http.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert BYTE_LEVEL.decode(chat) == "<|im_start|>user: Hello, world!<|im_end|><|im_start|>assistant: "
    tokens = http.post("/tokenize", json={"messages": QUESTION, "tools": [function("wave")]}).json()["tokens"]
    assert BYTE_LEVEL.decode(tokens).startswith("wave <tool_call><|im_start|>user: Hello")
    assert http.post("/tokenize", json={"prompt": "x", "tools": [function("wave")]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**9]}).json()["error"]["param"] == "tokens"


# --- what is refused --------------------------------------------------------------------------------------------------

COMPLETION = {"prompt": "Hello", "max_tokens": 4}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 4.0}, "max_tokens"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop_token_ids": [10**20]}, "stop_token_ids"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [330]}, "prompt"),
    ({"prompt": [[1, 10**23], [-(10**23)]]}, "prompt"),
    ({"prompt": [1] * 512}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "response_format"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"guided_regex": "["}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "nothing"}, "guided_grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_regex": "a", "min_tokens": 1}, "guided_regex"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"stream": True, "echo": True, "logprobs": 1}, "echo"),
    ({"temprature": 1}, "temprature"),
]


@pytest.mark.parametrize("body, param", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_400_names_the_field(server: Server, body: dict[str, Any], param: str) -> None:
    data = json.dumps(COMPLETION | body)
    reply = server.http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param, error
    assert param.split(".")[0] in error["message"] and error["type"] == "invalid_request_error"
    assert reply.headers["x-request-id"]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NO_SCHEMA = {"type": "object", "properties": {"a": {"type": 3}}}


def test_refusals_of_chats(client: openai.OpenAI) -> None:
    """Errors name the field, also a nested one."""
    for fields, param in (
        ({"max_completion_tokens": 600}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 5}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": 3}]}]}, "messages.0.tool_calls.0.id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [function("two words")]}, "tools.0.function.name"),
        ({"tools": [function("f"), function("f")]}, "tools"),
        ({"tools": [function("f", parameters={"type": "array"})]}, "tools.0.function.parameters"),
        ({"tools": [function("f", parameters=NO_SCHEMA)], "tool_choice": "required"}, "tools"),
        ({"tools": [function("f")], "tool_choice": "required", "extra_body": {"ignore_eos": True}}, "tools"),
        ({"tools": [function("f")], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [function("f")], "tool_choice": function("g")}, "tool_choice"),
        ({"tools": [function("f")], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ):
        with pytest.raises(openai.BadRequestError) as e:
            client.chat.completions.create(**({"model": "tiny", "messages": QUESTION} | fields))  # type: ignore[arg-type]
        assert e.value.param == param and param in str(e.value), fields


def test_other_errors(server: Server, client: openai.OpenAI) -> None:
    """Errors of keys, paths and sizes have OpenAI's form and their status."""
    for key in ("wrong", "sesam", "sesame2", "sésame"):
        reply = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="x", max_retries=0).models.list()
    for path in ("/metrics", "/status.json", "/openapi.json", "/v1/completions"):
        assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    page = httpx.get(server.url)
    assert page.status_code == 200 and "<table" in page.text and "tiny" not in page.text
    http = server.http
    assert http.get("/v1/nothing").status_code == 404 and http.get("/v1/nothing").json()["error"]["message"]
    assert http.get("/v1/completions").status_code == 405
    big = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    as_json = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=big, headers=as_json).status_code == 413
    in_chunks = http.post("/v1/completions", content=iter([big[:150_000], big[150_000:]]), headers=as_json)
    assert in_chunks.status_code == 413 and in_chunks.json()["error"]["message"]
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        body = {"lora_name": "x"} | ({"lora_path": "x"} if path[0] == "l" else {})
        assert http.post(f"/v1/{path}", json=body).status_code == 403
    many = http.post("/v1/completions", json={"prompt": ["x", "y"], "n": 128})
    assert many.status_code == 400 and "160" in many.json()["error"]["message"]


def test_one_model_answers_to_any_name(client: openai.OpenAI, server: Server) -> None:
    """Unknown model names are answered under the model's first name, aliases under their own."""
    for asked, name in (("gpt-4o-mini", "tiny"), ("a/b c", "tiny"), ("alias", "alias")):
        assert client.completions.create(model=asked, prompt="x", max_tokens=1).model == name
        assert client.models.retrieve(asked).id == name
        stream = client.chat.completions.create(model=asked, messages=QUESTION, max_tokens=1, stream=True)  # type: ignore[arg-type]
        assert {chunk.model for chunk in stream} == {name}
        for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [5]})):
            server.http.post(path, json=body | {"model": asked}).raise_for_status()


@pytest.mark.parametrize("options", [{"strict_model": True}, {}], ids=["strict", "adapters"])
def test_names_that_must_be_known(options: dict[str, Any]) -> None:
    """Unknown model names are rejected with --strict-model, and if adapters are supported."""
    state = app_state.AppState.__new__(app_state.AppState)
    state.options = app_state.ServerOptions(engine_address="", model_names=("tiny", "alias"), **options)
    state.engine_info = EngineInfo("", SPEC, 512, 8, "text", supports_adapters=not options)
    state.engine_client = MagicMock(
        spec=EngineClient, is_engine_dead=False, call_engine=AsyncMock(return_value=["poet"])
    )
    for name, answers in ((None, "tiny"), ("", "tiny"), ("alias", "alias"), ("poet", "poet")):
        assert asyncio.run(state.resolve_model_name(name)) == answers
    with pytest.raises(APIError, match="no model 'gpt' here; there is tiny, alias, poet") as e:
        asyncio.run(state.resolve_model_name("gpt"))
    assert (e.value.status, e.value.code, e.value.param) == (404, "model_not_found", "model")


LOCAL = ("localhost", "::1", "box.lan")
SENDERS: list[tuple[dict[str, str], bool]] = [
    ({"host": "localhost:5678"}, True),
    ({"host": "LOCALHOST"}, True),
    ({"host": "127.0.0.1:5678", "origin": "http://127.0.0.1:5678"}, True),
    ({"host": "[::1]:5678", "origin": "http://[::1]:5678"}, True),
    ({"host": "app.localhost:5678", "origin": "http://localhost:3000"}, True),
    ({"host": "192.168.1.5:5678", "origin": "http://192.168.1.5:5678"}, True),  # an address cannot be rebound
    ({"host": "Box.lan", "origin": "https://box.lan"}, True),
    ({}, True),
    ({"host": "evil.example:5678"}, False),
    ({"host": "localhost.evil.example"}, False),
    ({"host": "127.0.0.1.evil.example"}, False),
    ({"host": "evil.example", "origin": "http://evil.example"}, False),
    ({"host": "["}, False),
    ({"host": "localhost:5678", "origin": "https://evil.example"}, False),
    ({"host": "localhost:5678", "origin": "http://6.6.6.6"}, False),
    ({"host": "localhost:5678", "origin": "http://localhost.evil.example"}, False),
    ({"host": "localhost:5678", "origin": "null"}, False),
    ({"host": "127.0.0.1:5678", "origin": "http://127.0.0.1:5678@evil.example"}, False),
]


def make_middleware(**options: Any) -> middleware.Middleware:
    """Returns the middleware of a worker without an engine or an app."""
    state = app_state.AppState.__new__(app_state.AppState)
    state.is_draining, state.options = False, app_state.ServerOptions(engine_address="", model_names=("x",), **options)
    return middleware.Middleware(MagicMock(), state)


def check_head(headers: dict[str, str], method: str = "POST", **options: Any) -> None:
    """Passes a request's head to the middleware's checks."""
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    make_middleware(**options)._check_head({"method": method, "path": "/v1/chat/completions"}, raw)


@pytest.mark.parametrize("headers, is_allowed", SENDERS, ids=str)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], is_allowed: bool) -> None:
    """Requests are refused by their Host or Origin, if the server checks names."""
    headers |= {"content-type": "application/json"}
    check_head(headers)
    for method in ("GET", "POST"):
        if is_allowed:
            check_head(headers, method, allowed_hosts=LOCAL)
        else:
            with pytest.raises(APIError, match="--allowed-host") as e:
                check_head(headers, method, allowed_hosts=LOCAL)
            assert e.value.status == 403


def test_bodies_must_be_declared_as_json(server: Server) -> None:
    """A page of any site may send other content types without asking, so they are refused."""
    for good in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
        check_head({"content-type": good})
    for bad in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "text/json+x", "x/json"):
        with pytest.raises(APIError, match="application/json") as e:
            check_head({"content-type": bad})
        assert e.value.status == 400
    data = b'{"messages": [{"role": "user", "content": "x"}]}'
    assert server.http.post("/v1/chat/completions", content=data).status_code == 400
    assert server.http.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_api_keys() -> None:
    """Keys match as a whole; an empty key never does."""
    headers = {"content-type": "application/json"}
    for keys, authorization, is_allowed in (
        (("a b", "c"), "Bearer c", True),
        (("a b", "c"), "bearer  a b", True),
        (("",), "Bearer", False),
        (("",), "Bearer ", False),
        (("c",), "c", False),
        (("c",), "Basic c", False),
        (("c",), "Bearer C", False),
    ):
        if is_allowed:
            check_head(headers | {"authorization": authorization}, api_keys=keys)
        else:
            with pytest.raises(APIError) as e:
                check_head(headers | {"authorization": authorization}, api_keys=keys)
            assert e.value.status == 401


@pytest.mark.parametrize("key", ["", " ", "a ", "\ta", "é", "a\nb", "\x7f"])
def test_keys_that_no_header_can_hold(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong keys are refused at the start, from the command or the environment, and not printed."""
    for words, environment in (
        ([f"--api-key={key}"], None),
        (["--api-key", "good", "--api-key", key], None),
        ([], key),
    ):
        if environment is not None:
            monkeypatch.setenv("FGSERVE_API_KEY", environment)
        assert serve.main(["debug", *words]) == 2
        err = capsys.readouterr().err
        assert ("FGSERVE_API_KEY" if environment is not None else "--api-key") in err and "key" in err
    assert serve.collect_api_keys(["a=b", "c d"], "e") == ("a=b", "c d", "e") and serve.collect_api_keys([], None) == ()


def test_allowed_hosts() -> None:
    """Names are checked if the server listens to this machine alone, or if names are given."""
    hosts = serve.list_allowed_hosts
    assert hosts("127.0.0.1", "127.0.0.1", []) == ("localhost", "127.0.0.1")
    assert hosts("Box", "::1", ["Box.lan"]) == ("localhost", "box", "box.lan")
    assert hosts("0.0.0.0", "0.0.0.0", []) == () == hosts("fe80::1%eth0", "fe80::1%eth0", [])
    assert hosts("0.0.0.0", "0.0.0.0", ["api.example"]) == ("localhost", "0.0.0.0", "api.example")


WORDS: list[tuple[str, dict[str, str], str, str | None]] = [
    (
        'json grammar: no resource "https://example.com/a.json", json',
        {"json": "response_format"},
        'response_format grammar: no resource "https://example.com/a.json", json',
        "response_format",
    ),
    ("regex grammar: regex(?=x)", {"regex": "guided_regex"}, "guided_regex grammar: regex(?=x)", "guided_regex"),
    ("lark grammar: start: lark", {"lark": "guided_choice"}, "guided_choice grammar: start: lark", "guided_choice"),
    ("json grammar: { max_tokens=3", {"json": "tools"}, "tools grammar: { max_tokens=3", "tools"),
    ("SamplingParams.stop must be stop", {"stop": "stops"}, "stops must be stop", "stops"),
    ("logit_bias[400] must be small", {}, "logit_bias[400] must be small", "logit_bias"),
    ("prompt: token 9", {"prompt": "token_ids"}, "token_ids: token 9", "token_ids"),
    ("json is no field here", {}, "json is no field here", None),
    (
        "5 prompt tokens and max_tokens=600 do not fit: max_tokens can be at most 3",
        {"max_tokens": "max_completion_tokens"},
        "5 prompt tokens and max_completion_tokens=600 do not fit: max_completion_tokens can be at most 3",
        "max_completion_tokens",
    ),
]


@pytest.mark.parametrize("message, names, expected, param", WORDS, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_errors_name_the_fields_of_the_client(message: str, names: dict[str, str], expected: str, param: str) -> None:
    """Only the field at the start of a message is renamed to the client's name."""
    error = bad_request(message, names)
    assert (error.message, error.param) == (expected, param)


def test_errors_quote_what_was_sent(server: Server) -> None:
    """Errors of the grammar library and of pydantic quote the client's values."""
    link = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "https://example.com/a.json"}}}
    for body, words in (
        ({"response_format": link}, "https://example.com/a.json"),
        ({"guided_regex": "regex(?=x)"}, "regex(?=x)"),
        ({"temperature": "a\\b é"}, '"a\\\\b é"'),
        ({"n": [None, True]}, "[null, true]"),
    ):
        reply = server.http.post("/v1/completions", json=COMPLETION | body)
        assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


def test_more_than_the_queue_holds(server: Server, library: fastgen.Engine) -> None:
    """A full queue returns 429 with Retry-After; running requests are unaffected, and later ones succeed."""
    body = {"prompt": "Hello", "n": 128, "seed": 1, "max_tokens": 40}
    engine = server.children()["engine"]
    with ThreadPoolExecutor(2) as pool:
        os.kill(engine, signal.SIGSTOP)  # until both are there: the engine alone counts what runs
        try:
            both = [pool.submit(server.http.post, "/v1/completions", json=body) for _ in range(2)]
            time.sleep(1)
        finally:
            os.kill(engine, signal.SIGCONT)
        answer, refused = sorted((one.result() for one in both), key=lambda reply: reply.status_code)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    expected = texts(ask(library, "Hello", n=128, seed=1, max_tokens=40))
    assert [c["text"] for c in answer.raise_for_status().json()["choices"]] == expected
    assert server.http.post("/v1/completions", json={"prompt": "Hello", "n": 33}).status_code == 200
    quiet(server)


JUNK = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"{\xff\xfe}",
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ["\\udfff"]}',
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 50_000 + b"1" + b"]" * 50_000 + b"}",
    b'{"prompt": [' + b"9" * 5000 + b"]}",
    b'{"prompt": [1e400]}',
    b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}",
    b'{"prompt": "x", "\\ud800": 1}',
    b'{"prompt": "x", "logit_bias": {"\xd9\xa1": 1}}',
    b'{"prompt": "x", "model": "\\ud800"}',
    b'{"prompt": "x", "max_tokens": NaN}',
    b"\x00" * 1000,
]


def test_invalid_bodies_leave_running_requests_alone(server: Server, library: fastgen.Engine) -> None:
    """Invalid bodies always get a 4xx in JSON, and a running request is unaffected, also by an incomplete request."""
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80)) as slow, ThreadPoolExecutor(1) as pool:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        slow.sendall(b"Content-Type: application/json\r\nContent-Length: 100\r\n")
        body = {"prompt": "Hello", "temperature": 0, "max_tokens": 150, "ignore_eos": True}
        beside = pool.submit(lambda: httpx.post(f"{server.url}/completions", json=body, headers=server.headers))
        for junk in JUNK:
            for path in ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/tokenize", "/abort"):
                reply = server.http.post(path, content=junk, headers={"content-type": "application/json"})
                assert 400 <= reply.status_code < 500, (junk[:40], path, reply.text)
                assert reply.json()["error"]["message"] and "Traceback" not in reply.text
        for raw in (b"\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n"):
            with socket.create_connection((address.host, address.port or 80)) as s:
                s.sendall(raw)
        slow.sendall(b"\r\n{")
        expected = ask(library, "Hello", temperature=0, max_tokens=150, ignore_eos=True)
        assert beside.result().json()["choices"][0]["text"] == texts(expected)[0]
    quiet(server)
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines[-60:])


def test_whatever_the_schema_allows(server: Server) -> None:
    """Requests generated from the OpenAPI schema, valid or not, never get a 5xx."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    quick = settings(
        max_examples=6,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if not operation.path.startswith("/v1") and "generate" not in operation.path:
            continue

        @quick
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.headers = {**(case.headers or {}), **server.headers}
            reply = case.call(base_url=server.url)
            seen.add((case.operation.path, reply.status_code))
            assert reply.status_code < 500 and "Traceback" not in reply.text, reply.text

        check()
    assert {path for path, _ in seen} >= {"/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/models"}
    assert {status for _, status in seen} >= {200, 400}
    quiet(server)


def test_incomplete_bodies_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middleware does not wait forever for a body."""
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_SECONDS", 0.05)

    async def never() -> Any:
        await asyncio.sleep(60)

    with pytest.raises(APIError) as e:
        asyncio.run(make_middleware()._read_body({}, never))
    assert e.value.status == 408


# --- clients that leave, and many at once -----------------------------------------------------------------------------


def test_requests_of_a_disconnected_client_end(server: Server, client: openai.OpenAI) -> None:
    """Streamed and other requests end when their client disconnects; pages are freed and the log has status 499."""
    started = server.status()["generation_tokens"]
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=480, n=8, stream=True, extra_body={"ignore_eos": True}
    )
    id = next(iter(stream)).id
    assert server.status()["held_pages"] > 0
    stream.close()
    quiet(server)
    body = {"prompt": "Hello", "max_tokens": 480, "n": 8, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/completions", json=body, timeout=0.3, headers={"x-request-id": "left"})
    quiet(server)
    assert server.status()["generation_tokens"] - started < 2 * 8 * 480 / 2
    server.until(lambda: {id, "cmpl-left"} <= {e["id"] for e in server.logged()}, 10)
    lines = {e["id"]: e for e in server.logged()}
    for name in (id, "cmpl-left"):
        assert lines[name]["status"] == 499 and lines[name]["output_tokens"] < 8 * 480
        assert lines[name]["prompt_tokens"] == 3 and lines[name]["duration"] > 0


def test_profile(server: Server, bare: Server, profiles: Path) -> None:
    """Traces are written only with --profile-dir, one at a time."""
    assert server.http.post("/profile", json={}).status_code == 403
    assert bare.http.post("/profile", json={"steps": 0}).status_code == 400
    actual = bare.http.post("/v1/profile", json={"steps": 3, "skip": 1}).raise_for_status().json()
    refused = bare.http.post("/profile", json={})
    assert refused.status_code == 409 and "already" in refused.json()["error"]["message"]
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 12, "ignore_eos": True}}
    bare.http.post("/inference/v1/generate", json=body).raise_for_status()
    summary = Path(actual["summary"])
    bare.until(summary.is_file, 30)
    assert summary.parent == profiles.resolve() and summary.read_text().startswith("3 steps of ")
    with gzip.open(actual["trace"]) as file:
        assert json.load(file)["traceEvents"]


def test_abort_by_id(server: Server, library: fastgen.Engine) -> None:
    """Any worker can abort a request by its id; the stream ends with its output so far. An active id is unique."""
    body = {"prompt": "Hello", "max_tokens": 300, "stream": True, "ignore_eos": True, "temperature": 0}
    with server.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as stream:
        assert stream.headers["x-request-id"] == "cmpl-mine"
        chunks = events(stream)
        first = next(chunks)
        again = httpx.post(f"{server.url}/completions", json=body, headers=server.headers | {"x-request-id": "mine"})
        assert again.status_code == 409
        assert server.http.post("/abort", json={"request_id": first["id"]}).json() == {"aborted": True}
        parts = [c["choices"][0] for c in (first, *chunks)]
    assert parts[-1]["finish_reason"] == "abort"
    text = "".join(p["text"] for p in parts)
    complete = texts(ask(library, "Hello", max_tokens=300, ignore_eos=True, temperature=0))[0]
    assert len(text) < len(complete) and complete.startswith(text.rstrip("\ufffd"))
    assert server.http.post("/abort", json={"request_id": "cmpl-mine"}).json() == {"aborted": False}
    quiet(server)


def test_a_hundred_streams_of_which_many_break_off(server: Server, library: fastgen.Engine) -> None:
    """Each stream gets its own tokens in order, complete unless its client disconnects; no request remains."""
    dice = random.Random(0)
    prompts = [[dice.randrange(2, 330) for _ in range(dice.randrange(1, 60))] for _ in range(100)]
    length = 30
    sampling = [SamplingParams(seed=i, max_tokens=length, ignore_eos=True) for i in range(100)]
    expected = [o.completions[0] for o in library.generate(prompts, sampling, progress=False)]
    leaves = [dice.randrange(1, length) if dice.random() < 0.4 else None for _ in range(100)]

    async def tokens(http: httpx.AsyncClient, i: int) -> list[int]:
        body = {
            "token_ids": prompts[i],
            "stream": True,
            "sampling_params": {"seed": i, "max_tokens": length, "ignore_eos": True},
        }
        actual = []
        async with http.stream("POST", "/inference/v1/generate", json=body) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    actual += json.loads(line[6:])["choices"][0]["token_ids"]
                    if leaves[i] and len(actual) >= (leaves[i] or 0):
                        break
        return actual

    async def text(api: openai.AsyncOpenAI, i: int) -> str:
        stream = await api.completions.create(
            model="tiny", prompt=prompts[i], seed=i, max_tokens=length, stream=True, extra_body={"ignore_eos": True}
        )
        actual, count = "", 0
        async for chunk in stream:
            actual, count = actual + chunk.choices[0].text, count + 1
            if leaves[i] and count >= (leaves[i] or 0):
                await stream.close()
                break
        return actual

    async def all() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=90, limits=limits) as http,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=90) as api,
        ):
            return await asyncio.gather(*(tokens(http, i) if i % 2 else text(api, i) for i in range(100)))

    for i, actual in enumerate(asyncio.run(all())):
        complete = expected[i].token_ids if i % 2 else expected[i].text
        if leaves[i] is None:
            assert actual == complete, i
        else:
            assert actual == complete[: len(actual)] and actual, i
    quiet(server)


def test_metrics(server: Server, client: openai.OpenAI) -> None:
    """The counters of all workers together grow by the requests' tokens, under vLLM's names."""

    def read() -> dict[str, float]:
        lines = server.http.get("/metrics").text.splitlines()
        return {x.rpartition(" ")[0]: float(x.rpartition(" ")[2]) for x in lines if not x.startswith("#")}

    before = read()
    for i in range(6):
        with openai.OpenAI(base_url=server.url, api_key=KEY) as other:  # connections of their own, to either worker
            other.completions.create(
                model="tiny", prompt=[5, 6, 7, 8, i], max_tokens=4, n=2, extra_body={"ignore_eos": True}
            )
    label = '{model_name="tiny"}'
    ended = f"vllm:e2e_request_latency_seconds_count{label}"  # counted last, once the answer is sent
    server.until(lambda: read()[ended] - before[ended] == 6, 10)
    after = read()
    grown = {
        f"vllm:prompt_tokens_total{label}": 30,
        f"vllm:generation_tokens_total{label}": 48,
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}': 12,
        f"vllm:time_to_first_token_seconds_count{label}": 6,
        f"vllm:inter_token_latency_seconds_count{label}": 36,
        f"vllm:e2e_request_latency_seconds_count{label}": 6,
        f"vllm:prefix_cache_queries_total{label}": 60,
    }
    assert {name: after[name] - before.get(name, 0) for name in grown} == grown
    assert after[f"vllm:prefix_cache_hits_total{label}"] >= before[f"vllm:prefix_cache_hits_total{label}"]
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{gauge}{label}"] == 0


# --- processes that die, and the end ----------------------------------------------------------------------------------


def find_worker(server: Server, stream: httpx.Response) -> str:
    """Returns the name of the worker at the other end of a connection, by the socket of the two ports."""
    port = stream.extensions["network_stream"].get_extra_info("client_addr")[1]
    server_port = httpx.URL(server.url).port
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = [tuple(int(address.split(":")[1], 16) for address in row[1:3]) for row in rows]
    inode = rows[ports.index((server_port, port))][9]
    for name, pid in server.children().items():
        try:
            links = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        if f"socket:[{inode}]" in links:
            return name
    raise AssertionError("no worker has the connection")


def test_a_worker_is_killed(server: Server, library: fastgen.Engine) -> None:
    """Its streams break and its requests end; the other worker's continue, and a new worker is started."""
    sampling = {"temperature": 0, "max_tokens": 250, "ignore_eos": True}
    expected = texts(ask(library, "Hello", **sampling))[0]
    streams: list[tuple[str, httpx.Response, Iterator[dict[str, Any]]]] = []
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as http:
        while len({worker for worker, *_ in streams}) < 2 or len(streams) < 6:
            request = http.build_request("POST", "/completions", json={"prompt": "Hello", "stream": True} | sampling)
            response = http.send(request, stream=True)
            streams.append((find_worker(server, response), response, events(response)))
            assert len(streams) < 24
        victim = streams[0][0]
        os.kill(server.children()[victim], signal.SIGKILL)
        for worker, response, chunks in streams:
            if worker == victim:
                with pytest.raises(httpx.RemoteProtocolError):
                    list(chunks)
            else:
                assert "".join(c["choices"][0]["text"] for c in chunks) == expected
            response.close()
    quiet(server)
    server.until(lambda: len(server.children()) == 4)  # the engine, two workers and the killed one
    sampling["max_tokens"] = 9
    expected = texts(ask(library, "Hello", **sampling))[0]
    for _ in range(8):
        reply = httpx.post(f"{server.url}/completions", json={"prompt": "Hello"} | sampling, headers=server.headers)
        if reply.status_code != 503:  # the new worker may not have loaded its tokenizer yet
            assert reply.json()["choices"][0]["text"] == expected


def test_health_of_a_stopped_engine(bare: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """/health is 503 within its deadline while the engine is stopped, and 200 once the engine continues."""
    engine = bare.children()["engine"]
    os.kill(engine, signal.SIGSTOP)
    try:
        reply = bare.http.get("/health")
        assert reply.status_code == 503 and "has not answered for 5 s" in reply.json()["error"]["message"]
    finally:
        os.kill(engine, signal.SIGCONT)
    bare.until(lambda: bare.http.get("/health").status_code == 200, 10)


def test_the_fork_server_is_killed(bare: Server) -> None:
    """Workers live on without the process that started them, and are still replaced."""
    worker = bare.children()["worker-0"]
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != bare.process.pid
    os.kill(parent, signal.SIGKILL)
    assert bare.http.post("/completions", json={"prompt": [1, 2], "max_tokens": 1}).status_code == 200
    assert "worker-1" not in bare.children()
    os.kill(worker, signal.SIGKILL)
    bare.until(lambda: "worker-1" in bare.children(), 30)

    def is_healthy() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{bare.url}/health").status_code == 200
        return False

    bare.until(is_healthy, 30)


def test_a_model_without_a_tokenizer(bare: Server) -> None:
    """Without a tokenizer, token ids are accepted and requests that need text rejected."""
    fields = {"temperature": 0, "max_tokens": 5}
    answer = bare.http.post("/completions", json={"prompt": [1, 2, 3]} | fields).json()
    tokens = bare.http.post("/inference/v1/generate", json={"token_ids": [1, 2, 3], "sampling_params": fields}).json()
    assert answer["choices"][0]["text"] == "" and answer["usage"]["completion_tokens"] == 5
    assert len(tokens["choices"][0]["token_ids"]) == 5
    for path, body, param in (
        ("/chat/completions", {"messages": QUESTION}, "messages"),
        ("/completions", {"prompt": "x"}, "prompt"),
        ("/completions", {"prompt": [1], "stop": "x"}, "stop"),
        ("/tokenize", {"prompt": "x"}, "prompt"),
    ):
        reply = bare.http.post(path, json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_the_engine_is_killed(bare: Server) -> None:
    """Streams end with an error, other requests get one, and the server ends with status 1."""
    body = {"prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True}
    with bare.http.stream("POST", "/completions", json=body | {"stream": True, "logprobs": 0}) as stream:
        chunks = events(stream)
        next(chunks)
        with ThreadPoolExecutor() as pool:
            reply = pool.submit(lambda: httpx.post(f"{bare.url}/completions", json=body | {"n": 4}, timeout=60))
            bare.until(lambda: bare.status()["running"] == 5)
            os.kill(bare.children()["engine"], signal.SIGKILL)
            assert [*chunks][-1]["error"]["code"] == "engine_error"
        assert reply.result().status_code == 500 and reply.result().json()["error"]["code"] == "engine_error"
    assert bare.stop(terminate=False) == 1
    assert any("the engine died" in line for line in bare.lines)
    for pid in bare.children().values():
        assert not Path(f"/proc/{pid}").exists()


def test_shutdown(server: Server, library: fastgen.Engine) -> None:
    """After SIGTERM, new requests are refused, running ones finish or get an error after the grace period."""
    sampling = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    expected = texts(ask(library, "Hello", **sampling))[0]
    long = {"prompt": "Hello", "n": 128, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with (
        server.http.stream("POST", "/completions", json={"prompt": "Hello", "stream": True} | sampling) as stream,
        httpx.stream("POST", f"{server.url}/completions", json=long, headers=server.headers) as too_long,
    ):
        chunks, others = events(stream), events(too_long)
        text = next(chunks)["choices"][0]["text"]
        next(others)
        server.process.send_signal(signal.SIGTERM)
        server.line("shutting down")
        time.sleep(0.1)
        reply = server.http.post("/completions", json={"prompt": "Hello"})
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["message"] == "the server is shutting down"
        assert text + "".join(c["choices"][0]["text"] for c in chunks) == expected
        assert [*others][-1]["error"]["code"] == "shutting_down"
    assert server.stop(terminate=False) == 0
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines[-60:])


class EngineProcess:
    """An `EngineServer` whose socket is a mock, and the workers at its other end."""

    def __init__(self, library: fastgen.Engine) -> None:
        self.socket = MagicMock(spec=zmq.Socket)
        self.socket.recv_multipart.side_effect = zmq.Again()
        self.server = EngineServer(library, self.socket, EngineInfo("", SPEC, 512, 8, "text", False))

    def receive(self, *frames: tuple[str, str, object]) -> None:
        """Receives messages, as (worker, message id, pickled data or the message)."""
        data = [raw if isinstance(raw, bytes) else pickle.dumps(raw) for _, _, raw in frames]
        sources = [(worker.encode(), id.encode()) for worker, id, _ in frames]
        messages = [(*source, raw) for source, raw in zip(sources, data, strict=True)]
        self.socket.recv_multipart.side_effect = [*messages, zmq.Again()]
        self.server.drain_messages()
        self.socket.recv_multipart.side_effect = zmq.Again()

    def call(self, worker: str, message_id: str, method: str, *args: object) -> None:
        """Receives a call."""
        self.receive((worker, message_id, (method, args)))

    def run(self) -> None:
        """Steps until every request has finished."""
        while self.server.engine.has_unfinished_requests:
            self.server.step()
            self.server.drain_messages()

    def sent(self) -> list[tuple[str, Any]]:
        """Returns the messages to workers since the last call, as (worker, message)."""
        calls = self.socket.send_multipart.call_args_list
        messages = [(worker.decode(), pickle.loads(raw)) for ((worker, raw),), _ in calls]
        self.socket.send_multipart.reset_mock()
        return messages

    def replies(self) -> list[tuple[str, str, Any, Any]]:
        """Returns the replies since the last call, as (worker, message id, value, error's status and message)."""
        replies = [(worker, m) for worker, m in self.sent() if isinstance(m, Reply)]
        return [(w, m.message_id, m.value, m.error and (m.error.status, str(m.error))) for w, m in replies]

    def deltas(self, request_id: str) -> list[tuple[str, TokenDelta]]:
        """Returns the token deltas of a request since the last call, with the worker that received them."""
        return [(w, delta) for w, m in self.sent() if isinstance(m, dict) for delta in m.get(request_id, ())]


def test_a_call_that_fails_ends_its_request_alone(library: fastgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process replies to every call that raises, drops its request and processes the next call."""
    process, params = EngineProcess(library), SamplingParams(temperature=0, max_tokens=3)

    def fail(*_: Any, **__: Any) -> Any:
        raise RecursionError("too deep")

    wrong = [b"no pickle", ("nothing", ()), ("add", ()), ("add", ("x", 7, params)), (3,)]
    frames = [("a", str(i), message) for i, message in enumerate(wrong)]
    process.receive(*frames, ("a", "", b"\x80"), ("a", "9", ("add", ("good", [[5, 6]], params))))
    *errors, success = process.replies()
    assert [(id, error[0]) for _, id, _, error in errors] == [(str(i), 500) for i in range(5)]
    assert success == ("a", "9", None, None) and [*process.server.active_requests] == ["good"]
    with monkeypatch.context() as m:
        m.setattr(library.core, "prepare", fail)
        process.call("a", "4", "add", "other", [[5, 6]], params)
    message = "the engine failed at this: RecursionError: too deep"
    assert process.replies() == [("a", "4", None, (500, message))]
    assert [*process.server.active_requests] == ["good"]
    process.run()
    assert [t for _, delta in process.deltas("good") for t in delta.token_ids]


def test_grammars_are_compiled_beside_the_steps(library: fastgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request finishes meanwhile. A request whose grammar compiles counts, and ends with its client or worker,
    or by its id."""
    pytest.importorskip("llguidance")
    process, may_finish, cancel_events = EngineProcess(library), threading.Event(), dict[str, threading.Event]()
    server, compile = process.server, library.compile_grammar
    params = SamplingParams(temperature=0, max_tokens=3, n=2)

    def compile_later(params: SamplingParams, cancel_event: threading.Event | None = None) -> Any:
        if cancel_event is None:
            return compile(params)
        cancel_events[str(params.grammar)] = cancel_event
        while not (may_finish.is_set() or cancel_event.wait(0.01)):
            pass
        if cancel_event.is_set():
            raise GrammarCancelled
        return compile(params, cancel_event)

    monkeypatch.setattr(library, "compile_grammar", compile_later)
    monkeypatch.setattr(server, "_grammar_pool", ThreadPoolExecutor(8))
    for id, worker in (("one", "a"), ("left", "a"), ("killed", "a"), ("gone", "b")):
        process.call(worker, id, "add", id, [[5, 6]], replace(params, grammar=f"regex:{id}"))
    assert process.replies() == []
    process.call("a", "more", "add", "more", [[5, 6]], params)
    assert process.replies()[0][3][0] == 429
    process.call("a", "", "abort", "left", None)
    process.call("a", "plain", "add", "plain", [[5, 6]], params)
    process.run()
    assert [d.finish_reason for _, d in process.deltas("plain") if d.finish_reason] == ["length"] * 2
    process.call("a", "kill", "abort_by_id", "killed")
    server.abort_worker_requests(b"b")
    killed, reply = process.replies()
    assert killed[:3] == ("a", "killed", None) and killed[3][0] == 409 and reply == ("a", "kill", False, None)
    assert [*server.active_requests] == ["one"] and not server.active_requests["one"].engine_ids
    server._grammar_pool.submit(may_finish.wait, 60)
    may_finish.set()
    while not server.active_requests["one"].engine_ids:
        select.select([server.wake_fd], [], [], 60)
        server.drain_messages()
    assert process.replies() == [("a", "one", None, None)] and [*server.active_requests] == ["one"]
    server._grammar_pool.shutdown()
    server.drain_messages()
    process.run()
    tokens = [t for _, delta in process.deltas("one") if delta.choice_index == 0 for t in delta.token_ids]
    text = BYTE_LEVEL.decode(tokens, skip_special_tokens=True)
    assert "one".startswith(text) and tokens and not server.active_requests
    assert {g for g, event in cancel_events.items() if event.is_set()} == {"regex:left", "regex:killed", "regex:gone"}


def test_a_step_that_fails_and_a_worker_that_died(library: fastgen.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed step is reported to every request, and the next one runs. Requests of a dead worker end, others not."""
    process, params = EngineProcess(library), SamplingParams(temperature=0, max_tokens=3, n=2)
    server = process.server
    process.call("a", "1", "add", "call", [[5, 6]], params)
    assert process.replies() == [("a", "1", None, None)]
    with monkeypatch.context() as m:
        m.setattr(library.runner, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.step()
    server.report_step_failure()
    failures = [(d.choice_index, d.finish_reason) for _, d in process.deltas("call")]
    assert failures == [(0, "failed"), (1, "failed")]
    process.call("a", "2", "add", "one", [[5, 6]], params)
    process.call("b", "3", "add", "two", [[5, 6]], params)
    process.call("b", "", "abort", "one", None)  # ignored: another worker's request
    server.abort_worker_requests(b"b")
    process.run()
    messages = [(worker, m) for worker, m in process.sent() if isinstance(m, dict)]
    assert {(worker, id) for worker, m in messages for id in m} == {("a", "one")}
    expected = ask(library, [5, 6], temperature=0, max_tokens=3).completions[0].token_ids
    for i in range(2):
        assert [t for _, m in messages for d in m["one"] if d.choice_index == i for t in d.token_ids] == expected
    stats = server.get_stats(Sender(b"a", ""))
    assert stats["held_pages"] == 0 and not server.active_requests and not server.owner_by_engine_id


def test_a_worker_that_cannot_load_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that cannot load ends with a traceback, instead of answering 503 forever."""

    class Client:
        is_engine_dead = False

        def __init__(self, *_: str) -> None:
            self.engine_info = asyncio.get_running_loop().create_future()

        async def receive_forever(self) -> None:
            self.engine_info.set_result({})
            await asyncio.sleep(60)

    monkeypatch.setattr(app_state, "EngineClient", Client)
    ours, theirs = multiprocessing.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener, ours, theirs:
        listener.setblocking(False)
        with pytest.raises(SystemExit, match="1"):
            options = app_state.ServerOptions(engine_address="", model_names=("x",))
            http_worker.run_http_worker(theirs, options, "worker-0", listener)
        assert not ours.poll()
    assert "'dict' object has no attribute 'path'" in capsys.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["model=debug", "prompt=x"], "requests bring this themselves"),
        (["model=debug", "temperature=0"], "temperature=0: requests bring this themselves"),
        (["schedule.max_request=4"], "max_num_seqs"),
        (["no/such/folder/at/all"], "neither"),
        (["--port", "70000"], "port"),
        (["--workers", "0"], "at least 1"),
        (["--allowed-host", "http://x/"], "without port or path"),
    ],
)
def test_wrong_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command prints one line before anything starts."""
    try:
        code = serve.main(words)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "zmq" else name)
    assert serve.main([]) == 1
    assert capsys.readouterr().err == f"fgserve needs zmq: {install_command('serve')}\n"


def test_chat_template(tiny: Path) -> None:
    """chat_template=FILE replaces the template of the model's tokenizer in HTTP workers; other keys are per request."""
    words = [str(tiny), "chat_template=own.jinja"]
    config, _ = serve.configure(parse_arguments(parsers.serve_parser(), words))
    assert config.chat_template == "own.jinja"
    with pytest.raises(ValueError, match="tools=x: requests bring this themselves"):
        serve.configure(parse_arguments(parsers.serve_parser(), [str(tiny), "tools=x"]))
    state, template = app_state.AppState.__new__(app_state.AppState), "{{ messages[-1].content }}<tool_call>"
    state.options = app_state.ServerOptions(engine_address="", model_names=("tiny",), chat_template=template)
    state.tokenizer_thread, state.long_text_thread = (app_state.TokenizerThread(name) for name in "ab")

    async def load() -> None:
        engine_info: Any = asyncio.get_running_loop().create_future()
        engine_info.set_result(SimpleNamespace(path=str(tiny), context_length=64))
        state.engine_client = SimpleNamespace(engine_info=engine_info)  # type: ignore[assignment]
        await state.load()

    asyncio.run(load())
    for thread in (state.tokenizer_thread, state.long_text_thread):
        assert thread.tokenizer.chat_template == template
    assert state.tool_call_format == "hermes"


def test_model_names(tiny: Path) -> None:
    """MODEL is a path, whose last part is the name, a name of conf/model, or missing."""
    for words, name, path in (
        ([str(tiny)], "tiny", str(tiny)),
        (["debug"], "debug", None),
        ([], "smollm2-135m-instruct", None),
    ):
        config, actual = serve.configure(parsers.serve_parser().parse_args(words))
        assert actual == name and (path is None or config.model.path == path)
    config, _ = serve.configure(parsers.serve_parser().parse_args(["debug", "--tensor-parallel", "1"]))
    assert config.model.random_weights and config.parallel.tensor_parallel == 1
