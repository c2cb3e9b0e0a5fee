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
from fastgen.core.detokenizer import Detokenizer, token_to_bytes
from fastgen.core.request import NON_FINITE_LOGITS
from fastgen.core.types import Tokenizer
from fastgen.server.engine_client import EngineClient
from fastgen.server.engine_process import TokenDelta
from fastgen.server.metrics import Metrics
from fastgen.server.reasoning import ReasoningParser, find_open_tag
from fastgen.server.requests import APIError
from fastgen.server.tool_calls import ToolCallParser

Json = dict[str, Any]
MAX_INLINE_LOGPROBS = 4096  # logprobs of an answer that is written within the loop; more are in a thread
JSON_CHUNK_ELEMENTS = 64  # elements of a list that are written at once there
MIN_LOGPROB = -9999.0  # JSON has no -inf
ENGINE_ERROR_MESSAGES = {  # what a piece's reason means that has no answer
    "failed": "the engine failed while it computed this",
    "error": "the model's output is NaN or infinite for this request: its weights, or the adapter's, are broken",
}
MAX_TAG_TOKENS = 16  # of a prompt's end, which are more than a tag and a line break have
# Ends of lines to Python's splitlines, by which some clients read streams: U+0085, U+2028 and U+2029.
LINE_SEPARATOR_ESCAPES = tuple((chr(c).encode(), f"\\u{c:04x}".encode()) for c in (0x85, 0x2028, 0x2029))


def dump_json(value: Any) -> bytes:
    """JSON. What is no text in UTF-8, half a surrogate pair, becomes a question mark."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    for raw, escaped in LINE_SEPARATOR_ESCAPES:
        data = data.replace(raw, escaped)
    return data


def iter_json_chunks(value: Any) -> Iterator[bytes]:
    """What `dump` gives, a little at a time: no other thread runs while the encoder makes a piece."""
    if isinstance(value, dict) and value:
        for i, (name, member) in enumerate(value.items()):
            yield (b"," if i else b"{") + dump_json(name) + b":"
            yield from iter_json_chunks(member)
        yield b"}"
    elif isinstance(value, list) and len(value) > JSON_CHUNK_ELEMENTS:
        for i in range(0, len(value), JSON_CHUNK_ELEMENTS):
            yield (b"," if i else b"[") + dump_json(value[i : i + JSON_CHUNK_ELEMENTS])[1:-1]
        yield b"]"
    else:
        yield dump_json(value)


class TokenDecoder:
    """A tokenizer, or none; and what single tokens look like."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._bytes_cache: dict[int, bytes] = {}

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of tokens, special ones included."""
        if self.tokenizer is None:
            return ""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(token_ids, **options)  # type: ignore[return-value]

    def decode_to_bytes(self, token_id: int) -> bytes:
        """Returns what a token adds to a text, as UTF-8."""
        if token_id not in self._bytes_cache:
            self._bytes_cache[token_id] = b"" if self.tokenizer is None else token_to_bytes(self.tokenizer, token_id)
        return self._bytes_cache[token_id]

    def decode_token(self, token_id: int) -> str:
        """Returns what a token adds to a text."""
        return self.decode_to_bytes(token_id).decode(errors="replace")

    def format_logprob(self, token_id: int, logprob: float) -> Json:
        """Returns a token as a chat's logprobs have it; `bytes` tell parts of characters apart."""
        return {
            "token": self.decode_token(token_id),
            "logprob": max(logprob, MIN_LOGPROB),
            "bytes": [*self.decode_to_bytes(token_id)],
        }

    def echo_prompt(
        self, prompt_token_ids: list[int], skipped_positions: frozenset[int] = frozenset()
    ) -> "EchoedPrompt":
        """Returns a prompt's text and where its tokens begin in it.

        `hidden` are the places of tokens that the tokenizer has put around a text: they are not part of it.
        """
        if self.tokenizer is None:
            return EchoedPrompt("", [0] * len(prompt_token_ids))
        decoder, text, offsets = codecs.getincrementaldecoder("utf-8")("replace"), "", list[int]()
        for place, token in enumerate(prompt_token_ids):
            offsets.append(len(text))
            if place not in skipped_positions:
                text += decoder.decode(self.decode_to_bytes(token))
        text += decoder.decode(b"", final=True)
        own = [token for place, token in enumerate(prompt_token_ids) if place not in skipped_positions]
        blanks = len(text) - len(text.lstrip(" "))
        if blanks and not self.decode(own).startswith(" " * blanks):  # SentencePiece's own one, before the first word
            text, offsets = text[1:], [max(0, offset - 1) for offset in offsets]
        return EchoedPrompt(text, offsets)


