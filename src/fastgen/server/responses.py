"""Builds responses: text of token deltas, and the JSON of chats, completions and token-only generation."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastgen.sampling_params import SamplingParams
from fastgen.server.engine_process import TokenDelta
from fastgen.server.reasoning import ReasoningParser
from fastgen.server.tool_calls import ToolCallParser
from fastgen.text import Tokenizer
from fastgen.text.detokenizer import Detokenizer, token_to_bytes
from fastgen.text.text_processor import detokenizer_options

Json = dict[str, Any]
Parsers = tuple[ReasoningParser | None, ToolCallParser | None]
MIN_LOGPROB = -9999.0  # JSON has no -inf
MAX_TAG_TOKENS = 16  # tokens at the end of a prompt that are searched for a reasoning tag and line breaks


class EchoedPrompt(NamedTuple):
    """Text of a prompt that a response repeats, and the offset of each token in the text."""

    text: str
    text_offsets: list[int]


class TokenDecoder:
    """Decodes single tokens and prompts; without a tokenizer, to empty text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._bytes_cache: dict[int, bytes] = {}

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of tokens, including special tokens."""
        if self.tokenizer is None:
            return ""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(token_ids, **options)  # type: ignore[return-value]

    def decode_to_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes that a token appends to a text."""
        if token_id not in self._bytes_cache:
            self._bytes_cache[token_id] = b"" if self.tokenizer is None else token_to_bytes(self.tokenizer, token_id)
        return self._bytes_cache[token_id]

    def decode_token(self, token_id: int) -> str:
        """Returns the text that a token appends, with U+FFFD for parts of characters."""
        return self.decode_to_bytes(token_id).decode(errors="replace")

    def format_logprob(self, token_id: int, logprob: float) -> Json:
        """Returns a token's entry in a chat's logprobs; `bytes` distinguishes parts of characters."""
        token_bytes = [*self.decode_to_bytes(token_id)]
        return {"token": self.decode_token(token_id), "logprob": max(logprob, MIN_LOGPROB), "bytes": token_bytes}

    def echo_prompt(self, prompt_token_ids: list[int], text_positions: range) -> EchoedPrompt:
        """Returns a prompt's text and token offsets. The text has the tokens at `text_positions`, not those that the
        tokenizer has added around a text."""
        if self.tokenizer is None:
            return EchoedPrompt("", [0] * len(prompt_token_ids))
        decoder, text, offsets, text_tokens = codecs.getincrementaldecoder("utf-8")("replace"), "", [], []
        for position, token in enumerate(prompt_token_ids):
            offsets.append(len(text))
            if position in text_positions:
                text += decoder.decode(self.decode_to_bytes(token))
                text_tokens.append(token)
        text += decoder.decode(b"", final=True)
        num_spaces = len(text) - len(text.lstrip(" "))
        # SentencePiece puts a space before the first word.
        if num_spaces and not self.decode(text_tokens).startswith(" " * num_spaces):
            text, offsets = text[1:], [max(0, offset - 1) for offset in offsets]
        return EchoedPrompt(text, offsets)


