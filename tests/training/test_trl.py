"""TRL's own GRPOTrainer, with completions from fastgen on the parameters that it trains."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastgen
from fastgen.training.trl import RolloutFunc, sampling_params
from fastgen.training.weight_sync import merged_named_parameters

pytest.importorskip("trl", reason="pip install fastgen[trl]")
WARNINGS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
pytestmark = [pytest.mark.filterwarnings(x) for x in WARNINGS]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}z{% endif %}"


def letters() -> PreTrainedTokenizerFast:
    """Tokens are letters; 0 ends and 1 pads."""
    words = {"<end>": 0, "<pad>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}
    t = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<end>", pad_token="<pad>")
    found.chat_template = TEMPLATE
    return found


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reward(completions: list[Any], **given: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(t.count("a")) + 0.1 * len(t) for t in texts]


class Calling(PreTrainedTokenizerFast):
    """Whose model calls `shout` with all that it says, until it has a result, which begins with a q."""

    def parse_response(self, ids: Any, prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        text = self.decode(ids, skip_special_tokens=True)
        function = {"name": "shout", "arguments": {"text": text}}
        called = {} if "q" in self.decode(prefix) else {"tool_calls": [{"type": "function", "function": function}]}
        return {"role": "assistant", "content": text} | called


WITH_TOOLS = (
    "{% for m in messages %}{{ 'q' if m.role == 'tool' }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}{{ 'z' if add_generation_prompt }}"
)


class Seen:
    """What went through a trainer."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], dict[str, list[Any]]]] = []
        self.versions: list[int] = []
        self.scored: list[dict[str, Any]] = []


def trainer(
    folder: Path,
    rollout: Callable[..., Any],
    *,
    model: Any = None,
    prompts: list[Any] | None = None,
    words: Any = None,
    tools: list[Callable[..., Any]] | None = None,
    **args: Any,
) -> tuple[Any, Seen]:
    """A trainer of a few steps on the CPU whose rollouts are looked at, and its model's own logprobs of them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen = Seen()

    def looked(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        found = rollout(prompts, trainer)
        seen.calls.append((prompts, copy.deepcopy(found)))  # TRL writes into it
        seen.versions.append(rollout.engine.weight_version)  # type: ignore[attr-defined]
        return found

    fixed: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3,
        "max_completion_length": 10, "learning_rate": 0.01, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    config = GRPOConfig(**fixed | args)
    data = Dataset.from_dict({"prompt": prompts or ["abc", "hello", "z", "fastgenisfast"]})
    one = GRPOTrainer(
        model=model or llama(), reward_funcs=reward, args=config, train_dataset=data,
        processing_class=words or letters(), rollout_func=looked, tools=tools,
    )  # fmt: skip
    inner = one._generate_and_score_completions

    def scored(inputs: Any) -> Any:
        seen.scored.append(inner(inputs))
        return seen.scored[-1]

    one._generate_and_score_completions = scored
    return one, seen


def agree(scored: dict[str, Any]) -> None:
    """The logprobs that TRL computes again and the sampler's."""
    mask = scored["completion_mask"].bool() & scored.get("tool_mask", torch.tensor(True)).bool()
    old, mine = scored["old_per_token_logps"][mask], scored["sampling_per_token_logps"][mask]
    assert len(old) > 20
    torch.testing.assert_close(mine, old, atol=1e-4, rtol=0)


