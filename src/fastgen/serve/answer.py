"""From what the engine's steps give to what a client reads: text, stop strings, OpenAI's forms, server-sent events."""

import asyncio
import codecs
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgen.config import SamplingParams
from fastgen.request import NOT_FINITE
from fastgen.serve.client import Client
from fastgen.serve.core import Piece
from fastgen.serve.metrics import Metrics
from fastgen.serve.protocol import Refused
from fastgen.serve.reasoning import ReasoningReader, opened
from fastgen.serve.tools import Reader
from fastgen.tokenizer import Detokenizer, token_bytes
from fastgen.types import Tokenizer

Json = dict[str, Any]
INLINE = 4096  # logprobs of an answer that is written within the loop; more are in a thread
PIECE = 64  # elements of a list that are written at once there
LEAST = -9999.0  # JSON has no -inf
BROKEN = {  # what a piece's reason means that has no answer
    "failed": "the engine failed while it computed this",
    "error": "the model's output is NaN or infinite for this request: its weights, or the adapter's, are broken",
}
TAG_TOKENS = 16  # of a prompt's end, which are more than a tag and a line break have
# Ends of lines to Python's splitlines, by which some clients read streams: U+0085, U+2028 and U+2029.
BREAKS = tuple((chr(c).encode(), f"\\u{c:04x}".encode()) for c in (0x85, 0x2028, 0x2029))


def dump(value: Any) -> bytes:
    """JSON. What is no text in UTF-8, half a surrogate pair, becomes a question mark."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    for raw, escaped in BREAKS:
        data = data.replace(raw, escaped)
    return data


def pieces(value: Any) -> Iterator[bytes]:
    """What `dump` gives, a little at a time: no other thread runs while the encoder makes a piece."""
    if isinstance(value, dict) and value:
        for i, (name, member) in enumerate(value.items()):
            yield (b"," if i else b"{") + dump(name) + b":"
            yield from pieces(member)
        yield b"}"
    elif isinstance(value, list) and len(value) > PIECE:
        for i in range(0, len(value), PIECE):
            yield (b"," if i else b"[") + dump(value[i : i + PIECE])[1:-1]
        yield b"]"
    else:
        yield dump(value)


class Vocabulary:
    """A tokenizer, or none; and what single tokens look like."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._seen: dict[int, bytes] = {}

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, special ones included."""
        if self.tokenizer is None:
            return ""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(tokens, **options)  # type: ignore[return-value]

    def bytes(self, id: int) -> bytes:
        """Returns what a token adds to a text, as UTF-8."""
        if id not in self._seen:
            self._seen[id] = b"" if self.tokenizer is None else token_bytes(self.tokenizer, id)
        return self._seen[id]

    def token(self, id: int) -> str:
        """Returns what a token adds to a text."""
        return self.bytes(id).decode(errors="replace")

    def named(self, id: int, logprob: float) -> Json:
        """Returns a token as a chat's logprobs have it; `bytes` tell parts of characters apart."""
        return {"token": self.token(id), "logprob": max(logprob, LEAST), "bytes": [*self.bytes(id)]}

    def echo(self, prompt: list[int], hidden: frozenset[int] = frozenset()) -> "Echo":
        """Returns a prompt's text and where its tokens begin in it.

        `hidden` are the places of tokens that the tokenizer has put around a text: they are not part of it.
        """
        if self.tokenizer is None:
            return Echo("", [0] * len(prompt))
        decoder, text, offsets = codecs.getincrementaldecoder("utf-8")("replace"), "", list[int]()
        for place, token in enumerate(prompt):
            offsets.append(len(text))
            if place not in hidden:
                text += decoder.decode(self.bytes(token))
        text += decoder.decode(b"", final=True)
        own = [token for place, token in enumerate(prompt) if place not in hidden]
        blanks = len(text) - len(text.lstrip(" "))
        if blanks and not self.decode(own).startswith(" " * blanks):  # SentencePiece's own one, before the first word
            text, offsets = text[1:], [max(0, offset - 1) for offset in offsets]
        return Echo(text, offsets)


@dataclass(slots=True, frozen=True)
class Echo:
    """A prompt as it is given back."""

    text: str
    offsets: list[int]  # of each token in it


