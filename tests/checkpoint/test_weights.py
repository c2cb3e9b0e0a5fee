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
from fastgen import ModelConfig, Params
from fastgen.checkpoint.hub import resolve
from fastgen.checkpoint.weights import WeightSpec, named_weights, update, weight_specs
from fastgen.core.model_config import TPShard

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


def hf_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Returns a random transformers model; no weight is left at 0 or 1."""
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **options, dtype=dtype)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.2)
    return model


def assert_same_weights(params: Params, spec: ModelConfig, model: torch.nn.Module) -> None:
    """Asserts that parameters are the model's weights, bit for bit."""
    params_by_name, expected = dict(named_weights(params, spec)), model.state_dict()
    if spec.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    assert params_by_name.keys() == expected.keys()
    for name, tensor in params_by_name.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def present(params: Params) -> list[Tensor]:
    """Returns the weights that the model family has."""
    return [tensor for tensor in tree_leaves(params) if tensor is not None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a single-file checkpoint of the llama."""
    hf_model().save_pretrained(tmp_path)
    return tmp_path


def spec_and_params(name: str = "llama") -> tuple[ModelConfig, Params]:
    """Returns a model's config and random parameters."""
    model = hf_model(name)
    spec = fastgen.from_hf_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    return spec, fastgen.init(spec)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_load(name: str, shards: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Loads folders that transformers wrote, of one file or of many, in the checkpoint's dtype."""
    model = hf_model(name, dtype)
    model.save_pretrained(tmp_path, max_shard_size="9KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == shards
    spec, params = fastgen.load(tmp_path, progress=False)
    assert spec == fastgen.from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    assert spec.dtype == str(dtype).removeprefix("torch.")
    assert_same_weights(params, spec, model)


def test_load_by_the_path_of_a_file(tmp_path: Path) -> None:
    """The single file, the index and the config stand for their checkpoint, as a str or a Path."""
    model = hf_model()
    for shards, file in (("1GB", "model.safetensors"), ("9KB", "model.safetensors.index.json")):
        model.save_pretrained(tmp_path / shards, max_shard_size=shards)
        for path in (tmp_path / shards / file, str(tmp_path / shards / file), tmp_path / shards / "config.json"):
            spec, params = fastgen.load(path, progress=False)
            assert_same_weights(params, spec, model)


def test_load_casts(folder: Path) -> None:
    """Loading in another dtype rounds as torch does; the config keeps the checkpoint's dtype."""
    spec, params = fastgen.load(folder, dtype=torch.bfloat16, progress=False)
    assert_same_weights(params, spec, hf_model().bfloat16())
    assert spec.dtype == "float32"


def test_load_shows_progress(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading shows a bar by default on a terminal, and none elsewhere or with progress=False."""
    fastgen.load(folder)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fastgen.load(folder)
    assert "loading" in capfd.readouterr().err
    fastgen.load(folder, progress=False)
    assert capfd.readouterr() == ("", "")


def test_end_tokens_of_the_generation_config(folder: Path) -> None:
    """End tokens of generation_config.json are added, each one once: chat models name their end of turn there."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    for eos, want in ((9, (7, 9)), ([9, 7, 5], (7, 9, 5)), (None, (7,))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert fastgen.load(folder, progress=False)[0].eos_token_ids == want


def test_buffers_are_skipped(folder: Path) -> None:
    """RoPE frequencies in old checkpoints are skipped."""
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(folder, lambda t: t.update(extra))
    spec, params = fastgen.load(folder, progress=False)
    assert_same_weights(params, spec, hf_model())


def change_head(folder: Path, head: str, *, shards: bool = False) -> None:
    """Makes the head of a single-file tied checkpoint equal to the embedding, different, or the only one of the two."""

    def change(t: dict[str, Tensor]) -> None:
        embed = t["model.embed_tokens.weight"]
        if head != "none":
            t["lm_head.weight"] = embed.flip(0).contiguous() if head == "another" else embed.clone()
        if head == "alone":
            del t["model.embed_tokens.weight"]

    rewrite(folder, change)
    if shards:
        t = load_file(folder / "model.safetensors")
        names = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(t))}
        for file in set(names.values()):
            save_file({name: t[name] for name in t if names[name] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("head", ["none", "equal", "another", "alone"])
def test_head_beside_a_tied_embedding(head: str, shards: bool, tmp_path: Path) -> None:
    """As in transformers, a head is tied if it equals the embedding or one of both is missing, and untied otherwise."""
    hf_model("llama-tied-bias").save_pretrained(tmp_path)
    change_head(tmp_path, head, shards=shards)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    spec, params = fastgen.load(tmp_path, progress=False)
    assert spec.tie_word_embeddings == (head != "another") and (params.lm_head is None) == spec.tie_word_embeddings
    assert_same_weights(params, spec, read)
    tokens = list(range(3, 15))
    with torch.no_grad():
        want = read(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(logits(spec, params, tokens), want, atol=1e-4, rtol=0)
    halves = [fastgen.load(tmp_path, progress=False, tp_shard=TPShard(rank, 2)) for rank in (0, 1)]
    assert [half[0] for half in halves] == [spec, spec]
    for leaf in ("embed", "lm_head"):
        if (whole := getattr(params, leaf)) is not None:
            assert torch.equal(torch.cat([getattr(half, leaf) for _, half in halves]), whole)
    fastgen.save(tmp_path / "again", spec, params)
    assert fastgen.load(tmp_path / "again", progress=False)[0] == spec
    assert_same_weights(
        params, spec, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    )


def test_head_in_another_dtype_than_a_tied_embedding(tmp_path: Path) -> None:
    """Head and embedding are compared in the wider dtype, whatever the parameters are cast to: the config depends on
    the files alone."""
    hf_model("llama-tied-bias").save_pretrained(tmp_path)
    change_head(tmp_path, "equal")
    rewrite(tmp_path, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].bfloat16()}))
    assert not fastgen.load(tmp_path, dtype=torch.bfloat16, progress=False)[0].tie_word_embeddings
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].float()}))
    assert fastgen.load(tmp_path, dtype=torch.bfloat16, progress=False)[0].tie_word_embeddings


