"""Answers two prompts concurrently. Usage: python async_engine.py MODEL"""

import asyncio
import sys

from fastgen import AsyncEngine, Engine, SamplingParams


async def complete(engine, prompt, request_id):
    sampling_params = SamplingParams(temperature=0, max_tokens=8)
    async for _, output in engine.generate(prompt, sampling_params):
        final_output = output
    return prompt, final_output.completions[0].text


async def main():
    engine = AsyncEngine(Engine.from_pretrained(sys.argv[1]))
    prompts = ["The capital of France is", "The largest ocean on Earth is"]
    for prompt, text in await asyncio.gather(*(complete(engine, p, str(i)) for i, p in enumerate(prompts))):
        print(f"{prompt!r} -> {text!r}")


asyncio.run(main())