@dataclass(slots=True, frozen=True)
class EchoedPrompt:
    """A prompt as it is given back."""

    text: str
    text_offsets: list[int]  # of each token in it


@dataclass(slots=True)
class ChoiceDelta:
    """What a step added to a completion."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    text_offsets: list[int] = field(default_factory=list)  # of each token in the completion's text
    finish_reason: str | None = None


class Choice:
    """One completion on its way. The same rules as `request.Sample`'s, which works without the socket between."""

    def __init__(
        self,
        index: int,
        token_decoder: TokenDecoder,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        stream_text: bool,
        visible_special_tokens: dict[int, str],
    ) -> None:
        self.index, self.prompt_token_ids, self.sampling = index, prompt_token_ids, sampling
        self.detokenizer: Detokenizer | None = None
        if (tokenizer := token_decoder.tokenizer) is not None:
            options: Json = {"min_tokens": sampling.min_tokens, "stream_text": stream_text}
            self.detokenizer = Detokenizer(
                tokenizer, prompt_token_ids, sampling.stop, visible_special_tokens, **options
            )
        with_logprobs = sampling.logprobs is not None
        self.accumulated = ChoiceDelta(
            logprobs=[] if with_logprobs else None, top_logprobs=[] if sampling.logprobs else None
        )
        self.final_delta: TokenDelta | None = None  # with the counts
        self.last_token_time: float | None = None  # of the last token
        self.unsent_weight_versions: list[int] = []  # of tokens whose version the client was not told yet

    def push(self, token_delta: TokenDelta) -> ChoiceDelta:
        """Take what came; what of it is new."""
        new, cut, d = ChoiceDelta(), False, self.detokenizer
        for token in token_delta.token_ids:
            new.token_ids.append(token)
            if d is not None:
                if d.stream_text:
                    new.text_offsets.append(len(d.text))
                text, cut = d.push(token)
                new.text += text
            if cut:
                break
        if cut or token_delta.finish_reason:
            new.finish_reason, self.final_delta = "stop" if cut else token_delta.finish_reason, token_delta
            if d is not None and not cut:
                new.text += d.flush()
        all, count = self.accumulated, len(new.token_ids)
        if all.logprobs is not None and token_delta.logprobs is not None:
            new.logprobs = token_delta.logprobs[:count]
            all.logprobs += new.logprobs
        if all.top_logprobs is not None and token_delta.top_logprobs is not None:
            new.top_logprobs = token_delta.top_logprobs[:count]
            all.top_logprobs += new.top_logprobs
        all.text, all.finish_reason = all.text + new.text, new.finish_reason
        all.token_ids += new.token_ids
        all.text_offsets += new.text_offsets
        return new


class ResponseBuilder:
    """How a kind of answer looks: a choice of a whole answer, and of a chunk. `prefix` begins its ids."""

    id_prefix, object_type, chunk_object_type = "", "", ""
    has_text = True  # whether text is read as it comes

    def __init__(self, token_decoder: TokenDecoder) -> None:
        self.token_decoder = token_decoder
        self.visible_special_tokens: dict[int, str] = {}  # special tokens that belong to the text

    def build_envelope(self, request_id: str, created: int, model: str, *, is_chunk: bool) -> Json:
        """What surrounds choices."""
        return {
            "id": request_id,
            "object": self.chunk_object_type if is_chunk else self.object_type,
            "created": created,
            "model": model,
        }

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """A choice's first chunk, before any token."""
        return None

    def build_chunk(self, choice: Choice, new: ChoiceDelta) -> Json | None:
        """A choice's part of a chunk; None if there is nothing to say yet."""
        raise NotImplementedError

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """A whole choice; `scored` has its prompt's logprobs."""
        raise NotImplementedError


