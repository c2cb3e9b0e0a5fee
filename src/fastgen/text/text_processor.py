"""TextProcessor: what an EngineCore needs of a tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastgen.core import extensions
from fastgen.sampling_params import SamplingParams
from fastgen.text import Tokenizer
from fastgen.text.detokenizer import Detokenizer
from fastgen.text.tokenizer import Prompt, encode_with_text


def detokenizer_options(sampling: SamplingParams) -> dict[str, Any]:
    """Returns the options of a request's Detokenizer, except its stop strings."""
    return {
        "min_tokens": sampling.min_tokens,
        "include_stop_string": sampling.include_stop_str_in_output,
        "skip_special_tokens": sampling.skip_special_tokens,
    }


class TextProcessor(extensions.TextProcessor):
    """Encodes prompts and decodes outputs with a tokenizer. With None, prompts are token ids and outputs have no text.

    `tokenizer` may be replaced between requests. `special_tokens_in_content` is as for `encode`.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, special_tokens_in_content: str = "text") -> None:
        self.tokenizer, self.special_tokens_in_content = tokenizer, special_tokens_in_content

    def end_token_ids(self, model_eos_token_ids: Iterable[int]) -> frozenset[int]:
        eos: Any = [] if self.tokenizer is None else self.tokenizer.eos_token_id
        return frozenset(model_eos_token_ids).union([] if eos is None else eos if isinstance(eos, list) else [eos])

    def encode(self, prompt: Prompt, sampling: SamplingParams) -> tuple[list[int], str | None]:
        content = self.special_tokens_in_content
        token_ids, text = encode_with_text(self.tokenizer, prompt, special_tokens_in_content=content)
        return token_ids[-(sampling.truncate_prompt_tokens or 0) :], text

    def new_detokenizer(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, stream_text: bool
    ) -> Detokenizer | None:
        if self.tokenizer is None or not sampling.detokenize:
            return None
        options = detokenizer_options(sampling)
        return Detokenizer(self.tokenizer, prompt_token_ids, sampling.stop, stream_text=stream_text, **options)