@dataclass(slots=True)
class ChoiceDelta:
    """Text and tokens that a step added to a choice, or their sum over steps."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] | None = None  # float; None for a prompt's first token
    top_logprobs: list[Any] | None = None  # dict[int, float]; None for a prompt's first token
    text_offsets: list[int] = field(default_factory=list)  # of each token in the choice's text
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the id of `stop_token_ids`, that ended the choice


class Choice:
    """A completion in progress: detokenizes token deltas and accumulates them."""

    def __init__(
        self, index: int, decoder: TokenDecoder, prompt_token_ids: list[int], sampling: SamplingParams, **options: Any
    ) -> None:
        """`options` are those of the `Detokenizer`."""
        self.index, self.prompt_token_ids, self.sampling = index, prompt_token_ids, sampling
        self.detokenizer: Detokenizer | None = None
        if decoder.tokenizer is not None:
            options |= detokenizer_options(sampling)
            self.detokenizer = Detokenizer(decoder.tokenizer, prompt_token_ids, sampling.stop, **options)
        logprobs, top_logprobs = None if sampling.logprobs is None else [], [] if sampling.logprobs else None
        self.accumulated = ChoiceDelta(logprobs=logprobs, top_logprobs=top_logprobs)
        self.final_delta: TokenDelta | None = None  # with the prompt's logprobs and the number of cached tokens
        self.last_token_time: float | None = None  # time.monotonic() of the last token
        self.unsent_weight_versions: list[int] = []  # of tokens since the last chunk

    def push(self, token_delta: TokenDelta) -> ChoiceDelta:
        """Adds tokens up to the first stop string; returns the text that became certain and these tokens."""
        new, is_stopped, d = ChoiceDelta(), False, self.detokenizer
        for token in token_delta.token_ids:
            new.token_ids.append(token)
            if d is not None:
                if d.stream_text:
                    new.text_offsets.append(len(d.text))
                text, is_stopped = d.push(token)
                new.text += text
                if is_stopped:
                    break
        if is_stopped or token_delta.finish_reason:
            new.finish_reason, self.final_delta = "stop" if is_stopped else token_delta.finish_reason, token_delta
            new.text += "" if d is None else d.flush()
            ends = self.sampling.stop_token_ids if token_delta.finish_reason == "stop" else ()
            last = new.token_ids[-1] if new.token_ids else None
            new.stop_reason = d.stop_string if is_stopped and d else last if last in ends else None
        total, num_tokens = self.accumulated, len(new.token_ids)
        if total.logprobs is not None and token_delta.logprobs is not None:
            new.logprobs = token_delta.logprobs[:num_tokens]
            total.logprobs += new.logprobs
        if total.top_logprobs is not None and token_delta.top_logprobs is not None:
            new.top_logprobs = token_delta.top_logprobs[:num_tokens]
            total.top_logprobs += new.top_logprobs
        total.text, total.finish_reason, total.stop_reason = total.text + new.text, new.finish_reason, new.stop_reason
        total.token_ids += new.token_ids
        total.text_offsets += new.text_offsets
        return new


def _clip(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


@dataclass(eq=False)
class ResponseBuilder:
    """Builds the JSON of a kind of response: of choices in a body, and of chunks in a stream."""

    id_prefix, object_type, chunk_object_type = "", "", ""
    has_text = True

    token_decoder: TokenDecoder
    visible_special_tokens: dict[int, str] = field(default_factory=dict, kw_only=True)  # that the text includes

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """Builds a choice's chunk before the first token, if any."""
        return None

    def build_chunk(self, choice: Choice, delta: ChoiceDelta) -> Json | None:
        """Builds the chunk of a delta; None while there is nothing to send."""
        raise NotImplementedError

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """Builds a finished choice; `prompt_delta` has the prompt's logprobs."""
        raise NotImplementedError


def _format_content_logprobs(
    delta: ChoiceDelta, format_logprob: Callable[[int, float], Json], **fields: Any
) -> Json | None:
    """Returns the logprobs of a delta's tokens in the form of chats, and further fields; None without logprobs."""
    if delta.logprobs is None:
        return None
    content = []
    for i, (token, logprob) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
        top = delta.top_logprobs[i].items() if delta.top_logprobs is not None else ()
        content.append(format_logprob(token, logprob) | {"top_logprobs": [format_logprob(*pair) for pair in top]})
    return {"content": content} | fields


