"""What a trainer does with an engine: one memory, updates in place, versions of tokens, memory given back."""

import copy
import gc
import pickle
import re
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer import DICE, GREEDY, PROMPTS, SPEC, engine, expected, fresh, told, trainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

import fastgen
from fastgen import SamplingParams
from fastgen.checkpoint import weights
from fastgen.core.model_families import to_hf_config
from fastgen.training import logprobs, shared_params, weight_sync

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler, where it takes part, has some of its own


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A transformers model on the tests' device."""
    fastgen.save(tmp_path, SPEC, fresh())
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return found.to(torch.get_default_device())


# --- one memory -----------------------------------------------------------------------------------------------------


def test_adopt_shares_one_memory(model: PreTrainedModel) -> None:
    objects = dict(model.named_parameters())
    tokens = torch.tensor([PROMPTS[1]])
    before = model(tokens).logits
    spec, params = fastgen.adopt(model)
    assert spec == fastgen.from_hf_config(to_hf_config(SPEC) | {"torch_dtype": "float32"})
    assert dict(model.named_parameters()) == objects, "optimizers know these objects"
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {w.untyped_storage().data_ptr() for w in tree_leaves(params) if w is not None} == owned
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in model.parameters()), "no copy is left"
    torch.testing.assert_close(model(tokens).logits, before)
    for name, tensor in weights.named_weights(params, spec):
        assert tensor.data_ptr() == objects[name].data_ptr(), name


@pytest.mark.parametrize("fused", [False, True])  # which moves no version counter by itself
@pytest.mark.parametrize("compile", ["eager", "graphs"])
def test_an_optimizers_step_is_the_update(model: PreTrainedModel, compile: str, fused: bool, device: str) -> None:
    """Bitwise what a fresh engine says, from the step after, with a cache full of the old parameters' pages."""
    if compile == "graphs" and device == "cpu":
        pytest.skip("graphs need a GPU")
    _, params = fastgen.adopt(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    addresses = [w.data_ptr() for w in tree_leaves(params) if w is not None]
    with engine(params, compile=compile) as one:
        seen = [told(one.generate(PROMPTS, GREEDY))]
        for i in range(3):
            optimizer.zero_grad()
            batch = torch.tensor([PROMPTS[2]])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            outputs = one.generate(PROMPTS, GREEDY)  # nobody has called touch
            assert one.weight_version == i + 1
            assert all(c.weight_versions == [i + 1] * 12 for o in outputs for c in o.completions)
            assert not any(o.num_cached_tokens for o in outputs)
            found = told(outputs)
            assert found not in seen
            seen.append(found)
            assert found == expected(params, compile=compile)
            assert told(one.generate(PROMPTS, GREEDY))[0][0] == found[0][0]
            assert one.cache_stats.num_hit_tokens > 0, "the same version's pages are used again"
    assert [w.data_ptr() for w in tree_leaves(params) if w is not None] == addresses


def test_adopt_a_model_that_never_was_a_checkpoint() -> None:
    """Its config names no architecture; its class does."""
    made = Qwen2ForCausalLM(Qwen2Config(**to_hf_config(SPEC) | {"architectures": None}))
    spec, params = fastgen.adopt(made)
    assert spec.architecture == "Qwen2ForCausalLM"
    assert params.embed.data_ptr() == made.get_input_embeddings().weight.data_ptr()


def test_gradients_by_score_and_by_the_model_agree(model: PreTrainedModel) -> None:
    spec, params = fastgen.adopt(model)
    tokens = PROMPTS[2]
    batch = torch.tensor([tokens])
    model(batch, labels=batch).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    own = tree_map_only(Tensor, lambda w: w.detach().requires_grad_(), params)  # the same memory
    (-fastgen.score(own, spec, [tokens])[0].mean()).backward()
    grads = tree_map_only(Tensor, lambda w: w.grad, own)
    for name, grad in weights.named_weights(grads, spec):
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)


CONFIGS: dict[str, Any] = {"Llama": LlamaConfig, "Qwen2": Qwen2Config, "Qwen3": Qwen3Config}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": False},  # with biases
    "Qwen3": {"tie_word_embeddings": True, "head_dim": 8},  # with norms of queries and keys
}