@dataclass(slots=True)
class Delta:
    """What a step added to a completion."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None
    offsets: list[int] = field(default_factory=list)  # of each token in the completion's text
    reason: str | None = None


class Choice:
    """One completion on its way. The same rules as `request.Sample`'s, which works without the socket between."""

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        prompt: list[int],
        params: SamplingParams,
        *,
        live: bool,
        shown: dict[int, str],
    ) -> None:
        self.index, self.prompt, self.params = index, prompt, params
        self.detokenizer: Detokenizer | None = None
        if (tokenizer := vocabulary.tokenizer) is not None:
            options: Json = {"min_tokens": params.min_tokens, "live": live}
            self.detokenizer = Detokenizer(tokenizer, prompt, params.stop, shown, **options)
        with_logprobs = params.logprobs is not None
        self.whole = Delta(logprobs=[] if with_logprobs else None, top=[] if params.logprobs else None)
        self.last: Piece | None = None  # with the counts
        self.time: float | None = None  # of the last token
        self.versions: list[int] = []  # of tokens whose version the client was not told yet

    def push(self, piece: Piece) -> Delta:
        """Take what came; what of it is new."""
        new, cut, d = Delta(), False, self.detokenizer
        for token in piece.tokens:
            new.tokens.append(token)
            if d is not None:
                if d.live:
                    new.offsets.append(len(d.text))
                text, cut = d.push(token)
                new.text += text
            if cut:
                break
        if cut or piece.reason:
            new.reason, self.last = "stop" if cut else piece.reason, piece
            if d is not None and not cut:
                new.text += d.end([*self.whole.tokens, *new.tokens])
        all, count = self.whole, len(new.tokens)
        if all.logprobs is not None and piece.logprobs is not None:
            new.logprobs = piece.logprobs[:count]
            all.logprobs += new.logprobs
        if all.top is not None and piece.top is not None:
            new.top = piece.top[:count]
            all.top += new.top
        all.text, all.reason = all.text + new.text, new.reason
        all.tokens += new.tokens
        all.offsets += new.offsets
        return new


class Form:
    """How a kind of answer looks: a choice of a whole answer, and of a chunk. `prefix` begins its ids."""

    prefix, object, chunk_object = "", "", ""
    live = True  # whether text is read as it comes

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.shown: dict[int, str] = {}  # special tokens that belong to the text

    def frame(self, call: str, created: int, model: str, *, chunk: bool) -> Json:
        """What surrounds choices."""
        return {"id": call, "object": self.chunk_object if chunk else self.object, "created": created, "model": model}

    def first(self, choice: Choice) -> Json | None:
        """A choice's first chunk, before any token."""
        return None

    def part(self, choice: Choice, new: Delta) -> Json | None:
        """A choice's part of a chunk; None if there is nothing to say yet."""
        raise NotImplementedError

    def full(self, choice: Choice, scored: Piece | None) -> Json:
        """A whole choice; `scored` has its prompt's logprobs."""
        raise NotImplementedError