class ChatResponseBuilder(ResponseBuilder):
    """/chat/completions: reasoning is told from the answer first, then calls from its text.

    `reader` makes what reads calls, if there may be any.
    """

    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        token_decoder: TokenDecoder,
        make_tool_call_parser: Callable[[], ToolCallParser] | None = None,
        visible_special_tokens: dict[int, str] | None = None,
        *,
        is_function_named: bool = False,
        may_reason: bool = True,
    ) -> None:
        """`named`: the client chose the function, which OpenAI's finish_reason does not tell it again. `reasons`:
        whether an answer may begin with reasoning, as it may not where all of it follows a grammar."""
        super().__init__(token_decoder)
        self.make_tool_call_parser, self.visible_special_tokens, self.is_function_named, self.may_reason = (
            make_tool_call_parser,
            visible_special_tokens or {},
            is_function_named,
            may_reason,
        )
        self.parsers: dict[
            int, tuple[ReasoningParser | None, ToolCallParser | None]
        ] = {}  # of choices that are streamed

    def _make_parsers(self, choice: Choice) -> tuple[ReasoningParser | None, ToolCallParser | None]:
        """What reads a choice's text from its beginning."""
        end = self.token_decoder.decode(choice.prompt_token_ids[-MAX_TAG_TOKENS:]) if self.may_reason else ""
        return ReasoningParser(
            find_open_tag(end)
        ) if self.may_reason else None, self.make_tool_call_parser() if self.make_tool_call_parser else None

    def _finish_reason(self, reason: str | None, tool_call_parser: ToolCallParser | None) -> str | None:
        called = (
            reason == "stop"
            and tool_call_parser is not None
            and tool_call_parser.num_calls > 0
            and not self.is_function_named
        )
        return "tool_calls" if called else reason

    def _format_logprobs(self, new: ChoiceDelta) -> Json | None:
        if new.logprobs is None:
            return None
        name, content = self.token_decoder.format_logprob, []
        for i, (token, logprob) in enumerate(zip(new.token_ids, new.logprobs, strict=True)):
            top = new.top_logprobs[i].items() if new.top_logprobs is not None else ()
            content.append(name(token, logprob) | {"top_logprobs": [name(*pair) for pair in top]})
        return {"content": content, "refusal": None}

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": None if self.make_tool_call_parser else ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def build_chunk(self, choice: Choice, new: ChoiceDelta) -> Json | None:
        """Reasoning and text that are new, and calls."""
        if choice.index not in self.parsers:
            self.parsers[choice.index] = self._make_parsers(choice)
        reasoner, reader = self.parsers[choice.index]
        reasoning, text, calls = "", new.text, list[Json]()
        if reasoner:
            reasoning, text = reasoner.push(text, is_final=bool(new.finish_reason))
        if reader:
            text, calls = reader.push(text, is_final=bool(new.finish_reason))
        logprobs = self._format_logprobs(new) if new.token_ids else None
        if not (reasoning or text or calls or new.finish_reason or logprobs):
            return None
        delta: Json = {"reasoning_content": reasoning} if reasoning else {}
        delta |= {"content": text} if text or not (reasoning or calls or new.finish_reason) else {}
        reason = self._finish_reason(new.finish_reason, reader)
        delta |= {"tool_calls": calls} if calls else {}
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """The message."""
        all = choice.accumulated
        reasoner, reader = self._make_parsers(choice)
        reasoning, text, calls = "", all.text, list[Json]()
        if reasoner:
            reasoning, text = reasoner.push(text, is_final=True)
        if reader:
            text, calls = reader.push(text, is_final=True)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if reasoning or calls:
            message["content"] = text or None
        message |= {"reasoning_content": reasoning} if reasoning else {}
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._format_logprobs(all),
            "finish_reason": self._finish_reason(all.finish_reason, reader),
        }


