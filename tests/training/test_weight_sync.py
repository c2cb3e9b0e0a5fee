"""Weights sent to an engine: updates in place, names, versions of tokens, process groups."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer import CONFIG, GREEDY, PROMPTS, RNG, engine, finish, generate, generate_fresh, new_params, send_and_receive
from transformers import AutoModelForCausalLM
from transformers_models import Wrapper, new_model

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint import weights
from fastgen.training import weight_sync

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns


# --- updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tree", "mapping", "pairs", "module", "bf16"])
def test_update_from(form: str, tmp_path: Path) -> None:
    """Every form of parameters is written into the same memory, and tokens are then those of a new engine."""
    params, other = new_params(0), new_params(1)
    sources: dict[str, Any] = {
        "tree": other,
        "mapping": dict(weights.named_weights(other, CONFIG)),
        "pairs": ((name, t.clone()) for name, t in weights.named_weights(other, CONFIG)),
        "bf16": tree_map_only(Tensor, lambda w: w.bfloat16(), other),
    }
    if form == "module":
        fastgen.save(tmp_path, CONFIG, other)
        sources["module"] = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if form == "bf16":
        other = tree_map_only(Tensor, lambda w: w.bfloat16().float(), other)
    addresses = [w.data_ptr() for w in tree_leaves(params) if w is not None]
    with engine(params) as e:
        e.generate(PROMPTS, GREEDY)
        assert e.update_params(sources[form]) == e.weight_version == 1
        assert generate(e) == generate_fresh(other)
    assert [w.data_ptr() for w in tree_leaves(params) if w is not None] == addresses


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda n: "module." + n,
    "compiled": lambda n: "_orig_mod." + n,
    "compiled layers": lambda n: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", n),
    "FSDP": lambda n: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", "_fsdp_wrapped_module." + n),
    "checkpointed": lambda n: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", n),
    "PEFT": lambda n: "base_model.model." + re.sub(r"([qv]_proj)", r"\1.base_layer", n),
    "several": lambda n: "module._orig_mod.base_model.model." + n.replace("down_proj", "down_proj.base_layer"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrapped_modules(wrapper: str) -> None:
    params, other = new_params(0), new_params(1)
    pairs = [(WRAPPED[wrapper](name), t) for name, t in weights.named_weights(other, CONFIG)]
    weights.update(params, CONFIG, weight_sync.named_tensors(pairs))
    for updated, expected in zip(tree_leaves(params), tree_leaves(other), strict=True):
        assert updated is expected is None or torch.equal(updated, expected)


def test_unknown_names_are_refused_with_advice() -> None:
    params, named = new_params(), dict(weights.named_weights(new_params(), CONFIG))
    with pytest.raises(ValueError, match="leave 'policy.net.' out of the names"):
        weights.update(params, CONFIG, weight_sync.named_tensors({"policy.net." + n: t for n, t in named.items()}))
    changed = named | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)}
    with pytest.raises(ValueError, match=r"unexpected: model.*lora_A.*; merge the adapter"):
        weights.update(params, CONFIG, weight_sync.named_tensors(changed))
    with pytest.raises(ValueError, match="model.norm.weight is a list, not a tensor"):
        weights.update(params, CONFIG, weight_sync.named_tensors({"model.norm.weight": [1.0]}), partial=True)
    for wrong in ("a/folder", 5, None, torch.tensor(1.0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="parameters come as a tree, module"):
            weight_sync.named_tensors(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "merged, then disabled"])
def test_parameters_of_a_peft_model(state: str) -> None:
    """Named tensors have the values that the model computes with, whatever adapters are merged, compiled or not."""
    peft = pytest.importorskip("peft")
    source = new_model("Qwen2")
    base = {name: p.detach().clone() for name, p in source.named_parameters()}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
                           init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(source, lora)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    merged = {n: p.detach().clone() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    expected = base if "disabled" in state else merged
    actual = dict(weight_sync.merged_named_parameters(Wrapper("_orig_mod", model)))
    assert actual.keys() == expected.keys()
    for name, p in actual.items():
        torch.testing.assert_close(p, expected[name], atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(base["lm_head.weight"], merged["lm_head.weight"])


def test_partial_updates_and_refused_ones() -> None:
    params = new_params()
    with engine(params) as e:
        name = "model.norm.weight"
        assert e.update_params({name: torch.full((32,), 0.5)}, partial=True) == 1
        assert bool((params.final_norm == 0.5).all())
        with pytest.raises(ValueError, match=r"missing: .*and \d+ more"):
            e.update_params({name: torch.ones(32)})
        with pytest.raises(ValueError, match="unexpected: lora"):
            e.update_params({"lora": torch.ones(32)}, partial=True)
        with pytest.raises(ValueError, match=r"shape \(31,\), the config says \(32,\)"):
            e.update_params({name: torch.ones(31)}, partial=True)
        with pytest.raises(ValueError, match="another model's"):
            e.update_params(params._replace(final_norm=torch.ones(31)))
        for wrong, said in (
            (torch.ones(32, dtype=torch.int8), f"{name} has dtype torch.int8: weights are of floating point"),
            (torch.ones(32, dtype=torch.complex64), "dtype torch.complex64"),
            (torch.ones(32, device="meta"), f"{name} is on the meta device"),
            (torch.ones(32).to_sparse(), f"{name} is torch.sparse_coo"),
        ):
            with pytest.raises(ValueError, match=said):
                e.update_params({name: wrong}, partial=True)
        other = dict(weights.named_weights(new_params(1), CONFIG))
        first = next(iter(other))
        for pairs in ([*other.items(), (name, torch.ones(32))], other | {name: torch.ones(31)}):
            with pytest.raises(ValueError, match=f"{name} (is given twice|has shape)"):
                e.update_params(pairs)
        with pytest.raises(ValueError, match=f"{first} is given twice"):
            e.update_params(iter([(first, other[first])] * 2), partial=True, check_finite=False)
        e.update_params(new_params(), partial=True)
        assert e.weight_version == 3, "refused tensors that are in memory change nothing"
        assert generate(e) == generate_fresh(params), "pages cached before the update are not hit"


@pytest.mark.parametrize(
    ("form", "value"), [("tree", float("nan")), ("mapping", float("inf")), ("module", 1e39), ("pairs", float("-inf"))]
)
def test_update_with_values_that_are_not_finite(form: str, value: float) -> None:
    """The error names the tensor; sources in memory are then not written at all, and cached pages stay valid. 1e39 is
    finite in float64, but not in the engine's dtype."""
    params, other = new_params(0), tree_map_only(Tensor, torch.Tensor.double, new_params(1))
    wrong = "model.layers.1.self_attn.k_proj.weight"
    pairs = dict(weights.named_weights(other, CONFIG))
    pairs[wrong][1, 2] = value  # a view of the tree
    module = torch.nn.Module()
    module.named_parameters = lambda: iter(pairs.items())  # type: ignore[method-assign, assignment]
    source = {"tree": other, "mapping": pairs, "module": module, "pairs": (p for p in pairs.items())}[form]
    with engine(params) as e:
        expected = generate(e)
        with pytest.raises(ValueError, match=rf"update_params: NaN or infinite .* in {wrong} \(float32\)") as refused:
            e.update_params(source)
        if form == "pairs":  # the tensors before it are written
            assert e.weight_version == 1 and "the 15 tensors before it are written" in str(refused.value)
        else:
            assert e.weight_version == 0 and "nothing is written" in str(refused.value)
            again = generate(e)
            assert e.cache_stats.num_hit_tokens and [tokens for tokens, _ in again] == [
                tokens for tokens, _ in expected
            ]
        assert all(bool(w.isfinite().all()) for w in tree_leaves(params) if w is not None)
        assert e.update_params(pairs, check_finite=False) == e.weight_version
        assert not bool(params.layers[1].qkv.isfinite().all())


