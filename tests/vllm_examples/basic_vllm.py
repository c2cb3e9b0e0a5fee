"""Completes a list of prompts. Usage: python basic.py MODEL"""

import sys

from vllm import LLM, SamplingParams

prompts = ["The capital of France is", "The largest ocean on Earth is", "Water boils at"]
sampling_params = SamplingParams(temperature=0, top_p=0.95, max_tokens=8)

llm = LLM(model=sys.argv[1])
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"{prompt!r} -> {generated_text!r}")
