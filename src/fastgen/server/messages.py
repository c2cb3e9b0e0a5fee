"""Messages between HTTP workers and the engine's process: pickled objects over ZeroMQ.

    worker -> engine   a call of a method of `EngineServer`: (method name, arguments)
    engine -> worker   EngineInfo | Reply | {request_id: [TokenDelta, ...]}

A call's first frame is its message id, so that a call that cannot be unpickled is answered too; "" asks for no reply.
Pickle is safe here: both ends are processes of one program, on a socket in a folder that only their user can enter.
"""

import pickle
from typing import Any, NamedTuple

from fastgen.core.model_config import ModelConfig
from fastgen.server.errors import APIError


class Sender(NamedTuple):
    """The worker that sent a call, and the id of the message that the reply answers."""

    worker: bytes
    message_id: str


class EngineInfo(NamedTuple):
    """Facts about the engine that workers receive in reply to `EngineServer.hello`."""

    path: str  # of the model
    model_config: ModelConfig
    context_length: int  # in tokens
    max_completions: int  # that may run or wait at a time
    special_tokens_in_content: str  # see `fastgen.core.tokenizer.encode`
    supports_adapters: bool


class Reply(NamedTuple):
    """The result or the error of a call."""

    message_id: str
    value: Any = None
    error: APIError | None = None


class TokenDelta(NamedTuple):
    """Tokens that a step added to a choice. The last delta has the number of cached tokens and the prompt's logprobs.

    `finish_reason` is stop, length, abort, error (non-finite logits, or an error of the choice's grammar or text) or
    failed (the engine failed).
    """

    choice_index: int
    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    error: str = ""  # details of finish reason "error"
    num_cached_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    weight_version: int | None = None  # of the weights that the tokens were sampled with


def pack_message(message: object) -> bytes:
    """Pickles a message."""
    return pickle.dumps(message, protocol=5)


def health_address(address: str) -> str:
    """Returns the address of the health check beside the engine's own socket."""
    return f"{address}-health"
