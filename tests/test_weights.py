"""Reading and writing checkpoints, with transformers on the other side."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastgen
from fastgen import Params, Spec
from fastgen.models.weights import Leaf, declare, named, resolve, update

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS = ["full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "ministral": ("Ministral", {"layer_types": KINDS, "sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
}


def theirs(name: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A random model of transformers; no weight is left at 0 or 1."""
    family, rest = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **rest, dtype=dtype)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.2)
    return model


def check(params: Params, spec: Spec, model: torch.nn.Module) -> None:
    """The same weights, bit for bit."""
    ours, want = dict(named(params, spec)), model.state_dict()
    if spec.tied:
        want.pop("lm_head.weight", None)
    assert ours.keys() == want.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name]), name


def present(params: Params) -> list[Tensor]:
    return [tensor for tensor in tree_leaves(params) if tensor is not None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A single-file checkpoint of the llama."""
    theirs().save_pretrained(tmp_path)
    return tmp_path


def spec_and_params(name: str = "llama") -> tuple[Spec, Params]:
    model = theirs(name)
    spec = fastgen.from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    return spec, fastgen.init(spec)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_load(name: str, shards: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """A directory that transformers wrote, of one file or of many, in the checkpoint's dtype."""
    model = theirs(name, dtype)
    model.save_pretrained(tmp_path, max_shard_size="9KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    spec, params = fastgen.load(tmp_path, progress=False)
    assert spec == fastgen.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert spec.dtype == str(dtype).removeprefix("torch.")
    check(params, spec, model)


def test_load_by_the_path_of_a_file(tmp_path: Path) -> None:
    """The single file, the index and the config stand for their checkpoint; a str is as good as a Path."""
    model = theirs()
    for shards, file in (("1GB", "model.safetensors"), ("9KB", "model.safetensors.index.json")):
        model.save_pretrained(tmp_path / shards, max_shard_size=shards)
        for path in (tmp_path / shards / file, str(tmp_path / shards / file), tmp_path / shards / "config.json"):
            spec, params = fastgen.load(path, progress=False)
            check(params, spec, model)


def test_load_casts(folder: Path) -> None:
    """Another dtype than the checkpoint's, rounded as torch rounds; the spec keeps the checkpoint's."""
    spec, params = fastgen.load(folder, dtype=torch.bfloat16, progress=False)
    check(params, spec, theirs().bfloat16())
    assert spec.dtype == "float32"


def test_load_shows_progress(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bar by default, silence if wished."""
    fastgen.load(folder)
    assert "loading" in capfd.readouterr().err
    fastgen.load(folder, progress=False)
    assert capfd.readouterr() == ("", "")


def test_end_tokens_of_the_generation_config(folder: Path) -> None:
    """Chat models name their end of turn there; each token counts once."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    for eos, want in ((9, (7, 9)), ([9, 7, 5], (7, 9, 5)), (None, (7,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert fastgen.load(folder, progress=False)[0].eos == want


def test_buffers_and_tied_heads_are_skipped(tmp_path: Path) -> None:
    """Old checkpoints carry rope's frequencies, and some the head that is tied to the embedding."""
    model = theirs("llama-tied-bias")
    model.save_pretrained(tmp_path)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(tmp_path, lambda t: t.update(extra | {"lm_head.weight": torch.ones(64, 32)}))
    spec, params = fastgen.load(tmp_path, progress=False)
    check(params, spec, model)


def test_other_copies_of_the_weights_are_skipped(tmp_path: Path) -> None:
    """Mistral's repositories hold the weights a second time, under other names, in consolidated.safetensors."""
    model = theirs()
    for shards in ("1GB", "9KB"):
        model.save_pretrained(tmp_path / shards, max_shard_size=shards)
        save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / shards / "consolidated.safetensors")
        spec, params = fastgen.load(tmp_path / shards, progress=False)
        check(params, spec, model)


def refusal(folder: Path) -> str:
    """What load says of a checkpoint that it refuses."""
    with pytest.raises(ValueError) as e:
        fastgen.load(folder, progress=False)
    return str(e.value)


def test_missing_tensors_are_named(folder: Path) -> None:
    """Eight of them, and how many more; with the folder, since several may be loaded."""
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    said = refusal(folder)
    assert said.startswith(str(folder)) and said.endswith("missing: model.norm.weight")
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])
    said = refusal(folder)
    assert "model.layers.1.input_layernorm.weight" in said and said.endswith(" and 2 more")


