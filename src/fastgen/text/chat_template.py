"""Chat messages to text by the model's chat template, and that text to token ids."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError

from fastgen.text import Tokenizer
from fastgen.text.control_tokens import ESCAPE, ControlTokens
from fastgen.text.template_limits import limit_template

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None  # functions that the chat template describes to the model
# Raised by templates themselves and by operators in them: on operands of the wrong type, on nesting too deep, ...
TEMPLATE_ERRORS = (TemplateError, TypeError, AttributeError, LookupError, ArithmeticError, ValueError)
TEMPLATE_ERRORS += (RuntimeError, MemoryError)
NO_TOKENIZER = "this model came without a tokenizer: give prompts as token ids"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Chat messages with options for the chat template: a prompt, wherever prompts are taken.

    `tools` are JSON schemas of functions that the template describes to the model. `chat_template` is used instead of
    the tokenizer's. `chat_template_kwargs` are variables of the template, such as `enable_thinking=False` of Qwen3's.
    `add_generation_prompt` ends the prompt with the beginning of the assistant's turn. `continue_final_message` leaves
    the last message open, so that the model continues it; `add_generation_prompt` must then be False.
    """

    messages: Sequence[Message]
    tools: Tools = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def template_options(self) -> dict[str, Any]:
        """The keyword arguments of `render`."""
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }


def render(
    tokenizer: Tokenizer | None,
    messages: Sequence[Any],
    tools: Tools = None,
    *,
    special_tokens_in_content: str = "text",
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Renders messages with the chat template; `encode_rendered` tokenizes the result. Options are as in `ChatPrompt`.

    With `special_tokens_in_content="text"`, special tokens spelled in the content are escaped in the rendered text
    (`fastgen.text.control_tokens`).
    """
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"a chat message is a dict with 'role' and 'content', got {message!r}")
    if not messages:
        raise ValueError("the prompt is empty: a chat needs at least one message")
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message=True needs add_generation_prompt=False: the last message is continued")
    if chat_template is not None and not isinstance(chat_template, str):
        raise ValueError(f"chat_template must be the text of a Jinja template, got {chat_template!r:.100}")
    variables = _check_template_kwargs(tokenizer, chat_template_kwargs)
    if not (chat_template or tokenizer.chat_template):
        raise ValueError("this model's tokenizer has no chat template: give prompts as text or token ids")
    chat: Any = list(messages)
    try:
        if special_tokens_in_content == "text":
            escape = ControlTokens.for_tokenizer(tokenizer).escape
            chat, tools, variables = escape(chat), escape(tools), escape(variables)
        source = limit_template(tokenizer.get_chat_template(chat_template, tools=tools))
        options: Any = {"chat_template": source, "tools": tools, "tokenize": False} | variables
        options |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        return cast(str, tokenizer.apply_chat_template(chat, **options))
    except TEMPLATE_ERRORS as e:
        owner = "the model's" if chat_template is None else "this"
        raise ValueError(f"{owner} chat template refuses these messages: {e or type(e).__name__}") from e


def _check_template_kwargs(tokenizer: Tokenizer, variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns variables for a chat template. Raises ValueError for names that have a meaning of their own."""
    if not isinstance(variables, Mapping | None) or any(not isinstance(name, str) for name in variables or ()):
        expected = "a dict of variables for the chat template, {'enable_thinking': False}"
        raise ValueError(f"chat_template_kwargs must be {expected}, got {variables!r:.100}")
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
    if taken := [name for name in variables or () if name in reserved]:
        raise ValueError(f"chat_template_kwargs: {taken[0]!r} is no variable of a chat template, but set otherwise")
    return dict(variables or {})


def encode_rendered(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Returns the token ids of a text that `render` returned, or of a suffix of it."""
    if ESCAPE in rendered:
        return ControlTokens.for_tokenizer(tokenizer).encode(rendered)
    return tokenizer(rendered, add_special_tokens=False).input_ids
