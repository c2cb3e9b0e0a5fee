"""A conversation with a model, kept as token ids: each turn's prompt begins with everything the one before computed.

talk = Conversation(engine, SamplingParams(temperature=0.7, max_tokens=None))
for piece in talk.ask("What is the capital of France?"):
    print(piece, end="", flush=True)
"""

import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from fastgen.config import SamplingParams, unknown_name_message
from fastgen.core import tokenizer
from fastgen.core.control_tokens import ControlTokens
from fastgen.core.request import Completion
from fastgen.core.tokenizer import Message
from fastgen.core.types import Tokenizer
from fastgen.engine import Engine

UNSUPPORTED_SETTINGS = ("n", "prompt_logprobs")  # settings that make no sense in a conversation
COMMON_SETTINGS = ("temperature", "top_p", "max_tokens")
DEFAULT_SAMPLING = SamplingParams()
NUM_TOP_LOGPROBS = 5  # most likely tokens that are kept with each token of an answer


@dataclass(slots=True)
class Turn:
    """A message and its answer. What is read from a file has a text, and no tokens."""

    message: str
    answer: Completion
    prompt_token_ids: list[int] = field(default_factory=list)  # what the answer followed, as tokens
    rendered_prompt: str = ""  # and as the text that the chat template made of it
    num_cached_tokens: int = 0  # of these tokens, found in the cache
    seconds: float = 0.0  # from the question to the last token

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer a second; reading the prompt is part of the time."""
        return len(self.answer.token_ids) / self.seconds if self.seconds else 0.0


def check_can_chat(tokenizer: Tokenizer | None, model_name: str, sampling: SamplingParams) -> None:
    """ValueError, with what to do, for a model that cannot chat, or settings that are none of a conversation's."""
    _check_supported(asdict(sampling))
    if tokenizer is None:
        raise ValueError(f"{model_name} came without a tokenizer: put its tokenizer.json beside the weights")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{model_name}: its tokenizer has no chat template, as of a base model. Take the model's chat variant "
            "(-Instruct, -Chat), put its chat_template.jinja beside the weights, or complete texts: fgrun prompt=…"
        )


def _check_supported(settings: dict[str, Any]) -> None:
    for name in UNSUPPORTED_SETTINGS:
        if (value := settings.get(name, getattr(DEFAULT_SAMPLING, name))) != getattr(DEFAULT_SAMPLING, name):
            raise ValueError(f"{name}={value}: a conversation has one answer, and shows no more; leave {name} out")


class ConversationTooLong(ValueError):
    """No room is left for an answer."""