def test_unexpected_tensors_are_named(folder: Path) -> None:
    """A bias that the config does not know would be left out silently."""
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert refusal(folder).endswith("unexpected: model.layers.0.self_attn.q_proj.bias")
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight; unexpected: model.layers.0.self_attn.q_proj.bias" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.embed_tokens.weight", (63, 32)), ("model.layers.1.self_attn.k_proj.weight", (32, 32))],
)
def test_misshaped_tensors_are_named(name: str, shape: tuple[int, ...], folder: Path) -> None:
    """With both shapes. The second one would fit the packed leaf, but not its part of it."""
    want = tuple(load_file(folder / "model.safetensors")[name].shape)
    rewrite(folder, lambda t: t.update({name: torch.ones(shape)}))
    said = refusal(folder)
    assert name in said and str(shape) in said and str(want) in said


def test_absent_files_are_named(tmp_path: Path) -> None:
    """A shard that the index names, all of the weights, the config."""
    theirs().save_pretrained(tmp_path, max_shard_size="9KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    said = refusal(tmp_path)
    assert shard.name in said and "index" in said
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert refusal(tmp_path) == f"{tmp_path}: no .safetensors file"
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path) == f"{tmp_path}: no config.json"


@pytest.mark.parametrize("model", ["nonsense", "no/such/folder", "/no/such/folder", "a b/c", "./x", "model.gguf"])
def test_what_is_no_model(model: str) -> None:
    """Neither a path nor the form of a hub id: nothing is asked of the network."""
    with pytest.raises(ValueError, match="neither a local directory or file nor a hub id") as e:
        resolve(model)
    assert model in str(e.value)


def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is found in the cache without the network; one that is not there is refused with its name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    model = theirs()
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("owner/tiny") == repository / "snapshots" / commit
    spec, params = fastgen.load("owner/tiny", progress=False)
    check(params, spec, model)
    with pytest.raises(ValueError, match="'owner/other'.*not in the hub cache"):
        resolve("owner/other")


def test_hub_download_leaves_out_second_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository like Mistral's, each weight is fetched once, and what a tokenizer needs."""
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/tiny") == tmp_path
    needed = ["config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json", "merges.txt"]
    needed += ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"]
    other = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "README.md"]
    chosen = huggingface_hub.utils.filter_repo_objects([*needed, *other], **asked)
    assert list(chosen) == needed


