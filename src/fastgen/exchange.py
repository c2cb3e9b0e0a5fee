"""Parameters between a trainer and an engine: one memory for both, or tensors sent from one process to another.

adopt           a transformers model's weights become views of packed parameters: nothing is ever sent
handles         a GPU's tensors for another process on the same host, by CUDA IPC
send, receive   over a group of torch.distributed, in buckets
"""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import reduce_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastgen.models.spec import Spec, from_hf
from fastgen.models.weights import EMBED, HEAD, declare
from fastgen.types import Params

BUCKET = 2**28  # bytes that are sent together
SOURCES = "fastgen_sources"  # attribute of a packed leaf: the parameters that are views of it
WATCHED = "fastgen_watched"  # attribute of what an engine looks at


def adopt(model: torch.nn.Module) -> tuple[Spec, Params]:
    """Spec and parameters of a transformers model, for an engine that shares its memory.

    The model's own `nn.Parameter` objects stay, with optimizers and hooks that know them, and become views: q, k and
    v of one packed leaf, gate and up of another; other leaves are their memory as it was. So `optimizer.step()` is
    the update, captured graphs stay valid, and an engine sees from their version counters that they have changed.
    Repacking needs room for one more packed leaf at a time.

    Where one memory is impossible a ValueError says why: parameters that are sharded (FSDP, tensor parallel), on
    `meta`, of several dtypes or devices, or not of a plain decoder of a supported family (wrapped by PEFT,
    quantized). Then give an engine parameters of its own and `Engine.update_params` after each step.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: adopt takes a transformers model")
    made = {} if config.architectures else {"architectures": [type(model).__name__]}  # not from a checkpoint
    spec = from_hf(config.to_dict() | made)
    own = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    if {EMBED, HEAD} <= every.keys():  # the config may say otherwise: a checkpoint's head that differs is not tied
        spec = replace(spec, tied=every[HEAD] is every[EMBED])
    tree = declare(spec)
    names = [part.name for leaf in tree_leaves(tree) if leaf is not None for part in leaf.parts]
    _check(own, names, spec)
    leaves: list[Tensor | None] = []
    for leaf in tree_leaves(tree):
        if leaf is None:
            leaves.append(None)
            continue
        parts = [own[part.name] for part in leaf.parts]
        for part, p in zip(leaf.parts, parts, strict=True):
            if tuple(p.shape) != part.shape:
                raise ValueError(f"{part.name} has shape {tuple(p.shape)}, the config says {part.shape}")
        leaves.append(_pack(parts, leaf.shape))
    return spec, tree_unflatten(leaves, tree_flatten(tree)[1])


def _check(own: dict[str, Any], names: Sequence[str], spec: Spec) -> None:
    """ValueError, with the reason, where an engine cannot read a model's parameters where they are."""
    advice = "; give the engine parameters of its own and call Engine.update_params after each step"
    if missing := [name for name in names if name not in own]:
        found = "; ".join(list(own)[:3])
        raise ValueError(
            f"the model has no parameter {missing[0]} (and {len(missing) - 1} more of {spec.architecture}): is it "
            f"wrapped, by PEFT, a compiler or a quantizer? It has {found}, …{advice}"
        )
    others = set(own) - set(names)
    if others:
        raise ValueError(f"{spec.architecture} does not use the parameter {min(others)}{advice}")
    kinds = {own[name].dtype for name in names}
    devices = {own[name].device for name in names}
    for name in names:
        p = own[name]
        if hasattr(p, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, sharded over {p.device_mesh}: a shard cannot be read in place{advice}"
            )
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model first")
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {p.stride()}){advice}")
    if len(kinds) > 1:
        raise ValueError(f"the parameters have several dtypes, {sorted(map(str, kinds))}: an engine has one{advice}")
    if len(devices) > 1:
        raise ValueError(f"the parameters are on several devices, {sorted(map(str, devices))}{advice}")


def _pack(parts: Sequence[torch.nn.Parameter], shape: tuple[int, ...]) -> Tensor:
    if len(parts) == 1:
        packed = parts[0].detach()
    else:
        packed = torch.cat([p.detach() for p in parts]).view(shape)
        start = 0
        for p in parts:
            p.data = packed[start : start + len(p)]
            start += len(p)
    setattr(packed, SOURCES, tuple(parts))
    return packed


