"""Each weight is declared once, in `declare`; init, load, update and save are walks over that tree."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub  # what it has is imported where it is used
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from tqdm.auto import tqdm

from fastgen.checkpoint.files import Checkpoint, open_checkpoint, read_json
from fastgen.core.model_config import UNSHARDED, ModelConfig, TPShard, shard_config, vocab_shard
from fastgen.core.model_families import from_hf_config, parse_eos_token_ids, to_hf_config
from fastgen.core.types import Layer, Params
from fastgen.training.sleep import ReleasableMemory

IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry
EMBED_NAME, LM_HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"  # one tensor where the head is tied
FINAL_NORM_NAME = "model.norm.weight"
FINITE_HINT = "check_finite=False takes them as they are"
COMPARE_CHUNK_ROWS = 8192  # of two tensors that are compared at a time


class DimShard(NamedTuple):
    """What a rank has of a dimension: [first, first + count) of `whole`."""

    full_size: int
    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


class CheckpointTensor(NamedTuple):
    """Rows of a leaf that come from one tensor of the checkpoint: a cut of each of its dimensions."""

    name: str
    dim_shards: tuple[DimShard, ...]

    @property
    def full_shape(self) -> tuple[int, ...]:
        """In the checkpoint."""
        return tuple(cut.full_size for cut in self.dim_shards)

    def extract_shard(self, tensor: Any) -> Tensor:
        """The cut of a tensor, or of a file's slice, of which no more is read."""
        return tensor[tuple(cut.slice for cut in self.dim_shards)]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight: `parts` are packed along the first dimension, in order; rows beyond them are padding."""

    checkpoint_tensors: tuple[CheckpointTensor, ...]
    shape: tuple[int, ...]
    fill_value: float | None = None  # constant initial value; None draws from a normal


def weight_specs(model_config: ModelConfig, tp_shard: TPShard = UNSHARDED) -> Params:
    """The tree of all weights of a model, or of a rank's, with a Leaf in the place of every tensor."""
    rank, size = tp_shard
    shard_config(model_config, size)  # a size that does not divide the model is a ValueError

    def all_of(n: int) -> DimShard:
        return DimShard(n, 0, n)

    def heads(n: int) -> DimShard:
        """A rank's share, or, where there are fewer heads than ranks, the one that its queries belong to."""
        return DimShard(
            n * model_config.head_dim,
            rank * n // size * model_config.head_dim,
            max(1, n // size) * model_config.head_dim,
        )

    q, kv, dim = heads(model_config.num_q_heads), heads(model_config.num_kv_heads), all_of(model_config.hidden_size)
    ffn = DimShard(
        model_config.intermediate_size,
        rank * (model_config.intermediate_size // size),
        model_config.intermediate_size // size,
    )
    vocab = DimShard(model_config.vocab_size, *vocab_shard(model_config.vocab_size, tp_shard))
    padded = vocab_shard(model_config.vocab_size, TPShard(0, size))[1]

    def leaf(
        rows: dict[str, DimShard],
        columns: DimShard | None = None,
        *,
        padded: int | None = None,
        fill: float | None = None,
    ) -> Any:
        rest = () if columns is None else (columns,)
        count = padded or sum(cut.size for cut in rows.values())
        parts = tuple(CheckpointTensor(name, (cut, *rest)) for name, cut in rows.items())
        return WeightSpec(parts, (count, *(cut.size for cut in rest)), fill)

    def layer(i: int) -> Layer:
        def at(name: str) -> str:
            return f"model.layers.{i}.{name}"

        heads = {"q": q, "k": kv, "v": kv}
        weight = {at(f"self_attn.{n}_proj.weight"): rows for n, rows in heads.items()}
        bias = {at(f"self_attn.{n}_proj.bias"): rows for n, rows in heads.items()}
        gate_up = {at(f"mlp.{n}_proj.weight"): ffn for n in ("gate", "up")}
        norm = all_of(model_config.head_dim)
        return Layer(
            attn_norm=leaf({at("input_layernorm.weight"): dim}, fill=1.0),
            qkv=leaf(weight, dim),
            qkv_bias=leaf(bias, fill=0.0) if model_config.qkv_bias else None,
            q_norm=leaf({at("self_attn.q_norm.weight"): norm}, fill=1.0) if model_config.qk_norm else None,
            k_norm=leaf({at("self_attn.k_norm.weight"): norm}, fill=1.0) if model_config.qk_norm else None,
            out=leaf({at("self_attn.o_proj.weight"): dim}, q),
            out_bias=leaf({at("self_attn.o_proj.bias"): dim}, fill=0.0) if model_config.out_bias else None,
            ffn_norm=leaf({at("post_attention_layernorm.weight"): dim}, fill=1.0),
            gate_up=leaf(gate_up, dim),
            down=leaf({at("mlp.down_proj.weight"): dim}, ffn),
        )

    return Params(
        embed=leaf({EMBED_NAME: vocab}, dim, padded=padded),
        layers=tuple(layer(i) for i in range(model_config.num_layers)),
        final_norm=leaf({"model.norm.weight": dim}, fill=1.0),
        lm_head=None if model_config.tie_word_embeddings else leaf({LM_HEAD_NAME: vocab}, dim, padded=padded),
    )


def init(
    model_config: ModelConfig,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tp_shard: TPShard = UNSHARDED,
    memory: ReleasableMemory | None = None,
) -> Params:
    """Random parameters, normal with deviation 0.02, made on `device` directly (None: torch's default device).

    The same for the same seed and kind of device; a rank's at `place` are its share of them. With a `region`, of
    `size` bytes at least, they lie in its memory.
    """
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    kind = dtype or getattr(torch, model_config.dtype)

    def make(leaf: WeightSpec) -> Tensor:
        room = memory if tp_shard == UNSHARDED else None
        weight = torch.empty(leaf.shape, device=device, dtype=kind) if room is None else room.allocate(leaf.shape, kind)
        return (
            weight.normal_(0, 0.02, generator=generator) if leaf.fill_value is None else weight.fill_(leaf.fill_value)
        )

    whole, tree = tree_flatten(weight_specs(model_config))
    made = []
    for leaf, mine in zip(whole, tree_leaves(weight_specs(model_config, tp_shard)), strict=True):
        if leaf is None:
            made.append(None)
            continue
        weight = make(leaf)  # all of it is drawn, so that it is the same numbers
        made.append(weight if tp_shard == UNSHARDED else _copy_shard(leaf, mine, weight, memory))
    return tree_unflatten(made, tree)


def param_bytes(model_config: ModelConfig, dtype: torch.dtype, tp_shard: TPShard = UNSHARDED) -> int:
    """Bytes of a region that holds a model's parameters, or a rank's."""
    return ReleasableMemory.bytes_needed(
        [leaf.shape for leaf in tree_leaves(weight_specs(model_config, tp_shard)) if leaf is not None], dtype
    )


@torch.no_grad()
def shard_params(params: Params, model_config: ModelConfig, tp_shard: TPShard) -> Params:
    """A rank's copy of its share of parameters."""
    leaves = zip(
        tree_leaves(weight_specs(model_config)),
        tree_leaves(weight_specs(model_config, tp_shard)),
        tree_leaves(params),
        strict=True,
    )
    made = [None if leaf is None else _copy_shard(leaf, mine, weight) for leaf, mine, weight in leaves]
    return tree_unflatten(made, tree_flatten(params)[1])


def _copy_shard(
    full_spec: WeightSpec, shard_spec: WeightSpec, weight: Tensor, memory: ReleasableMemory | None = None
) -> Tensor:
    cut = weight.new_zeros(shard_spec.shape) if memory is None else memory.allocate(shard_spec.shape, weight.dtype)
    for (_, source), (part, target) in zip(
        _weight_views(full_spec, weight), _weight_views(shard_spec, cut), strict=True
    ):
        target.copy_(part.extract_shard(source))
    return cut


def _weight_views(weight_spec: WeightSpec, tensor: Tensor) -> Iterator[tuple[CheckpointTensor, Tensor]]:
    """The parts of a leaf, as views of its tensor."""
    if tuple(tensor.shape) != weight_spec.shape:
        problem = f"a parameter of shape {tuple(tensor.shape)} where {weight_spec.shape} is declared, for {weight_spec.checkpoint_tensors[0].name}"
        raise ValueError(f"{problem}: are these another model's, or one rank's?")
    start = 0
    for part in weight_spec.checkpoint_tensors:
        yield part, tensor[start : start + part.dim_shards[0].size]
        start += part.dim_shards[0].size


def _param_views(
    params: Params, model_config: ModelConfig, tp_shard: TPShard
) -> Iterator[tuple[CheckpointTensor, Tensor]]:
    declared, tensors = tree_leaves(weight_specs(model_config, tp_shard)), tree_leaves(params)
    if len(declared) != len(tensors) or any(a and b is None for a, b in zip(declared, tensors, strict=True)):
        raise ValueError(
            f"parameters are missing or too many of {model_config.architecture}: are these another model's?"
        )
    for leaf, tensor in zip(declared, tensors, strict=True):
        if leaf is not None and not isinstance(tensor, Tensor):
            raise ValueError(
                f"a parameter is {type(tensor).__name__} instead of a tensor, for {leaf.checkpoint_tensors[0].name}"
            )
        if leaf is not None:
            yield from _weight_views(leaf, tensor)


def named_weights(params: Params, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every weight; packed leaves are given as views of their parts."""
    for part, tensor in _param_views(params, model_config, UNSHARDED):
        yield part.name, tensor


@torch.no_grad()
def update(
    params: Params,
    model_config: ModelConfig,
    tensors: Iterable[tuple[str, Any]],
    *,
    source: str = "update",
    tp_shard: TPShard = UNSHARDED,
    partial: bool = False,
    check_finite: bool = True,
) -> None:
    """Writes `params` in place from (checkpoint name, tensor) pairs, casting to each leaf's dtype; every weight once.

    `partial`: those that are not given stay as they are. `check_finite`: a tensor that `raise_if_not_finite` refuses is not written,
    nor are those after it.

    The tensors are whole ones, or slices of a safetensors file; a rank's parameters at `place` take their cuts. Where
    the head is tied, either of its two names will do, and if both are given they must be equal.
    Raises ValueError naming the tensors that are mis-shaped, unexpected or missing, and a head that is another.
    """
    targets = {part.name: (part, view) for part, view in _param_views(params, model_config, tp_shard)}
    left, total, unexpected, given = set(targets), len(targets), [], set[str]()
    if model_config.tie_word_embeddings:
        targets[LM_HEAD_NAME] = targets[EMBED_NAME]
    tied = ""  # the one of the two names that came first
    for name, tensor in tensors:
        if name not in targets:
            if not IGNORED_TENSORS.search(name):
                unexpected.append(name)
            continue
        if name in given:
            raise ValueError(f"{source}: {name} is given twice")
        given.add(name)
        part, view = targets[name]
        if (shape := _checked_shape(source, name, tensor)) != part.full_shape:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {part.full_shape}")
        if model_config.tie_word_embeddings and part.name == EMBED_NAME and tied not in ("", name):
            if not _equal(view, part.extract_shard(tensor), view.dtype):
                raise ValueError(_untied_message(source))
            continue
        if check_finite:
            whole = tensor if isinstance(tensor, Tensor) else part.extract_shard(tensor)
            count = total - len(left)
            done = f"the {count} tensors before it are written" if count else "nothing is written"
            raise_if_not_finite([(name, whole, view.dtype)], source, f"{done}. {FINITE_HINT}")
        view.copy_(part.extract_shard(tensor))
        left.discard(part.name)
        tied = name if part.name == EMBED_NAME else tied
    _raise_on_mismatch(source, model_config, set() if partial else left, unexpected)


def _raise_on_mismatch(
    source: str, model_config: ModelConfig, missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Raises ValueError if there are any names, with the first eight of each kind."""
    names, unexpected = [*missing], [*unexpected]
    found = [f"{what}: {', '.join(sorted(some)[:8])}" + (f" and {len(some) - 8} more" if len(some) > 8 else "")
             for what, some in (("missing", names), ("unexpected", unexpected)) if some]  # fmt: skip
    prefix = (
        next((n.removesuffix(FINAL_NORM_NAME) for n in unexpected if n.endswith("." + FINAL_NORM_NAME)), None)
        if FINAL_NORM_NAME in names
        else None
    )
    if prefix:
        found.append(f"leave {prefix!r} out of the names")
    elif any(".lora_" in n for n in unexpected):
        found.append("merge the adapter into the matrices, or give it to Engine.add_adapter")
    if found:
        raise ValueError(f"{source}: tensors do not match {model_config.architecture}; {'; '.join(found)}")


def check_tensors(
    named_tensors: Sequence[tuple[str, Any]],
    model_config: ModelConfig,
    dtype: torch.dtype,
    *,
    source: str = "update",
    partial: bool = False,
) -> None:
    """Raises the ValueError that `update` would raise with parameters of `dtype`, before anything is written."""
    tensors = dict(named_tensors)
    if len(tensors) < len(named_tensors):
        raise ValueError(f"{source}: {Counter(name for name, _ in named_tensors).most_common(1)[0][0]} is given twice")
    shapes = {name: _checked_shape(source, name, tensor) for name, tensor in named_tensors}
    _check_shapes(shapes, model_config, source, partial=partial)
    if (
        model_config.tie_word_embeddings
        and {EMBED_NAME, LM_HEAD_NAME} <= shapes.keys()
        and not _equal(tensors[EMBED_NAME], tensors[LM_HEAD_NAME], dtype)
    ):
        raise ValueError(_untied_message(source))


def _checked_shape(source: str, name: str, tensor: Any) -> tuple[int, ...]:
    """Returns a tensor's shape. ValueError for what holds no weights: whole numbers would lack their scales."""
    if hasattr(tensor, "get_shape"):  # a slice of a file
        return tuple(tensor.get_shape())
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{source}: {name} is a {type(tensor).__name__}, not a tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: {name} has dtype {tensor.dtype}: weights are of floating point, not quantized")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{source}: {name} is {'on the meta device' if tensor.is_meta else tensor.layout}: no values")
    return tuple(tensor.shape)


def _untied_message(source: str) -> str:
    return (
        f"{source}: {EMBED_NAME} and {LM_HEAD_NAME} differ, but this model's head is tied to its embedding: load the model with "
        "tie_word_embeddings false, or from a checkpoint in which they differ"
    )


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], model_config: ModelConfig, source: str, *, partial: bool = False
) -> None:
    """Raises ValueError, as `update` would, where a checkpoint's tensors are not those of `spec`."""
    wanted = {
        part.name: part.full_shape
        for leaf in tree_leaves(weight_specs(model_config))
        if leaf is not None
        for part in leaf.checkpoint_tensors
    }
    missing = set() if partial else wanted.keys() - shapes.keys()
    if model_config.tie_word_embeddings:
        wanted[LM_HEAD_NAME] = wanted[EMBED_NAME]
        missing -= {EMBED_NAME} if LM_HEAD_NAME in shapes else set()
    for name, shape in shapes.items():
        if name in wanted and shape != wanted[name]:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {wanted[name]}")
    _raise_on_mismatch(
        source,
        model_config,
        missing,
        [name for name in shapes if name not in wanted and not IGNORED_TENSORS.search(name)],
    )


