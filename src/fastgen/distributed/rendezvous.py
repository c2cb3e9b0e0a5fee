"""How the ranks of a tensor-parallel engine meet: in torchrun's process group, or in one of their own (`workers`)."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from fastgen.distributed.tensor_parallel import TPProcessGroup

START_TIMEOUT = 120.0  # seconds in which all ranks must have started
CONNECT_TIMEOUT = 7.0  # seconds in which MASTER_ADDR must accept a connection
LOOPBACK_HOSTS = ("localhost", "127.0.0.1")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_device(device_type: str, rank: int) -> str:
    """Returns a rank's device: "cpu", or for "cuda" a GPU of its own."""
    if device_type != "cuda":
        return device_type
    return f"cuda:{os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count())}"


def init_process_group(device_type: str, rank: int, world_size: int, store: Any, timeout: timedelta) -> None:
    """Initializes torch.distributed's default process group over `store`: NCCL on "cuda", otherwise gloo."""
    if device_type == "cuda":
        torch.cuda.set_device(rank_device(device_type, rank))
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def loopback_only() -> Iterator[None]:
    """Makes gloo and NCCL listen on the loopback interface alone while they connect, unless the user chose another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")
    variables = [v for v in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback and v not in os.environ]
    os.environ.update(dict.fromkeys(variables, loopback))
    try:
        yield
        dist.barrier()  # NCCL reads its variable when the first collective connects the ranks
    finally:
        for variable in variables:
            del os.environ[variable]


def join_torchrun_group(tp_size: int, device_type: str) -> TPProcessGroup:
    """Joins the process group that torchrun's environment variables describe.

    Raises ValueError if the variables are inconsistent, before any rank waits for another, or if the ranks do not meet.
    """
    source = "the environment says that torchrun started this process"
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise ValueError(f"{source}, but {', '.join(missing)} is not set; otherwise unset RANK and WORLD_SIZE")
    rank, world_size, host, port = (os.environ[name] for name in TORCHRUN_VARIABLES)
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ValueError(f"{source}, but RANK={rank!r} is no rank of WORLD_SIZE={world_size!r}")
    if int(world_size) != tp_size:
        raise ValueError(f"parallel.tensor_parallel={tp_size}, but {source} with WORLD_SIZE={world_size}")
    local_rank, num_gpus = os.environ.get("LOCAL_RANK", rank), torch.cuda.device_count()
    if device_type == "cuda" and int(local_rank) >= num_gpus:
        raise ValueError(f"{source} as LOCAL_RANK={local_rank}, and this machine shows {num_gpus} GPUs")
    try:
        store = _connect_store(int(rank), tp_size, host, int(port))
        with loopback_only() if host in LOOPBACK_HOSTS else nullcontext():
            init_process_group(device_type, int(rank), tp_size, store, timedelta(seconds=START_TIMEOUT))
            return TPProcessGroup()
    except (dist.DistError, RuntimeError, OSError, TimeoutError, ValueError) as e:
        address = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
        raise ValueError(f"rank {rank} of {tp_size} found no group at {address}: {str(e).splitlines()[0]}") from e


def _connect_store(rank: int, world_size: int, host: str, port: int) -> Any:
    """Returns the store at torchrun's address once all ranks have connected. Raises OSError if nothing accepts a
    connection within CONNECT_TIMEOUT, and TimeoutError if a rank is missing after START_TIMEOUT."""
    # Otherwise torchrun itself runs the store.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + CONNECT_TIMEOUT
    while not is_master:  # torch's own client would try for as long as late ranks may take
        try:
            socket.create_connection((host, port), max(0.1, min(2.0, end - time.monotonic()))).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    # By itself the store would listen on all interfaces.
    listener = socket.create_server((host, port)).detach() if is_master and host in LOOPBACK_HOSTS else None
    options: dict[str, Any] = {"is_master": is_master, "wait_for_workers": False, "master_listen_fd": listener}
    timeout = timedelta(seconds=CONNECT_TIMEOUT / 3)  # the client tries twice
    store = TCPStore(host, port, world_size, timeout=timeout, **options)
    store = PrefixStore(f"fastgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(rank), "connected")
    end = time.monotonic() + START_TIMEOUT
    while missing := [str(r) for r in range(world_size) if not store.check([str(r)])]:
        if time.monotonic() > end:
            raise TimeoutError(f"rank {', '.join(missing)} did not come within {START_TIMEOUT:.0f} s")
        time.sleep(0.05)
    return store