class TextResponseBuilder(ResponseBuilder):
    """/completions; `echo` has the text of each choice's prompt, which then comes first."""

    id_prefix, object_type, chunk_object_type = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, token_decoder: TokenDecoder, get_echoed_prompt: Callable[[Choice], EchoedPrompt] | None = None
    ) -> None:
        super().__init__(token_decoder)
        self.get_echoed_prompt = get_echoed_prompt

    def _format_logprobs(self, new: ChoiceDelta, text_offset: int) -> Json | None:
        if new.logprobs is None:
            return None
        top = new.top_logprobs if new.top_logprobs is not None else [{} for _ in new.token_ids]
        drawn = zip(new.token_ids, new.logprobs, top, strict=True)
        return {
            "tokens": [self.token_decoder.decode_token(t) for t in new.token_ids],
            "token_logprobs": [max(p, MIN_LOGPROB) for p in new.logprobs],
            "top_logprobs": [self._format_top_logprobs(t, p, likely) for t, p, likely in drawn],
            "text_offset": [text_offset + i for i in new.text_offsets or [0] * len(new.token_ids)],
        }

    def _format_top_logprobs(self, token: int, logprob: float, top_logprobs: dict[int, float]) -> dict[str, float]:
        """Returns the likeliest tokens and the one that was drawn by their texts, the likeliest first.

        Where two look alike, the drawn one, or else the likelier one, has the text, and the other is `token_id:N`.
        """
        pairs = sorted((top_logprobs | {token: logprob}).items(), key=lambda pair: -pair[1])
        names = {self.token_decoder.decode_token(token): token}
        for id, _ in pairs:
            names.setdefault(self.token_decoder.decode_token(id), id)
        texts = {id: text for text, id in names.items()}
        return {texts.get(id, f"token_id:{id}"): max(p, MIN_LOGPROB) for id, p in pairs}

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """The prompt, if it is asked for."""
        if self.get_echoed_prompt is None:
            return None
        return {
            "index": choice.index,
            "text": self.get_echoed_prompt(choice).text,
            "logprobs": None,
            "finish_reason": None,
        }

    def build_chunk(self, choice: Choice, new: ChoiceDelta) -> Json:
        """Text that is new."""
        before = len(self.get_echoed_prompt(choice).text) if self.get_echoed_prompt else 0
        logprobs = self._format_logprobs(new, before) if new.token_ids else None
        return {"index": choice.index, "text": new.text, "logprobs": logprobs, "finish_reason": new.finish_reason}

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """The text, and what it was drawn with."""
        all, lead = choice.accumulated, self.get_echoed_prompt(choice).text if self.get_echoed_prompt else ""
        logprobs = self._format_logprobs(all, len(lead))
        if self.get_echoed_prompt and logprobs and prompt_delta and prompt_delta.prompt_logprobs is not None:
            top = prompt_delta.prompt_top_logprobs or [{} for _ in choice.prompt_token_ids]
            likely = [
                None if p is None else self._format_top_logprobs(t, p, others or {})
                for t, p, others in zip(choice.prompt_token_ids, prompt_delta.prompt_logprobs, top, strict=True)
            ]
            logprobs = {
                "tokens": [self.token_decoder.decode_token(t) for t in choice.prompt_token_ids] + logprobs["tokens"],
                "token_logprobs": [p if p is None else max(p, MIN_LOGPROB) for p in prompt_delta.prompt_logprobs]
                + logprobs["token_logprobs"],
                "top_logprobs": likely + logprobs["top_logprobs"],
                "text_offset": self.get_echoed_prompt(choice).text_offsets + logprobs["text_offset"],
            }
        return {
            "index": choice.index,
            "text": lead + all.text,
            "logprobs": logprobs,
            "finish_reason": all.finish_reason,
        }


class TokenResponseBuilder(ResponseBuilder):
    """/inference/v1/generate: token ids, and no text."""

    id_prefix, object_type, chunk_object_type = "gen", "generate", "generate.chunk"
    has_text = False

    def _format_logprobs(self, new: ChoiceDelta) -> Json | None:
        if new.logprobs is None:
            return None
        content = []
        for i, (token, logprob) in enumerate(zip(new.token_ids, new.logprobs, strict=True)):
            top = new.top_logprobs[i].items() if new.top_logprobs is not None else ()
            content.append(
                self._format_logprob(token, logprob) | {"top_logprobs": [self._format_logprob(*pair) for pair in top]}
            )
        return {"content": content}

    def _format_logprob(self, token: int, logprob: float) -> Json:
        return {"token": f"token_id:{token}", "logprob": max(logprob, MIN_LOGPROB), "bytes": None}

    def build_chunk(self, choice: Choice, new: ChoiceDelta) -> Json:
        """Tokens that are new."""
        logprobs = self._format_logprobs(new) if new.token_ids else None
        return {
            "index": choice.index,
            "token_ids": new.token_ids,
            "logprobs": logprobs,
            "finish_reason": new.finish_reason,
        }

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """All tokens, with the prompt's logprobs if they were asked for."""
        found = self.build_chunk(choice, choice.accumulated)
        if choice.sampling.prompt_logprobs is not None and prompt_delta and prompt_delta.prompt_logprobs is not None:
            found["prompt_logprobs"] = [p if p is None else max(p, MIN_LOGPROB) for p in prompt_delta.prompt_logprobs]
            if prompt_delta.prompt_top_logprobs is not None:
                found["prompt_top_logprobs"] = [
                    None if x is None else {str(t): max(p, MIN_LOGPROB) for t, p in x.items()}
                    for x in prompt_delta.prompt_top_logprobs
                ]
        return found