def _equal(a: Any, b: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether two matrices, or slices of files, are equal in a dtype, by default the wider one of both."""
    rows, count = (x.shape[0] if isinstance(x, Tensor) else x.get_shape()[0] for x in (a, b))
    for i in range(0, rows, COMPARE_CHUNK_ROWS):
        x, y = a[i : i + COMPARE_CHUNK_ROWS], b[i : i + COMPARE_CHUNK_ROWS]
        kind = dtype or torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(kind), y.to(x.device, kind)
        if not torch.equal(x, y) and not (x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True)):
            return False
    return rows == count


@torch.no_grad()
def raise_if_not_finite(tensors: Iterable[tuple[str, Tensor, torch.dtype]], source: str, advice: str) -> None:
    """Raises ValueError, naming the first eight of the (name, tensor, dtype), where values are NaN or infinite, or
    would be in that dtype.

    One reduction a tensor, and one wait for each kind of them. `advice` ends the message.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.dtype, Tensor]]] = defaultdict(list)
    for name, x, dtype in tensors:
        if x.is_floating_point() and x.numel():
            x = x.float() if x.itemsize == 1 else x  # float8 has no minimum
            kinds[x.device, x.dtype].append((name, dtype, torch.stack(torch.aminmax(x))))
    wrong = list[str]()
    for some in kinds.values():
        ends = torch.stack([both for _, _, both in some]).tolist()
        for (name, dtype, _), (low, high) in zip(some, ends, strict=True):
            if not (-torch.finfo(dtype).max <= low and high <= torch.finfo(dtype).max):
                wrong.append(f"{name} ({dtype})".replace("torch.", ""))
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        problem = f"{source}: NaN or infinite values, or ones beyond the dtype, in {', '.join(wrong[:8])}{more}"
        raise ValueError(f"{problem}; {advice}")