def made(family: str, **changes: Any) -> PreTrainedModel:
    """A transformers model of random weights, in training, large enough for gradients of all sizes."""
    torch.manual_seed(0)
    config = tiny.config(family, vocab=97, context=128, **FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(CONFIGS[family].from_dict(config), dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.1)
    return model.to(torch.get_default_device()).train()


def loss_of(logprobs: list[Tensor]) -> Tensor:
    return torch.stack([-x.mean() for x in logprobs]).sum()


def own_loss(model: PreTrainedModel, many: list[list[int]]) -> Tensor:
    """The same loss by transformers' own forward."""
    return torch.stack([model(x, labels=x).loss for x in (torch.tensor([tokens]) for tokens in many)]).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    for name, grad in wanted.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


FROZEN = {
    "nothing": r"$.",
    "parts of packed ones": r"layers\.0.*(k_proj|up_proj|q_proj\.bias)|layers\.1.*(q_proj|v_proj)",
    "all but the head and a norm": r"(?!lm_head|model\.norm)",
    "all but a projection": r"(?!.*layers\.1\.self_attn\.k_proj\.weight)",
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_give_gradients_to_the_models_parameters(family: str, frozen: str) -> None:
    """Those of transformers' own backward, accumulated over two; for all that require them, and for those alone."""
    model, twin = made(family), made(family)
    before = family != "Qwen2"  # whether parameters are frozen before they are adopted
    spec, params = fastgen.adopt(model) if before else (None, None)
    for one in (model, twin):
        for name, p in one.named_parameters():
            p.requires_grad_(not re.match(FROZEN[frozen], name))
    if spec is None:
        spec, params = fastgen.adopt(model)
    for checkpointed in (False, True):
        loss_of(
            fastgen.score(params, spec, PROMPTS[:3], activation_checkpointing=checkpointed, token_budget=30)
        ).backward()
        own_loss(twin, PROMPTS[:3]).backward()
        same_gradients(gradients(model), gradients(twin))
    assert any(g is not None for g in gradients(model).values())
    for set_to_none in (False, True):
        for one in (model, twin):
            one.zero_grad(set_to_none=set_to_none)
        loss_of(fastgen.score(params, spec, PROMPTS[1:3])).backward()
        own_loss(twin, PROMPTS[1:3]).backward()
        same_gradients(gradients(model), gradients(twin))
    with torch.no_grad():
        assert not fastgen.score(params, spec, PROMPTS[:1])[0].requires_grad
    assert not any(w.requires_grad for w in tree_leaves(params) if w is not None), "the engine's stay plain tensors"


def test_training_by_scores_is_training_by_transformers() -> None:
    """Three steps of AdamW end at the same parameters, with an engine that samples between them."""
    model, twin = made("Qwen3"), made("Qwen3")
    model.gradient_checkpointing_enable()
    spec, params = fastgen.adopt(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, eps=1e-4) for one in (model, twin)]
    with fastgen.Engine(params, spec, progress=False, page_size=16, cache_tokens=1024) as engine:
        for i in range(3):
            (output,) = engine.generate(PROMPTS[1], GREEDY)
            tokens = [*output.prompt_token_ids, *output.completions[0].token_ids]
            losses = loss_of(engine.score([tokens])), own_loss(twin, [tokens])
            torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            engine.generate(PROMPTS[0], GREEDY)
            assert engine.weight_version == i + 1
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_of_leaves_that_require_them() -> None:
    """Where packed leaves were made to require gradients, they and the parameters get the same numbers."""
    model = made("Qwen2")
    spec, params = fastgen.adopt(model)
    for w in logprobs.iter_weights(params):
        w.requires_grad_()
    loss_of(fastgen.score(params, spec, PROMPTS[1:3])).backward()
    found = gradients(model)
    for name, grad in weights.named_weights(tree_map_only(Tensor, lambda w: w.grad, params), spec):
        torch.testing.assert_close(grad, found[name], atol=0, rtol=0)


def blocks(file: str, word: str) -> list[str]:
    """The Python of a document that has a word in it."""
    text = (Path(__file__).parents[2] / file).read_text()
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if word in code]