def marks(params: Params) -> tuple[Tensor, ...]:
    """Everything whose version counter moves when the parameters are written in place."""
    found = []
    for leaf in tree_leaves(params):
        if leaf is not None:
            found += [t for t in (leaf, *getattr(leaf, SOURCES, ())) if not t.is_inference()]
    for t in found:
        setattr(t, WATCHED, True)
    _watch()
    return tuple(found)


@cache
def _watch() -> None:
    """Fused optimizers, the default of transformers' trainers, write without moving a version counter."""

    def stepped(optimizer: torch.optim.Optimizer, args: Any, named: Any) -> None:
        params = (p for group in optimizer.param_groups for p in group["params"])
        increment_version([p for p in params if getattr(p, WATCHED, False)])

    register_optimizer_step_post_hook(stepped)


def handles(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """A GPU's tensors for `Engine.update_params` of another process on this host: by CUDA IPC, without a copy.

    The tensors must live until the other has taken them. Send the bytes as you like, but only to who trusts you: they
    are a pickle. Processes that torch.multiprocessing has started may send the tensors themselves through its queues.
    """
    found = []
    for name, tensor in tensors:
        if not tensor.is_cuda:
            raise ValueError(f"{name} is on {tensor.device}: CUDA IPC is for a GPU's memory; use send and receive")
        found.append((name, reduce_tensor(tensor.detach())))
    return pickle.dumps(found)


def opened(handles: bytes) -> Iterator[tuple[str, Tensor]]:
    """What `handles` has packed."""
    for name, (rebuild, args) in pickle.loads(handles):
        yield name, rebuild(*args)


def _buckets(tensors: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Of one dtype each, and `size` bytes or one tensor."""
    some: list[tuple[str, Tensor]] = []
    for name, t in tensors:
        full = some and (some[0][1].dtype != t.dtype or sum(x.nbytes for _, x in some) + t.nbytes > size)
        if full:
            yield some
            some = []
        some.append((name, t))
    if some:
        yield some


def send(tensors: Iterable[tuple[str, Tensor]], group: Any = None, src: int = 0, *, bucket: int = BUCKET) -> None:
    """Broadcast (checkpoint name, tensor) pairs from this rank, `src`, to those of the group that `receive` them."""
    for _ in pass_on(tensors, group, src, bucket=bucket):
        pass


def pass_on(
    tensors: Iterable[tuple[str, Tensor]],
    group: Any = None,
    src: int = 0,
    *,
    device: torch.device | None = None,
    bucket: int = BUCKET,
) -> Iterator[tuple[str, Tensor]]:
    """`send`, bucket after bucket; and the pairs as they were sent, on `device` if given, for an engine here too."""
    try:
        for some in _buckets(((n, _whole(t)) for n, t in tensors), bucket):
            about: list[Any] = [[(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in some]]
            flat = torch.cat([t.detach().flatten() for _, t in some]).to(device)
            dist.broadcast_object_list(about, src, group)
            dist.broadcast(flat, src, group)
            for (name, t), part in zip(some, flat.split([t.numel() for _, t in some]), strict=True):
                yield name, part.view(t.shape)
    finally:  # also where nobody wants the rest
        dist.broadcast_object_list([None], src, group)


def receive(group: Any = None, src: int = 0, *, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """What rank `src` sends, on `device`, bucket after bucket: for `Engine.update_params`.

    All that is sent is received, also where the rest is not wanted any more: else `src` would wait for ever.
    """

    def bucket() -> Iterator[tuple[str, Tensor]] | None:
        about: list[Any] = [None]
        dist.broadcast_object_list(about, src, group)
        if about[0] is None:
            return None
        sizes = [torch.Size(shape).numel() for _, shape, _ in about[0]]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, about[0][0][2]), device=device)
        dist.broadcast(flat, src, group)
        parts = zip(about[0], flat.split(sizes), strict=True)
        return ((name, part.view(shape)) for (name, shape, _), part in parts)

    some = bucket()
    try:
        while some is not None:
            yield from some
            some = bucket()
    except GeneratorExit:
        while bucket() is not None:
            pass
        raise


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor; the shards of a DTensor are put together, which every rank of its mesh has to do."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def named(source: Any) -> Iterator[tuple[str, Any]]:
    """(checkpoint name, tensor) pairs of a module, a mapping, handles or pairs; shards are put together."""
    if isinstance(source, torch.nn.Module):
        source = source.named_parameters()
    elif isinstance(source, bytes):
        source = opened(source)
    elif hasattr(source, "items"):
        source = source.items()
    return ((name, _whole(tensor)) for name, tensor in source)