def logits(spec: Spec, params: Params, tokens: list[int]) -> Tensor:
    """Our logits [T, V] of a prompt."""
    cache = fastgen.new_cache(spec, 32, dtype=torch.float32)
    batch = fastgen.stage((fastgen.schedule.Span(0, 0, len(tokens), True, (1,)),), {0: tokens}, 16)
    return fastgen.unembed(params, fastgen.hidden(params, cache, batch, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 9000, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_save(name: str, shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """What is saved loads bit for bit, here and in transformers, in one file and in many."""
    model = theirs(name, dtype)
    model.save_pretrained(tmp_path / "theirs")
    spec, params = fastgen.load(tmp_path / "theirs", progress=False)
    fastgen.save(tmp_path / "new" / "ours", spec, params, shard_bytes=shard_bytes)
    again, loaded = fastgen.load(tmp_path / "new" / "ours", progress=False)
    assert again == spec
    check(loaded, spec, model)
    count = len(list((tmp_path / "new" / "ours").glob("*.safetensors")))
    assert count == {10**9: 1, 1: len(list(named(params, spec)))}.get(shard_bytes, count)
    assert (count > 1) == (shard_bytes < 10**9)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "ours", dtype="auto")
    assert type(read) is type(model)
    check(loaded, spec, read)
    tokens = list(range(3, 15))
    with torch.no_grad():
        want = read.float()(torch.tensor([tokens]), use_cache=False).logits[0]
    _, full = fastgen.load(tmp_path / "new" / "ours", dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(spec, full, tokens), want, atol=1e-4, rtol=0)


def test_save_in_another_dtype(folder: Path) -> None:
    """The config names the dtype of the parameters, not of the checkpoint they came from."""
    spec, params = fastgen.load(folder, dtype=torch.bfloat16, progress=False)
    fastgen.save(folder / "half", spec, params)
    spec, params = fastgen.load(folder / "half", progress=False)
    assert spec.dtype == "bfloat16"
    check(params, spec, theirs().bfloat16())


@pytest.mark.parametrize("sizes", [(9000, 10**9), (10**9, 9000), (1, 9000)])
def test_save_over_an_older_checkpoint(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Training saves into one folder again and again: no shard or index of an older save may win."""
    spec, params = spec_and_params()
    fastgen.save(tmp_path, spec, fastgen.init(spec, 1), shard_bytes=sizes[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    fastgen.save(tmp_path, spec, params, shard_bytes=sizes[1])
    _, loaded = fastgen.load(tmp_path, progress=False)
    assert all(map(torch.equal, present(loaded), present(params)))
    check(params, spec, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file()  # what is not ours stays


@pytest.mark.parametrize("name", FAMILIES)
def test_init(name: str) -> None:
    """The shapes declared, the seed's numbers, ones for norms and zeros for biases."""
    spec, params = spec_and_params(name)
    leaves = [leaf for leaf in tree_leaves(declare(spec)) if leaf is not None]
    assert [leaf.shape for leaf in leaves] == [tuple(tensor.shape) for tensor in present(params)]
    assert {n: t.shape for n, t in named(params, spec)} == {
        n: t.shape for n, t in theirs(name).state_dict().items() if not (spec.tied and n == "lm_head.weight")
    }
    same, other = fastgen.init(spec, 0), fastgen.init(spec, 1)
    for leaf, a, b, c in zip(leaves, *map(present, (params, same, other)), strict=True):
        assert torch.equal(a, b)
        if leaf.fill is None:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(0.02, rel=0.1) and abs(a.mean().item()) < 0.004
        else:
            assert (a == leaf.fill).all() and a.ndim == 1


def test_init_has_the_dtype_asked_for() -> None:
    """The spec's where none is."""
    spec, params = spec_and_params()
    assert {t.dtype for t in present(params)} == {torch.float32}
    assert {t.dtype for t in present(fastgen.init(spec, dtype=torch.float16))} == {torch.float16}


@pytest.mark.parametrize("trained", [False, True])
def test_update_in_place(trained: bool) -> None:
    """New weights arrive at the old addresses, in the old dtype; also where training wants gradients."""
    model = theirs("qwen3-tied")
    spec, _ = spec_and_params("qwen3-tied")
    params = fastgen.init(spec, dtype=torch.bfloat16)
    for tensor in present(params):
        tensor.requires_grad_(trained)
    before = [tensor.data_ptr() for tensor in present(params)]
    update(params, spec, model.state_dict().items())
    assert [tensor.data_ptr() for tensor in present(params)] == before
    assert all(tensor.requires_grad == trained for tensor in present(params))
    check(params, spec, model.bfloat16())


def test_update_takes_every_weight_once() -> None:
    """What is left out is named, and a name that nothing has, before anyone generates with half a model."""
    spec, params = spec_and_params()
    new = dict(named(fastgen.init(spec, 1), spec))
    left = {name: t for name, t in new.items() if "layers.1.mlp" not in name}
    with pytest.raises(ValueError, match=r"^update: .*missing: model.layers.1.mlp.down_proj.weight, "):
        update(params, spec, left.items())
    with pytest.raises(ValueError, match=r"^trainer: .*unexpected: module.norm.weight$"):
        update(params, spec, [*new.items(), ("module.norm.weight", torch.ones(32))], source="trainer")


MEASURE = """
import sys
import torch
import fastgen
from torch.utils._pytree import tree_leaves

def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024

before = peak()
spec, params = fastgen.load(sys.argv[1], progress=False)
print(peak() - before, sum(t.nbytes for t in tree_leaves(params) if t is not None))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Loading four shards of 50 MB takes the parameters, one mapped shard and a little: not all shards twice."""
    spec = fastgen.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "vocab_size": 512,
        }
    )
    params = tree_map_only(Leaf, lambda leaf: torch.ones(leaf.shape, dtype=torch.bfloat16), declare(spec))
    fastgen.save(tmp_path, spec, params, shard_bytes=50_000_000)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 4 and sum(shards) > 190e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    extra, size = map(int, run.stdout.split())
    assert size == sum(t.nbytes for t in present(params))
    assert extra - size < max(shards) + 30e6, f"{(extra - size) / 1e6:.0f} MB beside the parameters"