class Chat(Form):
    """/chat/completions: reasoning is told from the answer first, then calls from its text.

    `reader` makes what reads calls, if there may be any.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        vocabulary: Vocabulary,
        reader: Callable[[], Reader] | None = None,
        shown: dict[int, str] | None = None,
        *,
        named: bool = False,
        reasons: bool = True,
    ) -> None:
        """`named`: the client chose the function, which OpenAI's finish_reason does not tell it again. `reasons`:
        whether an answer may begin with reasoning, as it may not where all of it follows a grammar."""
        super().__init__(vocabulary)
        self.reader, self.shown, self.named, self.reasons = reader, shown or {}, named, reasons
        self.readers: dict[int, tuple[ReasoningReader | None, Reader | None]] = {}  # of choices that are streamed

    def _readers(self, choice: Choice) -> tuple[ReasoningReader | None, Reader | None]:
        """What reads a choice's text from its beginning."""
        end = self.vocabulary.decode(choice.prompt[-TAG_TOKENS:]) if self.reasons else ""
        return ReasoningReader(opened(end)) if self.reasons else None, self.reader() if self.reader else None

    def _reason(self, reason: str | None, reader: Reader | None) -> str | None:
        called = reason == "stop" and reader is not None and reader.count > 0 and not self.named
        return "tool_calls" if called else reason

    def _logprobs(self, new: Delta) -> Json | None:
        if new.logprobs is None:
            return None
        name, content = self.vocabulary.named, []
        for i, (token, logprob) in enumerate(zip(new.tokens, new.logprobs, strict=True)):
            top = new.top[i].items() if new.top is not None else ()
            content.append(name(token, logprob) | {"top_logprobs": [name(*pair) for pair in top]})
        return {"content": content, "refusal": None}

    def first(self, choice: Choice) -> Json | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": None if self.reader else ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, choice: Choice, new: Delta) -> Json | None:
        """Reasoning and text that are new, and calls."""
        if choice.index not in self.readers:
            self.readers[choice.index] = self._readers(choice)
        reasoner, reader = self.readers[choice.index]
        reasoning, text, calls = "", new.text, list[Json]()
        if reasoner:
            reasoning, text = reasoner.push(text, last=bool(new.reason))
        if reader:
            text, calls = reader.push(text, last=bool(new.reason))
        logprobs = self._logprobs(new) if new.tokens else None
        if not (reasoning or text or calls or new.reason or logprobs):
            return None
        delta: Json = {"reasoning_content": reasoning} if reasoning else {}
        delta |= {"content": text} if text or not (reasoning or calls or new.reason) else {}
        reason = self._reason(new.reason, reader)
        delta |= {"tool_calls": calls} if calls else {}
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def full(self, choice: Choice, scored: Piece | None) -> Json:
        """The message."""
        all = choice.whole
        reasoner, reader = self._readers(choice)
        reasoning, text, calls = "", all.text, list[Json]()
        if reasoner:
            reasoning, text = reasoner.push(text, last=True)
        if reader:
            text, calls = reader.push(text, last=True)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if reasoning or calls:
            message["content"] = text or None
        message |= {"reasoning_content": reasoning} if reasoning else {}
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(all),
            "finish_reason": self._reason(all.reason, reader),
        }


class Completion(Form):
    """/completions; `echo` has the text of each choice's prompt, which then comes first."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, vocabulary: Vocabulary, echo: Callable[[Choice], Echo] | None = None) -> None:
        super().__init__(vocabulary)
        self.echo = echo

    def _logprobs(self, new: Delta, before: int) -> Json | None:
        if new.logprobs is None:
            return None
        top = new.top if new.top is not None else [{} for _ in new.tokens]
        drawn = zip(new.tokens, new.logprobs, top, strict=True)
        return {
            "tokens": [self.vocabulary.token(t) for t in new.tokens],
            "token_logprobs": [max(p, LEAST) for p in new.logprobs],
            "top_logprobs": [self._top(t, p, likely) for t, p, likely in drawn],
            "text_offset": [before + i for i in new.offsets or [0] * len(new.tokens)],
        }

    def _top(self, token: int, logprob: float, likely: dict[int, float]) -> dict[str, float]:
        """Returns the likeliest tokens and the one that was drawn by their texts, the likeliest first.

        Where two look alike, the drawn one, or else the likelier one, has the text, and the other is `token_id:N`.
        """
        pairs = sorted((likely | {token: logprob}).items(), key=lambda pair: -pair[1])
        names = {self.vocabulary.token(token): token}
        for id, _ in pairs:
            names.setdefault(self.vocabulary.token(id), id)
        texts = {id: text for text, id in names.items()}
        return {texts.get(id, f"token_id:{id}"): max(p, LEAST) for id, p in pairs}

    def first(self, choice: Choice) -> Json | None:
        """The prompt, if it is asked for."""
        if self.echo is None:
            return None
        return {"index": choice.index, "text": self.echo(choice).text, "logprobs": None, "finish_reason": None}

    def part(self, choice: Choice, new: Delta) -> Json:
        """Text that is new."""
        before = len(self.echo(choice).text) if self.echo else 0
        logprobs = self._logprobs(new, before) if new.tokens else None
        return {"index": choice.index, "text": new.text, "logprobs": logprobs, "finish_reason": new.reason}

    def full(self, choice: Choice, scored: Piece | None) -> Json:
        """The text, and what it was drawn with."""
        all, lead = choice.whole, self.echo(choice).text if self.echo else ""
        logprobs = self._logprobs(all, len(lead))
        if self.echo and logprobs and scored and scored.prompt_logprobs is not None:
            top = scored.prompt_top or [{} for _ in choice.prompt]
            likely = [
                None if p is None else self._top(t, p, others or {})
                for t, p, others in zip(choice.prompt, scored.prompt_logprobs, top, strict=True)
            ]
            logprobs = {
                "tokens": [self.vocabulary.token(t) for t in choice.prompt] + logprobs["tokens"],
                "token_logprobs": [p if p is None else max(p, LEAST) for p in scored.prompt_logprobs]
                + logprobs["token_logprobs"],
                "top_logprobs": likely + logprobs["top_logprobs"],
                "text_offset": self.echo(choice).offsets + logprobs["text_offset"],
            }
        return {"index": choice.index, "text": lead + all.text, "logprobs": logprobs, "finish_reason": all.reason}


class Generate(Form):
    """/inference/v1/generate: token ids, and no text."""

    prefix, object, chunk_object = "gen", "generate", "generate.chunk"
    live = False

    def _logprobs(self, new: Delta) -> Json | None:
        if new.logprobs is None:
            return None
        content = []
        for i, (token, logprob) in enumerate(zip(new.tokens, new.logprobs, strict=True)):
            top = new.top[i].items() if new.top is not None else ()
            content.append(self._named(token, logprob) | {"top_logprobs": [self._named(*pair) for pair in top]})
        return {"content": content}

    def _named(self, token: int, logprob: float) -> Json:
        return {"token": f"token_id:{token}", "logprob": max(logprob, LEAST), "bytes": None}

    def part(self, choice: Choice, new: Delta) -> Json:
        """Tokens that are new."""
        logprobs = self._logprobs(new) if new.tokens else None
        return {
            "index": choice.index,
            "token_ids": new.tokens,
            "logprobs": logprobs,
            "finish_reason": new.reason,
        }

    def full(self, choice: Choice, scored: Piece | None) -> Json:
        """All tokens, with the prompt's logprobs if they were asked for."""
        found = self.part(choice, choice.whole)
        if choice.params.prompt_logprobs is not None and scored and scored.prompt_logprobs is not None:
            found["prompt_logprobs"] = [p if p is None else max(p, LEAST) for p in scored.prompt_logprobs]
            if scored.prompt_top is not None:
                found["prompt_top_logprobs"] = [
                    None if x is None else {str(t): max(p, LEAST) for t, p in x.items()} for x in scored.prompt_top
                ]
        return found


