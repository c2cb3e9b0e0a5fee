"""Weights sent from a trainer to an engine, as (checkpoint name, tensor) pairs.

named_tensors        the pairs of a module, mapping, pairs or handles: what `Engine.update_params` takes
stage_named_tensors  copies of the pairs, for an update that runs beside an engine's steps
cuda_ipc_handles     a GPU's tensors for another process on the same host
send, receive        pairs broadcast over a torch.distributed group, in buckets

`Engine.update_params` drops what the prefix cache holds (`EngineCore.params_changed_here`).

A trainer in the same process can share its memory instead of sending: `fastgen.adopt` (shared_params.py).
"""

import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._pytree import tree_leaves

from fastgen.quantization.fp8 import E4M3, QuantizedWeight

T = TypeVar("T")
NamedTensors = Iterable[tuple[str, Any]]  # tensors, or the `QuantizedWeight`s of an fp8 engine
BUCKET_BYTES = 2**28  # broadcast at once
FP8_FORMAT = "fp8"  # of a QuantizedWeight: the bytes of its values, then those of its scales
WRAPPER_PATTERN = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)\.")
WRAPPER_PREFIX_PATTERN = re.compile(r"^(?:module\.|base_model\.model\.)+")


def checkpoint_name(name: str) -> str:
    """Removes what `torch.compile`, DDP, FSDP, activation checkpointing and PEFT add to a parameter's name."""
    return WRAPPER_PREFIX_PATTERN.sub("", WRAPPER_PATTERN.sub("", name))


# --- sources of weights ---------------------------------------------------------------------------------------------


