"""A small model over several ranks, and what its other processes do: a module that imports little, to begin at once."""

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
PROGRAMS = 4  # of the kernel that sums


def weights(seed: int = 0, tp_shard: TPShard = UNSHARDED) -> fastgen.Params:
    """With distributions that are not flat."""
    params = fastgen.init(SPEC, seed, device="cpu", dtype=torch.float32, tp_shard=tp_shard)
    return tree_map(lambda x: x if x is None or x.ndim == 1 else x * 15, params)


def load(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that begin alike, of several samples, of all kinds."""
    r = random.Random(seed)
    stems = [[r.randrange(131) for _ in range(n)] for n in (16, 40)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "n": 3}, {"temperature": 1, "logprobs": 2, "top_k": 9},
        {"temperature": 0, "repetition_penalty": 1.2}, {"temperature": 0, "prompt_logprobs": 1},
    ]  # fmt: skip
    prompts = [r.choice(stems) + [r.randrange(131) for _ in range(r.randrange(1, 20))] for _ in range(count)]
    return prompts, [SamplingParams(**r.choice(kinds), seed=i, max_tokens=r.randrange(1, 24)) for i in range(count)]


def engine(size: int = 2, **more: Any) -> fastgen.Engine:
    return fastgen.Engine(weights(), SPEC, tensor_parallel=size, **SETTINGS | more)


def tokens(outputs: list[fastgen.Output]) -> list[list[list[int]]]:
    return [[c.token_ids for c in o.completions] for o in outputs]


def listening(pid: int | str = "self") -> set[str]:
    """The addresses at which a process listens for TCP connections, in the kernel's hexadecimal form."""
    links = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()]
    rows = [x.split() for v in ("tcp", "tcp6") for x in Path(f"/proc/{pid}/net/{v}").read_text().splitlines()[1:]]
    return {r[1].partition(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in links}


def endless(e: fastgen.Engine) -> None:
    prompts, _ = load(3, 6)
    while True:
        e.generate(prompts, SamplingParams(max_tokens=20), progress=False)


def late(rank: int, port: int, file: str) -> None:
    """A process as torchrun starts it; the first comes last."""
    given = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    time.sleep(2.5 if rank == 0 else 0)
    with engine() as e:
        torch.save((tokens(e.generate(*load(1, 3), progress=False)), listening()), f"{file}.{rank}")
    dist.destroy_process_group()


def reading(rank: int, size: int, file: str, parts: list[Tensor], flags: list[Tensor]) -> None:
    """A process that runs the kernel of sums over ranks again and again, ranks coming in all orders."""
    from fastgen.kernels import all_reduce_norm

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    all_reduce_norm.MAX_PROGRAMS = PROGRAMS
    found = []
    for step, rows in enumerate((3, 7, 1, 5, 3)):
        x, norm, mine = (torch.randn(n, 40, generator=torch.Generator().manual_seed(seed))
                         for n, seed in ((rows, step), (1, 99), (rows, 10 * step + rank)))  # fmt: skip
        parts[rank][step % 2, :rows] = mine
        time.sleep(0.05 * ((rank + step) % size))
        at = torch.tensor([p[step % 2].data_ptr() for p in parts])
        where = torch.tensor([f.data_ptr() for f in flags])
        found.append(
            all_reduce_norm.all_reduce_add_norm(x, parts[rank][step % 2, :rows], at, where, rank, norm[0], 1e-5)
        )
    torch.save(found, f"{file}.{rank}")
    if rank == 0:  # the others are gone: waiting ends when it is said
        flags[0][-1] = 1
        all_reduce_norm.all_reduce_add_norm(x, parts[0][step % 2, :rows], at, where, rank, norm[0], 1e-5)