class CompletionResponse(Response):
    """The response to a call: whole or as a stream, until its end, its client's or the engine's.

    When it is over nothing of it runs in the engine, whatever happened.
    """

    def __init__(
        self,
        engine_client: EngineClient,
        metrics: Metrics,
        builder: ResponseBuilder,
        request_id: str,
        model_name: str,
        prompts: list[list[int]],
        sampling: SamplingParams,
        log_entry: Json,
        *,
        stream: bool,
        include_usage: bool = False,
        return_weight_versions: bool = False,
    ) -> None:
        # Not Response's own: there is no body yet, and `entry`, the request's line in the log, gets the counts.
        self.background = None
        self.engine_client, self.metrics, self.builder, self.request_id, self.model_name = (
            engine_client,
            metrics,
            builder,
            request_id,
            model_name,
        )
        self.prompts, self.sampling, self.log_entry, self.stream, self.include_usage = (
            prompts,
            sampling,
            log_entry,
            stream,
            include_usage,
        )
        self.return_weight_versions = (
            return_weight_versions  # whether tokens are told with the version of the weights that drew them
        )
        live = builder.has_text and (stream or sampling.logprobs is not None)
        vocabulary = builder.token_decoder if builder.has_text else TokenDecoder(None)
        self.choices = [
            Choice(
                p * sampling.n + i,
                vocabulary,
                prompt,
                sampling,
                stream_text=live,
                visible_special_tokens=builder.visible_special_tokens,
            )
            for p, prompt in enumerate(prompts)
            for i in range(sampling.n)
        ]
        self.created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, for as long as the client is there."""
        work = asyncio.create_task(self._send_stream(send) if self.stream else self._send_full(send))
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                self.log_entry["status"] = 499  # nginx's for a client that left
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self.engine_client.close_request(self.request_id)
            self._record_totals()

    def _record_totals(self) -> None:
        for choice in self.choices:
            self.metrics.record_finished(choice.accumulated.finish_reason or "abort")
        self.metrics.e2e_latency.observe(time.monotonic() - self.log_entry["began"])
        cached = sum(c.final_delta.num_cached_tokens for c in self.choices[:: self.sampling.n] if c.final_delta)
        self.log_entry |= {
            "prompt_tokens": sum(map(len, self.prompts)),
            "cached_tokens": cached,
            "output_tokens": sum(len(c.accumulated.token_ids) for c in self.choices),
        }
        self.metrics.flush()

    async def _iter_deltas(self) -> AsyncGenerator[list[tuple[Choice, ChoiceDelta]]]:
        """What each step adds, until every choice has ended."""
        left = len(self.choices)
        while left:
            found = []
            for piece in await self.engine_client.next_deltas(self.request_id):
                choice = self.choices[piece.choice_index]
                if choice.accumulated.finish_reason:
                    continue  # tokens after a stop string
                if piece.finish_reason in ENGINE_ERROR_MESSAGES:
                    choice.accumulated.finish_reason = "error"
                    why = (
                        ENGINE_ERROR_MESSAGES[piece.finish_reason]
                        if piece.error in ("", NON_FINITE_LOGITS)
                        else piece.error
                    )
                    raise APIError(500, why, code="engine_error")
                new = choice.push(piece)
                if self.return_weight_versions and piece.weight_version is not None:
                    choice.unsent_weight_versions += [piece.weight_version] * len(new.token_ids)
                self._record_latency(choice, len(new.token_ids))
                if new.finish_reason:
                    left -= 1
                    if not piece.finish_reason:
                        self.engine_client.abort_choice(self.request_id, piece.choice_index)
                found.append((choice, new))
            yield found

    def _record_latency(self, choice: Choice, num_tokens: int) -> None:
        now, m = time.monotonic(), self.metrics
        m.generation_tokens.inc(num_tokens)
        if choice.last_token_time is not None:
            m.inter_token_latency.observe(now - choice.last_token_time)
        elif num_tokens and "ttft" not in self.log_entry:
            self.log_entry["ttft"] = now - self.log_entry["began"]
            m.time_to_first_token.observe(self.log_entry["ttft"])
        choice.last_token_time = now if num_tokens else choice.last_token_time

    def _build_usage(self) -> Json:
        """Prompts count once, however many completions they have."""
        prompt = sum(map(len, self.prompts))
        output = sum(len(c.accumulated.token_ids) for c in self.choices)
        cached = sum(c.final_delta.num_cached_tokens for c in self.choices[:: self.sampling.n] if c.final_delta)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _build_envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        return self.builder.build_envelope(self.request_id, self.created, self.model_name, is_chunk=is_chunk) | {
            "choices": choices
        }

    def _add_weight_versions(self, choice: Choice, choice_json: Json) -> Json:
        """A part of an answer, with the versions of the tokens since the last part if the client asked for them."""
        if self.return_weight_versions:
            choice_json["weight_versions"], choice.unsent_weight_versions = choice.unsent_weight_versions, []
        return choice_json

    async def _send_full(self, send: Send) -> None:
        try:
            async with aclosing(self._iter_deltas()) as steps:
                async for _ in steps:
                    pass
        except APIError as e:
            await error_response(e)(_EMPTY_SCOPE, _receive_nothing, send)
            return
        prompts = self.prompts if self.sampling.prompt_logprobs is not None else []
        tokens = sum(len(c.accumulated.token_ids) for c in self.choices) + sum(map(len, prompts))
        if (
            self.sampling.logprobs is None
            and not prompts
            or tokens * (1 + (self.sampling.logprobs or 0)) <= MAX_INLINE_LOGPROBS
        ):
            parts = self._encode_body(dump_json)
        else:
            parts = await asyncio.to_thread(self._encode_body, lambda value: b"".join(iter_json_chunks(value)))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _encode_body(self, encode: Callable[[Any], bytes]) -> list[bytes]:
        """The body of a whole answer: what comes before the choices, each of them, and what comes after."""
        n, parts = self.sampling.n, list[bytes]()
        for i, choice in enumerate(self.choices):
            parts.append(
                b"," * (i > 0)
                + encode(
                    self._add_weight_versions(
                        choice, self.builder.build_choice(choice, self.choices[i - i % n].final_delta)
                    )
                )
            )
        before = self.builder.build_envelope(self.request_id, self.created, self.model_name, is_chunk=False)
        return [dump_json(before)[:-1] + b',"choices":[', *parts, b'],"usage":' + dump_json(self._build_usage()) + b"}"]

    async def _send_stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would keep it until it is complete
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(*values: Json, last: bool = False) -> None:
            data = b"".join(b"data: " + dump_json(v) + b"\n\n" for v in values) + b"data: [DONE]\n\n" * last
            await send({"type": "http.response.body", "body": data, "more_body": True})

        blank = {"usage": None} if self.include_usage else {}
        try:
            first = [part for c in self.choices if (part := self.builder.build_first_chunk(c))]
            if first:
                await emit(*(self._build_envelope([part], is_chunk=True) | blank for part in first))
            async with aclosing(self._iter_deltas()) as steps:
                async for found in steps:
                    told = [
                        (c, d) for c, d in found if d.text or d.finish_reason or d.logprobs or not self.builder.has_text
                    ]
                    parts = [
                        self._add_weight_versions(c, part) for c, d in told if (part := self.builder.build_chunk(c, d))
                    ]
                    if parts:
                        await emit(*(self._build_envelope([part], is_chunk=True) | blank for part in parts))
            final = (
                [self._build_envelope([], is_chunk=True) | {"usage": self._build_usage()}] if self.include_usage else []
            )
            await emit(*final, last=True)
        except APIError as e:
            self.log_entry["status"] = e.status
            await emit(e.to_body(), last=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: APIError) -> Response:
    """An error as a response."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(dump_json(error.to_body()), error.status, headers, media_type="application/json")


_EMPTY_SCOPE: Scope = {"type": "http"}  # Response reads nothing else of it


async def _receive_nothing() -> Any:
    raise AssertionError("a response has nothing to receive")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
