"""adopt: one memory for a transformers model and an engine."""

import copy
import gc
import pickle
import re
import timeit
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer import CONFIG, GREEDY, PROMPTS, clone, engine, generate, generate_fresh, new_params, tokens_and_logprobs
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers_models import FAMILIES, Wrapper, new_model

import fastgen
from fastgen.checkpoint import weights
from fastgen.checkpoint.model_families import to_hf_config
from fastgen.training import logprobs, shared_params

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns


# --- sharing --------------------------------------------------------------------------------------------------------


def test_adopt_shares_one_memory(model: PreTrainedModel) -> None:
    parameters = dict(model.named_parameters())
    tokens = torch.tensor([PROMPTS[1]])
    before = model(tokens).logits
    config, params = fastgen.adopt(model)
    assert config == fastgen.from_hf_config(to_hf_config(CONFIG) | {"torch_dtype": "float32"})
    assert dict(model.named_parameters()) == parameters, "optimizers refer to these objects"
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {w.untyped_storage().data_ptr() for w in tree_leaves(params) if w is not None} == storages
    num_bytes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(num_bytes.values()) == sum(p.nbytes for p in model.parameters()), "no copy is left"
    torch.testing.assert_close(model(tokens).logits, before)
    for name, tensor in weights.named_weights(params, config):
        assert tensor.data_ptr() == parameters[name].data_ptr(), name


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer increments no version counter by itself
@pytest.mark.parametrize("compile", ["eager", "graphs"])
def test_an_optimizers_step_is_the_update(model: PreTrainedModel, compile: str, fused: bool, device: str) -> None:
    """The next step's tokens equal a new engine's bit for bit, despite a cache full of the old parameters' pages."""
    if compile == "graphs" and device == "cpu":
        pytest.skip("graphs need a GPU")
    _, params = fastgen.adopt(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    addresses = [w.data_ptr() for w in tree_leaves(params) if w is not None]
    with engine(params, compile=compile) as e:
        previous = [generate(e)]
        for i in range(3):
            optimizer.zero_grad()
            batch = torch.tensor([PROMPTS[2]])
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            outputs = e.generate(PROMPTS, GREEDY)  # without a call of params_changed
            assert e.weight_version == i + 1
            assert all(c.weight_versions == [i + 1] * 12 for o in outputs for c in o.completions)
            assert not any(o.num_cached_tokens for o in outputs)
            result = tokens_and_logprobs(outputs)
            assert result not in previous
            previous.append(result)
            assert result == generate_fresh(params, compile=compile)
            assert generate(e)[0][0] == result[0][0]
            assert e.cache_stats.num_hit_tokens > 0, "pages of the same version are hit"
    assert [w.data_ptr() for w in tree_leaves(params) if w is not None] == addresses


def test_adopt_a_model_without_a_checkpoint() -> None:
    """The architecture is the class if the config names none."""
    model = Qwen2ForCausalLM(Qwen2Config(**to_hf_config(CONFIG) | {"architectures": None}))
    config, params = fastgen.adopt(model)
    assert config.architecture == "Qwen2ForCausalLM"
    assert params.embed.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_gradients_by_score_and_by_the_model_agree(model: PreTrainedModel) -> None:
    config, params = fastgen.adopt(model)
    tokens = PROMPTS[2]
    batch = torch.tensor([tokens])
    model(batch, labels=batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    leaves = tree_map_only(Tensor, lambda w: w.detach().requires_grad_(), params)  # the same memory
    (-fastgen.score(leaves, config, [tokens])[0].mean()).backward()
    grads = tree_map_only(Tensor, lambda w: w.grad, leaves)
    for name, grad in weights.named_weights(grads, config):
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)


def loss_of(logprobs: list[Tensor]) -> Tensor:
    return torch.stack([-x.mean() for x in logprobs]).sum()


def transformers_loss(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """Returns the same loss by transformers' own forward."""
    return torch.stack([model(x, labels=x).loss for x in (torch.tensor([tokens]) for tokens in sequences)]).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, grad in expected.items():
        if grad is None:
            assert actual[name] is None, name
        else:
            torch.testing.assert_close(
                actual[name], grad, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


FROZEN = {
    "nothing": r"$.",
    "parts of packed ones": r"layers\.0.*(k_proj|up_proj|q_proj\.bias)|layers\.1.*(q_proj|v_proj)",
    "all but the head and a norm": r"(?!lm_head|model\.norm)",
    "all but a projection": r"(?!.*layers\.1\.self_attn\.k_proj\.weight)",
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_scores_reach_the_models_parameters(family: str, frozen: str) -> None:
    """Only parameters that require gradients get them: transformers' own, accumulated over two backward passes."""
    model, twin = new_model(family), new_model(family)
    adopt_first = family != "Qwen2"  # or freeze parameters first
    config, params = fastgen.adopt(model) if adopt_first else (None, None)
    for m in (model, twin):
        for name, p in m.named_parameters():
            p.requires_grad_(not re.match(FROZEN[frozen], name))
    if config is None:
        config, params = fastgen.adopt(model)
    for recompute in (False, True):
        scores = fastgen.score(params, config, PROMPTS[:3], activation_checkpointing=recompute, token_budget=30)
        loss_of(scores).backward()
        transformers_loss(twin, PROMPTS[:3]).backward()
        assert_same_gradients(gradients(model), gradients(twin))
    assert any(g is not None for g in gradients(model).values())
    for set_to_none in (False, True):
        for m in (model, twin):
            m.zero_grad(set_to_none=set_to_none)
        loss_of(fastgen.score(params, config, PROMPTS[1:3])).backward()
        transformers_loss(twin, PROMPTS[1:3]).backward()
        assert_same_gradients(gradients(model), gradients(twin))
    with torch.no_grad():
        assert not fastgen.score(params, config, PROMPTS[:1])[0].requires_grad
    assert not any(w.requires_grad for w in tree_leaves(params) if w is not None), (
        "the engine's leaves stay plain tensors"
    )


def test_training_with_scores_equals_training_with_transformers() -> None:
    """Three steps of AdamW end at the same parameters, with an engine that samples between the steps."""
    model, twin = new_model("Qwen3"), new_model("Qwen3")
    model.gradient_checkpointing_enable()
    config, params = fastgen.adopt(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-4) for m in (model, twin)]
    with fastgen.Engine(params, config, progress=False, page_size=16, cache_tokens=1024) as engine:
        for i in range(3):
            (output,) = engine.generate(PROMPTS[1], GREEDY)
            tokens = [*output.prompt_token_ids, *output.completions[0].token_ids]
            losses = loss_of(engine.score([tokens])), transformers_loss(twin, [tokens])
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
    """Packed leaves that require gradients get the same gradients as the parameters."""
    model = new_model("Qwen2")
    config, params = fastgen.adopt(model)
    for w in logprobs.iter_weights(params):
        w.requires_grad_()
    loss_of(fastgen.score(params, config, PROMPTS[1:3])).backward()
    expected = gradients(model)
    for name, grad in weights.named_weights(tree_map_only(Tensor, lambda w: w.grad, params), config):
        torch.testing.assert_close(grad, expected[name], atol=0, rtol=0)


def test_a_backward_after_a_step_is_refused() -> None:
    """torch refuses the backward pass: the forward's parameters were overwritten."""
    model = new_model("Llama")
    config, params = fastgen.adopt(model)
    loss = loss_of(fastgen.score(params, config, PROMPTS[1:2]))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_of_adopted_parameters_are_plain() -> None:
    """A deep copy, as for a reference policy, neither copies the model nor changes with it."""
    model = new_model("Llama")
    config, params = fastgen.adopt(model)
    with torch.no_grad():
        expected = fastgen.score(params, config, PROMPTS[1:2])[0]
    reference = copy.deepcopy(params)
    assert len(pickle.dumps(reference)) < 3 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    result = fastgen.score(reference, config, PROMPTS[1:2])[0]
    assert torch.equal(result, expected) and not result.requires_grad


def test_adopting_again_returns_the_same_leaves() -> None:
    """Two engines of one model both change with it."""
    model = new_model("Qwen2")
    first, second = fastgen.adopt(model)[1], fastgen.adopt(model)[1]
    assert all(a is b for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True))
    with engine(first) as a, engine(second) as b:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
        assert generate(a) == generate(b) == generate_fresh(first)
        assert a.weight_version == b.weight_version == 1


# --- models that stop sharing ---------------------------------------------------------------------------------------


def replace_parameter(model: PreTrainedModel, name: str) -> torch.nn.Parameter:
    """Replaces a parameter by a copy, and returns the copy."""
    owner, _, attribute = name.rpartition(".")
    new = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    setattr(model.get_submodule(owner), attribute, new)
    return new


def move_data(model: PreTrainedModel) -> None:
    p = model.model.layers[1].mlp.down_proj.weight
    p.data = p.data * 1.5


def add_lora(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"]))


def wrap_module(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj)


CHANGES: dict[str, tuple[Any, str]] = {
    "assign": (lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
               "model.embed_tokens.weight was replaced"),
    "data": (move_data, "model.layers.1.mlp.down_proj.weight was moved"),
    "to": (lambda m: m.to(torch.bfloat16).to(torch.float32), "model.embed_tokens.weight was moved"),
    "half": (lambda m: m.half(), "model.embed_tokens.weight was moved"),
    "peft": (add_lora, r"it got the parameter model.layers.\d.self_attn.v_proj.lora_"),
    "setattr": (lambda m: replace_parameter(m, "model.layers.0.self_attn.k_proj.weight"), "k_proj.weight was replaced"),
    "norm": (lambda m: replace_parameter(m, "model.norm.weight"), "model.norm.weight was replaced"),
    "_parameters": (lambda m: m.lm_head._parameters.update(weight=torch.nn.Parameter(torch.zeros(97, 32))), "lm_head"),
    "untied": (lambda m: replace_parameter(m, "lm_head.weight"), "lm_head.weight"),
    "resized": (lambda m: m.resize_token_embeddings(100), "model.embed_tokens.weight was"),
    "layers": (lambda m: m.model.layers.pop(1), "model.layers.1.* no longer exists"),
    "module": (wrap_module, "mlp.up_proj.weight no longer exists"),
    "meta": (lambda m: m.to("meta"), "model.embed_tokens.weight was"),
    "bias": (lambda m: m.model.layers[1].mlp.down_proj.register_parameter("bias", torch.nn.Parameter(torch.ones(32))),
             "it got the parameter model.layers.1.mlp.down_proj.bias"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # tied and untied embeddings
def test_a_model_that_stops_sharing_is_an_error(family: str, change: str) -> None:
    """The next step names the parameter and loses no request; the weight version stays."""
    model = new_model(family, head_dim=8)
    config, params = fastgen.adopt(model)
    with fastgen.Engine(params, config, progress=False, page_size=16, cache_tokens=1024) as e:
        id = e.add(PROMPTS[1], GREEDY)
        e.step()
        apply, problem = CHANGES[change]
        apply(model)
        if change == "untied" and family == "Qwen2":
            problem = "lm_head.weight was replaced"
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{problem}.*adopt the model again"):
                e.step()
        with pytest.raises(ValueError, match=rf"{problem}.*adopt the model again"):
            fastgen.score(params, config, PROMPTS[:1])
        assert e.weight_version == 0
        assert e.abort(id) is not None


def test_changes_that_keep_sharing() -> None:
    """A value head, compiled layers, checkpoint wrappers, LoRA that is unloaded again, and values loaded in place."""
    peft = pytest.importorskip("peft")
    model = new_model("Llama").requires_grad_(False)
    config, params = fastgen.adopt(model)
    with fastgen.Engine(params, config, progress=False, page_size=16, cache_tokens=1024) as e:
        before = e.score(PROMPTS[1:2])[0]
        model.value_head = torch.nn.Linear(32, 1)
        model.model.layers[0] = Wrapper("_checkpoint_wrapped_module", model.model.layers[0])
        model.model.layers[1] = Wrapper("_orig_mod", model.model.layers[1])
        model.to(torch.float32).eval()
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"])).unload()
        e.generate(PROMPTS[1], GREEDY)
        assert e.weight_version == 0 and torch.equal(e.score(PROMPTS[1:2])[0], before)
        model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})
        del model
        gc.collect()
        e.generate(PROMPTS[1], GREEDY)
        after = fastgen.score(clone(params), config, PROMPTS[1:2])[0]
        assert e.weight_version == 1 and not torch.equal(before, after)
        assert torch.equal(e.score(PROMPTS[1:2])[0], after)


def test_the_check_before_each_step_is_fast() -> None:
    """For 300 parameters about 30 µs; the bound allows for a slow machine."""
    model = new_model("Qwen3", num_hidden_layers=27)
    _, params = fastgen.adopt(model)
    (adopted,) = shared_params.adopted_models(params)
    assert len(list(model.parameters())) == 299
    assert min(timeit.repeat(adopted.check, number=20, repeat=5)) / 20 < 500e-6


def test_models_that_cannot_be_adopted(model: PreTrainedModel) -> None:
    """The error names the reason and what to do instead; the model is unchanged."""
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
    other = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf_config(CONFIG) | {"num_hidden_layers": 1}))
    other.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="no parameter model.layers.1"):
        fastgen.adopt(other)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf_config(CONFIG)))
    with pytest.raises(ValueError, match="meta device"):
        fastgen.adopt(empty)


@pytest.fixture
def single_rank_group() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters(model: PreTrainedModel, single_rank_group: None, device: str) -> None:
    """A shard cannot be adopted; an update gathers the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(device, (1,))
    for name, p in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        shard = torch.nn.Parameter(distribute_tensor(p.detach() * 1.25, mesh, [Shard(0)]))
        setattr(owner, name.rpartition(".")[2], shard)
    with pytest.raises(ValueError, match="is a DTensor"):
        fastgen.adopt(model)
    params = new_params()
    with engine(params) as e:
        e.update_params(model)
        assert generate(e) == generate_fresh(clone(new_params(), 1.25))