def check_finite_update(
    params: Params, model_config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], tp_shard: TPShard, source: str
) -> None:
    """Raises ValueError as `raise_if_not_finite`, of those of (checkpoint name, tensor) that `update` would write."""
    dtypes = {part.name: view.dtype for part, view in _param_views(params, model_config, tp_shard)}
    if model_config.tie_word_embeddings:
        dtypes[LM_HEAD_NAME] = dtypes[EMBED_NAME]
    for name, tensor in tensors:
        _checked_shape(source, name, tensor)
    raise_if_not_finite(
        [(n, t, dtypes[n]) for n, t in tensors if n in dtypes], source, f"nothing is written. {FINITE_HINT}"
    )


@torch.no_grad()
def copy_params(params: Params, source: Params) -> None:
    """Writes `params` in place from a tree of the same shapes, of any dtype and device. ValueError if it is another."""
    pairs = list(zip(tree_leaves(params), tree_leaves(source), strict=False))
    if tree_flatten(params)[1] != tree_flatten(source)[1] or any(
        (a is None) != (b is None) or (a is not None and a.shape != b.shape) for a, b in pairs
    ):
        raise ValueError("the parameters to copy are another model's: their tree or their shapes are not the same")
    for a, b in pairs:
        if a is not None:
            a.copy_(b, non_blocking=True)