@pytest.mark.parametrize("release", [True, False])
def test_grpo_on_one_memory(release: bool, tmp_path: Path) -> None:
    """Completions are not fastgen's, parameters are copied, or a rollout has an older step's, or its pages."""
    rollout = RolloutFunc(cache_tokens=1024, page_size=4, sleep_between_rollouts=release)
    # With two updates for each rollout TRL needs the old logprobs, and computes them by the model itself.
    one, seen = trainer(tmp_path, rollout, num_iterations=2, max_steps=6, temperature=0.8)
    before = [p.detach().clone() for p in one.model.parameters()]
    objects = {id(p) for p in one.model.parameters()}
    one.train()
    assert [len(prompts) for prompts, _ in seen.calls] == [8, 8, 8]
    assert seen.versions == [0, 1, 2], "each rollout sees that there were steps of the optimizer since"
    assert one.state.global_step == 6
    assert any(not torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert {id(p) for p in one.model.parameters()} == objects
    engine = rollout.engine
    assert engine is not None
    for name, tensor in fastgen.checkpoint.weights.named_weights(engine.params, engine.model_config):
        assert tensor.data_ptr() == one.model.get_parameter(name).data_ptr(), name
    words = letters()
    for (prompts, found), scored in zip(seen.calls, seen.scored, strict=True):
        assert prompts == [p for p in prompts[::4] for _ in range(4)]
        assert found["prompt_ids"] == words(text=prompts)["input_ids"]
        assert len({tuple(c) for c in found["completion_ids"]}) > 4, "samples of a prompt are the same"
        for tokens, logprobs in zip(found["completion_ids"], found["logprobs"], strict=True):
            assert len(tokens) == len(logprobs) and (len(tokens) == 10 or tokens[-1] == 0) and 0 not in tokens[:-1]
        rows = {tuple(c) for c in found["completion_ids"]}
        for ids, mask in zip(scored["completion_ids"], scored["completion_mask"].bool(), strict=True):
            assert tuple(ids[mask].tolist()) in rows
        agree(scored)
    if release:
        with pytest.raises(ValueError, match=r"call wake_up\(\)"):  # given back between rollouts
            engine.step()
    else:
        assert engine.cache_stats.num_hit_tokens > 8 * 3, "samples of a prompt compute it once"


def test_messages_and_settings(tmp_path: Path) -> None:
    """Messages go through the chat template; settings of the trainer reach the sampler."""
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "hello")]
    given = {"top_k": 1, "max_completion_length": 5, "generation_kwargs": {"min_new_tokens": 5}, "max_steps": 1}
    one, seen = trainer(
        tmp_path, RolloutFunc(cache_tokens=1024, sleep_between_rollouts=False), prompts=prompts, **given
    )
    one.train()
    ((_, found),) = seen.calls
    assert {tuple(p) for p in found["prompt_ids"]} == {tuple(letters()(x).input_ids) for x in ("abcz", "helloz")}
    assert {len(c) for c in found["completion_ids"]} == {5}
    assert len({tuple(c) for c in found["completion_ids"]}) <= 2, "one for each prompt"


def test_tools(tmp_path: Path) -> None:
    """What follows a tool's result is drawn by the engine too, with the logprobs it was drawn with."""
    heard: list[str] = []

    def shout(text: str) -> str:
        """
        Say a text aloud.

        Args:
            text: What to say.
        """
        heard.append(text)
        return "bab"

    words = Calling(tokenizer_object=letters().backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    words.chat_template, words.response_template = WITH_TOOLS, {"it is": "parse_response that decides"}
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "hello")]
    # One prompt and answer reach the end of the model's context.
    one, seen = trainer(
        tmp_path, RolloutFunc(cache_tokens=1024), prompts=prompts, words=words, tools=[shout], max_completion_length=56,
        num_iterations=2, max_steps=2,
    )  # fmt: skip
    one.train()
    ((_, found),), (scored, *_) = seen.calls, seen.scored
    firsts = [words.decode(c, skip_special_tokens=True) for c in found["completion_ids"]]
    assert heard and set(heard) <= set(firsts)
    agree(scored)
    after = 0
    for ids, mask, ours in zip(scored["completion_ids"], scored["completion_mask"], scored["tool_mask"], strict=True):
        ids, ours = ids[mask.bool()].tolist(), ours[mask.bool()].tolist()
        if 0 in ours:
            start, stop = ours.index(0), len(ours) - ours[::-1].index(0)
            assert words.decode(ids[start:stop]) == "qbabz", "the tool's result"
            assert ids[:start] in found["completion_ids"]
            after += len(ids) - stop
    assert after > len(heard)


