"""TRL's own GRPOTrainer with completions from fastgen, on the parameters that it trains."""

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

pytest.importorskip("trl", reason="needs the extra trl")
WARNINGS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
pytestmark = [pytest.mark.filterwarnings(x) for x in WARNINGS]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}z{% endif %}"


def letters() -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are letters; 0 is EOS and 1 is padding."""
    words = {"<end>": 0, "<pad>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}
    t = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reward(completions: list[Any], **columns: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(t.count("a")) + 0.1 * len(t) for t in texts]


class Calling(PreTrainedTokenizerFast):
    """A tokenizer that parses every completion as a call of `shout`, until the prompt has a result (with a q)."""

    def parse_response(self, ids: Any, prefix: Any = None, tools: Any = None) -> dict[str, Any]:
        text = self.decode(ids, skip_special_tokens=True)
        function = {"name": "shout", "arguments": {"text": text}}
        calls = {} if "q" in self.decode(prefix) else {"tool_calls": [{"type": "function", "function": function}]}
        return {"role": "assistant", "content": text} | calls


WITH_TOOLS = (
    "{% for m in messages %}{{ 'q' if m.role == 'tool' }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}{{ 'z' if add_generation_prompt }}"
)


class Record:
    """Rollouts of a trainer, the engine's weight versions, and TRL's scored batches."""

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
) -> tuple[Any, Record]:
    """Returns a trainer of a few steps on the CPU, and the record of its rollouts and of its model's own logprobs."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    record = Record()

    def recorded(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        result = rollout(prompts, trainer)
        record.calls.append((prompts, copy.deepcopy(result)))  # TRL modifies it
        record.versions.append(rollout.engine.weight_version)  # type: ignore[attr-defined]
        return result

    defaults: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3,
        "max_completion_length": 10, "learning_rate": 0.01, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    config = GRPOConfig(**defaults | args)
    data = Dataset.from_dict({"prompt": prompts or ["abc", "hello", "z", "fastgenisfast"]})
    t = GRPOTrainer(
        model=model or llama(), reward_funcs=reward, args=config, train_dataset=data,
        processing_class=words or letters(), rollout_func=recorded, tools=tools,
    )  # fmt: skip
    generate_and_score = t._generate_and_score_completions

    def scored(inputs: Any) -> Any:
        record.scored.append(generate_and_score(inputs))
        return record.scored[-1]

    t._generate_and_score_completions = scored
    return t, record


def assert_logprobs_agree(scored: dict[str, Any]) -> None:
    """Compares the sampler's logprobs with those that TRL recomputes."""
    mask = scored["completion_mask"].bool() & scored.get("tool_mask", torch.tensor(True)).bool()
    recomputed, sampled = scored["old_per_token_logps"][mask], scored["sampling_per_token_logps"][mask]
    assert len(recomputed) > 20
    torch.testing.assert_close(sampled, recomputed, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sleep", [True, False])
def test_grpo_on_shared_memory(sleep: bool, tmp_path: Path) -> None:
    """Completions are fastgen's; parameters are not copied; each rollout uses the latest step's, and no older pages."""
    rollout = RolloutFunc(cache_tokens=1024, page_size=4, sleep_between_rollouts=sleep)
    # With two updates per rollout TRL needs the old logprobs, and computes them with the model itself.
    t, record = trainer(tmp_path, rollout, num_iterations=2, max_steps=6, temperature=0.8)
    before = [p.detach().clone() for p in t.model.parameters()]
    objects = {id(p) for p in t.model.parameters()}
    t.train()
    assert [len(prompts) for prompts, _ in record.calls] == [8, 8, 8]
    assert record.versions == [0, 1, 2], "each rollout notices the optimizer steps since the last"
    assert t.state.global_step == 6
    assert any(not torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    assert {id(p) for p in t.model.parameters()} == objects
    engine = rollout.engine
    assert engine is not None
    for name, tensor in fastgen.checkpoint.weights.named_weights(engine.params, engine.model_config):
        assert tensor.data_ptr() == t.model.get_parameter(name).data_ptr(), name
    words = letters()
    for (prompts, outputs), scored in zip(record.calls, record.scored, strict=True):
        assert prompts == [p for p in prompts[::4] for _ in range(4)]
        assert outputs["prompt_ids"] == words(text=prompts)["input_ids"]
        assert len({tuple(c) for c in outputs["completion_ids"]}) > 4, "samples of a prompt are equal"
        for tokens, logprobs in zip(outputs["completion_ids"], outputs["logprobs"], strict=True):
            assert len(tokens) == len(logprobs) and (len(tokens) == 10 or tokens[-1] == 0) and 0 not in tokens[:-1]
        rows = {tuple(c) for c in outputs["completion_ids"]}
        for ids, mask in zip(scored["completion_ids"], scored["completion_mask"].bool(), strict=True):
            assert tuple(ids[mask].tolist()) in rows
        assert_logprobs_agree(scored)
    if sleep:
        with pytest.raises(ValueError, match=r"call wake_up\(\)"):  # asleep between rollouts
            engine.step()
    else:
        assert engine.cache_stats.num_hit_tokens > 8 * 3, "samples of a prompt share its pages"


def test_messages_and_settings(tmp_path: Path) -> None:
    """Messages go through the chat template; settings of the trainer reach the sampler."""
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "hello")]
    args = {"top_k": 1, "max_completion_length": 5, "generation_kwargs": {"min_new_tokens": 5}, "max_steps": 1}
    t, record = trainer(tmp_path, RolloutFunc(cache_tokens=1024, sleep_between_rollouts=False), prompts=prompts, **args)
    t.train()
    ((_, outputs),) = record.calls
    assert {tuple(p) for p in outputs["prompt_ids"]} == {tuple(letters()(x).input_ids) for x in ("abcz", "helloz")}
    assert {len(c) for c in outputs["completion_ids"]} == {5}
    assert len({tuple(c) for c in outputs["completion_ids"]}) <= 2, "greedy: one distinct completion per prompt"


def test_tools(tmp_path: Path) -> None:
    """The turn after a tool's result is sampled by the engine too, with its logprobs."""
    shouted: list[str] = []

    def shout(text: str) -> str:
        """
        Say a text aloud.

        Args:
            text: What to say.
        """
        shouted.append(text)
        return "bab"

    words = Calling(tokenizer_object=letters().backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    words.chat_template, words.response_template = WITH_TOOLS, {"it is": "parse_response that decides"}
    prompts = [[{"role": "user", "content": text}] for text in ("abc", "hello")]
    # One prompt and answer reach the end of the model's context.
    t, record = trainer(
        tmp_path, RolloutFunc(cache_tokens=1024), prompts=prompts, words=words, tools=[shout], max_completion_length=56,
        num_iterations=2, max_steps=2,
    )  # fmt: skip
    t.train()
    ((_, outputs),), (scored, *_) = record.calls, record.scored
    firsts = [words.decode(c, skip_special_tokens=True) for c in outputs["completion_ids"]]
    assert shouted and set(shouted) <= set(firsts)
    assert_logprobs_agree(scored)
    after = 0
    for ids, mask, ours in zip(scored["completion_ids"], scored["completion_mask"], scored["tool_mask"], strict=True):
        ids, ours = ids[mask.bool()].tolist(), ours[mask.bool()].tolist()
        if 0 in ours:
            start, stop = ours.index(0), len(ours) - ours[::-1].index(0)
            assert words.decode(ids[start:stop]) == "qbabz", "the tool's result"
            assert ids[:start] in outputs["completion_ids"]
            after += len(ids) - stop
    assert after > len(shouted)


def test_parameters_copied_to_an_engine(tmp_path: Path) -> None:
    """An engine with parameters of its own gets each step's parameters once."""
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    engine = fastgen.Engine(
        fastgen.init(spec, 9, dtype=torch.float32), spec, letters(), progress=False, cache_tokens=1024
    )
    t, record = trainer(tmp_path, RolloutFunc(engine), model=source, num_iterations=2, max_steps=4)
    t.train()
    assert record.versions == [1, 2]
    assert engine.params.embed.data_ptr() != t.model.get_input_embeddings().weight.data_ptr()
    for scored in record.scored:
        assert_logprobs_agree(scored)
    engine.close()


def test_parameters_that_cannot_be_shared(tmp_path: Path) -> None:
    """The error names the reason and the remedy, and the remedy works."""
    source = llama()
    source.model.norm.to(torch.bfloat16)
    t, _ = trainer(tmp_path, RolloutFunc(cache_tokens=1024), model=source)
    with pytest.raises(ValueError, match=r"several dtypes.*RolloutFunc\(fastgen.Engine.from_pretrained"):
        t.train()
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with fastgen.Engine(fastgen.init(spec, 9, dtype=torch.float32), spec, progress=False, cache_tokens=1024) as engine:
        t, _ = trainer(tmp_path, RolloutFunc(engine, weights=lambda _: {"x": torch.ones(2)}.items()), model=source)
        with pytest.raises(ValueError, match="do not fit the engine: .*pass weights="):
            t.train()

        def doubled(trainer: Any) -> list[tuple[str, Tensor]]:
            return [(name, p.detach() * 2 if "embed" in name else p) for name, p in trainer.model.named_parameters()]

        t, record = trainer(tmp_path, RolloutFunc(engine, weights=doubled), model=source, max_steps=2)
        t.train()
        assert record.versions == [engine.weight_version - 1, engine.weight_version]
    with pytest.raises(ValueError, match="set them on yours"):
        RolloutFunc(engine, cache_tokens=1024)
    with pytest.raises(ValueError, match=r"RolloutFunc\(engine, weights"):
        RolloutFunc(weights=doubled)


def test_lora(tmp_path: Path) -> None:
    """Completions use PEFT's LoRA, and the base weights are not written to."""
    peft = pytest.importorskip("peft")
    source = llama()
    spec = fastgen.from_hf_config(source.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    before = {name: p.detach().clone() for name, p in source.named_parameters()}
    shared = fastgen.Engine(fastgen.adopt(source)[1], spec, progress=False, cache_tokens=1024)
    wrapped = peft.get_peft_model(source, lora)
    with fastgen.Engine(fastgen.init(spec, 9, dtype=torch.float32), spec, progress=False, cache_tokens=1024) as engine:
        t, record = trainer(tmp_path, RolloutFunc(engine), model=wrapped, num_iterations=2, max_steps=4)
        t.train()
        assert record.versions == [1, 2]
        for scored in record.scored:
            assert_logprobs_agree(scored)
    for name, p in wrapped.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    t, _ = trainer(tmp_path, RolloutFunc(shared), model=wrapped)
    with pytest.raises(ValueError, match="would overwrite"):
        t.train()
    t, _ = trainer(tmp_path, RolloutFunc(cache_tokens=1024), model=wrapped)
    with pytest.raises(ValueError, match="PeftModel.*parameters of its own"):
        t.train()
    dora = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="not by plain LoRA"):
        list(merged_named_parameters(dora))


def test_sampling_params_of_a_trainer() -> None:
    """Settings are translated, and unknown ones refused instead of ignored."""
    args: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": None, "repetition_penalty": 1.1,
        "max_completion_length": 20, "generation_kwargs": {"stop_strings": "x", "seed": 4},
    }  # fmt: skip
    sampling = sampling_params(SimpleNamespace(args=SimpleNamespace(**args), eos_token_ids=[0, 5]))
    assert sampling == fastgen.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, max_tokens=20, stop=("x",), seed=4,
        stop_token_ids=(0, 5), logprobs=0, logprob_mode="processed",
    )  # fmt: skip
    args["generation_kwargs"] = {"num_beams": 4}
    with pytest.raises(ValueError, match="unknown generation_kwargs 'num_beams'"):
        sampling_params(SimpleNamespace(args=SimpleNamespace(**args), eos_token_ids=[0]))
