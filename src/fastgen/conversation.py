"""Conversations with a model, as token ids: each turn's prompt extends the last one's, whose KV cache it reuses.

conversation = Conversation(engine, SamplingParams(temperature=0.7, max_tokens=None))
for text in conversation.ask("What is the capital of France?"):
    print(text, end="", flush=True)
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from fastgen.config import unknown_name_message
from fastgen.core.request import Completion
from fastgen.engine import Engine
from fastgen.sampling_params import SamplingParams
from fastgen.text import Tokenizer, chat_template
from fastgen.text.chat_template import Message
from fastgen.text.control_tokens import ControlTokens

COMMON_SETTINGS = ("temperature", "top_p", "max_tokens")
NUM_TOP_LOGPROBS = 5  # most likely tokens recorded with each token of an answer


@dataclass(slots=True)
class Turn:
    """A message and its answer. Turns loaded from a file have texts only, no tokens."""

    message: str
    answer: Completion
    prompt_token_ids: list[int] = field(default_factory=list)
    rendered_prompt: str = ""  # the prompt as text, from the chat template
    num_cached_tokens: int = 0  # prompt tokens that hit the prefix cache
    seconds: float = 0.0  # from the message to the last token of the answer

    @property
    def tokens_per_second(self) -> float:
        """Returns the answer's tokens per second. The time includes the prefill."""
        return len(self.answer.token_ids) / self.seconds if self.seconds else 0.0


def check_can_chat(
    tokenizer: Tokenizer | None, model_name: str, sampling: SamplingParams, chat_template: str | None = None
) -> None:
    """Raises ValueError, with advice, if the model cannot chat or a sampling setting is not supported.

    `chat_template` is used instead of the tokenizer's.
    """
    _check_supported(asdict(sampling))
    if tokenizer is None:
        raise ValueError(f"{model_name} has no tokenizer: put its tokenizer.json beside the weights")
    if not (chat_template or tokenizer.chat_template):
        raise ValueError(
            f"{model_name}: the tokenizer has no chat template; this may be a base model. Use the model's chat variant "
            "(-Instruct, -Chat), name its template with chat_template=FILE, or complete texts: fgrun prompt=…"
        )


def _check_supported(settings: dict[str, Any]) -> None:
    for name, default in (("n", 1), ("prompt_logprobs", None), ("detokenize", True)):  # meaningless in a conversation
        if (value := settings.get(name, default)) != default:
            raise ValueError(f"{name}={value}: is not supported in conversations, which have one answer per message")


class ConversationTooLong(ValueError):
    """Raised when the prompt leaves no space in the context or the KV cache for an answer."""


