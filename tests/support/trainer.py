"""A small model that is trained, and a process that trains it: a module that imports little, to begin at once."""

import random
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint import weights

SPEC = fastgen.from_hf_config(tiny.config("Qwen2", vocab=97, context=128))
DICE = random.Random(0)
PROMPTS = [[DICE.randrange(97) for _ in range(n)] for n in (5, 19, 40, 1)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)


def fresh(seed: int = 0) -> fastgen.Params:
    return tiny.weights(SPEC, seed, times=8)


def engine(params: fastgen.Params, **settings: Any) -> fastgen.Engine:
    return fastgen.Engine(params, SPEC, progress=False, **{"page_size": 16, "cache_tokens": 1024} | settings)


def told(outputs: list[fastgen.Output]) -> list[tuple[list[int], list[float] | None]]:
    return [(c.token_ids, c.logprobs) for o in outputs for c in o.completions]


def expected(params: fastgen.Params, **settings: Any) -> Any:
    """From an engine that never knew anything else."""
    with engine(tree_map_only(Tensor, lambda w: w.detach().clone(), params), **settings) as one:
        return told(one.generate(PROMPTS, GREEDY))


def trainer(rank: int, port: int, found: Any, kind: str) -> None:
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    params = fresh(rank)
    if rank == 0:
        fastgen.send(weights.named_weights(params, SPEC), bucket_bytes=3000)
    else:
        with engine(params) as one:
            one.generate(PROMPTS, GREEDY)
            one.update_params(fastgen.receive(device=torch.get_default_device()))
            found.put(told(one.generate(PROMPTS, GREEDY)))
    dist.barrier()
    dist.destroy_process_group()
