"""core/ runs a model with nothing importable but core, config, checkpoint and quantization, and without Triton."""

import subprocess
import sys

import tiny

import fastgen
from fastgen import SamplingParams

CONFIG = tiny.config("Mistral", **tiny.WINDOWED)
PROMPTS = [[1, 2, 3], [7] * 21, [4, 5, 6] * 6, [7] * 21]
SAMPLING = [
    {"temperature": 0, "max_tokens": 9},
    {"seed": 3, "max_tokens": 12, "n": 2},
    {"seed": 5, "max_tokens": 8, "top_k": 9, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0, "max_tokens": 6, "prompt_logprobs": 1},
]
SETTINGS = {"page_size": 8, "cache_tokens": 96, "max_num_seqs": 3, "token_budget": 24, "overlap": True}
ALONE = f"""
import sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        allowed = tuple(f"fastgen.{{x}}" for x in ("core", "config", "sampling_params", "checkpoint", "quantization"))
        if name.startswith("fastgen.") and not name.startswith(allowed) or name.partition(".")[0] == "triton":
            raise ImportError(f"core must not need {{name}}")

sys.meta_path.insert(0, Refuse())
torch.set_num_threads(1)
from fastgen.checkpoint import weights
from fastgen.config import EngineConfig
from fastgen.sampling_params import SamplingParams
from fastgen.core.engine_core import EngineCore
from fastgen.core.kv_cache import new_kv_cache
from fastgen.checkpoint.model_families import from_hf_config
from fastgen.core.runner import EagerRunner, PageCopier
from torch import Tensor
from torch.utils._pytree import tree_map_only

model_config = from_hf_config({CONFIG!r})
params = weights.init(model_config, 0, device="cpu")
params = tree_map_only(Tensor, lambda w: w * 10 if w.ndim == 2 else w, params)
config = EngineConfig.from_flat(**{SETTINGS!r}).resolve("cpu")
runner = EagerRunner(params, model_config, config)
runner.attach_cache(new_kv_cache(model_config, 96 + 8, dtype=torch.float32))
core = EngineCore(runner, config, PageCopier(runner.cache, 8))
ids = [core.add(p, SamplingParams(**s)) for p, s in zip({PROMPTS!r}, {SAMPLING!r})]
outputs = {{}}
while core.has_unfinished_requests:
    for event in core.step():
        if event.output is not None:
            outputs[event.request_id] = event.output
print([[c.token_ids for c in outputs[id].completions] for id in ids])
print([outputs[id].prompt_logprobs for id in ids], core.state.prefix_cache.stats.num_hit_tokens > 0)
core.close()
"""


def test_core_alone() -> None:
    """The same tokens and prompt logprobs as an Engine's, with preemption and prefix cache hits, in a bare process."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model_config = fastgen.from_hf_config(CONFIG)
    params = tiny.weights(model_config, device="cpu")
    with fastgen.Engine(params, model_config, progress=False, **SETTINGS) as e:
        outputs = e.generate(PROMPTS, [SamplingParams(**s) for s in SAMPLING])
    tokens = [[c.token_ids for c in o.completions] for o in outputs]
    assert done.stdout == f"{tokens}\n{[o.prompt_logprobs for o in outputs]} True\n"