class Conversation:
    """Rounds of messages and answers with one engine.

    `sampling` holds for the next answer, and so does `system`, the system prompt. The engine may serve others too.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams | None = None, system: str | None = None) -> None:
        self.engine, self.system = engine, system
        self.sampling = SamplingParams(max_tokens=None)
        self.update_sampling(**(asdict(sampling) if sampling else {}))
        self.turns: list[Turn] = []

    @property
    def messages(self) -> list[Message]:
        """Everything said so far, as chat messages."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for r in self.turns:
            said.append({"role": "user", "content": r.message})
            said.append({"role": "assistant", "content": r.answer.text})
        return said

    @property
    def max_length(self) -> int:
        """Tokens a conversation may have, the last answer included."""
        return min(
            self.engine.model_config.context_length, self.engine.cache_capacity + 1
        )  # the last one drawn is never cached

    # --- a turn -----------------------------------------------------------------------------------------------------

    def ask(self, message: str) -> Generator[str, None, None]:
        """The answer's text as it comes; an empty text for each step that brings none, so that one may stop there.

        The round is added at the end, or with what there is when the iterator is closed. One without a token, or
        whose step failed, is not added. TooLong if there is no room left for an answer.
        """
        rendered, prompt = self.render_prompt(message)
        room, most = self.max_length - len(prompt), self.sampling.max_tokens
        if room < 1:
            raise ConversationTooLong(
                f"the conversation is too long: {len(prompt)} tokens with this message, and the model and its cache "
                f"hold {self.max_length}, the answer included"
            )
        sampling = replace(
            self.sampling,
            logprobs=max(NUM_TOP_LOGPROBS, self.sampling.logprobs or 0),
            max_tokens=most and min(most, room),
            min_tokens=min(self.sampling.min_tokens, room),
        )
        began, output = perf_counter(), None
        request = self.engine.add(prompt, sampling)
        try:
            while output is None:
                mine = [e for e in self.engine.step() if e.request_id == request]
                output = next((e.output for e in mine if e.output), None)
                yield "".join(e.text for e in mine)
        finally:
            output = output or self.engine.abort(request)
            if output and output.completions[0].token_ids:
                seconds = perf_counter() - began
                new = Turn(message, output.completions[0], prompt, rendered, output.num_cached_tokens, seconds)
                self.turns.append(new)

    def render_prompt(self, message: str) -> tuple[str, list[int]]:
        """What the model is given for the next message: the chat template's text, and its tokens.

        The tokens are those of the last round, prompt and answer as it was drawn, and then those of what the template
        puts between this answer and the next one. Where the template rewrites what was there (it drops an earlier
        answer's thinking, or the system prompt is another now), all of it is made anew.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        coder, content = self.engine.tokenizer, self.engine.config.special_tokens_in_content
        rendered = tokenizer.render(coder, messages, special_tokens_in_content=content)
        assert coder is not None
        tokens = self._extend_last_prompt(rendered)
        return rendered, tokenizer.encode_rendered(coder, rendered) if tokens is None else tokens

    def _extend_last_prompt(self, rendered_prompt: str) -> list[int] | None:
        """The last round's tokens and what follows them in `rendered`; None where it does not begin with them."""
        last, coder = self.turns[-1] if self.turns else None, self.engine.tokenizer
        if (
            last is None
            or not last.prompt_token_ids
            or not rendered_prompt.startswith(last.rendered_prompt)
            or coder is None
        ):
            return None
        rest, text, stripped = rendered_prompt[len(last.rendered_prompt) :], last.answer.text, last.answer.text.strip()
        said, said_stripped = text, stripped  # as they are in the rendered text
        if self.engine.config.special_tokens_in_content == "text":
            said, said_stripped = map(ControlTokens.for_tokenizer(coder).escape, (text, stripped))
        if rest.startswith(said):
            between = rest[len(said) :]
        elif rest.lstrip().startswith(said_stripped):  # templates may strip an answer; its tokens stay as they are
            between = rest.lstrip()[len(said_stripped) :] if stripped else rest
        else:
            return None
        drawn = [*last.answer.token_ids]
        if last.answer.finish_reason == "stop":
            if self._decode(drawn).strip() != stripped:
                return None  # stopped by a string, which is cut from the text and not from the tokens
            if not self._decode(drawn[-1:]):
                drawn.pop()  # an end token: the template closes the answer itself
        return [*last.prompt_token_ids, *drawn, *tokenizer.encode_rendered(coder, between)]

    def _decode(self, tokens: list[int]) -> str:
        assert self.engine.tokenizer is not None
        text = self.engine.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    # --- settings and history ---------------------------------------------------------------------------------------

    def update_sampling(self, **settings: Any) -> None:
        """Change sampling settings; ValueError for one that does not exist or has no place here."""
        _check_supported(settings)
        for name in settings:
            if not hasattr(DEFAULT_SAMPLING, name):
                raise ValueError(
                    unknown_name_message("sampling setting", name, [f.name for f in fields(SamplingParams)])
                )
        try:
            self.sampling = replace(self.sampling, **settings)
        except TypeError as e:
            raise ValueError(f"sampling: {e}") from e

    def notable_settings(self) -> dict[str, Any]:
        """The most common sampling settings, and those that are not SamplingParams' defaults."""
        given = asdict(self.sampling)
        return {name: v for name, v in given.items() if name in COMMON_SETTINGS or v != getattr(DEFAULT_SAMPLING, name)}

    def rewind(self, turn_number: int) -> None:
        """Go back to before round `number`; they count from 1."""
        if not 1 <= turn_number <= len(self.turns) + 1:
            raise ValueError(f"there is no round {turn_number}: the next one is {len(self.turns) + 1}")
        del self.turns[turn_number - 1 :]

    def save(self, path: str | Path) -> None:
        """Write messages and sampling settings as JSON."""
        kept = {"messages": self.messages, "sampling": asdict(self.sampling)}
        Path(path).expanduser().write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Take up a conversation that was saved. ValueError, and nothing changed, for a file that is none."""
        path = Path(path).expanduser()
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            said = [(m["role"], m["content"]) for m in kept["messages"]]
            sampling = dict(kept.get("sampling", {}))
            if "logit_bias" in sampling:  # JSON's keys are texts
                sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is no saved conversation: JSON with 'messages' and 'sampling' is wanted") from e
        if not all(isinstance(text, str) for _, text in said):
            raise ValueError(f"{path}: every message's content must be a text")
        system = said.pop(0)[1] if said and said[0][0] == "system" else None
        roles, texts = [role for role, _ in said], [text for _, text in said]
        if roles != ["user", "assistant"] * (len(said) // 2):
            raise ValueError(f"{path}: after the system's, messages must be the user's and the assistant's in turn")
        self.update_sampling(**sampling)
        self.system = system
        self.turns = [Turn(m, Completion(text=a)) for m, a in zip(texts[::2], texts[1::2], strict=True)]
