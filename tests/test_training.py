"""What a trainer does with an engine: one memory, updates in place, versions of tokens, memory given back."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from trainer import DICE, GREEDY, PROMPTS, SPEC, engine, expected, fresh, told, trainer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import fastgen
from fastgen import SamplingParams
from fastgen.models import weights
from fastgen.models.spec import to_hf

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
    assert spec == fastgen.from_hf(to_hf(SPEC) | {"torch_dtype": "float32"})
    assert dict(model.named_parameters()) == objects, "optimizers know these objects"
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {w.untyped_storage().data_ptr() for w in tree_leaves(params) if w is not None} == owned
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in model.parameters()), "no copy is left"
    torch.testing.assert_close(model(tokens).logits, before)
    for name, tensor in weights.named(params, spec):
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
            assert one.version == i + 1
            assert all(c.versions == [i + 1] * 12 for o in outputs for c in o.completions)
            assert not any(o.cached_tokens for o in outputs)
            found = told(outputs)
            assert found not in seen
            seen.append(found)
            assert found == expected(params, compile=compile)
            assert told(one.generate(PROMPTS, GREEDY))[0][0] == found[0][0]
            assert one.counts.reused > 0, "the same version's pages are used again"
    assert [w.data_ptr() for w in tree_leaves(params) if w is not None] == addresses


def test_adopt_a_model_that_never_was_a_checkpoint() -> None:
    """Its config names no architecture; its class does."""
    made = Qwen2ForCausalLM(Qwen2Config(**to_hf(SPEC) | {"architectures": None}))
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
    for name, grad in weights.named(grads, spec):
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)


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
    other = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf(SPEC) | {"num_hidden_layers": 1}))
    other.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="no parameter model.layers.1"):
        fastgen.adopt(other)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(Qwen2Config(**to_hf(SPEC)))
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
        assert told(one.generate(PROMPTS, GREEDY)) == expected(
            tree_map_only(Tensor, lambda w: w * 1.25, fresh()),
        )


# --- updates in place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tree", "mapping", "pairs", "module", "bf16"])
def test_update_from(kind: str, tmp_path: Path) -> None:
    """Whatever form the parameters have: the same memory, then a fresh engine's tokens."""
    params, other = fresh(0), fresh(1)
    sources: dict[str, Any] = {
        "tree": other,
        "mapping": dict(weights.named(other, SPEC)),
        "pairs": ((name, t.clone()) for name, t in weights.named(other, SPEC)),
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
        assert one.update_params(sources[kind]) == one.version == 1
        assert told(one.generate(PROMPTS, GREEDY)) == expected(other)
    assert [w.data_ptr() for w in tree_leaves(params) if w is not None] == addresses


def test_update_of_some_and_wrong_ones() -> None:
    params = fresh()
    with engine(params) as one:
        name = "model.norm.weight"
        assert one.update_params({name: torch.full((32,), 0.5)}, partial=True) == 1
        assert bool((params.norm == 0.5).all())
        with pytest.raises(ValueError, match=r"missing: .*and \d+ more"):
            one.update_params({name: torch.ones(32)})
        with pytest.raises(ValueError, match="unexpected: lora"):
            one.update_params({"lora": torch.ones(32)}, partial=True)
        with pytest.raises(ValueError, match=r"shape \(31,\), the config says \(32,\)"):
            one.update_params({name: torch.ones(31)}, partial=True)
        with pytest.raises(ValueError, match="another model's"):
            one.update_params(params._replace(norm=torch.ones(31)))
        assert told(one.generate(PROMPTS, GREEDY)) == expected(params), "what was cached meanwhile is of no use"


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
        while one.unfinished:
            done |= {e.request_id: e.output for e in one.step() if e.output}
        found = [done[i].completions[0] for i in ids]
        assert all(c.versions == sorted(c.versions) and {*c.versions} == {0, 1} for c in found)
        if not recompute:
            return
        for prompt, c in zip(PROMPTS, found, strict=True):
            drawn = c.versions.count(0)
            rest = SamplingParams(temperature=0, max_tokens=12 - drawn, ignore_eos=True)
            (again,) = one.generate([prompt + c.token_ids[:drawn]], rest)
            assert again.completions[0].token_ids == c.token_ids[drawn:]


def test_versions_survive_fork_and_snapshot(tmp_path: Path) -> None:
    with engine(fresh()) as one:
        request = one.add(PROMPTS[0], GREEDY)
        for _ in range(4):
            one.step()
        one.touch()
        (fork,) = one.fork(request)
        one.snapshot(request).save(tmp_path / "one.safetensors")
        back = one.restore(fastgen.Snapshot.load(tmp_path / "one.safetensors"))
        done = {}
        while one.unfinished:
            done |= {e.request_id: e.output for e in one.step() if e.output}
        for i in (request, fork, back):
            c = done[i].completions[0]
            assert len(c.versions) == len(c.token_ids) == 12
            assert c.versions == sorted(c.versions)
            assert {*c.versions} == {0, 1}


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
    for (tokens, logprobs), (other, wanted) in zip(answer, expected(fresh(0)), strict=True):
        assert tokens == other and logprobs == pytest.approx(wanted, abs=0 if device == "cpu" else 1e-5)


def test_handles_are_for_a_gpus_memory() -> None:
    with pytest.raises(ValueError, match="CUDA IPC is for a GPU"):
        fastgen.handles([("x", torch.ones(2, device="cpu"))])


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> fastgen.Engine:
    fastgen.save(tmp_path, SPEC, fresh())
    how = {"page_size": 16, "cache_tokens": 1024, "deterministic": True}  # what is computed again has the same bits
    return fastgen.Engine.from_pretrained(
        tmp_path, progress=False, dtype="float32", device=str(torch.get_default_device()), **how
    )


def test_a_hundred_cycles(loaded: fastgen.Engine) -> None:
    """Never a wrong token, nothing that grows, in the middle of requests too."""
    wanted = expected(fresh(), deterministic=True)
    addresses = [w.data_ptr() for w in tree_leaves((loaded.params, loaded.cache)) if w is not None]
    size = sum(w.nbytes for w in tree_leaves((loaded.params, loaded.cache)) if w is not None)
    with loaded as one:
        for i in range(100):
            ids = [one.add(p, GREEDY) for p in PROMPTS] if i % 10 == 0 else []
            for _ in range(5):
                one.step()
            what = ("all", "cache", "params")[i % 3]
            given = one.release(what)
            assert one.release(what) == 0
            assert given >= size if what == "all" else 0 < given < size + 10**6
            if ids:
                with pytest.raises(ValueError, match=r"call restore\(\)"):
                    one.step()
            assert one.restore() == given
            if ids:
                done = {}
                while one.unfinished:
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
        one.release("cache")
        with torch.no_grad():
            model.model.norm.weight.mul_(torch.linspace(-1, 2, 32))
        one.restore()
        assert one.version == 1
        while one.unfinished:
            found = {e.request_id: e.output for e in one.step() if e.output}
        assert found[id].completions[0].versions == [0] * 4 + [1] * 8
        assert [t for t, _ in told(one.generate(PROMPTS, GREEDY))] == [t for t, _ in expected(params)]
        assert one.version == 1


def test_what_is_released_is_free(loaded: fastgen.Engine) -> None:
    with loaded as one:
        leaf, weight = one.cache.k[0], one.params.layers[0].down
        one.release()
        if torch.get_default_device().type == "cpu":
            assert leaf.untyped_storage().nbytes() == weight.untyped_storage().nbytes() == 0
        one.restore()
        assert leaf.untyped_storage().nbytes() > leaf.nbytes
        assert not leaf.any()


def test_what_cannot_be_released() -> None:
    with engine(fresh()) as one:
        with pytest.raises(ValueError, match="given to the engine"):
            one.release("params")
        with pytest.raises(ValueError, match="did you mean cache"):
            one.release("cash")
        assert one.release() > 0, "all that is its own"
        one.restore()
        assert told(one.generate(PROMPTS, GREEDY)) == expected(fresh())