@dataclass(eq=False)
class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of /chat/completions: separates reasoning from the text, then tool calls."""

    id_prefix, object_type, chunk_object_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    make_tool_call_parser: Callable[[], ToolCallParser] | None = None
    is_function_named: bool = False  # the client chose the function, so that OpenAI's finish reason stays "stop"
    may_reason: bool = True  # the output may begin with reasoning; not if a grammar constrains all of the output
    parsers: dict[int, Parsers] = field(default_factory=dict)  # of streamed choices

    def _make_parsers(self, choice: Choice) -> Parsers:
        prompt_end = self.token_decoder.decode(choice.prompt_token_ids[-MAX_TAG_TOKENS:])
        reasoning_parser = ReasoningParser(prompt_end) if self.may_reason else None
        return reasoning_parser, self.make_tool_call_parser() if self.make_tool_call_parser else None

    def _parse(self, parsers: Parsers, delta: ChoiceDelta, is_final: bool) -> tuple[str, str, list[Json], str | None]:
        """Returns the reasoning, text and tool calls of a delta's text, and the finish reason."""
        reasoning_parser, tool_call_parser = parsers
        reasoning, text, calls, finish_reason = "", delta.text, list[Json](), delta.finish_reason
        if reasoning_parser:
            reasoning, text = reasoning_parser.push(text, is_final=is_final)
        if tool_call_parser:
            text, calls = tool_call_parser.push(text, is_final=is_final)
            if finish_reason == "stop" and tool_call_parser.num_calls > 0 and not self.is_function_named:
                finish_reason = "tool_calls"
        return reasoning, text, calls, finish_reason

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """Builds the chunk with the role."""
        delta = {"role": "assistant", "content": None if self.make_tool_call_parser else ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}

    def build_chunk(self, choice: Choice, delta: ChoiceDelta) -> Json | None:
        """Builds the chunk with new reasoning, text and tool calls."""
        if choice.index not in self.parsers:
            self.parsers[choice.index] = self._make_parsers(choice)
        parsers, is_final = self.parsers[choice.index], bool(delta.finish_reason)
        reasoning, text, calls, reason = self._parse(parsers, delta, is_final)
        format_logprob = self.token_decoder.format_logprob
        logprobs = _format_content_logprobs(delta, format_logprob, refusal=None) if delta.token_ids else None
        if not (reasoning or text or calls or is_final or logprobs):
            return None
        message: Json = {"reasoning_content": reasoning} if reasoning else {}
        message |= {"content": text} if text or not (reasoning or calls or is_final) else {}
        message |= {"tool_calls": calls} if calls else {}
        end = {"finish_reason": reason, "stop_reason": delta.stop_reason}
        return {"index": choice.index, "delta": message, "logprobs": logprobs} | end

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """Builds the choice with the message."""
        total = choice.accumulated
        reasoning, text, calls, reason = self._parse(self._make_parsers(choice), total, is_final=True)
        content = text or None if reasoning or calls else text
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        if calls:
            message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
        logprobs = _format_content_logprobs(total, self.token_decoder.format_logprob, refusal=None)
        end = {"finish_reason": reason, "stop_reason": total.stop_reason}
        return {"index": choice.index, "message": message, "logprobs": logprobs} | end


def _text_choice(index: int, text: str, logprobs: Json | None, delta: ChoiceDelta) -> Json:
    """Returns the JSON of a choice, or of its chunk; `delta` has the reasons of its end."""
    end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
    return {"index": index, "text": text, "logprobs": logprobs} | end


