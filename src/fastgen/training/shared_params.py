"""Parameters in one memory for a trainer and an engine.

`adopt` makes a transformers model's parameters views of the engine's packed leaves, so nothing is ever sent:
`optimizer.step()` is the weight update, and version counters show the engine that it happened. An engine that computes
in fp8 has a `QuantizedShadow` of these parameters, which is made anew after each update.
"""

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from fastgen.checkpoint.model_families import from_hf_config
from fastgen.checkpoint.weights import EMBED_NAME, LM_HEAD_NAME, TensorMemory, quantize_params, requantize, weight_specs
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard
from fastgen.core.types import Params
from fastgen.kernels.select import select_quantize_into
from fastgen.training.weight_sync import checkpoint_name

VERSION_TRACKED = "fastgen_version_tracked"  # attribute of tensors whose version counters an engine reads


class AdoptedModel:
    """A model whose parameters an engine shares. `check` raises once one of the parameters was replaced or moved."""

    def __init__(self, model: torch.nn.Module, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Records the model's modules and the addresses of the adopted parameters, keyed by checkpoint name."""
        self._model, self._params = weakref.ref(model), dict(params)
        self._addresses = [p.data_ptr() for p in params.values()]
        self._record_modules(model)

    def _record_modules(self, model: torch.nn.Module) -> None:
        """Records the parameters and submodules of every module."""
        pairs = ((m._modules, m._parameters) for m in model.modules())
        self._module_dicts: list[dict[str, Any]] = [d for pair in pairs for d in pair if d]
        self._recorded_dicts = [dict(d) for d in self._module_dicts]

    def check(self) -> None:
        """Raises ValueError, with the parameter's name, if a parameter of the model was replaced or moved. Runs before
        every step, so it compares addresses, and the dictionaries of all modules in one comparison."""
        with torch._C.DisableTorchFunction():  # a default device intercepts each call: 20 times as long
            is_moved = list(map(Tensor.data_ptr, self._params.values())) != self._addresses
        try:  # == on identical objects returns at once; on two different tensors it compares elements, or raises
            is_same = self._module_dicts == self._recorded_dicts
        except Exception:
            is_same = False
        if not is_moved and is_same:
            return
        if problem := self._first_difference():
            raise ValueError(
                f"the adopted model and the engine no longer share their parameters: {problem} (load_state_dict with "
                "assign=True, `.data =`, `.to()`, resizing and PEFT do this); adopt the model again and make a new "
                "engine, or give an engine parameters of its own and call Engine.update_params after each step"
            )
        if (model := self._model()) is not None:
            self._record_modules(model)

    def _first_difference(self) -> str:
        """Returns what is wrong with the first parameter, in the model's order, that differs; "" if none does."""
        current, model = self._params, self._model()
        if model is not None:  # otherwise deleted; the engine keeps its parameters alive
            current = {checkpoint_name(name): p for name, p in model.named_parameters()}
        for (name, p), address in zip(self._params.items(), self._addresses, strict=True):
            if name not in current:
                return f"{name} no longer exists"
            if current[name] is not p:
                return f"{name} was replaced by another parameter"
            if p.data_ptr() != address:
                return f"{name} was moved to other memory"
        new = [n for n in current if n not in self._params and n.startswith(("model.", "lm_head."))]
        return f"it got the parameter {min(new)}, which the engine does not have" if new else ""


class _LeafOrigin(NamedTuple):
    """The model's parameters that a leaf of packed parameters was made of."""

    adopted_model: AdoptedModel
    sources: tuple[torch.nn.Parameter, ...]  # views of the leaf, consecutive along its first dimension


# A table beside the leaves, not attributes of them: a copy of a leaf must not keep the model alive.
_leaf_origins: MutableMapping[Tensor, _LeafOrigin] = WeakTensorKeyDictionary()


def adopt(model: torch.nn.Module) -> tuple[ModelConfig, Params]:
    """Returns the config and parameters of a transformers model, for an engine that shares the model's memory.

    The model keeps its `nn.Parameter` objects, with the optimizers and hooks that refer to them. They become views of
    packed leaves: q, k and v of one, gate and up of another. A leaf made of one parameter uses its memory as it is. So
    `optimizer.step()` is the weight update, captured CUDA graphs stay valid, and an engine detects the change by
    version counters. Gradients of `score` with the returned parameters reach the model's parameters that require them.
    Repacking needs free memory for one packed leaf. Adopting a model again returns the same parameters, if they exist.

    If a parameter of the model is later replaced or moved, the engine's next step raises ValueError.

    Raises ValueError, with the reason, where memory cannot be shared: parameters that are sharded (FSDP, tensor
    parallel), on `meta`, of several dtypes or devices, or not of a plain decoder of a supported family (wrapped by
    PEFT, quantized). Then give an engine parameters of its own and call `Engine.update_params` after each step.
    """
    hf_config = getattr(model, "config", None)
    if hf_config is None:
        raise ValueError(f"{type(model).__name__} has no config: adopt takes a transformers model")
    class_name = type(getattr(model, "_orig_mod", model)).__name__  # torch.compile wraps a model
    # The config of a model that was not loaded from a checkpoint names no architecture.
    config = from_hf_config(hf_config.to_dict() | ({} if hf_config.architectures else {"architectures": [class_name]}))
    named = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    if EMBED_NAME in named and LM_HEAD_NAME in named:
        # The config may be wrong: a loaded head that differs from the embedding is not tied.
        config = replace(config, tie_word_embeddings=named[LM_HEAD_NAME] is named[EMBED_NAME])
        if config.tie_word_embeddings:
            del named[LM_HEAD_NAME]
    tree = weight_specs(config)
    specs = [spec for spec in tree_leaves(tree) if spec is not None]
    tensors = [tensor for spec in specs for tensor in spec.checkpoint_tensors]
    _check_adoptable(named, {t.name: t.full_shape for t in tensors}, config)
    sources = [tuple(named[t.name] for t in spec.checkpoint_tensors) for spec in specs]
    existing = {tuple(map(id, origin.sources)): leaf for leaf, origin in _leaf_origins.items()}
    packed = [_pack_leaf(p, s.shape, existing.get(tuple(map(id, p)))) for p, s in zip(sources, specs, strict=True)]
    adopted = AdoptedModel(model, {t.name: named[t.name] for t in tensors})
    for leaf, params in zip(packed, sources, strict=True):
        _leaf_origins[leaf] = _LeafOrigin(adopted, params)
    leaves = iter(packed)
    return config, tree_map(lambda spec: None if spec is None else next(leaves), tree)


def _check_adoptable(named: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], model_config: ModelConfig) -> None:
    """Raises ValueError, with the reason, if an engine cannot use a model's parameters, of these shapes, in place."""
    advice = "; give the engine parameters of its own and call Engine.update_params after each step"
    if missing := [name for name in shapes if name not in named]:
        names = f"{missing[0]} (and {len(missing) - 1} more of {model_config.architecture})"
        others = f"is it wrapped, by PEFT, a compiler or a quantizer? It has {'; '.join(list(named)[:3])}, …"
        raise ValueError(f"the model has no parameter {names}: {others}{advice}")
    if unused := named.keys() - shapes.keys():
        raise ValueError(f"{model_config.architecture} does not use the parameter {min(unused)}{advice}")
    params = [named[name] for name in shapes]
    for name, p in zip(shapes, params, strict=True):
        if hasattr(p, "full_tensor"):
            raise ValueError(f"{name} is a DTensor, sharded over {p.device_mesh}: a shard cannot be adopted{advice}")
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model first")
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {p.stride()}){advice}")
        if tuple(p.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, the config says {shapes[name]}")
    if len(dtypes := {p.dtype for p in params}) > 1:
        raise ValueError(f"the parameters have several dtypes, {sorted(map(str, dtypes))}: an engine has one{advice}")
    if len(devices := {p.device for p in params}) > 1:
        raise ValueError(f"the parameters are on several devices, {sorted(map(str, devices))}{advice}")


def _pack_leaf(sources: tuple[torch.nn.Parameter, ...], shape: tuple[int, ...], existing: Tensor | None) -> Tensor:
    """Returns the leaf that the parameters are views of: `existing` if they are still its views, else a new one."""
    if existing is not None:
        pairs = zip(sources, _split_like(existing, sources), strict=True)
        if all((p.data_ptr(), p.dtype, p.shape) == (v.data_ptr(), v.dtype, v.shape) for p, v in pairs):
            return existing
    if len(sources) == 1:
        return sources[0].detach()
    packed = torch.cat([p.detach() for p in sources]).view(shape)
    for p, view in zip(sources, _split_like(packed, sources), strict=True):
        p.data = view
    return packed


def _split_like(leaf: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the views of a leaf, or the parts of its gradient, that belong to the parameters it was packed from."""
    return leaf.split([len(p) for p in sources])


def _get_leaf_origins(params: Params) -> list[_LeafOrigin]:
    """Returns the origins of the adopted leaves of `params`."""
    origins = (_leaf_origins.get(leaf) for leaf in tree_leaves(params) if leaf is not None)
    return [origin for origin in origins if origin is not None]


def adopted_models(params: Params) -> tuple[AdoptedModel, ...]:
    """Returns the distinct models that leaves of `params` were adopted from."""
    return tuple(dict.fromkeys(origin.adopted_model for origin in _get_leaf_origins(params)))


class _SplitPackedGrad(torch.autograd.Function):
    """Returns a packed leaf without a copy; backward, splits its gradient over the parameters that are its views."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sources = ctx.saved_tensors  # raises if an optimizer has overwritten the values that forward used
        leaf_needs_grad, *needs_grad = ctx.needs_input_grad
        pairs = zip(_split_like(grads[0], sources), needs_grad, strict=True)
        return grads[0] if leaf_needs_grad else None, *(grad if needed else None for grad, needed in pairs)


def attach_gradients(params: Params) -> Params:
    """Returns `params` as differentiable functions of the model's parameters that they were adopted from.

    The result shares the leaves' memory; only parameters that require gradients get them. Raises ValueError if the
    model has other parameters now.
    """
    for adopted in adopted_models(params):
        adopted.check()

    def attach(leaf: Tensor) -> Tensor:
        origin = _leaf_origins.get(leaf)
        if origin is None or not any(p.requires_grad for p in origin.sources):
            return leaf
        return _SplitPackedGrad.apply(leaf, *origin.sources)  # type: ignore[return-value]

    return tree_map_only(Tensor, attach, params) if torch.is_grad_enabled() else params


def version_counters(params: Params) -> tuple[Tensor, ...]:
    """Returns the tensors whose version counters change when the parameters are written in place."""
    leaves = [leaf for leaf in tree_leaves(params) if leaf is not None]
    sources = [origin.sources for origin in _get_leaf_origins(params)]
    for t in (*leaves, *chain(*sources)):
        if not t.is_inference():
            setattr(t, VERSION_TRACKED, True)
    _register_optimizer_hook()
    views = chain(*(params for params in sources if len(params) > 1))  # a single source shares the leaf's counter
    return tuple(t for t in (*leaves, *views) if not t.is_inference())


@cache
def _register_optimizer_hook() -> None:
    """Makes optimizer steps increment version counters: fused optimizers, transformers' default, do not."""

    def increment_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = (p for group in optimizer.param_groups for p in group["params"])
        increment_version([p for p in params if getattr(p, VERSION_TRACKED, False)])

    register_optimizer_step_post_hook(increment_versions)


class QuantizedShadow:
    """fp8 copies of full-precision parameters, made anew, at their addresses, after the parameters were written.

    `params` are what an engine reads: the copies, and the weights of `source` that are not quantized.
    """

    def __init__(
        self, source: Params, model_config: ModelConfig, tp_shard: TPShard = UNSHARDED, *,
        allocate: Callable[[int], TensorMemory] | None = None,
    ) -> None:  # fmt: skip
        """Quantizes `source`, a model's parameters or a rank's shards; `allocate` returns memory for the copies."""
        self.source = source
        self.params = quantize_params(source, model_config, tp_shard=tp_shard, allocate=allocate)
        self._quantize_into = select_quantize_into(source.embed.device)
        self._version_tensors = version_counters(source)
        self._last_version_sum: int | None = self._version_sum()

    def mark_stale(self) -> None:
        """Makes the next `refresh` quantize the parameters, which were written in a way that torch does not see."""
        self._last_version_sum = None

    def refresh(self) -> None:
        """Quantizes the parameters again if they were written in place since the last time."""
        if (version_sum := self._version_sum()) != self._last_version_sum:
            requantize(self.params, self.source, self._quantize_into)
            self._last_version_sum = version_sum

    def _version_sum(self) -> int:
        with torch._C.DisableTorchFunction():  # a default device intercepts every access
            return sum(map(attrgetter("_version"), self._version_tensors))