def resolve(model: str | Path) -> Path:
    """The local directory or file of a model given by path or by hub id.

    A hub id is taken from the hub cache where it is complete, else downloaded. ValueError if there is no such model.
    """
    if not isinstance(model, str | Path):
        raise ValueError(f"a model is a path or a hub id, got {model!r:.100}")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        raise ValueError(f"model {str(model)!r} is neither a local directory or file nor a hub id (owner/name)")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    others = ["consolidated*", "*/*"]  # the same weights again, in the publisher's own format
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=others))
    except OSError as e:  # those of the hub are, too
        raise ValueError(f"model {str(model)!r}: not a local path, not in the hub cache, and the hub said: {e}") from e


def _is_config_file(path: Path) -> bool:
    return path.suffix == ".json" and not path.name.endswith(".index.json")


def read_hf_config(path: Path) -> dict:
    """The Hugging Face config of a resolved model; generation_config.json's end tokens are joined in.

    ValueError, with the file, for one that is missing or damaged.
    """
    if path.suffix == ".gguf":
        from fastgen.checkpoint import gguf  # whose reader takes a while to import

        return gguf.read(path)[0]
    folder = path if path.is_dir() else path.parent
    file = path if _is_config_file(path) else folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        advice = "; this is an adapter: name its base model, and the adapter in `adapters`" if adapter else ""
        raise ValueError(f"{folder}: no config.json{advice}")
    config = read_json(file)
    generation = folder / "generation_config.json"
    if generation.is_file():
        both = [
            parse_eos_token_ids(x.get("eos_token_id"), str(f))
            for x, f in ((config, file), (read_json(generation), generation))
        ]
        config["eos_token_id"] = list(dict.fromkeys(both[0] + both[1]))
    return config