def test_the_documents_lines_teach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one after the other."""
    monkeypatch.chdir(tmp_path)
    fastgen.save("path/to/checkpoint", SPEC, fresh())
    names: dict[str, Any] = {
        "tokenizer": None, "prompts": PROMPTS, "sampling": replace(GREEDY, temperature=1, seed=0),
        "rewards": [1.0, -1.0, 0.5, 0.0], "advantages": [1.0, -1.0, 0.5, 0.0],
    }  # fmt: skip
    first, *_, second = blocks("docs/training.md", "fastgen.score(params")
    exec(first, names)
    engine, model = names["engine"], names["model"]
    assert engine.weight_version == 1
    for p, old in zip(logprobs.iter_weights(names["params"]), logprobs.iter_weights(fresh()), strict=True):
        assert not torch.equal(p, old)
    names["optimizer"].zero_grad()
    exec(second, names)
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    names |= {"hf_model": model, "cache": engine.cache, "batch": engine.last_batch}
    (readme,) = blocks("README.md", "fastgen.adopt")
    exec(readme, names)
    assert names["logits"].dtype == torch.float32 and all(x.requires_grad for x in names["logprobs"])
    assert names["engine"].params.embed is engine.params.embed


def test_a_backward_after_a_step_is_refused() -> None:
    """As torch refuses it: the forward was computed with parameters that are gone."""
    model = made("Llama")
    spec, params = fastgen.adopt(model)
    loss = loss_of(fastgen.score(params, spec, PROMPTS[1:2]))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_of_adopted_parameters_are_plain() -> None:
    """A deep copy, as for a reference policy, neither copies the model nor follows it."""
    model = made("Llama")
    spec, params = fastgen.adopt(model)
    with torch.no_grad():
        wanted = fastgen.score(params, spec, PROMPTS[1:2])[0]
    reference = copy.deepcopy(params)
    assert len(pickle.dumps(reference)) < 3 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    found = fastgen.score(reference, spec, PROMPTS[1:2])[0]
    assert torch.equal(found, wanted) and not found.requires_grad


def test_adopting_again_keeps_the_memory() -> None:
    """Two engines of one model follow it both."""
    model = made("Qwen2")
    one, two = fastgen.adopt(model)[1], fastgen.adopt(model)[1]
    assert all(a is b for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True))
    with engine(one) as a, engine(two) as b:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
        assert told(a.generate(PROMPTS, GREEDY)) == told(b.generate(PROMPTS, GREEDY)) == expected(one)
        assert a.weight_version == b.weight_version == 1


# --- a model that goes its own ways ---------------------------------------------------------------------------------


def replaced(model: PreTrainedModel, name: str) -> torch.nn.Parameter:
    """Another parameter in the place of one."""
    owner, _, own = name.rpartition(".")
    new = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    setattr(model.get_submodule(owner), own, new)
    return new


def moved_data(model: PreTrainedModel) -> None:
    p = model.model.layers[1].mlp.down_proj.weight
    p.data = p.data * 1.5


def lora(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"]))


def wrapped(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj)


APART: dict[str, tuple[Any, str]] = {
    "assign": (lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
               "model.embed_tokens.weight was replaced"),
    "data": (moved_data, "model.layers.1.mlp.down_proj.weight was moved"),
    "to": (lambda m: m.to(torch.bfloat16).to(torch.float32), "model.embed_tokens.weight was moved"),
    "half": (lambda m: m.half(), "model.embed_tokens.weight was moved"),
    "peft": (lora, r"it got the parameter model.layers.\d.self_attn.v_proj.lora_"),
    "setattr": (lambda m: replaced(m, "model.layers.0.self_attn.k_proj.weight"), "k_proj.weight was replaced"),
    "norm": (lambda m: replaced(m, "model.norm.weight"), "model.norm.weight was replaced"),
    "_parameters": (lambda m: m.lm_head._parameters.update(weight=torch.nn.Parameter(torch.zeros(97, 32))), "lm_head"),
    "untied": (lambda m: replaced(m, "lm_head.weight"), "lm_head.weight"),
    "resized": (lambda m: m.resize_token_embeddings(100), "model.embed_tokens.weight was"),
    "layers": (lambda m: m.model.layers.pop(1), "model.layers.1.* no longer exists"),
    "module": (wrapped, "mlp.up_proj.weight no longer exists"),
    "meta": (lambda m: m.to("meta"), "model.embed_tokens.weight was"),
    "bias": (lambda m: m.model.layers[1].mlp.down_proj.register_parameter("bias", torch.nn.Parameter(torch.ones(32))),
             "it got the parameter model.layers.1.mlp.down_proj.bias"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", APART)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # tied, and not
def test_a_model_that_comes_apart_from_its_engine(family: str, way: str) -> None:
    """The next step says which parameter it is, loses nothing, and the version has not moved."""
    model = made(family, head_dim=8)
    spec, params = fastgen.adopt(model)
    with fastgen.Engine(params, spec, progress=False, page_size=16, cache_tokens=1024) as one:
        id = one.add(PROMPTS[1], GREEDY)
        one.step()
        change, problem = APART[way]
        change(model)
        if way == "untied" and family == "Qwen2":
            problem = "lm_head.weight was replaced"
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{problem}.*adopt the model again"):
                one.step()
        with pytest.raises(ValueError, match=rf"{problem}.*adopt the model again"):
            fastgen.score(params, spec, PROMPTS[:1])
        assert one.weight_version == 0
        assert one.abort(id) is not None


class Wrapper(torch.nn.Module):
    """A module in another, as torch's compiler and activation checkpointing wrap them."""

    def __init__(self, name: str, inner: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def test_what_leaves_model_and_engine_together() -> None:
    """A value head, compiled layers, checkpoint wrappers, values loaded in place, LoRA that was taken off again."""
    peft = pytest.importorskip("peft")
    model = made("Llama").requires_grad_(False)
    spec, params = fastgen.adopt(model)
    with fastgen.Engine(params, spec, progress=False, page_size=16, cache_tokens=1024) as one:
        before = one.score(PROMPTS[1:2])[0]
        model.value_head = torch.nn.Linear(32, 1)
        model.model.layers[0] = Wrapper("_checkpoint_wrapped_module", model.model.layers[0])
        model.model.layers[1] = Wrapper("_orig_mod", model.model.layers[1])
        model.to(torch.float32).eval()
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"])).unload()
        one.generate(PROMPTS[1], GREEDY)
        assert one.weight_version == 0 and torch.equal(one.score(PROMPTS[1:2])[0], before)
        model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})
        del model
        gc.collect()
        one.generate(PROMPTS[1], GREEDY)
        apart = tree_map_only(Tensor, lambda w: w.detach().clone(), params)
        after = fastgen.score(apart, spec, PROMPTS[1:2])[0]
        assert (
            one.weight_version == 1
            and torch.equal(one.score(PROMPTS[1:2])[0], after)
            and not torch.equal(before, after)
        )


