"""Generates JSON that follows a schema. Usage: python structured_output.py MODEL"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "country": {"enum": ["France", "Italy", "Japan"]},
        "population": {"type": "integer", "minimum": 0, "maximum": 100000000},
    },
    "required": ["city", "country", "population"],
    "additionalProperties": False,
}
llm = LLM(model=sys.argv[1])
sampling_params = SamplingParams(temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=schema))
prompts = ["Describe Paris as JSON: ", "Describe Tokyo as JSON: "]

for output in llm.generate(prompts, sampling_params):
    print(json.loads(output.outputs[0].text))