@pytest.mark.parametrize("recompute", [False, True])
def test_update_in_flight(recompute: bool) -> None:
    """Tokens have the version that sampled them; with `recompute`, later tokens depend on the new parameters alone."""
    params, other = new_params(0), new_params(1)
    with engine(params) as e:
        ids = [e.add(p, GREEDY) for p in PROMPTS]
        for _ in range(6):
            e.step()
        e.update_params(other, recompute=recompute)
        outputs = finish(e)
        completions = [outputs[i].completions[0] for i in ids]
        assert all(
            c.weight_versions == sorted(c.weight_versions) and {*c.weight_versions} == {0, 1} for c in completions
        )
        if not recompute:
            return
        for prompt, c in zip(PROMPTS, completions, strict=True):
            num_old = c.weight_versions.count(0)
            remaining = SamplingParams(temperature=0, max_tokens=12 - num_old, ignore_eos=True)
            (again,) = e.generate([prompt + c.token_ids[:num_old]], remaining)
            assert again.completions[0].token_ids == c.token_ids[num_old:]


def test_versions_survive_fork_and_snapshot(tmp_path: Path) -> None:
    with engine(new_params()) as e:
        request = e.add(PROMPTS[0], GREEDY)
        for _ in range(4):
            e.step()
        e.params_changed()
        (fork,) = e.fork(request)
        e.snapshot(request).save(tmp_path / "e.safetensors")
        restored = e.restore(fastgen.Snapshot.load(tmp_path / "e.safetensors"))
        outputs = finish(e)
        for i in (request, fork, restored):
            c = outputs[i].completions[0]
            assert len(c.weight_versions) == len(c.token_ids) == 12
            assert c.weight_versions == sorted(c.weight_versions)
            assert {*c.weight_versions} == {0, 1}


def test_update_over_a_process_group(device: str) -> None:
    """Weights arrive in buckets, from another process or another GPU."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU per process")
    results = mp.get_context("spawn").SimpleQueue()
    port = RNG.randrange(20000, 30000)
    processes = mp.spawn(send_and_receive, (port, results, device), nprocs=2, join=False)
    received = results.get()
    while not processes.join():
        pass
    for (tokens, logprobs), (tokens0, logprobs0) in zip(received, generate_fresh(new_params(0)), strict=True):
        assert tokens == tokens0 and logprobs == pytest.approx(logprobs0, abs=0 if device == "cpu" else 1e-5)


def test_handles_of_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="CUDA IPC is for a GPU"):
        fastgen.cuda_ipc_handles([("x", torch.ones(2, device="cpu"))])