def read_model_config(path: Path) -> ModelConfig:
    """The spec of a resolved model, as its config has it. ValueError, with the file, for what is not supported."""
    return _parse_hf_config(path, read_hf_config(path))


def _parse_hf_config(path: Path, config: dict) -> ModelConfig:
    try:
        return from_hf_config(config)
    except ValueError as e:
        folder = path if path.is_dir() else path.parent
        file = path if path.suffix == ".gguf" or _is_config_file(path) else folder / "config.json"
        raise ValueError(str(e).replace("config.json", str(file), 1)) from e


def _untie_if_heads_differ(model_config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """`spec` with a head of its own where the config says tied and the file has another, as transformers reads it."""
    if model_config.tie_word_embeddings and {EMBED_NAME, LM_HEAD_NAME} <= checkpoint.shapes.keys():
        with checkpoint.open_slice(EMBED_NAME) as embed, checkpoint.open_slice(LM_HEAD_NAME) as head:
            return (
                model_config
                if checkpoint.shapes[EMBED_NAME] == checkpoint.shapes[LM_HEAD_NAME] and _equal(embed, head)
                else replace(model_config, tie_word_embeddings=False)
            )
    return model_config


def _with_progress(
    pairs: Iterable[tuple[str, Any]], shapes: Mapping[str, tuple[int, ...]], num_bytes: int, bar: tqdm
) -> Iterator[tuple[str, Any]]:
    """The pairs, while a bar shows how many of `size` bytes have been taken."""
    total, done = sum(map(prod, shapes.values())) or 1, 0
    bar.reset(total=num_bytes)
    for name, tensor in pairs:
        yield name, tensor
        done += prod(shapes[name])
        bar.update(num_bytes * done // total - bar.n)


def load(
    model: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    tp_shard: TPShard = UNSHARDED,
    allocate: Callable[[int], ReleasableMemory] | None = None,
    check_finite: bool = True,
) -> tuple[ModelConfig, Params]:
    """Spec and parameters of a checkpoint: a Hugging Face directory, hub id, `.safetensors` or `.gguf` file.

    `device` None is torch's default device, `dtype` None the checkpoint's own. Host memory beyond the parameters
    stays about one tensor plus the mapped file. ValueError names what is damaged, missing, unexpected or mis-shaped,
    before memory is taken. Of several candidates in a folder the files are those that transformers takes; and where the
    config ties the head to the embedding, but the file has another head, the spec is not tied. The spec
    is the whole model's; parameters are a rank's at `place`, of which alone the files are read. `region` makes the
    memory that they lie in, of so many bytes. `check_finite`: ValueError for values that are NaN or infinite, or too large
    for the dtype.
    """
    path = resolve(model)
    with tqdm(
        desc=f"loading {path.stem}", unit="B", unit_scale=True, disable=None if progress else True, leave=False
    ) as bar:
        tensors: Iterable[tuple[str, Any]]
        if path.suffix == ".gguf":
            from fastgen.checkpoint import gguf  # whose reader takes a while to import

            config, tensors = gguf.read(path)
            spec, shapes, bytes = _parse_hf_config(path, config), tensors.shapes, path.stat().st_size
        else:
            config = read_hf_config(path)
            checkpoint = open_checkpoint(path, config)
            spec = _untie_if_heads_differ(_parse_hf_config(path, config), checkpoint)
            tensors, shapes, bytes = (
                checkpoint.iter_tensors(as_slices=tp_shard != UNSHARDED),
                checkpoint.shapes,
                checkpoint.num_bytes,
            )
        _check_shapes(shapes, spec, str(path))
        kind = dtype or getattr(torch, spec.dtype)
        room = None if allocate is None else allocate(param_bytes(spec, kind, tp_shard))

        def make(leaf: WeightSpec) -> Tensor:
            return (
                torch.zeros(leaf.shape, device=device, dtype=kind) if room is None else room.allocate(leaf.shape, kind)
            )

        params = tree_map_only(WeightSpec, make, weight_specs(spec, tp_shard))
        shown = _with_progress(tensors, shapes, bytes // tp_shard.size, bar)
        update(params, spec, shown, source=str(path), tp_shard=tp_shard, check_finite=False)
        if check_finite:  # where they are now: a reduction is fastest there
            found = ((part.name, view, view.dtype) for part, view in _param_views(params, spec, tp_shard))
            raise_if_not_finite(found, str(path), f"is the file damaged, or the dtype too narrow? {FINITE_HINT}")
    return spec, params


def save(folder: str | Path, model_config: ModelConfig, params: Params, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and sharded safetensors in the Hugging Face layout; the tokenizer is the caller's to save.

    An older checkpoint in `folder` is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(params.embed.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(to_hf_config(model_config) | {"torch_dtype": dtype}, indent=2))
    index_file = folder / "model.safetensors.index.json"
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", index_file):
        old.unlink(missing_ok=True)
    shards: list[list[tuple[str, Tensor]]] = [[]]
    for name, tensor in named_weights(params, model_config):
        if shards[-1] and sum(t.nbytes for _, t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append((name, tensor))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in shard}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys((n for n, _ in shard), file)
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for _, t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file.write_text(json.dumps(index, indent=2))