def test_watching_a_model_costs_a_step_little() -> None:
    """300 parameters: some 30 microseconds; the bound is that of a slow machine."""
    model = made("Qwen3", num_hidden_layers=27)
    _, params = fastgen.adopt(model)
    (adoption,) = shared_params.adopted_models(params)
    assert len(list(model.parameters())) == 299
    assert min(timeit.repeat(adoption.check, number=20, repeat=5)) / 20 < 500e-6


def test_what_cannot_be_adopted(model: PreTrainedModel) -> None:
    """The reason, and what to do instead; the model is as it was."""
    with pytest.raises(ValueError, match="has no config"):
        fastgen.adopt(torch.nn.Linear(2, 2))
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"several dtypes.*update_params"):
        fastgen.adopt(model)
    model.model.norm.to(torch.float32)
    layer = model.model.layers[0]
    layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.randn(32, 32).T)
    with pytest.raises(ValueError, match=r"q_proj.weight is not contiguous"):
        fastgen.adopt(model)
    layer.self_attn.q_proj = torch.nn.Sequential(layer.self_attn.q_proj)
    with pytest.raises(ValueError, match=r"no parameter .*q_proj.weight.*wrapped"):
        fastgen.adopt(model)
    other = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf_config(SPEC) | {"num_hidden_layers": 1}))
    other.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="no parameter model.layers.1"):
        fastgen.adopt(other)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf_config(SPEC)))
    with pytest.raises(ValueError, match="meta device"):
        fastgen.adopt(empty)