class Answer(Response):
    """The response to a call: whole or as a stream, until its end, its client's or the engine's.

    When it is over nothing of it runs in the engine, whatever happened.
    """

    def __init__(
        self,
        client: Client,
        metrics: Metrics,
        form: Form,
        call: str,
        model: str,
        prompts: list[list[int]],
        params: SamplingParams,
        entry: Json,
        *,
        stream: bool,
        usage: bool = False,
        versions: bool = False,
    ) -> None:
        # Not Response's own: there is no body yet, and `entry`, the request's line in the log, gets the counts.
        self.background = None
        self.client, self.metrics, self.form, self.call, self.model = client, metrics, form, call, model
        self.prompts, self.params, self.entry, self.stream, self.usage = prompts, params, entry, stream, usage
        self.versions = versions  # whether tokens are told with the version of the weights that drew them
        live = form.live and (stream or params.logprobs is not None)
        vocabulary = form.vocabulary if form.live else Vocabulary(None)
        self.choices = [
            Choice(p * params.n + i, vocabulary, prompt, params, live=live, shown=form.shown)
            for p, prompt in enumerate(prompts)
            for i in range(params.n)
        ]
        self.created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, for as long as the client is there."""
        work = asyncio.create_task(self._stream(send) if self.stream else self._whole(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                self.entry["status"] = 499  # nginx's for a client that left
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self.client.close(self.call)
            self._account()

    def _account(self) -> None:
        for choice in self.choices:
            self.metrics.finished(choice.whole.reason or "abort")
        self.metrics.whole.observe(time.monotonic() - self.entry["began"])
        cached = sum(c.last.cached for c in self.choices[:: self.params.n] if c.last)
        self.entry |= {
            "prompt_tokens": sum(map(len, self.prompts)),
            "cached_tokens": cached,
            "output_tokens": sum(len(c.whole.tokens) for c in self.choices),
        }
        self.metrics.flush()

    async def _steps(self) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        """What each step adds, until every choice has ended."""
        left = len(self.choices)
        while left:
            found = []
            for piece in await self.client.next(self.call):
                choice = self.choices[piece.slot]
                if choice.whole.reason:
                    continue  # tokens after a stop string
                if piece.reason in BROKEN:
                    choice.whole.reason = "error"
                    why = BROKEN[piece.reason] if piece.error in ("", NOT_FINITE) else piece.error
                    raise Refused(500, why, code="engine_error")
                new = choice.push(piece)
                if self.versions and piece.version is not None:
                    choice.versions += [piece.version] * len(new.tokens)
                self._time(choice, len(new.tokens))
                if new.reason:
                    left -= 1
                    if not piece.reason:
                        self.client.end(self.call, piece.slot)
                found.append((choice, new))
            yield found

    def _time(self, choice: Choice, count: int) -> None:
        now, m = time.monotonic(), self.metrics
        m.tokens.inc(count)
        if choice.time is not None:
            m.gap.observe(now - choice.time)
        elif count and "ttft" not in self.entry:
            self.entry["ttft"] = now - self.entry["began"]
            m.first.observe(self.entry["ttft"])
        choice.time = now if count else choice.time

    def _usage(self) -> Json:
        """Prompts count once, however many completions they have."""
        prompt = sum(map(len, self.prompts))
        output = sum(len(c.whole.tokens) for c in self.choices)
        cached = sum(c.last.cached for c in self.choices[:: self.params.n] if c.last)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _frame(self, choices: list[Json], *, chunk: bool) -> Json:
        return self.form.frame(self.call, self.created, self.model, chunk=chunk) | {"choices": choices}

    def _versioned(self, choice: Choice, part: Json) -> Json:
        """A part of an answer, with the versions of the tokens since the last part if the client asked for them."""
        if self.versions:
            part["weight_versions"], choice.versions = choice.versions, []
        return part

    async def _whole(self, send: Send) -> None:
        try:
            async with aclosing(self._steps()) as steps:
                async for _ in steps:
                    pass
        except Refused as e:
            await refuse(e)(_NO_SCOPE, _nothing, send)
            return
        prompts = self.prompts if self.params.prompt_logprobs is not None else []
        tokens = sum(len(c.whole.tokens) for c in self.choices) + sum(map(len, prompts))
        if self.params.logprobs is None and not prompts or tokens * (1 + (self.params.logprobs or 0)) <= INLINE:
            parts = self._parts(dump)
        else:
            parts = await asyncio.to_thread(self._parts, lambda value: b"".join(pieces(value)))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _parts(self, encode: Callable[[Any], bytes]) -> list[bytes]:
        """The body of a whole answer: what comes before the choices, each of them, and what comes after."""
        n, parts = self.params.n, list[bytes]()
        for i, choice in enumerate(self.choices):
            parts.append(
                b"," * (i > 0) + encode(self._versioned(choice, self.form.full(choice, self.choices[i - i % n].last)))
            )
        before = self.form.frame(self.call, self.created, self.model, chunk=False)
        return [dump(before)[:-1] + b',"choices":[', *parts, b'],"usage":' + dump(self._usage()) + b"}"]

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would keep it until it is complete
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(*values: Json, last: bool = False) -> None:
            data = b"".join(b"data: " + dump(v) + b"\n\n" for v in values) + b"data: [DONE]\n\n" * last
            await send({"type": "http.response.body", "body": data, "more_body": True})

        blank = {"usage": None} if self.usage else {}
        try:
            first = [part for c in self.choices if (part := self.form.first(c))]
            if first:
                await emit(*(self._frame([part], chunk=True) | blank for part in first))
            async with aclosing(self._steps()) as steps:
                async for found in steps:
                    told = [(c, d) for c, d in found if d.text or d.reason or d.logprobs or not self.form.live]
                    parts = [self._versioned(c, part) for c, d in told if (part := self.form.part(c, d))]
                    if parts:
                        await emit(*(self._frame([part], chunk=True) | blank for part in parts))
            final = [self._frame([], chunk=True) | {"usage": self._usage()}] if self.usage else []
            await emit(*final, last=True)
        except Refused as e:
            self.entry["status"] = e.status
            await emit(e.body(), last=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def refuse(e: Refused) -> Response:
    """An error as a response."""
    headers = {"Retry-After": str(e.retry)} if e.retry else {}
    if e.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(dump(e.body()), e.status, headers, media_type="application/json")


_NO_SCOPE: Scope = {"type": "http"}  # Response reads nothing else of it


async def _nothing() -> Any:
    raise AssertionError("a response has nothing to receive")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
