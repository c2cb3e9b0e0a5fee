"""Clients of `fgserve`: scripts with OpenAI's client, LangChain, lm-eval, idle connections, and the status page."""

import asyncio
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from unittest.mock import MagicMock

import httpx
import openai
import pydantic
import pytest
import uvicorn
from serving import SETTINGS, Server, checkpoint
from test_tokenizer import BYTE_LEVEL

import fastgen
from fastgen import SamplingParams
from fastgen.server import http_worker

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KEY = "foo"
# Debian's package chromium, for one.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    server = Server(str(tiny), *SETTINGS, key=KEY)
    yield server.ready()
    server.stop()


@pytest.fixture(scope="module")
def library(tiny: Path) -> Iterator[fastgen.Engine]:
    """Returns an engine of the same model in this process, for the expected texts."""
    settings: dict[str, Any] = dict(page_size=16, cache_tokens=4096, max_num_seqs=24, token_budget=256)
    with fastgen.Engine.from_pretrained(tiny, progress=False, **settings) as engine:
        yield engine


def chats(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"Hello, {i} {'ab ' * (i % 7)}"}] for i in range(count)]


def greedy(library: fastgen.Engine, prompts: list[Any]) -> list[str]:
    outputs = library.generate(prompts, SamplingParams(**GREEDY), progress=False)
    return [o.completions[0].text for o in outputs]


# --- scripts ----------------------------------------------------------------------------------------------------------


def test_a_script_with_many_threads(server: Server, library: fastgen.Engine) -> None:
    """32 threads share one client, whose address lacks /v1, and use the name that /models returns."""
    questions = chats(32)
    url = server.url.replace("127.0.0.1", "localhost")
    with openai.OpenAI(base_url=url, api_key=KEY, timeout=60) as client, ThreadPoolExecutor(32) as pool:
        [model] = [m.id for m in client.models.list()]

        def complete(messages: Any) -> str | None:
            return client.chat.completions.create(model=model, messages=messages, **GREEDY).choices[0].message.content

        def stream(messages: Any) -> str:
            chunks = client.chat.completions.create(model=model, messages=messages, stream=True, **GREEDY)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        answers = pool.map(lambda i: (stream if i % 2 else complete)(questions[i]), range(32))
        assert list(answers) == greedy(library, questions)


README = """
from openai import OpenAI

client = OpenAI(base_url="http://localhost:5678", api_key="foo")
completion = client.chat.completions.create(
    model="gpt-4o-mini",
    messages=[
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write a haiku about recursion in programming."},
    ],
)
print(completion.choices[0].message.content)
"""


