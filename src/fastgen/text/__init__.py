"""Text: prompts to token ids (also chat messages), and generated tokens to text with stop strings."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object  # importing transformers takes as long as importing torch, and only text needs it

__all__ = ["Tokenizer"]