@torch.no_grad()
def merged_named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (checkpoint name, tensor) pairs of a module's parameters, with the values that it computes with.

    PEFT's LoRA is added to copies of the matrices that it adapts. Modules that PEFT trains in full replace their
    originals. Names lose what wrappers add. Raises ValueError for other kinds of adapters.
    """
    for name, p in module.named_parameters():
        owner, _, param_name = name.rpartition(".")
        if owner.endswith(".base_layer"):
            p = _merge_lora(owner.removesuffix(".base_layer"), module, param_name, p)
        elif ".lora_" in name:
            continue
        elif match := re.fullmatch(r"(.*)\.(?:modules_to_save\.([^.]+)|original_module)(\..*)", name):
            wrapper: Any = module.get_submodule(match[1])
            if match[2] != (None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)):
                continue
            name = match[1] + match[3]
        yield checkpoint_name(name), p


def _merge_lora(layer_name: str, module: torch.nn.Module, param_name: str, param: Tensor) -> Tensor:
    """Returns a parameter of a layer wrapped by PEFT, with the active LoRA adapters added and the others subtracted."""
    layer: Any = module.get_submodule(layer_name)
    has_bias = any(getattr(layer, "lora_bias", {}).values())
    if getattr(layer, "lora_variant", None) or not hasattr(layer, "scaling") or has_bias:
        raise ValueError(f"{layer_name} is wrapped by {type(layer).__name__}, not by plain LoRA")
    if param_name != "weight":
        return param
    merged = {*layer.merged_adapters}  # already added to the matrix
    active = set() if layer.disable_adapters else merged or {*layer.active_adapters}
    for adapter in (active ^ merged) & layer.scaling.keys():
        delta = layer.get_delta_weight(adapter)
        param = param + delta if adapter in active else param - delta
    return param


def _full_tensor(tensor: Any) -> Any:
    """Returns all of a tensor. Gathers the shards of a DTensor, which every rank of its mesh must do."""
    full_tensor: Any = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def _check_pair(pair: Any) -> tuple[str, Any]:
    """Returns the pair as a tuple. Raises ValueError if it is not (checkpoint name, tensor)."""
    if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
        return pair[0], pair[1]
    raise ValueError(f"parameters come as pairs of a checkpoint's name and a tensor, and one is {pair!r:.100}")


def named_tensors(source: Any) -> Iterable[tuple[str, Any]]:
    """Returns the (checkpoint name, tensor) pairs of a module, a mapping, CUDA IPC handles or pairs.

    Gathers shards of DTensors. Names lose what DDP, FSDP, `torch.compile`, activation checkpointing and PEFT add.
    Returns a list if all tensors are in memory already, and an iterator otherwise.
    """
    if isinstance(source, torch.nn.Module):
        has_lora = any(".lora_" in name for name, _ in source.named_parameters())  # then merge one matrix at a time
        source = merged_named_parameters(source) if has_lora else list(merged_named_parameters(source))
    elif isinstance(source, bytes):
        source = list(open_cuda_ipc_handles(source))
    elif isinstance(source, dict):
        source = list(source.items())
    elif hasattr(source, "items"):  # it may read each tensor from a file
        source = source.items()
    elif isinstance(source, str | Tensor) or not isinstance(source, Iterable):
        raise ValueError(f"parameters come as a tree, module, mapping, pairs or handles, not {type(source).__name__}")
    if isinstance(source, list | tuple):
        source = [_check_pair(x) for x in source]
    if isinstance(source, list) and not any(hasattr(tensor, "full_tensor") for _, tensor in source):
        return [(checkpoint_name(name), tensor) for name, tensor in source]
    return ((checkpoint_name(name), _full_tensor(tensor)) for name, tensor in map(_check_pair, source))


def _map_weight(fn: Callable[[Tensor], Any], weight: Any) -> Any:
    """Returns a weight with a function applied to it, or to both tensors of a quantized one. Converts arrays."""
    if isinstance(weight, QuantizedWeight):
        return weight.map(fn)
    return fn(weight if isinstance(weight, Tensor) else torch.as_tensor(weight))


def stage_named_tensors(source: Any, device: torch.device | str | None = None) -> list[tuple[str, Any]]:
    """Copies all pairs of a source into new memory on `device`; None keeps each tensor's device.

    Meant for a thread beside an engine's: copies from and to a GPU run on a stream of their own and are complete when
    this returns.
    """
    stream = torch.cuda.Stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    with torch.no_grad(), torch.cuda.stream(stream):
        staged = [(name, _map_weight(lambda t: t.to(device or t.device, copy=True), t))
                  for name, t in named_tensors(source)]  # fmt: skip
    if stream is not None:
        stream.synchronize()
        for t in tree_leaves(staged):
            if isinstance(t, Tensor) and t.is_cuda:
                # The engine's stream reads it: the allocator must not reuse the memory before that.
                t.record_stream(torch.cuda.default_stream(t.device))
    return staged


# --- from one process to another ------------------------------------------------------------------------------------


def cuda_ipc_handles(tensors: NamedTensors) -> bytes:
    """Packs handles of a GPU's tensors for `Engine.update_params` in another process on this host: CUDA IPC, no copy.

    The tensors must live until the other process has read them. Only send the bytes to a process that trusts this one:
    they are a pickle. Processes started by torch.multiprocessing can send the tensors themselves through its queues.
    """
    packed = []
    for name, weight in tensors:
        parts = weight if isinstance(weight, QuantizedWeight) else (weight,)
        for part in parts:
            if not part.is_cuda:
                raise ValueError(f"{name} is on {part.device}: CUDA IPC is for a GPU's memory; use send and receive")
        packed.append((name, [reduce_tensor(part.detach()) for part in parts]))
    return pickle.dumps(packed)


def open_cuda_ipc_handles(handles: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the pairs that `cuda_ipc_handles` packed, as tensors over the other process's memory."""
    try:
        packed = pickle.loads(handles)
    except (pickle.UnpicklingError, EOFError, ImportError, LookupError, AttributeError, ValueError) as e:
        raise ValueError(f"these bytes were not made by cuda_ipc_handles: {e}") from e
    for name, handles_of_parts in packed:
        parts = [rebuild(*args) for rebuild, args in handles_of_parts]
        yield name, parts[0] if len(parts) == 1 else QuantizedWeight(*parts)


