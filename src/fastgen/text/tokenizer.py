"""Prompts to token ids: texts, chat messages through the chat template, arrays and mappings."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from fastgen.text import Tokenizer
from fastgen.text.chat_template import NO_TOKENIZER, ChatPrompt, Message, Tools, encode_rendered, render
from fastgen.text.control_tokens import ESCAPE

ACCEPTED_PROMPTS = "prompts are a text, a list of token ids, a list of chat messages, or a list of these"


# A text, token ids (also an array), chat messages, or a mapping with a text or token ids (`_prompt_from_mapping`).
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt | Mapping[str, Any]


def to_chat_prompts(conversations: Any, **options: Any) -> list[ChatPrompt]:
    """Returns one conversation (a list of messages), or several, as prompts with the same options of `ChatPrompt`.

    Raises ValueError for anything else.
    """
    if isinstance(conversations, list | tuple) and conversations:
        if isinstance(conversations[0], Mapping):
            return [ChatPrompt(conversations, **options)]
        if all(isinstance(messages, list | tuple) for messages in conversations):
            return [ChatPrompt(messages, **options) for messages in conversations]
    expected = "a list of messages, [{'role': 'user', 'content': 'Hello'}], or a list of such lists"
    raise ValueError(f"chat takes {expected}, got {conversations!r:.100}")


def max_prompt_chars(tokenizer: Tokenizer | None, context_length: int) -> int:
    """Returns an upper bound on the characters of `context_length` tokens, to reject longer texts without tokenizing.

    The vocabulary spells a token with at least one character per byte. A normalizer may compose up to four characters
    into one (NFC).
    """
    if tokenizer is None:
        return 0
    backend = getattr(tokenizer, "backend_tokenizer", None)
    num_composed = 1 if backend is not None and backend.normalizer is None else 4
    return context_length * num_composed * max(map(len, tokenizer.get_vocab()), default=1)


def is_single_prompt(prompts: object) -> bool:
    """Returns whether a value is one prompt (text, token ids, chat messages, mapping) and not a list of prompts."""
    if isinstance(prompts, str | Mapping | ChatPrompt):
        return True
    if isinstance(prompts, list | tuple):
        first = prompts[0] if prompts else None
        return isinstance(first, Integral) or (isinstance(first, Mapping) and "role" in first)
    if getattr(prompts, "ndim", 0) != 1:
        return False
    array = cast(Any, prompts)  # of token ids, or of texts
    return not len(array) or isinstance(array[:1].tolist()[0], Integral)


def to_prompt_list(prompts: Any) -> list[Prompt]:
    """Returns one or several prompts as a list.

    A mapping with `input_ids`, as tokenizers return (`BatchEncoding`), has one prompt per row; padding is removed.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _unpad_rows(prompts)
    if is_single_prompt(prompts):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"{ACCEPTED_PROMPTS}, not {type(prompts).__name__}")
    if hasattr(prompts, "columns"):  # a table of pandas, polars or Arrow, which iterates over its columns
        raise ValueError(f"{ACCEPTED_PROMPTS}, not {type(prompts).__name__}: give one of its columns")
    return list(prompts)


def _unpad_rows(encoding: Mapping[str, Any]) -> list[Prompt]:
    """Returns the token ids of each row of a `BatchEncoding`, without tokens that its attention mask excludes."""

    def rows(name: str) -> list[Any]:
        values: Any = encoding[name]
        if hasattr(values, "tolist"):
            values = values.tolist()
        elif isinstance(values, Iterable) and not isinstance(values, str):
            values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
        if isinstance(values, list):
            values = [values] if not values or isinstance(values[0], Integral) else values
            if all(isinstance(row, list | tuple) for row in values):
                return values
        raise ValueError(f"{name} of a prompt are token ids, or rows of them, not {type(encoding[name]).__name__}")

    ids = rows("input_ids")
    if encoding.get("attention_mask") is None:
        return ids
    masks = rows("attention_mask")
    if list(map(len, ids)) != list(map(len, masks)):
        raise ValueError("the input_ids and the attention_mask of a prompt must have the same shape")
    return [[t for t, keep in zip(row, mask, strict=True) if keep] for row, mask in zip(ids, masks, strict=True)]


