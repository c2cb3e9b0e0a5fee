"""Parameters between a trainer and an engine: one memory for both, or tensors sent from one process to another.

adopt           a transformers model's weights become views of packed parameters: nothing is ever sent
merged, named   what `Engine.update_params` takes, by the names of the checkpoint
staged          the same in memory of its own, for an update beside an engine's steps
handles         a GPU's tensors for another process on the same host, by CUDA IPC
send, receive   over a group of torch.distributed, in buckets
"""

import pickle
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import reduce_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fastgen.checkpoint.weights import EMBED_NAME, LM_HEAD_NAME, weight_specs
from fastgen.core.model_config import ModelConfig, from_hf_config
from fastgen.core.types import Params

BUCKET_BYTES = 2**28  # bytes that are sent together
VERSION_TRACKED = "fastgen_watched"  # attribute of what an engine looks at
WRAPPER_PATTERN = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)\.")
WRAPPER_PREFIX_PATTERN = re.compile(r"^(?:module\.|base_model\.model\.)+")


def checkpoint_name(name: str) -> str:
    """Removes what `torch.compile`, DDP, FSDP, activation checkpointing and PEFT add to a parameter's name."""
    return WRAPPER_PREFIX_PATTERN.sub("", WRAPPER_PATTERN.sub("", name))


# --- one memory -----------------------------------------------------------------------------------------------------


