"""Prints the logprob of each token of the prompt and of the output. Usage: python logprobs.py MODEL"""

import sys

from vllm import LLM, SamplingParams


def print_logprobs(token_ids, logprobs):
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        print(f"token {token_id}: {logprob[token_id].logprob:.4f}")


llm = LLM(model=sys.argv[1])
sampling_params = SamplingParams(temperature=0, max_tokens=4, logprobs=0, prompt_logprobs=0)

for output in llm.generate(["The capital of France is"], sampling_params):
    completion = output.outputs[0]
    print_logprobs(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    print_logprobs(completion.token_ids, completion.logprobs)
    print(f"sum of the output's logprobs: {completion.cumulative_logprob:.4f}")
