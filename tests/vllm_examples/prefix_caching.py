"""Completes prompts that begin with the same text, which is computed once. Usage: python prefix_caching.py MODEL"""

import sys

from fastgen import Engine, SamplingParams

prefix = "You are the librarian of a small town. You know every book in the house and every reader by name. " * 4
prompts = [prefix + "A reader asks: which book is about ships?", prefix + "A reader asks: which book is about stars?"]
sampling_params = SamplingParams(temperature=0, max_tokens=8)

llm = Engine.from_pretrained(sys.argv[1], prefix_cache=True)
llm.generate(prompts[0], sampling_params)  # fills the cache
for output in llm.generate(prompts, sampling_params):
    generated_text = output.completions[0].text
    print(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} cached: {generated_text!r}")
