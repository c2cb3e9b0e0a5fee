"""A small model to train, engines of it, and a process that sends weights; imports little, for spawned processes."""

import random
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint.weights import named_weights

CONFIG = fastgen.from_hf_config(tiny.config("Qwen2", vocab=97, context=128))
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(97) for _ in range(n)] for n in (5, 19, 40, 1)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)


def new_params(seed: int = 0) -> fastgen.Params:
    return tiny.weights(CONFIG, seed, times=8)


def clone(params: fastgen.Params, scale: float = 1.0) -> fastgen.Params:
    return tree_map_only(Tensor, lambda w: w.detach() * scale, params)


def engine(params: fastgen.Params, **settings: Any) -> fastgen.Engine:
    return fastgen.Engine(params, CONFIG, progress=False, **{"page_size": 16, "cache_tokens": 1024} | settings)


def tokens_and_logprobs(outputs: list[fastgen.Output]) -> list[tuple[list[int], list[float] | None]]:
    return [(c.token_ids, c.logprobs) for o in outputs for c in o.completions]


def generate(engine: fastgen.Engine) -> list[tuple[list[int], list[float] | None]]:
    """Returns the greedy tokens of the prompts, and their logprobs."""
    return tokens_and_logprobs(engine.generate(PROMPTS, GREEDY))


def generate_fresh(params: fastgen.Params, **settings: Any) -> list[tuple[list[int], list[float] | None]]:
    """Returns what a new engine generates with copies of the parameters."""
    with engine(clone(params), **settings) as e:
        return generate(e)


def finish(engine: fastgen.Engine) -> dict[int, fastgen.Output]:
    """Runs steps until no request is left. Returns the outputs by request id."""
    outputs = {}
    while engine.has_unfinished_requests:
        outputs |= {e.request_id: e.output for e in engine.step() if e.output}
    return outputs


def send_and_receive(rank: int, port: int, results: Any, device_type: str) -> None:
    """Runs in two processes: rank 0 sends its parameters, and rank 1 generates with them."""
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    params = new_params(rank)
    if rank == 0:
        fastgen.send(named_weights(params, CONFIG), bucket_bytes=3000)
    else:
        with engine(params) as e:
            generate(e)
            e.update_params(fastgen.receive(device=torch.get_default_device()))
            results.put(generate(e))
    dist.barrier()
    dist.destroy_process_group()