def test_head_that_is_missing_or_has_another_shape(tmp_path: Path) -> None:
    """A head that the config declares and the file lacks is an error; transformers would initialize it at random."""
    hf_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert load_error(tmp_path).endswith("missing: lm_head.weight")
    hf_model("llama-tied-bias").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(65, 32)}))
    assert "lm_head.weight has shape (65, 32), the config says (64, 32)" in load_error(tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(name) for name in ("lm_head.weight", "model.embed_tokens.weight")])
    assert load_error(tmp_path).endswith("missing: model.embed_tokens.weight")


def test_update_of_a_tied_head() -> None:
    """An update with both the head and the embedding must have them equal, in either order; one of them alone updates
    both."""
    model = hf_model("llama-tied-bias")
    spec, params = spec_and_params("llama-tied-bias")
    new, embed, head = dict(model.named_parameters()), "model.embed_tokens.weight", "lm_head.weight"
    assert head not in new and params.lm_head is None
    other = new[embed].flip(0)
    for pairs in ({**new, head: new[embed]}, {head: new[embed], **new}, {**new, head: other, embed: other}):
        update(params, spec, pairs.items())
        assert torch.equal(params.embed, pairs[embed])
    for pairs in ({**new, head: other}, {head: other, **new}):
        with pytest.raises(
            ValueError, match=r"^update: model.embed_tokens.weight and lm_head.weight differ, but .*tied"
        ):
            update(params, spec, pairs.items())
    update(params, spec, [(head, other)], partial=True)
    assert torch.equal(params.embed, other)


@pytest.mark.parametrize("head", ["equal", "another"])
def test_adopt_with_a_head_beside_a_tied_embedding(head: str, tmp_path: Path) -> None:
    """adopt() reads whether the head is tied from the model: transformers leaves the config alone where it does not
    tie."""
    hf_model("llama-tied-bias").save_pretrained(tmp_path)
    change_head(tmp_path, head)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.config.tie_word_embeddings
    spec, params = fastgen.adopt(model)
    assert spec.tie_word_embeddings == (head == "equal")
    assert_same_weights(params, spec, model)
    model.config.tie_word_embeddings = False
    assert fastgen.adopt(model)[0] == spec


ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-0000{}-of-00002.safetensors"


