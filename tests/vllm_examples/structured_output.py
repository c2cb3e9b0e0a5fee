"""Generates JSON that follows a schema. Usage: python structured_output.py MODEL"""

import json
import sys

from fastgen import Engine, SamplingParams

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
llm = Engine.from_pretrained(sys.argv[1])
sampling_params = SamplingParams(temperature=0, max_tokens=64, grammar=schema)
prompts = ["Describe Paris as JSON: ", "Describe Tokyo as JSON: "]

for output in llm.generate(prompts, sampling_params):
    print(json.loads(output.completions[0].text))
