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

from fastgen.memory import Region
from fastgen.models.files import Checkpoint, open_checkpoint, read_json
from fastgen.models.spec import WHOLE, Place, Spec, end_tokens, from_hf, share_of, split, to_hf
from fastgen.types import Layer, Params

IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor where the head is tied
NORM = "model.norm.weight"
ANYHOW = "finite=False takes them as they are"
ROWS = 8192  # of two tensors that are compared at a time


class Cut(NamedTuple):
    """What a rank has of a dimension: [first, first + count) of `whole`."""

    whole: int
    first: int
    count: int

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.count)


class Part(NamedTuple):
    """Rows of a leaf that come from one tensor of the checkpoint: a cut of each of its dimensions."""

    name: str
    cuts: tuple[Cut, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """In the checkpoint."""
        return tuple(cut.whole for cut in self.cuts)

    def of(self, tensor: Any) -> Tensor:
        """The cut of a tensor, or of a file's slice, of which no more is read."""
        return tensor[tuple(cut.slice for cut in self.cuts)]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A weight: `parts` are packed along the first dimension, in order; rows beyond them are padding."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    fill: float | None = None  # constant initial value; None draws from a normal


def declare(spec: Spec, place: Place = WHOLE) -> Params:
    """The tree of all weights of a model, or of a rank's, with a Leaf in the place of every tensor."""
    rank, size = place
    split(spec, size)  # a size that does not divide the model is a ValueError

    def all_of(n: int) -> Cut:
        return Cut(n, 0, n)

    def heads(n: int) -> Cut:
        """A rank's share, or, where there are fewer heads than ranks, the one that its queries belong to."""
        return Cut(n * spec.head, rank * n // size * spec.head, max(1, n // size) * spec.head)

    q, kv, dim = heads(spec.q_heads), heads(spec.kv_heads), all_of(spec.dim)
    ffn = Cut(spec.ffn, rank * (spec.ffn // size), spec.ffn // size)
    vocab = Cut(spec.vocab, *share_of(spec.vocab, place))
    padded = share_of(spec.vocab, Place(0, size))[1]

    def leaf(
        rows: dict[str, Cut], columns: Cut | None = None, *, padded: int | None = None, fill: float | None = None
    ) -> Any:
        rest = () if columns is None else (columns,)
        count = padded or sum(cut.count for cut in rows.values())
        parts = tuple(Part(name, (cut, *rest)) for name, cut in rows.items())
        return Leaf(parts, (count, *(cut.count for cut in rest)), fill)

    def layer(i: int) -> Layer:
        def at(name: str) -> str:
            return f"model.layers.{i}.{name}"

        heads = {"q": q, "k": kv, "v": kv}
        weight = {at(f"self_attn.{n}_proj.weight"): rows for n, rows in heads.items()}
        bias = {at(f"self_attn.{n}_proj.bias"): rows for n, rows in heads.items()}
        gate_up = {at(f"mlp.{n}_proj.weight"): ffn for n in ("gate", "up")}
        norm = all_of(spec.head)
        return Layer(
            attn_norm=leaf({at("input_layernorm.weight"): dim}, fill=1.0),
            qkv=leaf(weight, dim),
            qkv_bias=leaf(bias, fill=0.0) if spec.qkv_bias else None,
            q_norm=leaf({at("self_attn.q_norm.weight"): norm}, fill=1.0) if spec.qk_norm else None,
            k_norm=leaf({at("self_attn.k_norm.weight"): norm}, fill=1.0) if spec.qk_norm else None,
            out=leaf({at("self_attn.o_proj.weight"): dim}, q),
            out_bias=leaf({at("self_attn.o_proj.bias"): dim}, fill=0.0) if spec.out_bias else None,
            ffn_norm=leaf({at("post_attention_layernorm.weight"): dim}, fill=1.0),
            gate_up=leaf(gate_up, dim),
            down=leaf({at("mlp.down_proj.weight"): dim}, ffn),
        )

    return Params(
        embed=leaf({EMBED: vocab}, dim, padded=padded),
        layers=tuple(layer(i) for i in range(spec.layers)),
        norm=leaf({"model.norm.weight": dim}, fill=1.0),
        head=None if spec.tied else leaf({HEAD: vocab}, dim, padded=padded),
    )


def init(
    spec: Spec,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    place: Place = WHOLE,
    region: Region | None = None,
) -> Params:
    """Random parameters, normal with deviation 0.02, made on `device` directly (None: torch's default device).

    The same for the same seed and kind of device; a rank's at `place` are its share of them. With a `region`, of
    `size` bytes at least, they lie in its memory.
    """
    generator = torch.Generator(device or torch.get_default_device()).manual_seed(seed)
    kind = dtype or getattr(torch, spec.dtype)

    def make(leaf: Leaf) -> Tensor:
        room = region if place == WHOLE else None
        weight = torch.empty(leaf.shape, device=device, dtype=kind) if room is None else room.take(leaf.shape, kind)
        return weight.normal_(0, 0.02, generator=generator) if leaf.fill is None else weight.fill_(leaf.fill)

    whole, tree = tree_flatten(declare(spec))
    made = []
    for leaf, mine in zip(whole, tree_leaves(declare(spec, place)), strict=True):
        if leaf is None:
            made.append(None)
            continue
        weight = make(leaf)  # all of it is drawn, so that it is the same numbers
        made.append(weight if place == WHOLE else _cut(leaf, mine, weight, region))
    return tree_unflatten(made, tree)


def size(spec: Spec, dtype: torch.dtype, place: Place = WHOLE) -> int:
    """Bytes of a region that holds a model's parameters, or a rank's."""
    return Region.bytes([leaf.shape for leaf in tree_leaves(declare(spec, place)) if leaf is not None], dtype)


@torch.no_grad()
def share(params: Params, spec: Spec, place: Place) -> Params:
    """A rank's copy of its share of parameters."""
    leaves = zip(tree_leaves(declare(spec)), tree_leaves(declare(spec, place)), tree_leaves(params), strict=True)
    made = [None if leaf is None else _cut(leaf, mine, weight) for leaf, mine, weight in leaves]
    return tree_unflatten(made, tree_flatten(params)[1])


def _cut(leaf: Leaf, mine: Leaf, weight: Tensor, region: Region | None = None) -> Tensor:
    cut = weight.new_zeros(mine.shape) if region is None else region.take(mine.shape, weight.dtype)
    for (_, source), (part, target) in zip(_views(leaf, weight), _views(mine, cut), strict=True):
        target.copy_(part.of(source))
    return cut


def _views(leaf: Leaf, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """The parts of a leaf, as views of its tensor."""
    if tuple(tensor.shape) != leaf.shape:
        problem = f"a parameter of shape {tuple(tensor.shape)} where {leaf.shape} is declared, for {leaf.parts[0].name}"
        raise ValueError(f"{problem}: are these another model's, or one rank's?")
    start = 0
    for part in leaf.parts:
        yield part, tensor[start : start + part.cuts[0].count]
        start += part.cuts[0].count


def _parts(params: Params, spec: Spec, place: Place) -> Iterator[tuple[Part, Tensor]]:
    declared, tensors = tree_leaves(declare(spec, place)), tree_leaves(params)
    if len(declared) != len(tensors) or any(a and b is None for a, b in zip(declared, tensors, strict=True)):
        raise ValueError(f"parameters are missing or too many of {spec.architecture}: are these another model's?")
    for leaf, tensor in zip(declared, tensors, strict=True):
        if leaf is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"a parameter is {type(tensor).__name__} instead of a tensor, for {leaf.parts[0].name}")
        if leaf is not None:
            yield from _views(leaf, tensor)


def named(params: Params, spec: Spec) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every weight; packed leaves are given as views of their parts."""
    for part, tensor in _parts(params, spec, WHOLE):
        yield part.name, tensor


@torch.no_grad()
def update(
    params: Params,
    spec: Spec,
    tensors: Iterable[tuple[str, Any]],
    *,
    source: str = "update",
    place: Place = WHOLE,
    partial: bool = False,
    finite: bool = True,
) -> None:
    """Writes `params` in place from (checkpoint name, tensor) pairs, casting to each leaf's dtype; every weight once.

    `partial`: those that are not given stay as they are. `finite`: a tensor that `check_finite` refuses is not written,
    nor are those after it.

    The tensors are whole ones, or slices of a safetensors file; a rank's parameters at `place` take their cuts. Where
    the head is tied, either of its two names will do, and if both are given they must be equal.
    Raises ValueError naming the tensors that are mis-shaped, unexpected or missing, and a head that is another.
    """
    targets = {part.name: (part, view) for part, view in _parts(params, spec, place)}
    left, total, unexpected, given = set(targets), len(targets), [], set[str]()
    if spec.tied:
        targets[HEAD] = targets[EMBED]
    tied = ""  # the one of the two names that came first
    for name, tensor in tensors:
        if name not in targets:
            if not IGNORED.search(name):
                unexpected.append(name)
            continue
        if name in given:
            raise ValueError(f"{source}: {name} is given twice")
        given.add(name)
        part, view = targets[name]
        if (shape := _shape(source, name, tensor)) != part.shape:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {part.shape}")
        if spec.tied and part.name == EMBED and tied not in ("", name):
            if not _equal(view, part.of(tensor), view.dtype):
                raise ValueError(_untied(source))
            continue
        if finite:
            whole = tensor if isinstance(tensor, Tensor) else part.of(tensor)
            count = total - len(left)
            done = f"the {count} tensors before it are written" if count else "nothing is written"
            check_finite([(name, whole, view.dtype)], source, f"{done}. {ANYHOW}")
        view.copy_(part.of(tensor))
        left.discard(part.name)
        tied = name if part.name == EMBED else tied
    _refuse(source, spec, set() if partial else left, unexpected)


def _refuse(source: str, spec: Spec, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ValueError if there are any names, with the first eight of each kind."""
    names, unexpected = [*missing], [*unexpected]
    found = [f"{what}: {', '.join(sorted(some)[:8])}" + (f" and {len(some) - 8} more" if len(some) > 8 else "")
             for what, some in (("missing", names), ("unexpected", unexpected)) if some]  # fmt: skip
    prefix = next((n.removesuffix(NORM) for n in unexpected if n.endswith("." + NORM)), None) if NORM in names else None
    if prefix:
        found.append(f"leave {prefix!r} out of the names")
    elif any(".lora_" in n for n in unexpected):
        found.append("merge the adapter into the matrices, or give it to Engine.add_adapter")
    if found:
        raise ValueError(f"{source}: tensors do not match {spec.architecture}; {'; '.join(found)}")


def check(
    pairs: Sequence[tuple[str, Any]], spec: Spec, dtype: torch.dtype, *, source: str = "update", partial: bool = False
) -> None:
    """Raises the ValueError that `update` would raise with parameters of `dtype`, before anything is written."""
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
        raise ValueError(f"{source}: {Counter(name for name, _ in pairs).most_common(1)[0][0]} is given twice")
    shapes = {name: _shape(source, name, tensor) for name, tensor in pairs}
    _check(shapes, spec, source, partial=partial)
    if spec.tied and {EMBED, HEAD} <= shapes.keys() and not _equal(tensors[EMBED], tensors[HEAD], dtype):
        raise ValueError(_untied(source))


def _shape(source: str, name: str, tensor: Any) -> tuple[int, ...]:
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


def _untied(source: str) -> str:
    return (
        f"{source}: {EMBED} and {HEAD} differ, but this model's head is tied to its embedding: load the model with "
        "tie_word_embeddings false, or from a checkpoint in which they differ"
    )


def _check(shapes: Mapping[str, tuple[int, ...]], spec: Spec, source: str, *, partial: bool = False) -> None:
    """Raises ValueError, as `update` would, where a checkpoint's tensors are not those of `spec`."""
    wanted = {part.name: part.shape for leaf in tree_leaves(declare(spec)) if leaf is not None for part in leaf.parts}
    missing = set() if partial else wanted.keys() - shapes.keys()
    if spec.tied:
        wanted[HEAD] = wanted[EMBED]
        missing -= {EMBED} if HEAD in shapes else set()
    for name, shape in shapes.items():
        if name in wanted and shape != wanted[name]:
            raise ValueError(f"{source}: {name} has shape {shape}, the config says {wanted[name]}")
    _refuse(source, spec, missing, [name for name in shapes if name not in wanted and not IGNORED.search(name)])


def _equal(a: Any, b: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether two matrices, or slices of files, are equal in a dtype, by default the wider one of both."""
    rows, count = (x.shape[0] if isinstance(x, Tensor) else x.get_shape()[0] for x in (a, b))
    for i in range(0, rows, ROWS):
        x, y = a[i : i + ROWS], b[i : i + ROWS]
        kind = dtype or torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(kind), y.to(x.device, kind)
        if not torch.equal(x, y) and not (x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True)):
            return False
    return rows == count


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor, torch.dtype]], source: str, advice: str) -> None:
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


def check_update(params: Params, spec: Spec, tensors: Iterable[tuple[str, Tensor]], place: Place, source: str) -> None:
    """Raises ValueError as `check_finite`, of those of (checkpoint name, tensor) that `update` would write."""
    dtypes = {part.name: view.dtype for part, view in _parts(params, spec, place)}
    if spec.tied:
        dtypes[HEAD] = dtypes[EMBED]
    for name, tensor in tensors:
        _shape(source, name, tensor)
    check_finite([(n, t, dtypes[n]) for n, t in tensors if n in dtypes], source, f"nothing is written. {ANYHOW}")


@torch.no_grad()
def copy(params: Params, source: Params) -> None:
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


def _is_config(path: Path) -> bool:
    return path.suffix == ".json" and not path.name.endswith(".index.json")


def read_config(path: Path) -> dict:
    """The Hugging Face config of a resolved model; generation_config.json's end tokens are joined in.

    ValueError, with the file, for one that is missing or damaged.
    """
    if path.suffix == ".gguf":
        from fastgen.models import gguf  # whose reader takes a while to import

        return gguf.read(path)[0]
    folder = path if path.is_dir() else path.parent
    file = path if _is_config(path) else folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        advice = "; this is an adapter: name its base model, and the adapter in `adapters`" if adapter else ""
        raise ValueError(f"{folder}: no config.json{advice}")
    config = read_json(file)
    generation = folder / "generation_config.json"
    if generation.is_file():
        both = [
            end_tokens(x.get("eos_token_id"), str(f)) for x, f in ((config, file), (read_json(generation), generation))
        ]
        config["eos_token_id"] = list(dict.fromkeys(both[0] + both[1]))
    return config


def read_spec(path: Path) -> Spec:
    """The spec of a resolved model, as its config has it. ValueError, with the file, for what is not supported."""
    return _spec(path, read_config(path))


def _spec(path: Path, config: dict) -> Spec:
    try:
        return from_hf(config)
    except ValueError as e:
        folder = path if path.is_dir() else path.parent
        file = path if path.suffix == ".gguf" or _is_config(path) else folder / "config.json"
        raise ValueError(str(e).replace("config.json", str(file), 1)) from e


def _untie(spec: Spec, checkpoint: Checkpoint) -> Spec:
    """`spec` with a head of its own where the config says tied and the file has another, as transformers reads it."""
    if spec.tied and {EMBED, HEAD} <= checkpoint.shapes.keys():
        with checkpoint.slice(EMBED) as embed, checkpoint.slice(HEAD) as head:
            return (
                spec
                if checkpoint.shapes[EMBED] == checkpoint.shapes[HEAD] and _equal(embed, head)
                else replace(spec, tied=False)
            )
    return spec


def _shown(
    pairs: Iterable[tuple[str, Any]], shapes: Mapping[str, tuple[int, ...]], size: int, bar: tqdm
) -> Iterator[tuple[str, Any]]:
    """The pairs, while a bar shows how many of `size` bytes have been taken."""
    total, done = sum(map(prod, shapes.values())) or 1, 0
    bar.reset(total=size)
    for name, tensor in pairs:
        yield name, tensor
        done += prod(shapes[name])
        bar.update(size * done // total - bar.n)


def load(
    model: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    place: Place = WHOLE,
    region: Callable[[int], Region] | None = None,
    finite: bool = True,
) -> tuple[Spec, Params]:
    """Spec and parameters of a checkpoint: a Hugging Face directory, hub id, `.safetensors` or `.gguf` file.

    `device` None is torch's default device, `dtype` None the checkpoint's own. Host memory beyond the parameters
    stays about one tensor plus the mapped file. ValueError names what is damaged, missing, unexpected or mis-shaped,
    before memory is taken. Of several candidates in a folder the files are those that transformers takes; and where the
    config ties the head to the embedding, but the file has another head, the spec is not tied. The spec
    is the whole model's; parameters are a rank's at `place`, of which alone the files are read. `region` makes the
    memory that they lie in, of so many bytes. `finite`: ValueError for values that are NaN or infinite, or too large
    for the dtype.
    """
    path = resolve(model)
    with tqdm(
        desc=f"loading {path.stem}", unit="B", unit_scale=True, disable=None if progress else True, leave=False
    ) as bar:
        tensors: Iterable[tuple[str, Any]]
        if path.suffix == ".gguf":
            from fastgen.models import gguf  # whose reader takes a while to import

            config, tensors = gguf.read(path)
            spec, shapes, bytes = _spec(path, config), tensors.shapes, path.stat().st_size
        else:
            config = read_config(path)
            checkpoint = open_checkpoint(path, config)
            spec = _untie(_spec(path, config), checkpoint)
            tensors, shapes, bytes = checkpoint.tensors(sliced=place != WHOLE), checkpoint.shapes, checkpoint.size
        _check(shapes, spec, str(path))
        kind = dtype or getattr(torch, spec.dtype)
        room = None if region is None else region(size(spec, kind, place))

        def make(leaf: Leaf) -> Tensor:
            return torch.zeros(leaf.shape, device=device, dtype=kind) if room is None else room.take(leaf.shape, kind)

        params = tree_map_only(Leaf, make, declare(spec, place))
        shown = _shown(tensors, shapes, bytes // place.size, bar)
        update(params, spec, shown, source=str(path), place=place, finite=False)
        if finite:  # where they are now: a reduction is fastest there
            found = ((part.name, view, view.dtype) for part, view in _parts(params, spec, place))
            check_finite(found, str(path), f"is the file damaged, or the dtype too narrow? {ANYHOW}")
    return spec, params


def save(folder: str | Path, spec: Spec, params: Params, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and sharded safetensors in the Hugging Face layout; the tokenizer is the caller's to save.

    An older checkpoint in `folder` is replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(params.embed.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(to_hf(spec) | {"torch_dtype": dtype}, indent=2))
    index_file = folder / "model.safetensors.index.json"
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", index_file):
        old.unlink(missing_ok=True)
    shards: list[list[tuple[str, Tensor]]] = [[]]
    for name, tensor in named(params, spec):
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
