"""Completes a prompt without and with a LoRA adapter. Usage: python lora.py MODEL ADAPTER"""

import sys

from fastgen import Engine, SamplingParams


def print_texts(outputs):
    for output in outputs:
        print(repr(output.completions[0].text))


prompts = ["Once upon a time", "The sea is"]
sampling_params = SamplingParams(temperature=0, max_tokens=8)

llm = Engine.from_pretrained(sys.argv[1], adapters={"tales": sys.argv[2]})
print_texts(llm.generate(prompts, sampling_params))
print_texts(llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, adapter="tales")))