def test_the_example_of_openai(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's own example works with the server's address, whatever model it names."""
    names: dict[str, Any] = {}
    exec(README.replace("5678", str(httpx.URL(server.url).port)), names)
    completion = names["completion"]
    assert completion.model == "tiny" and completion.choices[0].message.content
    assert capsys.readouterr().out == completion.choices[0].message.content + "\n"


# --- LangChain --------------------------------------------------------------------------------------------------------


class Person(pydantic.BaseModel):
    """The object that an answer must be."""

    name: Literal["Ann", "Bo"]
    adult: bool


def test_langchain(server: Server, library: fastgen.Engine) -> None:
    """ChatOpenAI gets single answers, streams, batches, and answers that are objects."""
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI
    options = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 12}
    model = ChatOpenAI(**options)
    questions = chats(6)
    expected = greedy(library, questions)
    answer = model.invoke(questions[0])
    output = library.generate([questions[0]], SamplingParams(**GREEDY), progress=False)[0]
    assert answer.content == expected[0] and answer.response_metadata["finish_reason"]
    assert answer.usage_metadata["input_tokens"] == len(output.prompt_token_ids)
    assert answer.usage_metadata["output_tokens"] == len(output.completions[0].token_ids)
    chunks = list(model.stream(questions[1]))
    assert "".join(c.content for c in chunks) == expected[1] and len(chunks) > 2
    assert [a.content for a in model.batch(questions)] == expected

    async def invoke() -> str:
        async with httpx.AsyncClient() as client:  # the client that LangChain creates would outlive the loop
            return (await ChatOpenAI(**options, http_async_client=client).ainvoke(questions[2])).content

    assert asyncio.run(invoke()) == expected[2]
    # A random model may generate white space up to max_tokens, which the client turns into an error.
    people = []
    for seed in range(6):
        sampled = ChatOpenAI(
            model="tiny", base_url=f"{server.url}/v1", api_key=KEY, temperature=1, seed=seed, max_tokens=200
        )
        try:
            people.append(sampled.with_structured_output(Person, method="json_schema").invoke(questions[0]))
        except openai.LengthFinishReasonError:
            pass
    assert people and all(isinstance(x, Person) for x in people)


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_likelihood_requests_of_lm_eval(server: Server, library: fastgen.Engine) -> None:
    """Its `local-completions` sends batches of token ids, to be echoed with one logprob each, and one new token.

    From the response it computes a continuation's likelihood, and whether the continuation is the greedy choice.
    """
    pairs = [([41, 70, 77, 45], [46, 49]), ([47], [48, 41, 69]), ([45] * 40, [43])]
    outputs = library.generate(
        [context + continuation for context, continuation in pairs],
        SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1),
        progress=False,
    )
    body = {
        "prompt": [context + continuation for context, continuation in pairs],
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    ended = body | {"logit_bias": {str(BYTE_LEVEL.eos_token_id): 100}}
    for choice in server.http.post("/v1/completions", json=ended).raise_for_status().json()["choices"]:
        # lm-eval assumes that the last token is the new one, so there must be one even where the text ends.
        context, continuation = pairs[choice["index"]]
        assert (
            choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(context + continuation) + 1
        )
    choices = server.http.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    for (context, continuation), choice, output in zip(pairs, choices, outputs, strict=True):
        logprobs = choice["logprobs"]
        own = logprobs["token_logprobs"][len(context) : -1]
        values = (output.prompt_logprobs or [])[len(context) :]
        assert len(own) == len(continuation) and sum(own) == pytest.approx(sum(map(float, values)), abs=1e-4)  # type: ignore[arg-type]
        for token, value, top in zip(
            logprobs["tokens"][len(context) : -1], own, logprobs["top_logprobs"][len(context) : -1], strict=True
        ):
            assert top[token] == value and max(top.values()) >= value


def test_lm_eval(
    server: Server, library: fastgen.Engine, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval itself, where it is installed, runs a task of likelihoods and one of texts."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"Hello {i}:", "options": [" yes", " no", " abc abc"], "answer": i % 3} for i in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\ntest_split: test\n"
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: answer\n"
        "doc_to_choice: options\ntarget_delimiter: ''\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write\n{data}output_type: generate_until\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{options[0]}}'\n"
        "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 12, temperature: 0}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    model = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", tokenizer=str(tiny), num_concurrent=3, batch_size=4
    )
    results = lm_eval.simple_evaluate(
        model=model, tasks=["choose", "write"], task_manager=TaskManager(include_path=str(tmp_path)), log_samples=True
    )
    encode = library.tokenizer
    assert encode is not None and results is not None
    for sample in results["samples"]["choose"]:
        for (question, option), ((value, _),) in zip(
            [(a["arg_0"], a["arg_1"]) for a in sample["arguments"].values()]
            if isinstance(sample["arguments"], dict)
            else sample["arguments"],
            sample["resps"],
            strict=True,
        ):
            context, complete = encode(question).input_ids, encode(question + option).input_ids
            output = library.generate(
                [complete], SamplingParams(temperature=0, max_tokens=1, logprobs=0, prompt_logprobs=0), progress=False
            )[0]
            assert value == pytest.approx(sum(map(float, (output.prompt_logprobs or [])[len(context) :])), abs=1e-3)  # type: ignore[arg-type]
    texts = greedy(library, [row["q"] for row in rows])
    written = {s["doc"]["q"]: s["resps"][0][0] for s in results["samples"]["write"]}
    assert [written[row["q"]] for row in rows] == [text.split("\n\n")[0] for text in texts]
    assert not math.isnan(results["results"]["choose"]["acc,none"])


# --- clients that idle ------------------------------------------------------------------------------------------------


def test_idle_connections(server: Server, library: fastgen.Engine) -> None:
    """With 500 idle connections, some within a request's head, streams continue and new requests are answered."""
    [question] = chats(1)
    url = httpx.URL(server.url)
    with contextlib.ExitStack() as stack, openai.OpenAI(base_url=server.url, api_key=KEY, timeout=60) as client:
        stream = client.chat.completions.create(model="tiny", messages=question, stream=True, **GREEDY)  # type: ignore[call-overload]
        parts = [next(stream).choices[0].delta.content or ""]
        for i in range(500):
            connection = stack.enter_context(socket.create_connection((url.host, url.port or 80)))
            connection.sendall(b"" if i % 5 else b"POST /v1/completions HTTP/1.1\r\nHost")
        parts += [chunk.choices[0].delta.content or "" for chunk in stream]
        again = client.chat.completions.create(model="tiny", messages=question, **GREEDY)  # type: ignore[call-overload]
        assert ["".join(parts), again.choices[0].message.content] == greedy(library, [question]) * 2


@pytest.mark.parametrize("sent", [[], [b"GET / HT", b"TP/1.1\r\n"], [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /"]])
def test_incomplete_heads_time_out(sent: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is closed whether it is new or within the head of a first or second request; a response that takes
    longer is not cut."""
    monkeypatch.setattr(http_worker, "HEADERS_TIMEOUT_SECONDS", 0.2)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.4)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> bytes:
        config = uvicorn.Config(
            slow, http=http_worker._Connection, lifespan="off", log_level="warning", timeout_keep_alive=9
        )
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        address = listener.getsockname()
        server = http_worker._Server(config, listener)
        task = asyncio.create_task(server.serve())
        reader, writer = await asyncio.open_connection(*address)
        for part in sent:
            writer.write(part)
            await asyncio.sleep(0.1 if len(sent[0]) < 12 else 0.5)
        response = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        server.should_exit = True
        await task
        return response

    assert asyncio.run(run()).endswith(b"ok") == (len(sent) == 2 and sent[0].endswith(b"\r\n\r\n"))


def test_a_connection_is_read_in_small_parts() -> None:
    """Other clients are served while a body comes in chunks of one byte, which are slow to parse."""
    sizes, done = list[int](), asyncio.Event()

    class Connection(http_worker._Connection):
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            if sum(sizes) == 2**18:
                done.set()

    async def run() -> None:
        config = uvicorn.Config(MagicMock(), http=Connection, lifespan="off", log_level="warning")
        config.load()
        loop = asyncio.get_running_loop()
        state = uvicorn.server.ServerState()
        server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(bytes(2**18))
        await asyncio.wait_for(done.wait(), 5)
        writer.close()
        server.close()

    asyncio.run(run())
    assert max(sizes) <= http_worker.MAX_READ_BYTES


# --- the status page, in a browser ----------------------------------------------------------------------------------


def browse(url: str, profile: Path) -> tuple[dict[str, str], str]:
    """Returns the page's table after three seconds of its time, and its error message."""
    # As root, as in containers, there is no sandbox; /dev/shm may be small there.
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}")
    command = [str(BROWSER), *options, "--virtual-time-budget=3000", "--dump-dom", url]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    problem = re.search(r'<p id="problem">(.*?)</p>', page, re.DOTALL)
    assert problem, page
    return dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)), problem[1]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_the_page(server: Server, tmp_path: Path) -> None:
    """The page asks for the key; with the key it shows the figures of an idle server, then of a busy one."""
    assert browse(server.url, tmp_path)[1].startswith("a valid API key is needed")
    idle, problem = browse(f"{server.url}/#{KEY}", tmp_path)
    assert not problem and idle["model"] == "tiny" and idle["output tokens/s"] == "0.0"
    assert (idle["running"], idle["waiting"], idle["cache in use"]) == ("0", "0", "0.0 %")
    body = {"prompt": "Hello", "n": 90, "max_tokens": 480, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/completions", json=body):
        for _ in range(5):  # the page's three seconds may pass within one step of the engine
            busy, problem = browse(f"{server.url}/#{KEY}", tmp_path)
            assert server.status()["running"], "the request was over before the page was there"
            if busy["output tokens/s"] != "0.0":
                break
    assert not problem and int(busy["running"]) > 0 and int(busy["waiting"]) > 0
    assert float(busy["cache in use"].split()[0]) > 0 and float(busy["output tokens/s"]) > 0
    assert int(busy["output tokens"]) > int(idle["output tokens"])