def write(folder: Path, *files: str, seed: int = 0) -> dict[str, Tensor]:
    """Writes a checkpoint's files whose tensors depend on a seed: ONE, INDEX, "shards" or any other name."""
    torch.manual_seed(seed)
    t = {name: torch.randn_like(x) for name, x in hf_model().state_dict().items()}
    place = {name: SHARD.format(1 + i % 2) for i, name in enumerate(sorted(t))}
    folder.mkdir(exist_ok=True)
    hf_model().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    for file in files:
        if file == INDEX:
            (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": place}))
        elif file == "shards":
            for shard in set(place.values()):
                save_file({n: x for n, x in t.items() if place[n] == shard}, folder / shard, {"format": "pt"})
        elif file.endswith(".bin"):
            torch.save(t, folder / file)
        else:
            save_file(t, folder / file, {"format": "pt"})
    return t


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (["shards", INDEX], [ONE]),
        ([ONE], ["shards", INDEX]),
        ([INDEX], [ONE]),  # whose shards are gone
        (["shards"], [ONE]),
        (["other.safetensors"], [ONE]),
        ([ONE], ["pytorch_model.bin"]),
        (["pytorch_model.bin"], [ONE]),
        (["pytorch_model.bin"], ["shards", INDEX]),
        (["consolidated.safetensors"], [ONE]),
        (["consolidated.safetensors"], ["shards", INDEX]),
        (["model.fp16.safetensors"], [ONE]),
        ([ONE], ["model.fp16.safetensors"]),
        (["model.fp16.safetensors"], ["shards", INDEX]),
        (["model-00001-of-00003.safetensors"], ["shards", INDEX]),
    ],
)
def test_which_of_several_files(older: list[str], newer: list[str], tmp_path: Path) -> None:
    """Of a folder with two checkpoints, loads the one that transformers loads."""
    for seed, files in enumerate((older, newer)):
        write(tmp_path, *files, seed=seed)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    spec, params = fastgen.load(tmp_path, progress=False)
    assert_same_weights(params, spec, read)


@pytest.mark.parametrize("named", ["b.safetensors", "b.safetensors.index.json"])
def test_files_that_the_config_names(named: str, tmp_path: Path) -> None:
    """Loads the file that config.json names, as transformers does; a file outside of the folder is an error."""
    write(tmp_path, ONE)
    if named.endswith(".json"):
        write(tmp_path, "shards", INDEX, seed=1)
        (tmp_path / INDEX).rename(tmp_path / named)
    else:
        write(tmp_path, named, seed=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    spec, params = fastgen.load(tmp_path, progress=False)
    assert_same_weights(params, spec, read)
    for wrong, said in (("../b.safetensors", "outside"), ("b.bin", "no safetensors file"), (5, "no safetensors file")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
        assert said in load_error(tmp_path)


def test_a_file_that_is_named(tmp_path: Path) -> None:
    """A file is loaded by its own path, whatever lies beside it."""
    old, new = write(tmp_path, "shards", INDEX), write(tmp_path, ONE, "other.safetensors", seed=1)
    for file, expected in ((INDEX, old), (ONE, new), ("other.safetensors", new), ("config.json", new)):
        spec, params = fastgen.load(tmp_path / file, progress=False)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in named_weights(params, spec)), file
    for file, said in ((SHARD.format(1), "missing: "), ("pytorch_model.bin", ".safetensors and .gguf files only")):
        write(tmp_path, "pytorch_model.bin")
        assert said in load_error(tmp_path / file)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """The last shard of the index wins, as in transformers; without an index a tensor in two shards is an error."""
    write(tmp_path, "shards", INDEX)
    first = load_file(tmp_path / SHARD.format(1))
    norm = {"model.norm.weight": torch.full((32,), 7.0)}
    save_file(first | norm, tmp_path / SHARD.format(1), {"format": "pt"})
    save_file(load_file(tmp_path / SHARD.format(2)) | norm, tmp_path / SHARD.format(2), {"format": "pt"})
    spec, params = fastgen.load(tmp_path, progress=False)
    assert_same_weights(params, spec, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    (tmp_path / INDEX).unlink()
    said = load_error(tmp_path)
    assert "both hold model.norm.weight" in said and SHARD.format(1) in said and SHARD.format(2) in said


def test_shards_without_an_index(tmp_path: Path) -> None:
    """Shards without an index are loaded where each weight is in one of them."""
    expected = write(tmp_path, "shards")
    spec, params = fastgen.load(tmp_path, progress=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_weights(params, spec))


def test_other_formats_are_named(tmp_path: Path) -> None:
    """The error names files of other formats, and the remedy."""
    write(tmp_path, "pytorch_model.bin")
    assert load_error(tmp_path) == (
        f"{tmp_path}: no .safetensors file; pytorch_model.bin is not read: save the model with transformers' "
        "save_pretrained"
    )
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no config.json; this is an adapter: name its base model" in load_error(tmp_path)


def load_error(folder: Path) -> str:
    """Returns the error message of loading a checkpoint."""
    with pytest.raises(ValueError) as e:
        fastgen.load(folder, progress=False)
    return str(e.value)


def test_missing_tensors_are_named(folder: Path) -> None:
    """The error names the folder, eight missing tensors, and the number of the others."""
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    said = load_error(folder)
    assert said.startswith(str(folder)) and said.endswith("missing: model.norm.weight")
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])
    said = load_error(folder)
    assert "model.layers.1.input_layernorm.weight" in said and said.endswith(" and 2 more")


