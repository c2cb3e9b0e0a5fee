"""sleep and wake_up: memory that an engine frees for a trainer and takes again."""

import gc
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from trainer import CONFIG, GREEDY, PROMPTS, engine, finish, generate, generate_fresh, new_params, tokens_and_logprobs
from transformers import PreTrainedModel

import fastgen

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns


@pytest.fixture
def loaded(tmp_path: Path) -> fastgen.Engine:
    fastgen.save(tmp_path, CONFIG, new_params())
    settings = {"page_size": 16, "cache_tokens": 1024, "batch_invariant": True}  # recomputed tokens have the same bits
    return fastgen.Engine.from_pretrained(
        tmp_path, progress=False, dtype="float32", device=str(torch.get_default_device()), **settings
    )


def test_a_hundred_cycles(loaded: fastgen.Engine) -> None:
    """Sleeping and waking, also amid requests, never changes a token, and memory does not grow."""
    expected = generate_fresh(new_params(), batch_invariant=True)
    addresses = [w.data_ptr() for w in tree_leaves((loaded.params, loaded.cache)) if w is not None]
    size = sum(w.nbytes for w in tree_leaves((loaded.params, loaded.cache)) if w is not None)
    with loaded as e:
        for i in range(100):
            ids = [e.add(p, GREEDY) for p in PROMPTS] if i % 10 == 0 else []
            for _ in range(5):
                e.step()
            target = ("all", "cache", "params")[i % 3]
            released = e.sleep(target)
            assert e.sleep(target) == 0
            assert released >= size if target == "all" else 0 < released < size + 10**6
            if ids:
                with pytest.raises(ValueError, match=r"call wake_up\(\)"):
                    e.step()
            assert e.wake_up() == released
            if ids:
                outputs = finish(e)
                assert tokens_and_logprobs([outputs[j] for j in ids]) == expected
        assert generate(e) == expected
        if torch.get_default_device().type == "cuda":
            now = [w.data_ptr() for w in tree_leaves((e.params, e.cache)) if w is not None]
            assert now == addresses
    gc.collect()


def test_an_update_during_sleep(model: PreTrainedModel) -> None:
    """Tokens sampled after waking have the new version."""
    _, params = fastgen.adopt(model)
    with engine(params) as e:
        id = e.add(PROMPTS[0], GREEDY)
        for _ in range(4):
            e.step()
        e.sleep("cache")
        with torch.no_grad():
            model.model.norm.weight.mul_(torch.linspace(-1, 2, 32))
        e.wake_up()
        assert e.weight_version == 1
        outputs = finish(e)
        assert outputs[id].completions[0].weight_versions == [0] * 4 + [1] * 8
        assert [t for t, _ in generate(e)] == [t for t, _ in generate_fresh(params)]
        assert e.weight_version == 1


def test_sleep_frees_memory(loaded: fastgen.Engine) -> None:
    with loaded as e:
        leaf, weight = e.cache.k[0], e.params.layers[0].down
        e.sleep()
        if torch.get_default_device().type == "cpu":
            assert leaf.untyped_storage().nbytes() == weight.untyped_storage().nbytes() == 0
        e.wake_up()
        assert leaf.untyped_storage().nbytes() > leaf.nbytes
        assert not leaf.any()


def test_sleep_refusals() -> None:
    with engine(new_params()) as e:
        with pytest.raises(ValueError, match="given to the engine"):
            e.sleep("params")
        with pytest.raises(ValueError, match="did you mean cache"):
            e.sleep("cash")
        assert e.sleep() > 0, "frees the memory that the engine owns"
        e.wake_up()
        assert generate(e) == generate_fresh(new_params())