@pytest.fixture
def alone() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters(model: PreTrainedModel, alone: None, device: str) -> None:
    """A shard cannot be adopted; its whole is put together for an update."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(device, (1,))
    for name, p in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        shard = torch.nn.Parameter(distribute_tensor(p.detach() * 1.25, mesh, [Shard(0)]))
        setattr(owner, name.rpartition(".")[2], shard)
    with pytest.raises(ValueError, match="is a DTensor"):
        fastgen.adopt(model)
    params = fresh()
    with engine(params) as one:
        one.update_params(model)
        assert told(one.generate(PROMPTS, GREEDY)) == expected(tree_map_only(Tensor, lambda w: w * 1.25, fresh()))


# --- updates in place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tree", "mapping", "pairs", "module", "bf16"])
def test_update_from(kind: str, tmp_path: Path) -> None:
    """Whatever form the parameters have: the same memory, then a fresh engine's tokens."""
    params, other = fresh(0), fresh(1)
    sources: dict[str, Any] = {
        "tree": other,
        "mapping": dict(weights.named_weights(other, SPEC)),
        "pairs": ((name, t.clone()) for name, t in weights.named_weights(other, SPEC)),
        "bf16": tree_map_only(Tensor, lambda w: w.bfloat16(), other),
    }
    if kind == "module":
        fastgen.save(tmp_path, SPEC, other)
        sources["module"] = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if kind == "bf16":
        other = tree_map_only(Tensor, lambda w: w.bfloat16().float(), other)
    addresses = [w.data_ptr() for w in tree_leaves(params) if w is not None]
    with engine(params) as one:
        one.generate(PROMPTS, GREEDY)
        assert one.update_params(sources[kind]) == one.weight_version == 1
        assert told(one.generate(PROMPTS, GREEDY)) == expected(other)
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
def test_names_that_wrappers_have_changed(wrapper: str) -> None:
    params, other = fresh(0), fresh(1)
    pairs = [(WRAPPED[wrapper](name), t) for name, t in weights.named_weights(other, SPEC)]
    weights.update(params, SPEC, weight_sync.named_tensors(pairs))
    for mine, wanted in zip(tree_leaves(params), tree_leaves(other), strict=True):
        assert mine is wanted is None or torch.equal(mine, wanted)


def test_names_of_others_are_refused_with_advice() -> None:
    params, own = fresh(), dict(weights.named_weights(fresh(), SPEC))
    with pytest.raises(ValueError, match="leave 'policy.net.' out of the names"):
        weights.update(params, SPEC, weight_sync.named_tensors({"policy.net." + n: t for n, t in own.items()}))
    changed = own | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)}
    with pytest.raises(ValueError, match=r"unexpected: model.*lora_A.*; merge the adapter"):
        weights.update(params, SPEC, weight_sync.named_tensors(changed))
    with pytest.raises(ValueError, match="model.norm.weight is a list, not a tensor"):
        weights.update(params, SPEC, weight_sync.named_tensors({"model.norm.weight": [1.0]}), partial=True)
    for wrong in ("a/folder", 5, None, torch.tensor(1.0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="parameters come as a tree, module"):
            weight_sync.named_tensors(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "merged, then disabled"])