def test_unexpected_tensors_are_named(folder: Path) -> None:
    """A bias that the config does not declare is an error: without it outputs would be wrong."""
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert load_error(folder).endswith("unexpected: model.layers.0.self_attn.q_proj.bias")
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight; unexpected: model.layers.0.self_attn.q_proj.bias" in load_error(folder)


@pytest.mark.parametrize(
    ("name", "shape"), [("model.embed_tokens.weight", (63, 32)), ("model.layers.1.self_attn.k_proj.weight", (32, 32))]
)
def test_misshaped_tensors_are_named(name: str, shape: tuple[int, ...], folder: Path) -> None:
    """The error has both shapes. The second case would fit the packed weight, but not its part of it."""
    want = tuple(load_file(folder / "model.safetensors")[name].shape)
    rewrite(folder, lambda t: t.update({name: torch.ones(shape)}))
    said = load_error(folder)
    assert name in said and str(shape) in said and str(want) in said


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e5])
def test_values_that_are_not_finite_are_named(value: float, folder: Path) -> None:
    """NaN and infinite values are errors by the tensor's name, unless check_finite=False; also values that only the
    dtype makes infinite."""
    name = "model.layers.1.self_attn.v_proj.weight"
    rewrite(folder, lambda tensors: tensors[name][0].fill_(value))
    with pytest.raises(ValueError, match=rf"in {name} \(float16\); .*check_finite=False"):
        fastgen.load(folder, progress=False, dtype=torch.float16)
    _, params = fastgen.load(folder, progress=False, dtype=torch.float16, check_finite=False)
    assert int((~params.layers[1].qkv.isfinite()).sum()) == params.layers[1].qkv.shape[1]
    if value == 1e5:
        fastgen.load(folder, progress=False, dtype=torch.float32)