def test_parameters_that_are_copied(tmp_path: Path) -> None:
    """An engine of its own gets the parameters of each step, once."""
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    own = fastgen.Engine(fastgen.init(spec, 9, dtype=torch.float32), spec, letters(), progress=False, cache_tokens=1024)
    one, seen = trainer(tmp_path, RolloutFunc(own), model=source, num_iterations=2, max_steps=4)
    one.train()
    assert seen.versions == [1, 2]
    assert own.params.embed.data_ptr() != one.model.get_input_embeddings().weight.data_ptr()
    for scored in seen.scored:
        agree(scored)
    own.close()


def test_parameters_that_cannot_be_shared(tmp_path: Path) -> None:
    """A wrapped or sharded model's: the reason, what to do, and that it works."""
    source = llama()
    source.model.norm.to(torch.bfloat16)
    one, _ = trainer(tmp_path, RolloutFunc(cache_tokens=1024), model=source)
    with pytest.raises(ValueError, match=r"several dtypes.*Rollout\(fastgen.Engine.from_pretrained"):
        one.train()
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with fastgen.Engine(fastgen.init(spec, 9, dtype=torch.float32), spec, progress=False, cache_tokens=1024) as own:
        one, _ = trainer(tmp_path, RolloutFunc(own, weights=lambda _: {"x": torch.ones(2)}.items()), model=source)
        with pytest.raises(ValueError, match="do not fit the engine: .*give Rollout weights="):
            one.train()

        def doubled(t: Any) -> list[tuple[str, Tensor]]:
            return [(name, p.detach() * 2 if "embed" in name else p) for name, p in t.model.named_parameters()]

        one, seen = trainer(tmp_path, RolloutFunc(own, weights=doubled), model=source, max_steps=2)
        one.train()
        assert seen.versions == [own.weight_version - 1, own.weight_version]
    with pytest.raises(ValueError, match="set them on yours"):
        RolloutFunc(own, cache_tokens=1024)
    with pytest.raises(ValueError, match=r"Rollout\(engine, weights"):
        RolloutFunc(weights=doubled)


def test_lora(tmp_path: Path) -> None:
    """PEFT's changes are missing from completions, or the weights under them are written to."""
    peft = pytest.importorskip("peft")
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    how = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    before = {name: p.detach().clone() for name, p in source.named_parameters()}
    shared = fastgen.Engine(fastgen.adopt(source)[1], spec, progress=False, cache_tokens=1024)
    wrapped = peft.get_peft_model(source, how)
    with fastgen.Engine(fastgen.init(spec, 9, dtype=torch.float32), spec, progress=False, cache_tokens=1024) as own:
        one, seen = trainer(tmp_path, RolloutFunc(own), model=wrapped, num_iterations=2, max_steps=4)
        one.train()
        assert seen.versions == [1, 2]
        for scored in seen.scored:
            agree(scored)
    for name, p in wrapped.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    one, _ = trainer(tmp_path, RolloutFunc(shared), model=wrapped)
    with pytest.raises(ValueError, match="would overwrite"):
        one.train()
    one, _ = trainer(tmp_path, RolloutFunc(cache_tokens=1024), model=wrapped)
    with pytest.raises(ValueError, match="PeftModel.*parameters of its own"):
        one.train()
    dora = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="not by plain LoRA"):
        list(merged_named_parameters(dora))


def test_settings_that_are_not_known() -> None:
    """They are ignored, and a run is another than it says."""
    args: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": None, "repetition_penalty": 1.1,
        "max_completion_length": 20, "generation_kwargs": {"stop_strings": "x", "seed": 4},
    }  # fmt: skip
    found = sampling_params(SimpleNamespace(args=SimpleNamespace(**args), eos_token_ids=[0, 5]))
    assert found == fastgen.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, max_tokens=20, stop=("x",), seed=4,
        stop_token_ids=(0, 5), logprobs=0, logprob_mode="processed",
    )  # fmt: skip
    args["generation_kwargs"] = {"num_beams": 4}
    with pytest.raises(ValueError, match="unknown generation_kwargs 'num_beams'"):
        sampling_params(SimpleNamespace(args=SimpleNamespace(**args), eos_token_ids=[0]))
