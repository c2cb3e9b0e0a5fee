"""Answers one conversation, then two at once, then one with a chat template of its own. Usage: python chat.py MODEL"""

import sys

from vllm import LLM, SamplingParams

SHORT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def print_answers(outputs):
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


llm = LLM(model=sys.argv[1])
sampling_params = SamplingParams(temperature=0, max_tokens=8)
france = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
italy = [{"role": "user", "content": "What is the capital of Japan?"}]

print_answers(llm.chat(france, sampling_params))
print_answers(llm.chat([france, italy], sampling_params))
print_answers(llm.chat(italy, sampling_params, chat_template=SHORT_TEMPLATE))
