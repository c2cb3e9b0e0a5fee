"""Each field of OpenAI's client is supported, accepted without effect, or rejected by name."""

import typing
from typing import Any

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import chat_completion_assistant_message_param as assistant
from openai.types.chat import chat_completion_stream_options_param as stream_options
from openai.types.chat import completion_create_params as chat
from pydantic import ValidationError

from fastgen.server.errors import APIError
from fastgen.server.requests import ChatMessage, ChatRequest, CompletionRequest, GenerateRequest, to_template_dicts

ANY = {"type": "function", "function": {"name": "f"}}
# By field: values that are accepted, and values that are rejected.
CHAT: dict[str, tuple[list[Any], list[Any]]] = {
    "messages": ([[{"role": "user", "content": "x"}]], [[], "x"]),
    "model": (["gpt-4o-mini"], [3]),
    "audio": ([], [{"voice": "alloy", "format": "wav"}]),
    "frequency_penalty": ([0, 0.5], [3, "x"]),
    "function_call": (["none"], ["auto", {"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}, {"5": 1}], [{"x": 1}]),
    "logprobs": ([False, True], [1]),
    "max_completion_tokens": ([5], [0]),
    "max_tokens": ([5], [0]),
    "metadata": ([{}, {"a": "b"}], [{"a": 1}, "x"]),
    "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
    "moderation": ([], [{"model": "omni-moderation-latest"}]),
    "n": ([1, 2], [0, 129]),
    "parallel_tool_calls": ([], [True, False]),  # without tools, as OpenAI
    "prediction": ([{"type": "content", "content": "x"}], ["x"]),
    "presence_penalty": ([0, 0.5], [3]),
    "prompt_cache_key": (["k"], [3]),
    "prompt_cache_options": ([{}, {"mode": "implicit"}], [{"mode": "explicit"}, {"ttl": "30m"}]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "reasoning_effort": (["medium"], ["none", "high"]),
    "response_format": ([{"type": "text"}, {"type": "json_object"}], [{"type": "xml"}]),
    "safety_identifier": (["u"], [3]),
    "seed": ([1], ["1"]),
    "service_tier": (["auto", "default"], ["flex", "scale", "priority", "fast"]),
    "stop": (["x", ["x"], []], ["", [""]]),
    "store": ([False, True], ["x"]),
    "stream": ([False, True], [1]),
    "stream_options": ([{}, {"include_usage": False}], [{"include_usage": True}, {"include_obfuscation": True}]),
    "temperature": ([0, 1], [-1]),
    "tool_choice": (["none"], ["auto", "required", ANY]),  # without tools
    "tools": ([[], [ANY]], [[{"type": "custom", "custom": {"name": "f"}}]]),
    "top_logprobs": ([0], [2]),  # without logprobs
    "top_p": ([0, 0.0, 1e-9, 0.5, 1], [-0.1, 1.1]),
    "user": (["u"], [3]),
    "verbosity": (["medium"], ["low", "high"]),
    "web_search_options": ([], [{}, {"search_context_size": "low"}]),
}
COMPLETION: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["x", [5], ["x", "y"], [[5], [6]]], ["", []]),
    "best_of": ([1], [2]),
    "echo": ([False, True], [1]),
    "logprobs": ([0, 5], [21, True]),
    "suffix": ([""], ["x"]),
    **{name: CHAT[name] for name in ("model", "frequency_penalty", "logit_bias", "max_tokens", "n", "presence_penalty",
       "seed", "stop", "stream", "stream_options", "temperature", "top_p", "user")},
}  # fmt: skip
STREAM: dict[str, tuple[list[Any], list[Any]]] = {
    "include_usage": ([False, True], [1]),
    "include_obfuscation": ([False], [True]),
    "continuous_usage_stats": ([False], [True]),  # vLLM's
}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASSISTANT: dict[str, tuple[list[Any], list[Any]]] = {
    "role": (["assistant"], ["critic"]),
    "audio": ([], [{"id": "x"}]),
    "content": (["", "x", [{"type": "text", "text": "x"}]], [3, [{"type": "refusal", "refusal": "x"}]]),
    "function_call": ([], [{"name": "f", "arguments": "{}"}]),
    "name": (["x"], [3]),
    "refusal": ([""], ["No."]),
    "tool_calls": ([[], [CALL], [CALL | {"index": 0}]], [[{}], [CALL | {"type": "custom"}]]),
    "annotations": ([[]], [[{"type": "url_citation"}]]),  # of answers
    "reasoning_content": (["x"], [3]),  # of ours
}


def fields(of: Any) -> set[str]:
    return set(typing.get_type_hints(of))


def test_every_field_of_the_client_is_decided() -> None:
    """Fails for new fields of a newer client: support or reject them, and add values above."""
    assert fields(chat.CompletionCreateParamsNonStreaming) == set(CHAT)
    assert fields(completion.CompletionCreateParamsNonStreaming) == set(COMPLETION)
    assert fields(assistant.ChatCompletionAssistantMessageParam) | {"annotations", "reasoning_content"} == set(
        ASSISTANT
    )
    assert fields(stream_options.ChatCompletionStreamOptionsParam) | {"continuous_usage_stats"} == set(STREAM)


def request(model: Any, body: dict[str, Any]) -> Any:
    """Validates a request as the endpoints do."""
    request = model.model_validate(body)
    if isinstance(request, ChatRequest):
        assert request.tool_choice_mode
    return request.to_sampling_params()


def cases(table: dict[str, tuple[list[Any], list[Any]]]) -> list[Any]:
    return [pytest.param(name, *both, id=name) for name, both in table.items()]


def check_values(model: Any, base: dict[str, Any], name: str, good: list[Any], bad: list[Any]) -> None:
    for value in (*good, None):
        if value is not None or name not in base:
            request(model, base | {name: value})
    for value in bad:
        with pytest.raises((APIError, ValidationError)) as e:
            request(model, base | {name: value})
        assert name in str(e.value), (name, value)
        if isinstance(e.value, APIError):
            assert e.value.status == 400 and e.value.param == name


@pytest.mark.parametrize("name, good, bad", cases(CHAT))
def test_fields_of_chats(name: str, good: list[Any], bad: list[Any]) -> None:
    """Values are accepted, or rejected with the field's name."""
    check_values(ChatRequest, {"messages": [{"role": "user", "content": "x"}]}, name, good, bad)


@pytest.mark.parametrize("name, good, bad", cases(COMPLETION))
def test_fields_of_completions(name: str, good: list[Any], bad: list[Any]) -> None:
    """Values are accepted, or rejected with the field's name."""
    check_values(CompletionRequest, {"prompt": "x"}, name, good, bad)


def test_nested_fields() -> None:
    """Fields of stream options, and of an assistant's message, which clients send back."""
    body = {"prompt": "x", "stream": True}
    for name, (good, bad) in STREAM.items():
        for value in good:
            request(CompletionRequest, body | {"stream_options": {name: value}})
        for value in bad:
            with pytest.raises(ValidationError, match=name):
                request(CompletionRequest, body | {"stream_options": {name: value}})
    for name, (good, bad) in ASSISTANT.items():
        for value in good:
            ChatMessage.model_validate({"role": "assistant"} | {name: value})
        for value in bad:
            with pytest.raises(ValidationError, match=name):
                ChatMessage.model_validate({"role": "assistant"} | {name: value})
    with pytest.raises(ValidationError, match="reasoning_content: only the assistant"):
        ChatMessage.model_validate({"role": "user", "content": "x", "reasoning_content": "y"})


def test_conversion() -> None:
    """top_p=0 keeps the most likely token; best_of equal to n has no effect; messages become template dicts."""
    for value in (0, 1e-9):
        assert request(CompletionRequest, {"prompt": "x", "top_p": value}).top_p == 1e-6
    assert request(GenerateRequest, {"token_ids": [5], "sampling_params": {"top_p": 0}}).top_p == 1e-6
    assert request(CompletionRequest, {"prompt": "x", "best_of": 3, "n": 3}).n == 3
    assert request(CompletionRequest, {"prompt": "x", "cache_salt": "a"}).cache_salt == "a"
    assert request(GenerateRequest, {"token_ids": [5], "cache_salt": "b"}).cache_salt == "b"
    message = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL | {"index": 0}]}
    function = {"name": "f", "arguments": {}}
    [result] = to_template_dicts([ChatMessage.model_validate(message)])
    assert result == {"role": "assistant", "content": "", "reasoning_content": "Hm.",
                    "tool_calls": [{"id": "a", "type": "function", "function": function}]}  # fmt: skip
