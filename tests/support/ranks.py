"""A small model over several ranks, and the functions of its other processes. Imports little, so that they start
fast."""

import os
import random
import time
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

import fastgen
from fastgen import SamplingParams
from fastgen.core.model_config import UNSHARDED, TPShard

SPEC = fastgen.from_hf_config(
    tiny.config("Qwen2", num_hidden_layers=1, vocab=131, context=256, tie_word_embeddings=True)
)
SETTINGS: dict[str, Any] = {
    "page_size": 8, "cache_tokens": 136, "max_num_seqs": 6, "token_budget": 40, "offload": "host", "host_gb": 1e-4,
    "seed": 5, "progress": False,
}  # fmt: skip
MAX_PROGRAMS = 4  # of the all-reduce kernel in `run_all_reduce_kernel`


def weights(seed: int = 0, tp_shard: TPShard = UNSHARDED) -> fastgen.Params:
    """Returns parameters whose next-token distributions are not flat."""
    params = fastgen.init(SPEC, seed, device="cpu", dtype=torch.float32, tp_shard=tp_shard)
    return tree_map(lambda x: x if x is None or x.ndim == 1 else x * 15, params)


def load(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Returns prompts with shared prefixes, and sampling parameters of all kinds."""
    r = random.Random(seed)
    stems = [[r.randrange(131) for _ in range(n)] for n in (16, 40)]
    choices: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "n": 3}, {"temperature": 1, "logprobs": 2, "top_k": 9},
        {"temperature": 0, "repetition_penalty": 1.2}, {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 1, "allowed_token_ids": range(60)},
    ]  # fmt: skip
    prompts = [r.choice(stems) + [r.randrange(131) for _ in range(r.randrange(1, 20))] for _ in range(count)]
    return prompts, [SamplingParams(**r.choice(choices), seed=i, max_tokens=r.randrange(1, 24)) for i in range(count)]


def engine(size: int = 2, **more: Any) -> fastgen.Engine:
    return fastgen.Engine(weights(), SPEC, tensor_parallel=size, **SETTINGS | more)


def tokens(outputs: list[fastgen.Output]) -> list[list[list[int]]]:
    return [[c.token_ids for c in o.completions] for o in outputs]


def listening(pid: int | str = "self") -> set[str]:
    """Returns the addresses at which a process listens for TCP connections, in the kernel's hexadecimal form."""
    links = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()]
    rows = [x.split() for v in ("tcp", "tcp6") for x in Path(f"/proc/{pid}/net/{v}").read_text().splitlines()[1:]]
    return {r[1].partition(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in links}


def endless(e: fastgen.Engine) -> None:
    prompts, _ = load(3, 6)
    while True:
        e.generate(prompts, SamplingParams(max_tokens=20), progress=False)


def late(rank: int, port: int, file: str) -> None:
    """Runs a rank as torchrun starts it; rank 0 starts last."""
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    time.sleep(2.5 if rank == 0 else 0)
    with engine() as e:
        torch.save((tokens(e.generate(*load(1, 3), progress=False)), listening()), f"{file}.{rank}")
    dist.destroy_process_group()


def run_all_reduce_kernel(rank: int, size: int, file: str, partials: list[Tensor], flags: list[Tensor]) -> None:
    """Runs a rank's all-reduce kernels, with ranks arriving in all orders."""
    from fastgen.kernels import all_reduce_norm

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    all_reduce_norm.MAX_PROGRAMS = MAX_PROGRAMS
    results = []
    for step, rows in enumerate((3, 7, 1, 5, 3)):
        x, norm, partial = (torch.randn(n, 40, generator=torch.Generator().manual_seed(seed))
                         for n, seed in ((rows, step), (1, 99), (rows, 10 * step + rank)))  # fmt: skip
        partials[rank][step % 2, :rows] = partial
        time.sleep(0.05 * ((rank + step) % size))
        partial_ptrs = torch.tensor([p[step % 2].data_ptr() for p in partials])
        flag_ptrs = torch.tensor([f.data_ptr() for f in flags])
        arguments = x, partials[rank][step % 2, :rows], partial_ptrs, flag_ptrs, rank, norm[0], 1e-5
        results.append(all_reduce_norm.all_reduce_add_norm(*arguments))
    torch.save(results, f"{file}.{rank}")
    if rank == 0:  # the others have exited: the abort flag ends the waiting
        flags[0][-1] = 1
        all_reduce_norm.all_reduce_add_norm(*arguments)