class Conversation:
    """A conversation with one engine, which may serve other requests too.

    `sampling` and `system`, the system prompt, can change at any time; they apply to the next answer.
    `chat_template` and `chat_template_kwargs` are as for `ChatPrompt`.
    """

    def __init__(
        self, engine: Engine, sampling: SamplingParams | None = None, system: str | None = None, *,
        chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.system = engine, system
        self.template_options: Any = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
        self.sampling = sampling or SamplingParams(max_tokens=None)
        self.turns: list[Turn] = []
        _check_supported(asdict(self.sampling))

    @property
    def messages(self) -> list[Message]:
        """Returns the conversation so far as chat messages."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.answer.text}]
        return messages

    @property
    def max_length(self) -> int:
        """Returns the maximum number of tokens of a conversation, the last answer included."""
        # The KV of the last sampled token is never cached.
        return min(self.engine.model_config.context_length, self.engine.cache_capacity + 1)

    def ask(self, message: str) -> Generator[str, None, None]:
        """Yields the answer's text as it is generated: one piece per step, empty if the step completed no text.

        The turn is added when the answer ends, or, with the text so far, when the generator is closed. A turn without
        tokens, or one whose step failed, is not added. Raises ConversationTooLong if no answer can fit.
        """
        rendered, prompt = self.render_prompt(message)
        s, limit = self.sampling, self.max_length - len(prompt)
        if limit < 1:
            raise ConversationTooLong(
                f"the conversation is too long: {len(prompt)} tokens with this message; the context and the KV cache "
                f"allow {self.max_length}, including the answer"
            )
        max_tokens, num_logprobs = s.max_tokens and min(s.max_tokens, limit), max(NUM_TOP_LOGPROBS, s.logprobs or 0)
        params = replace(s, logprobs=num_logprobs, max_tokens=max_tokens, min_tokens=min(s.min_tokens, limit))
        start, output = perf_counter(), None
        request_id = self.engine.add(prompt, params)
        try:
            while output is None:
                events = [e for e in self.engine.step() if e.request_id == request_id]
                output = next((e.output for e in events if e.output), None)
                yield "".join(e.text for e in events)
        finally:
            output = output or self.engine.abort(request_id)
            if output and output.completions[0].token_ids:
                stats = (output.num_cached_tokens, perf_counter() - start)
                self.turns.append(Turn(message, output.completions[0], prompt, rendered, *stats))

    def render_prompt(self, message: str) -> tuple[str, list[int]]:
        """Returns the next message's prompt as rendered text and as token ids.

        The token ids are the last turn's prompt, the answer's tokens as sampled, and the tokens of the text that the
        template adds after the answer. Where the template renders earlier turns differently now, as without their
        reasoning or with another system prompt, the rendered text is tokenized instead.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        coder, content = self.engine.tokenizer, self.engine.config.special_tokens_in_content
        options = {"special_tokens_in_content": content} | self.template_options
        rendered = chat_template.render(coder, messages, **options)
        assert coder is not None
        return rendered, self._extend_last_prompt(rendered) or chat_template.encode_rendered(coder, rendered)

    def _extend_last_prompt(self, rendered: str) -> list[int] | None:
        """Returns the last turn's tokens and those of the new text. None unless `rendered` extends the last turn."""
        last, coder = self.turns[-1] if self.turns else None, self.engine.tokenizer
        if last is None or coder is None or not last.prompt_token_ids or not rendered.startswith(last.rendered_prompt):
            return None
        suffix, answer = rendered[len(last.rendered_prompt) :], last.answer.text
        if self.engine.config.special_tokens_in_content == "text":  # as the template renders it
            answer = ControlTokens.for_tokenizer(coder).escape(answer)
        if suffix.startswith(answer):
            new_text = suffix[len(answer) :]
        elif suffix.lstrip().startswith(answer.strip()):  # the template strips answers; the tokens need not change
            new_text = suffix.lstrip().removeprefix(answer.strip()) if answer.strip() else suffix
        else:
            return None
        answer_ids = [*last.answer.token_ids]
        if last.answer.finish_reason == "stop":
            if self._decode(answer_ids).strip() != last.answer.text.strip():
                return None  # a stop string was cut from the text, but not from the tokens
            if not self._decode(answer_ids[-1:]):
                answer_ids.pop()  # the EOS token: the template itself ends the answer
        return [*last.prompt_token_ids, *answer_ids, *chat_template.encode_rendered(coder, new_text)]

    def _decode(self, token_ids: list[int]) -> str:
        assert (coder := self.engine.tokenizer) is not None
        return str(coder.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def update_sampling(self, **settings: Any) -> None:
        """Changes sampling settings. Raises ValueError for unknown, unsupported and invalid ones."""
        _check_supported(settings)
        names = [f.name for f in fields(SamplingParams)]
        for name in settings.keys() - names:
            raise ValueError(unknown_name_message("sampling setting", name, names))
        try:
            self.sampling = replace(self.sampling, **settings)
        except TypeError as e:
            raise ValueError(f"sampling: {e}") from e

    def notable_settings(self) -> dict[str, Any]:
        """Returns the most common sampling settings, and all that differ from the defaults of SamplingParams."""
        defaults = asdict(SamplingParams())
        return {k: v for k, v in asdict(self.sampling).items() if k in COMMON_SETTINGS or v != defaults[k]}

    def rewind(self, turn_number: int) -> None:
        """Removes turn `turn_number`, counted from 1, and all later turns."""
        if not 1 <= turn_number <= len(self.turns) + 1:
            raise ValueError(f"there is no turn {turn_number}: the next turn is {len(self.turns) + 1}")
        del self.turns[turn_number - 1 :]

    def save(self, path: str | Path) -> None:
        """Writes the messages and sampling settings to a JSON file."""
        saved = {"messages": self.messages, "sampling": asdict(self.sampling)}
        Path(path).expanduser().write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Replaces this conversation by a saved one. An invalid file raises ValueError and changes nothing."""
        path = Path(path).expanduser()
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            messages = [(m["role"], m["content"]) for m in saved["messages"]]
            sampling = dict(saved.get("sampling", {}))
            if "logit_bias" in sampling:  # JSON keys are strings
                sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is not a saved conversation: JSON with 'messages' and 'sampling'") from e
        if not all(isinstance(text, str) for _, text in messages):
            raise ValueError(f"{path}: the content of every message must be a text")
        system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
        roles, texts = [role for role, _ in messages], [text for _, text in messages]
        if roles != ["user", "assistant"] * (len(messages) // 2):
            raise ValueError(f"{path}: after the system message, user and assistant messages must alternate")
        self.update_sampling(**sampling)
        self.system = system
        self.turns = [Turn(m, Completion(text=a)) for m, a in zip(texts[::2], texts[1::2], strict=True)]
