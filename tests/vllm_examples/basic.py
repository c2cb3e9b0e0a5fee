"""Completes a list of prompts. Usage: python basic.py MODEL"""

import sys

from fastgen import Engine, SamplingParams

prompts = ["The capital of France is", "The largest ocean on Earth is", "Water boils at"]
sampling_params = SamplingParams(temperature=0, top_p=0.95, max_tokens=8)

llm = Engine.from_pretrained(sys.argv[1])
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.completions[0].text
    print(f"{prompt!r} -> {generated_text!r}")
