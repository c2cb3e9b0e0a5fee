"""Completes a prompt without and with a LoRA adapter. Usage: python lora.py MODEL ADAPTER"""

import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def print_texts(outputs):
    for output in outputs:
        print(repr(output.outputs[0].text))


prompts = ["Once upon a time", "The sea is"]
sampling_params = SamplingParams(temperature=0, max_tokens=8)

llm = LLM(model=sys.argv[1], enable_lora=True)
print_texts(llm.generate(prompts, sampling_params))
print_texts(llm.generate(prompts, sampling_params, lora_request=LoRARequest("tales", 1, sys.argv[2])))