def _prompt_from_mapping(prompt: Mapping[str, Any]) -> Any:
    """Extracts the prompt of vLLM's `{"prompt": text}` or `{"prompt_token_ids": ids}`, or of one row of `input_ids`."""
    if "input_ids" in prompt:
        rows = _unpad_rows(prompt)
        if len(rows) != 1:
            raise ValueError(f"one prompt was expected, and these input_ids have {len(rows)} rows")
        return rows[0]
    keys = {key for key, value in prompt.items() if value is not None}
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if keys == {"prompt"} and isinstance(text, str):
        return text
    if "prompt_token_ids" in keys and keys <= {"prompt", "prompt_token_ids"} and not isinstance(ids, str | Mapping):
        return ids  # the token ids count; `prompt` is their text
    raise ValueError(
        'a mapping as a prompt is {"prompt": "a text"}, {"prompt_token_ids": [1, 2]} or what a tokenizer returns '
        "(input_ids), and a chat is a list of messages with 'role' and 'content'; "
        f"got the keys {sorted(map(str, prompt))}"
    )


def encode(
    tokenizer: Tokenizer | None, prompt: Prompt, tools: Tools = None, *, special_tokens_in_content: str = "text"
) -> list[int]:
    """Returns the token ids of a prompt. Chat messages go through the chat template, with the generation prompt.

    `special_tokens_in_content` decides whether a special token spelled in messages or tools is plain text ("text") or
    the special token ("control"). In a prompt that is a text, it is always the special token.

    Raises ValueError for anything that is not a prompt, and for a prompt without tokens.
    """
    return encode_with_text(tokenizer, prompt, tools, special_tokens_in_content=special_tokens_in_content)[0]


def encode_with_text(
    tokenizer: Tokenizer | None, prompt: Any, tools: Tools = None, *, special_tokens_in_content: str = "text"
) -> tuple[list[int], str | None]:
    """Returns the token ids of a prompt, as `encode`, and its text: None for token ids, the rendered text of a chat."""
    text: str | None = None
    if isinstance(prompt, Mapping):
        text = prompt["prompt"] if isinstance(prompt.get("prompt"), str) else None
        prompt = _prompt_from_mapping(prompt)
    if isinstance(prompt, ChatPrompt):
        tools = tools if prompt.tools is None else prompt.tools
        return _encode_chat(tokenizer, prompt.messages, tools, special_tokens_in_content, **prompt.template_options)
    if getattr(prompt, "ndim", 0) == 1:  # an array or tensor of token ids
        prompt = cast(Any, prompt).tolist()
    if not isinstance(prompt, str | list | tuple):
        accepted = "a prompt is a text, a list of token ids or a list of chat messages"
        raise ValueError(f"{accepted}, not {type(prompt).__name__}")
    if not len(prompt):
        raise ValueError("the prompt is empty: it needs at least one token")
    if not isinstance(prompt, str):
        types = set(map(type, prompt))  # not token by token: hundreds of prompts may be added before a step
        if all(issubclass(t, Integral) and t is not bool for t in types):
            return list(prompt) if types == {int} else [int(t) for t in prompt], text  # type: ignore
        return _encode_chat(tokenizer, prompt, tools, special_tokens_in_content)
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    try:
        token_ids = tokenizer(prompt).input_ids
    except (TypeError, UnicodeEncodeError) as e:
        raise ValueError("the prompt is no text: half of a surrogate pair is in it") from e
    if not token_ids:
        raise ValueError(f"the prompt {prompt!r} is no token for this tokenizer: it needs at least one")
    return token_ids, prompt


def _encode_chat(
    tokenizer: Tokenizer | None, messages: Sequence[Any], tools: Tools, special_tokens_in_content: str, **options: Any
) -> tuple[list[int], str]:
    """Returns the token ids and the rendered text of messages; `options` are those of `render`."""
    rendered = render(tokenizer, messages, tools, special_tokens_in_content=special_tokens_in_content, **options)
    if not (token_ids := encode_rendered(cast(Tokenizer, tokenizer), rendered)):
        raise ValueError("the chat template renders these messages to no token: a prompt needs at least one")
    return token_ids, rendered.replace(ESCAPE, "")
