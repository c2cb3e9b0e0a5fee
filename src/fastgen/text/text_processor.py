"""TextProcessor: what an EngineCore needs of a tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastgen.config import SamplingParams
from fastgen.core import extensions
from fastgen.text import Tokenizer
from fastgen.text.detokenizer import Detokenizer
from fastgen.text.tokenizer import Prompt, encode


class TextProcessor(extensions.TextProcessor):
    """Encodes prompts and decodes outputs with a tokenizer. With None, prompts are token ids and outputs have no text.

    `tokenizer` may be replaced between requests. `special_tokens_in_content` is as for `encode`.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, special_tokens_in_content: str = "text") -> None:
        self.tokenizer, self.special_tokens_in_content = tokenizer, special_tokens_in_content

    def end_token_ids(self, model_eos_token_ids: Iterable[int]) -> frozenset[int]:
        eos: Any = [] if self.tokenizer is None else self.tokenizer.eos_token_id
        return frozenset(model_eos_token_ids).union([] if eos is None else eos if isinstance(eos, list) else [eos])

    def encode(self, prompt: Prompt) -> list[int]:
        return encode(self.tokenizer, prompt, special_tokens_in_content=self.special_tokens_in_content)

    def new_detokenizer(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, stream_text: bool
    ) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        options: Any = {"min_tokens": sampling.min_tokens, "stream_text": stream_text}
        return Detokenizer(self.tokenizer, prompt_token_ids, sampling.stop, **options)