def test_parameters_of_a_module_that_peft_has_wrapped(state: str) -> None:
    """They are those that it computes with, whatever is merged, and compiled or not."""
    peft = pytest.importorskip("peft")
    source = made("Qwen2")
    plain = {name: p.detach().clone() for name, p in source.named_parameters()}
    how = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
                          init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(source, how)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    changed = {n: p.detach().clone() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    wanted = plain if "disabled" in state else changed
    found = dict(weight_sync.merged_named_parameters(Wrapper("_orig_mod", model)))
    assert found.keys() == wanted.keys()
    for name, p in found.items():
        torch.testing.assert_close(p, wanted[name], atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(plain["lm_head.weight"], changed["lm_head.weight"])


def test_update_of_some_and_wrong_ones() -> None:
    params = fresh()
    with engine(params) as one:
        name = "model.norm.weight"
        assert one.update_params({name: torch.full((32,), 0.5)}, partial=True) == 1
        assert bool((params.final_norm == 0.5).all())
        with pytest.raises(ValueError, match=r"missing: .*and \d+ more"):
            one.update_params({name: torch.ones(32)})
        with pytest.raises(ValueError, match="unexpected: lora"):
            one.update_params({"lora": torch.ones(32)}, partial=True)
        with pytest.raises(ValueError, match=r"shape \(31,\), the config says \(32,\)"):
            one.update_params({name: torch.ones(31)}, partial=True)
        with pytest.raises(ValueError, match="another model's"):
            one.update_params(params._replace(final_norm=torch.ones(31)))
        for wrong, said in (
            (torch.ones(32, dtype=torch.int8), f"{name} has dtype torch.int8: weights are of floating point"),
            (torch.ones(32, dtype=torch.complex64), "dtype torch.complex64"),
            (torch.ones(32, device="meta"), f"{name} is on the meta device"),
            (torch.ones(32).to_sparse(), f"{name} is torch.sparse_coo"),
        ):
            with pytest.raises(ValueError, match=said):
                one.update_params({name: wrong}, partial=True)
        other = dict(weights.named_weights(fresh(1), SPEC))
        first = next(iter(other))
        for pairs in ([*other.items(), (name, torch.ones(32))], other | {name: torch.ones(31)}):
            with pytest.raises(ValueError, match=f"{name} (is given twice|has shape)"):
                one.update_params(pairs)
        with pytest.raises(ValueError, match=f"{first} is given twice"):
            one.update_params(iter([(first, other[first])] * 2), partial=True, check_finite=False)
        one.update_params(fresh(), partial=True)
        assert one.weight_version == 3, "refused tensors that are all in memory change nothing"
        assert told(one.generate(PROMPTS, GREEDY)) == expected(params), "what was cached meanwhile is of no use"


@pytest.mark.parametrize(
    ("kind", "value"), [("tree", float("nan")), ("mapping", float("inf")), ("module", 1e39), ("pairs", float("-inf"))]
)
def test_update_with_values_that_are_not_finite(kind: str, value: float) -> None:
    """Refused by the tensor's name; from memory nothing is written then, and nothing cached is lost. 1e39 is finite as
    given, and not in the engine's dtype."""
    params, other = fresh(0), tree_map_only(Tensor, torch.Tensor.double, fresh(1))
    wrong = "model.layers.1.self_attn.k_proj.weight"
    pairs = dict(weights.named_weights(other, SPEC))
    pairs[wrong][1, 2] = value  # a view of the tree
    module = torch.nn.Module()
    module.named_parameters = lambda: iter(pairs.items())  # type: ignore[method-assign, assignment]
    source = {"tree": other, "mapping": pairs, "module": module, "pairs": (p for p in pairs.items())}[kind]
    with engine(params) as one:
        wanted = told(one.generate(PROMPTS, GREEDY))
        with pytest.raises(ValueError, match=rf"update_params: NaN or infinite .* in {wrong} \(float32\)") as refused:
            one.update_params(source)
        if kind == "pairs":  # those before it are written
            assert one.weight_version == 1 and "the 15 tensors before it are written" in str(refused.value)
        else:
            assert one.weight_version == 0 and "nothing is written" in str(refused.value)
            again = told(one.generate(PROMPTS, GREEDY))
            assert one.cache_stats.num_hit_tokens and [tokens for tokens, _ in again] == [
                tokens for tokens, _ in wanted
            ]
        assert all(bool(w.isfinite().all()) for w in tree_leaves(params) if w is not None)
        assert one.update_params(pairs, check_finite=False) == one.weight_version
        assert not bool(params.layers[1].qkv.isfinite().all())


@pytest.mark.parametrize("recompute", [False, True])
def test_update_in_flight(recompute: bool) -> None:
    """Tokens carry the version that drew them; with `recompute` the later ones are the new parameters' altogether."""
    params, other = fresh(0), fresh(1)
    with engine(params) as one:
        ids = [one.add(p, GREEDY) for p in PROMPTS]
        for _ in range(6):
            one.step()
        one.update_params(other, recompute=recompute)
        done = {}
        while one.has_unfinished_requests:
            done |= {e.request_id: e.output for e in one.step() if e.output}
        found = [done[i].completions[0] for i in ids]
        assert all(c.weight_versions == sorted(c.weight_versions) and {*c.weight_versions} == {0, 1} for c in found)
        if not recompute:
            return
        for prompt, c in zip(PROMPTS, found, strict=True):
            drawn = c.weight_versions.count(0)
            rest = SamplingParams(temperature=0, max_tokens=12 - drawn, ignore_eos=True)
            (again,) = one.generate([prompt + c.token_ids[:drawn]], rest)
            assert again.completions[0].token_ids == c.token_ids[drawn:]


def test_versions_survive_fork_and_snapshot(tmp_path: Path) -> None:
    with engine(fresh()) as one:
        request = one.add(PROMPTS[0], GREEDY)
        for _ in range(4):
            one.step()
        one.params_changed()
        (fork,) = one.fork(request)
        one.snapshot(request).save(tmp_path / "one.safetensors")
        back = one.restore(fastgen.Snapshot.load(tmp_path / "one.safetensors"))
        done = {}
        while one.has_unfinished_requests:
            done |= {e.request_id: e.output for e in one.step() if e.output}
        for i in (request, fork, back):
            c = done[i].completions[0]
            assert len(c.weight_versions) == len(c.token_ids) == 12
            assert c.weight_versions == sorted(c.weight_versions)
            assert {*c.weight_versions} == {0, 1}


def test_update_over_a_process_group(device: str) -> None:
    """In buckets, from another process, or another GPU."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("a GPU each")
    found = mp.get_context("spawn").SimpleQueue()
    port = DICE.randrange(20000, 30000)
    done = mp.spawn(trainer, (port, found, device), nprocs=2, join=False)
    answer = found.get()
    while not done.join():
        pass
    for (tokens, values), (other, wanted) in zip(answer, expected(fresh(0)), strict=True):
        assert tokens == other and values == pytest.approx(wanted, abs=0 if device == "cpu" else 1e-5)


def test_handles_are_for_a_gpus_memory() -> None:
    with pytest.raises(ValueError, match="CUDA IPC is for a GPU"):
        fastgen.cuda_ipc_handles([("x", torch.ones(2, device="cpu"))])


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> fastgen.Engine:
    fastgen.save(tmp_path, SPEC, fresh())
    how = {"page_size": 16, "cache_tokens": 1024, "batch_invariant": True}  # what is computed again has the same bits
    return fastgen.Engine.from_pretrained(
        tmp_path, progress=False, dtype="float32", device=str(torch.get_default_device()), **how
    )


def test_a_hundred_cycles(loaded: fastgen.Engine) -> None:
    """Never a wrong token, nothing that grows, in the middle of requests too."""
    wanted = expected(fresh(), batch_invariant=True)
    addresses = [w.data_ptr() for w in tree_leaves((loaded.params, loaded.cache)) if w is not None]
    size = sum(w.nbytes for w in tree_leaves((loaded.params, loaded.cache)) if w is not None)
    with loaded as one:
        for i in range(100):
            ids = [one.add(p, GREEDY) for p in PROMPTS] if i % 10 == 0 else []
            for _ in range(5):
                one.step()
            what = ("all", "cache", "params")[i % 3]
            given = one.sleep(what)
            assert one.sleep(what) == 0
            assert given >= size if what == "all" else 0 < given < size + 10**6
            if ids:
                with pytest.raises(ValueError, match=r"call wake_up\(\)"):
                    one.step()
            assert one.wake_up() == given
            if ids:
                done = {}
                while one.has_unfinished_requests:
                    done |= {e.request_id: e.output for e in one.step() if e.output}
                assert told([done[j] for j in ids]) == wanted
        assert told(one.generate(PROMPTS, GREEDY)) == wanted
        if torch.get_default_device().type == "cuda":
            now = [w.data_ptr() for w in tree_leaves((one.params, one.cache)) if w is not None]
            assert now == addresses
    gc.collect()


def test_an_update_while_memory_is_given_back(model: PreTrainedModel) -> None:
    """Tokens after it say that they are the old parameters'."""
    _, params = fastgen.adopt(model)
    with engine(params) as one:
        id = one.add(PROMPTS[0], GREEDY)
        for _ in range(4):
            one.step()
        one.sleep("cache")
        with torch.no_grad():
            model.model.norm.weight.mul_(torch.linspace(-1, 2, 32))
        one.wake_up()
        assert one.weight_version == 1
        while one.has_unfinished_requests:
            found = {e.request_id: e.output for e in one.step() if e.output}
        assert found[id].completions[0].weight_versions == [0] * 4 + [1] * 8
        assert [t for t, _ in told(one.generate(PROMPTS, GREEDY))] == [t for t, _ in expected(params)]
        assert one.weight_version == 1


def test_what_is_released_is_free(loaded: fastgen.Engine) -> None:
    with loaded as one:
        leaf, weight = one.cache.k[0], one.params.layers[0].down
        one.sleep()
        if torch.get_default_device().type == "cpu":
            assert leaf.untyped_storage().nbytes() == weight.untyped_storage().nbytes() == 0
        one.wake_up()
        assert leaf.untyped_storage().nbytes() > leaf.nbytes
        assert not leaf.any()


def test_what_cannot_be_released() -> None:
    with engine(fresh()) as one:
        with pytest.raises(ValueError, match="given to the engine"):
            one.sleep("params")
        with pytest.raises(ValueError, match="did you mean cache"):
            one.sleep("cash")
        assert one.sleep() > 0, "all that is its own"
        one.wake_up()
        assert told(one.generate(PROMPTS, GREEDY)) == expected(fresh())