@dataclass(eq=False)
class TextResponseBuilder(ResponseBuilder):
    """Builds responses of /completions. With `echoes`, one for each prompt, the text begins with the prompt's."""

    id_prefix, object_type, chunk_object_type = "cmpl", "text_completion", "text_completion"

    echoes: Sequence[EchoedPrompt] = ()

    def _echo(self, choice: Choice) -> EchoedPrompt:
        return self.echoes[choice.index // choice.sampling.n] if self.echoes else EchoedPrompt("", [])

    def _format_logprobs(self, delta: ChoiceDelta, text_offset: int) -> Json | None:
        if delta.logprobs is None:
            return None
        top = delta.top_logprobs if delta.top_logprobs is not None else [None] * len(delta.token_ids)
        tokens = zip(delta.token_ids, delta.logprobs, top, strict=True)
        return {
            "tokens": [self.token_decoder.decode_token(t) for t in delta.token_ids],
            "token_logprobs": [_clip(p) for p in delta.logprobs],
            "top_logprobs": [None if p is None else self._format_top_logprobs(t, p, x or {}) for t, p, x in tokens],
            "text_offset": [text_offset + i for i in delta.text_offsets or [0] * len(delta.token_ids)],
        }

    def _format_top_logprobs(self, token: int, logprob: float, top_logprobs: dict[int, float]) -> dict[str, float]:
        """Returns logprobs of the most likely tokens and of `token` by the tokens' texts, most likely first.

        Of tokens with the same text, `token` or else the most likely one keeps the text; others are `token_id:N`.
        """
        pairs = sorted((top_logprobs | {token: logprob}).items(), key=lambda pair: -pair[1])
        ids = {self.token_decoder.decode_token(token): token}
        for id, _ in pairs:
            ids.setdefault(self.token_decoder.decode_token(id), id)
        texts = {id: text for text, id in ids.items()}
        return {texts.get(id, f"token_id:{id}"): max(p, MIN_LOGPROB) for id, p in pairs}

    def build_first_chunk(self, choice: Choice) -> Json | None:
        """Builds the chunk with the echoed prompt."""
        return _text_choice(choice.index, self._echo(choice).text, None, ChoiceDelta()) if self.echoes else None

    def build_chunk(self, choice: Choice, delta: ChoiceDelta) -> Json:
        """Builds the chunk with new text."""
        logprobs = self._format_logprobs(delta, len(self._echo(choice).text)) if delta.token_ids else None
        return _text_choice(choice.index, delta.text, logprobs, delta)

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """Builds the choice with the text, and with the prompt's logprobs if echoed."""
        total, prompt = choice.accumulated, self._echo(choice)
        logprobs = self._format_logprobs(total, len(prompt.text))
        if self.echoes and logprobs and (d := prompt_delta) and d.prompt_logprobs is not None:
            tokens = choice.prompt_token_ids, d.prompt_logprobs, d.prompt_top_logprobs or None, prompt.text_offsets
            prompt_logprobs = self._format_logprobs(ChoiceDelta("", *tokens), 0) or {}
            logprobs = {name: prompt_logprobs[name] + values for name, values in logprobs.items()}
        return _text_choice(choice.index, prompt.text + total.text, logprobs, total)


class TokenResponseBuilder(ResponseBuilder):
    """Builds responses of /inference/v1/generate: token ids without text."""

    id_prefix, object_type, chunk_object_type = "gen", "generate", "generate.chunk"
    has_text = False

    def _format_logprob(self, token: int, logprob: float) -> Json:
        return {"token": f"token_id:{token}", "logprob": max(logprob, MIN_LOGPROB), "bytes": None}

    def build_chunk(self, choice: Choice, delta: ChoiceDelta) -> Json:
        """Builds the chunk with new tokens."""
        tokens, reason = delta.token_ids, delta.finish_reason
        logprobs = _format_content_logprobs(delta, self._format_logprob) if tokens else None
        return {"index": choice.index, "token_ids": tokens, "logprobs": logprobs, "finish_reason": reason}

    def build_choice(self, choice: Choice, prompt_delta: TokenDelta | None) -> Json:
        """Builds the choice with all tokens, and the prompt's logprobs if requested."""
        choice_json = self.build_chunk(choice, choice.accumulated)
        if prompt_delta and prompt_delta.prompt_logprobs is not None:
            choice_json["prompt_logprobs"] = [_clip(p) for p in prompt_delta.prompt_logprobs]
            if (top := prompt_delta.prompt_top_logprobs) is not None:
                choice_json["prompt_top_logprobs"] = [x and {str(t): _clip(p) for t, p in x.items()} for x in top]
        return choice_json