class AdoptedModel:
    """Watches whether a model still computes with the parameters that were adopted from it."""

    def __init__(self, model: torch.nn.Module, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Takes the adopted parameters by checkpoint name."""
        self._model = weakref.ref(model)
        self._param_names, self._params = list(params), list(params.values())
        self._addresses = [p.data_ptr() for p in self._params]
        self._record_modules(model)

    def _record_modules(self, model: torch.nn.Module) -> None:
        """Remembers which parameters and modules every module has."""
        both = ((m._modules, m._parameters) for m in model.modules())
        self._module_dicts: list[dict[str, Any]] = [d for pair in both for d in pair if d]
        self._recorded_dicts = [dict(d) for d in self._module_dicts]

    def check(self) -> None:
        """Raises ValueError, with the parameter's name, if the model has another one or it has moved.

        Runs before every step, so it compares addresses, and the dictionaries of all modules in one comparison.
        """
        with torch._C.DisableTorchFunction():  # a default device takes part in each call, and makes it 20 times slower
            moved = list(map(Tensor.data_ptr, self._params)) != self._addresses
        try:  # the same objects are equal at once; where one is another, == compares tensors, and raises
            same = self._module_dicts == self._recorded_dicts
        except Exception:
            same = False
        if moved or not same:
            self._raise_first_difference()

    def _raise_first_difference(self) -> None:
        """Compares name by name, and raises ValueError for the first parameter that differs."""
        model = self._model()
        problem = None
        if model is None:  # it was deleted, and left its parameters to the engine
            found = dict(zip(self._param_names, self._params, strict=True))
        else:
            found = {checkpoint_name(name): p for name, p in model.named_parameters()}
        for name, p, address in zip(self._param_names, self._params, self._addresses, strict=True):
            if name not in found:
                problem = f"{name} is not there any more"
            elif found[name] is not p:
                problem = f"{name} was replaced by another parameter"
            elif p.data_ptr() != address:
                problem = f"{name} was moved to other memory"
            if problem:
                break
        else:
            inner = (name for name in found.keys() - set(self._param_names) if name.startswith(("model.", "lm_head.")))
            if name := min(inner, default=None):
                problem = f"it got the parameter {name}, which the engine does not have"
        if problem:
            raise ValueError(
                f"the adopted model and the engine no longer share their parameters: {problem} (load_state_dict with "
                "assign=True, `.data =`, `.to()`, resizing and PEFT do this); adopt the model again and make a new "
                "engine, or give an engine parameters of its own and call Engine.update_params after each step"
            )
        if model is not None:
            self._record_modules(model)


class _LeafOrigin(NamedTuple):
    """Where a leaf of packed parameters comes from."""

    adopted_model: AdoptedModel
    sources: tuple[torch.nn.Parameter, ...]  # views of the leaf, along its first dimension


# Beside the leaves, not an attribute of them: copies of a leaf must not take its model along.
_leaf_origins: MutableMapping[Tensor, _LeafOrigin] = WeakTensorKeyDictionary()
_packed_leaves: MutableMapping[torch.nn.Module, list[TensorWeakRef]] = (
    weakref.WeakKeyDictionary()
)  # of a model, in order


def adopt(model: torch.nn.Module) -> tuple[ModelConfig, Params]:
    """Spec and parameters of a transformers model, for an engine that shares its memory.

    The model's own `nn.Parameter` objects stay, with optimizers and hooks that know them, and become views: q, k and
    v of one packed leaf, gate and up of another; other leaves are their memory as it was. So `optimizer.step()` is
    the update, captured graphs stay valid, and an engine sees from their version counters that they have changed.
    `score` of the parameters returned has the gradients of the model's own, as far as those require them. Repacking
    needs room for one more packed leaf at a time. A model that is adopted again gives the same parameters, while they
    live.

    If the model gets other parameters or memory later, the engine's next step raises ValueError.

    Where one memory is impossible a ValueError says why: parameters that are sharded (FSDP, tensor parallel), on
    `meta`, of several dtypes or devices, or not of a plain decoder of a supported family (wrapped by PEFT,
    quantized). Then give an engine parameters of its own and `Engine.update_params` after each step.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: adopt takes a transformers model")
    kind = type(getattr(model, "_orig_mod", model))  # of a compiled one: what was compiled
    made = {} if config.architectures else {"architectures": [kind.__name__]}  # not from a checkpoint
    spec = from_hf_config(config.to_dict() | made)
    own = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    if {
        EMBED_NAME,
        LM_HEAD_NAME,
    } <= own.keys():  # the config may say otherwise: a checkpoint's head that differs is not tied
        spec = replace(spec, tie_word_embeddings=own[LM_HEAD_NAME] is own[EMBED_NAME])
        own = {name: p for name, p in own.items() if not (spec.tie_word_embeddings and name == LM_HEAD_NAME)}
    tree = weight_specs(spec)
    declared = [leaf for leaf in tree_leaves(tree) if leaf is not None]
    parts = [part for leaf in declared for part in leaf.checkpoint_tensors]
    _check_adoptable(own, [part.name for part in parts], spec)
    for part in parts:
        if tuple(own[part.name].shape) != part.full_shape:
            raise ValueError(f"{part.name} has shape {tuple(own[part.name].shape)}, the config says {part.full_shape}")
    sources = [tuple(own[part.name] for part in leaf.checkpoint_tensors) for leaf in declared]
    known = [ref() for ref in _packed_leaves.get(model, [])] + [None] * len(declared)
    packed = [_pack_leaf(some, leaf.shape, old) for some, leaf, old in zip(sources, declared, known, strict=False)]
    adoption = AdoptedModel(model, {part.name: own[part.name] for part in parts})
    for leaf, some in zip(packed, sources, strict=True):
        _leaf_origins[leaf] = _LeafOrigin(adoption, some)
    _packed_leaves[model] = list(map(TensorWeakRef, packed))
    rest = iter(packed)
    leaves = [None if leaf is None else next(rest) for leaf in tree_leaves(tree)]
    return spec, tree_unflatten(leaves, tree_flatten(tree)[1])


def _check_adoptable(model_params: dict[str, Any], required_names: Sequence[str], model_config: ModelConfig) -> None:
    """ValueError, with the reason, where an engine cannot read a model's parameters where they are."""
    advice = "; give the engine parameters of its own and call Engine.update_params after each step"
    if missing := [name for name in required_names if name not in model_params]:
        found = "; ".join(list(model_params)[:3])
        raise ValueError(
            f"the model has no parameter {missing[0]} (and {len(missing) - 1} more of {model_config.architecture}): is it "
            f"wrapped, by PEFT, a compiler or a quantizer? It has {found}, …{advice}"
        )
    others = set(model_params) - set(required_names)
    if others:
        raise ValueError(f"{model_config.architecture} does not use the parameter {min(others)}{advice}")
    kinds = {model_params[name].dtype for name in required_names}
    devices = {model_params[name].device for name in required_names}
    for name in required_names:
        p = model_params[name]
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


def _pack_leaf(sources: tuple[torch.nn.Parameter, ...], shape: tuple[int, ...], existing: Tensor | None) -> Tensor:
    """The leaf whose views the parameters become; the known one, if they are its views."""
    if existing is not None and _is_packed_from(existing, sources):
        return existing
    if len(sources) == 1:
        return sources[0].detach()
    packed = torch.cat([p.detach() for p in sources]).view(shape)
    for p, view in zip(sources, packed.split([len(p) for p in sources]), strict=True):
        p.data = view
    return packed


def _is_packed_from(leaf: Tensor, sources: tuple[torch.nn.Parameter, ...]) -> bool:
    """Whether a leaf was made of just these parameters, and they still are its views."""
    before = _leaf_origins[leaf].sources
    if len(before) != len(sources) or any(a is not b for a, b in zip(before, sources, strict=True)):
        return False
    views = leaf.split([len(p) for p in sources])
    return all(
        (p.data_ptr(), p.dtype, p.shape) == (v.data_ptr(), v.dtype, v.shape)
        for p, v in zip(sources, views, strict=True)
    )


def _adopted_leaves(params: Params) -> list[tuple[Tensor, _LeafOrigin]]:
    """The leaves that come from a model."""
    leaves = [(leaf, _leaf_origins.get(leaf)) for leaf in tree_leaves(params) if leaf is not None]
    return [(leaf, known) for leaf, known in leaves if known is not None]


def adopted_models(params: Params) -> tuple[AdoptedModel, ...]:
    """What watches the models that parameters were adopted from."""
    return tuple(dict.fromkeys(known.adopted_model for _, known in _adopted_leaves(params)))


class _SplitPackedGrad(torch.autograd.Function):
    """A packed leaf as it lies in memory, whose gradient is split over the parameters that are its views."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sources = ctx.saved_tensors  # raises where an optimizer has written since: forward used what is gone
        parts = grads[0].split([len(p) for p in sources])
        first, *rest = ctx.needs_input_grad
        return (grads[0] if first else None, *(g if wanted else None for g, wanted in zip(parts, rest, strict=True)))


def attach_gradients(params: Params) -> Params:
    """Returns the same values as functions of the parameters that they were adopted from, which then get gradients.

    The memory is the leaves'; parameters that do not require gradients get none. Raises ValueError if their model has
    other parameters now.
    """
    for adoption in adopted_models(params):
        adoption.check()

    def join(leaf: Tensor) -> Tensor:
        known = _leaf_origins.get(leaf)
        if known is None or not any(p.requires_grad for p in known.sources):
            return leaf
        return _SplitPackedGrad.apply(leaf, *known.sources)  # type: ignore[return-value]

    return tree_map_only(Tensor, join, params) if torch.is_grad_enabled() else params


def version_counters(params: Params) -> tuple[Tensor, ...]:
    """Everything whose version counter moves when the parameters are written in place."""
    leaves = [leaf for leaf in tree_leaves(params) if leaf is not None]
    sources = [known.sources for _, known in _adopted_leaves(params)]
    for t in (*leaves, *chain(*sources)):
        if not t.is_inference():
            setattr(t, VERSION_TRACKED, True)
    _register_optimizer_hook()
    packed = chain(*(some for some in sources if len(some) > 1))  # a leaf of one source has its version counter
    return tuple(t for t in (*leaves, *packed) if not t.is_inference())


@cache
def _register_optimizer_hook() -> None:
    """Fused optimizers, the default of transformers' trainers, write without moving a version counter."""

    def stepped(optimizer: torch.optim.Optimizer, args: Any, named: Any) -> None:
        params = (p for group in optimizer.param_groups for p in group["params"])
        increment_version([p for p in params if getattr(p, VERSION_TRACKED, False)])

    register_optimizer_step_post_hook(stepped)


# --- from one process to another ------------------------------------------------------------------------------------


def cuda_ipc_handles(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
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


def open_cuda_ipc_handles(handles: bytes) -> Iterator[tuple[str, Tensor]]:
    """What `handles` has packed."""
    try:
        packed = pickle.loads(handles)
    except (pickle.UnpicklingError, EOFError, ImportError, LookupError, AttributeError, ValueError) as e:
        raise ValueError(f"these bytes are no `handles`: {e}") from e
    for name, (rebuild, args) in packed:
        yield name, rebuild(*args)


def _split_into_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Of one dtype each, and `size` bytes or one tensor."""
    some: list[tuple[str, Tensor]] = []
    for name, t in tensors:
        full = some and (some[0][1].dtype != t.dtype or sum(x.nbytes for _, x in some) + t.nbytes > bucket_bytes)
        if full:
            yield some
            some = []
        some.append((name, t))
    if some:
        yield some


def send(
    tensors: Iterable[tuple[str, Tensor]], group: Any = None, src: int = 0, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Broadcast (checkpoint name, tensor) pairs from this rank, `src`, to those of the group that `receive` them."""
    for _ in broadcast_weights(tensors, group, src, bucket_bytes=bucket_bytes):
        pass


def broadcast_weights(
    tensors: Iterable[tuple[str, Tensor]],
    group: Any = None,
    src: int = 0,
    *,
    device: torch.device | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """`send`, bucket after bucket; and the pairs as they were sent, on `device` if given, for an engine here too."""
    try:
        for some in _split_into_buckets(((n, _full_tensor(t)) for n, t in tensors), bucket_bytes):
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


def _full_tensor(tensor: Any) -> Any:
    """All of a tensor; the shards of a DTensor are put together, which every rank of its mesh has to do."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@torch.no_grad()
def merged_named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) pairs of a module's parameters, as it computes with them.

    PEFT's LoRA is added to copies of the matrices it changes; modules that PEFT trains whole are taken in the place of
    their originals. ValueError for other changes. What wrappers add to names is left out.
    """
    for name, p in module.named_parameters():
        owner, _, own = name.rpartition(".")
        if owner.endswith(".base_layer"):
            p = _merge_lora(owner.removesuffix(".base_layer"), module, own, p)
        elif ".lora_" in name:
            continue
        elif one := re.fullmatch(r"(.*)\.(?:modules_to_save\.([^.]+)|original_module)(\..*)", name):
            wrapper: Any = module.get_submodule(one[1])
            if one[2] != (None if wrapper.disable_adapters else next(iter(wrapper.active_adapters), None)):
                continue
            name = one[1] + one[3]
        yield checkpoint_name(name), p


def _merge_lora(layer_name: str, module: torch.nn.Module, param_name: str, param: Tensor) -> Tensor:
    """A parameter of a layer that PEFT has wrapped, with its LoRA."""
    layer: Any = module.get_submodule(layer_name)
    biased = any(getattr(layer, "lora_bias", {}).values())
    if getattr(layer, "lora_variant", None) or not hasattr(layer, "scaling") or biased:
        raise ValueError(f"{layer_name} is wrapped by {type(layer).__name__}, not by plain LoRA")
    if param_name != "weight":
        return param
    present = {*layer.merged_adapters}  # whose change the matrix has
    wanted = set() if layer.disable_adapters else present or {*layer.active_adapters}
    for adapter in (wanted ^ present) & layer.scaling.keys():
        delta = layer.get_delta_weight(adapter)
        param = param + delta if adapter in wanted else param - delta
    return param


def _check_pair(pair: Any) -> tuple[str, Any]:
    """(checkpoint name, tensor), or a ValueError."""
    if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
        return pair[0], pair[1]
    raise ValueError(f"parameters come as pairs of a checkpoint's name and a tensor, and one is {pair!r:.100}")


def named_tensors(source: Any) -> Iterable[tuple[str, Any]]:
    """(checkpoint name, tensor) pairs of a module, a mapping, handles or pairs; shards are put together.

    Names may have what DDP, FSDP, `torch.compile`, activation checkpointing and PEFT add to them. A list where all of
    the tensors are in memory, or else an iterator.
    """
    if isinstance(source, torch.nn.Module):
        changed = any(".lora_" in name for name, _ in source.named_parameters())  # sums, made one at a time
        source = merged_named_parameters(source) if changed else list(merged_named_parameters(source))
    elif isinstance(source, bytes):
        source = list(open_cuda_ipc_handles(source))
    elif isinstance(source, dict):
        source = list(source.items())
    elif hasattr(source, "items"):  # it may read each from a file
        source = source.items()
    elif isinstance(source, str | Tensor) or not isinstance(source, Iterable):
        raise ValueError(f"parameters come as a tree, module, mapping, pairs or handles, not {type(source).__name__}")
    if isinstance(source, list | tuple):
        source = [_check_pair(x) for x in source]
    if isinstance(source, list) and not any(hasattr(tensor, "full_tensor") for _, tensor in source):
        return [(checkpoint_name(name), tensor) for name, tensor in source]
    return ((checkpoint_name(name), _full_tensor(tensor)) for name, tensor in map(_check_pair, source))


def stage_named_tensors(source: Any, device: torch.device | str | None = None) -> list[tuple[str, Tensor]]:
    """All (checkpoint name, tensor) pairs of a source, in memory of their own on `device`; None: where each is.

    For a thread beside an engine's: a GPU's tensors are received on a stream of their own, and are there at the end.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    stream = torch.cuda.Stream() if on_gpu else None
    with torch.no_grad(), torch.cuda.stream(stream):
        pairs = ((name, t if isinstance(t, Tensor) else torch.as_tensor(t)) for name, t in named_tensors(source))
        found = [(name, t.to(device or t.device, copy=True)) for name, t in pairs]
    if stream is not None:
        stream.synchronize()
        for _, t in found:
            if t.is_cuda:  # the engine's stream reads it, so its memory is not another's before that is done
                t.record_stream(torch.cuda.default_stream(t.device))
    return found