def split_by_size(items: Iterable[T], size: Callable[[T], int], max_size: int) -> Iterator[list[T]]:
    """Yields lists of consecutive items whose sizes sum to at most `max_size`; a larger item is a list of its own."""
    batch, total = list[T](), 0
    for item in items:
        if batch and total + size(item) > max_size:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def send(tensors: NamedTensors, group: Any = None, src: int = 0, *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Broadcasts pairs from this rank, `src`, to the ranks of the group that call `receive`."""
    for _ in broadcast_weights(tensors, group, src, bucket_bytes=bucket_bytes):
        pass


def _format_of(weight: Tensor | QuantizedWeight) -> str:
    """Returns how a weight is sent: as values of a dtype, or as `FP8_FORMAT`."""
    return FP8_FORMAT if isinstance(weight, QuantizedWeight) else str(weight.dtype).removeprefix("torch.")


def _flatten(weight: Tensor | QuantizedWeight) -> Tensor:
    """Returns the values of a weight, or the bytes of a quantized one, in one dimension."""
    if not isinstance(weight, QuantizedWeight):
        return weight.detach().flatten()
    return torch.cat([part.detach().contiguous().flatten().view(torch.uint8) for part in weight])


def _unflatten(flat: Tensor, shape: tuple[int, ...], weight_format: str) -> Any:
    """Returns the weight that `_flatten` made into one dimension."""
    if weight_format != FP8_FORMAT:
        return flat.view(shape)
    num_values = prod(shape)
    scale = flat[num_values:].clone()  # aligned
    return QuantizedWeight(flat[:num_values].view(E4M3).view(shape), scale.view(torch.float32))


def broadcast_weights(
    tensors: NamedTensors, group: Any = None, src: int = 0, *, device: torch.device | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Broadcasts pairs as `send` does, and yields those of each bucket after it is sent, for an engine on this rank.
    The tensors are sent from `device`, and yielded there; None keeps their device."""
    pairs = ((name, _full_tensor(t)) for name, t in tensors)
    try:
        for weight_format, group_pairs in groupby(pairs, lambda pair: _format_of(pair[1])):
            for bucket in split_by_size(group_pairs, lambda pair: pair[1].nbytes, bucket_bytes):
                header = [[(name, tuple(t.shape), weight_format) for name, t in bucket]]
                flat_weights = [_flatten(t) for _, t in bucket]
                flat = torch.cat(flat_weights).to(device)
                dist.broadcast_object_list(header, src, group)
                dist.broadcast(flat, src, group)
                for (name, t), part in zip(bucket, flat.split([len(x) for x in flat_weights]), strict=True):
                    yield name, _unflatten(part, t.shape, weight_format)
    finally:  # None ends the transfer, also if the consumer stops early
        dist.broadcast_object_list([None], src, group)


def receive(group: Any = None, src: int = 0, *, device: torch.device | str = "cpu") -> Iterator[tuple[str, Any]]:
    """Yields the pairs that rank `src` sends, on `device`, bucket after bucket: for `Engine.update_params`.

    Receives everything that is sent, even if the consumer stops early: otherwise `src` would block forever.
    """

    header: list[Any] = [None]
    is_closed = False
    while True:
        dist.broadcast_object_list(header, src, group)
        if (bucket := header[0]) is None:
            return
        weight_format = bucket[0][2]
        is_fp8 = weight_format == FP8_FORMAT
        sizes = [prod(shape) + 4 * shape[0] if is_fp8 else prod(shape) for _, shape, _ in bucket]
        dtype = torch.uint8 if is_fp8 else getattr(torch, weight_format)
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.broadcast(flat, src, group)
        for (name, shape, _), part in zip(bucket, flat.split(sizes), strict=True):
            try:
                if not is_closed:
                    yield name, _unflatten(part, shape, weight_format)
            except GeneratorExit:
                is_closed = True