def test_absent_files_are_named(tmp_path: Path) -> None:
    """The error names a shard of the index, the weights, or the config where it is absent."""
    hf_model().save_pretrained(tmp_path, max_shard_size="9KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    said = load_error(tmp_path)
    assert shard.name in said and "index" in said
    (tmp_path / "model.safetensors.index.json").unlink()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert load_error(tmp_path) == f"{tmp_path}: no .safetensors file"
    (tmp_path / "config.json").unlink()
    assert load_error(tmp_path) == f"{tmp_path}: no config.json"


@pytest.mark.parametrize("model", ["nonsense", "no/such/folder", "/no/such/folder", "a b/c", "./x", "model.gguf"])
def test_what_is_no_model(model: str) -> None:
    """A model that is neither a path nor formed like a hub id is an error without any request to the network."""
    with pytest.raises(ValueError, match="neither a local directory or file nor a hub id") as e:
        resolve(model)
    assert model in str(e.value)


def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is read from the cache without the network; the error for an absent one names it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    model = hf_model()
    model.save_pretrained(repository / "snapshots" / commit)
    write(repository / "snapshots" / commit[::-1], ONE, seed=1)  # an older or newer revision
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("owner/tiny") == repository / "snapshots" / commit
    spec, params = fastgen.load("owner/tiny", progress=False)
    assert_same_weights(params, spec, model)
    with pytest.raises(ValueError, match="'owner/other'.*not in the hub cache"):
        resolve("owner/other")


def test_hub_download_leaves_out_second_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository like Mistral's, each weight is downloaded once, with the tokenizer's files."""
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


def logits(spec: ModelConfig, params: Params, tokens: list[int]) -> Tensor:
    """Returns fastgen's logits [T, V] of a prompt."""
    cache = fastgen.new_kv_cache(spec, 32, dtype=torch.float32)
    batch = fastgen.build_batch((fastgen.core.scheduler.Span(0, 0, len(tokens), True, (1,)),), {0: tokens}, 16)
    return fastgen.compute_logits(params, fastgen.hidden_states(params, cache, batch, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 9000, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_save(name: str, shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A saved checkpoint loads bit for bit, here and in transformers, from one file and from many."""
    model = hf_model(name, dtype)
    model.save_pretrained(tmp_path / "hf")
    spec, params = fastgen.load(tmp_path / "hf", progress=False)
    fastgen.save(tmp_path / "new" / "ours", spec, params, shard_bytes=shard_bytes)
    again, loaded = fastgen.load(tmp_path / "new" / "ours", progress=False)
    assert again == spec
    assert_same_weights(loaded, spec, model)
    count = len(list((tmp_path / "new" / "ours").glob("*.safetensors")))
    assert count == {10**9: 1, 1: len(list(named_weights(params, spec)))}.get(shard_bytes, count)
    assert (count > 1) == (shard_bytes < 10**9)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "ours", dtype="auto")
    assert type(read) is type(model)
    assert_same_weights(loaded, spec, read)
    tokens = list(range(3, 15))
    with torch.no_grad():
        want = read.float()(torch.tensor([tokens]), use_cache=False).logits[0]
    _, full = fastgen.load(tmp_path / "new" / "ours", dtype=torch.float32, progress=False)
    torch.testing.assert_close(logits(spec, full, tokens), want, atol=1e-4, rtol=0)


def test_save_in_another_dtype(folder: Path) -> None:
    """The saved config has the dtype of the parameters, not of the checkpoint that they were loaded from."""
    spec, params = fastgen.load(folder, dtype=torch.bfloat16, progress=False)
    fastgen.save(folder / "half", spec, params)
    spec, params = fastgen.load(folder / "half", progress=False)
    assert spec.dtype == "bfloat16"
    assert_same_weights(params, spec, hf_model().bfloat16())


@pytest.mark.parametrize("sizes", [(9000, 10**9), (10**9, 9000), (1, 9000)])
def test_save_over_an_older_checkpoint(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Saving into a folder again removes the shards and the index of the older save."""
    spec, params = spec_and_params()
    fastgen.save(tmp_path, spec, fastgen.init(spec, 1), shard_bytes=sizes[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    fastgen.save(tmp_path, spec, params, shard_bytes=sizes[1])
    _, loaded = fastgen.load(tmp_path, progress=False)
    assert all(map(torch.equal, present(loaded), present(params)))
    assert_same_weights(params, spec, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file()  # files of others stay


@pytest.mark.parametrize("name", FAMILIES)
def test_init(name: str) -> None:
    """Initial weights have the declared shapes and depend on the seed; norms are ones and biases zeros."""
    spec, params = spec_and_params(name)
    leaves = [leaf for leaf in tree_leaves(weight_specs(spec)) if leaf is not None]
    assert [leaf.shape for leaf in leaves] == [tuple(tensor.shape) for tensor in present(params)]
    assert {n: t.shape for n, t in named_weights(params, spec)} == {
        n: t.shape
        for n, t in hf_model(name).state_dict().items()
        if not (spec.tie_word_embeddings and n == "lm_head.weight")
    }
    same, other = fastgen.init(spec, 0), fastgen.init(spec, 1)
    for leaf, a, b, c in zip(leaves, *map(present, (params, same, other)), strict=True):
        assert torch.equal(a, b)
        if leaf.fill_value is None:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(0.02, rel=0.1) and abs(a.mean().item()) < 0.004
        else:
            assert (a == leaf.fill_value).all() and a.ndim == 1


def test_init_has_the_dtype_asked_for() -> None:
    """Initial weights have the requested dtype, or else the config's."""
    spec, params = spec_and_params()
    assert {t.dtype for t in present(params)} == {torch.float32}
    assert {t.dtype for t in present(fastgen.init(spec, dtype=torch.float16))} == {torch.float16}


@pytest.mark.parametrize("trained", [False, True])
def test_update_in_place(trained: bool) -> None:
    """An update keeps addresses, dtypes and requires_grad."""
    model = hf_model("qwen3-tied")
    spec, _ = spec_and_params("qwen3-tied")
    params = fastgen.init(spec, dtype=torch.bfloat16)
    for tensor in present(params):
        tensor.requires_grad_(trained)
    before = [tensor.data_ptr() for tensor in present(params)]
    update(params, spec, model.state_dict().items())
    assert [tensor.data_ptr() for tensor in present(params)] == before
    assert all(tensor.requires_grad == trained for tensor in present(params))
    assert_same_weights(params, spec, model.bfloat16())


def test_update_takes_every_weight_once() -> None:
    """The error names weights that an update lacks, and names that the model does not have."""
    spec, params = spec_and_params()
    new = dict(named_weights(fastgen.init(spec, 1), spec))
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
    """Loading four shards of 50 MB takes memory for the parameters, one mapped shard and 30 MB."""
    spec = fastgen.from_hf_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "vocab_size": 512,
        }
    )
    params = tree_map_only(WeightSpec, lambda leaf: torch.ones(leaf.shape, dtype=torch.bfloat16), weight_specs(spec))
    fastgen.save(tmp_path, spec, params, shard_bytes=50_000_000)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 4 and sum(shards) > 190e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    extra, size = map(int, run.stdout.split())
    assert size == sum(t.nbytes for t in present(params))
    assert extra - size < max(shards) + 30e6, f"{(extra - size) / 1e6:.0f} MB beside the parameters"
