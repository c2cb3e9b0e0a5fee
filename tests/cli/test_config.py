"""Tests that settings reject invalid values, and that every file in conf/ composes."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from itertools import combinations, product
from typing import Any

import hydra
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import GenerationConfig

import fastgen
from fastgen.argument_hints import CALL_HINTS, ENGINE_HINTS, SAMPLING_HINTS
from fastgen.cli import run
from fastgen.cli.hydra_config import KEY_ALIASES, TASKS, RunConfig, compose, conf_dir, to_dataclass
from fastgen.config import (
    CompileConfig,
    EngineConfig,
    GrpoConfig,
    KVCacheConfig,
    LoadConfig,
    LoraConfig,
    OffloadConfig,
    ParallelConfig,
    QuantizationConfig,
    SchedulerConfig,
)
from fastgen.sampling_params import SamplingParams

NAN = float("nan")
BAD = [
    (SamplingParams, "temperature", [-0.1, 101, NAN, True, "1", None], "between 0 and 100"),
    (SamplingParams, "top_p", [0, 0.0, -1, 1.01, NAN], "at most 1|between 0 and 1"),
    (SamplingParams, "top_k", [-2, 1.0, False], "at least 0"),
    (SamplingParams, "min_p", [-0.01, 1.1, NAN], "between 0 and 1"),
    (SamplingParams, "seed", [2**63, -(2**63) - 1, 1.5], str(2**63 - 1)),
    (SamplingParams, "n", [0, 4097, 2.0, None], "between 1 and 4096"),
    (SamplingParams, "max_tokens", [0, -1, 1.5], "at least 1"),
    (SamplingParams, "min_tokens", [-1, 257, 0.5], "between 0 and 256"),
    (SamplingParams, "stop", [[""], ["a", ""], [1]], "non-empty strings"),
    (SamplingParams, "stop_token_ids", [[-1], [1.0], ["2"]], "at least 0"),
    (SamplingParams, "bad_words", [[""], [" "], [1]], "non-empty strings"),
    (SamplingParams, "allowed_token_ids", [[-1], [1.0]], "at least 0|whole number"),
    (SamplingParams, "logits_processors", [[1], ["f"]], "must hold functions"),
    (SamplingParams, "truncate_prompt_tokens", [0, -1, 1.5], "at least 1|whole number"),
    (SamplingParams, "include_stop_str_in_output", [1, "yes", None], "true or false"),
    (SamplingParams, "skip_special_tokens", [0, "no", None], "true or false"),
    (SamplingParams, "detokenize", [0, "no", None], "true or false"),
    (SamplingParams, "presence_penalty", [-2.1, 2.1, NAN], "between -2 and 2"),
    (SamplingParams, "frequency_penalty", [-2.1, 2.1, NAN], "between -2 and 2"),
    (SamplingParams, "repetition_penalty", [0, 101, NAN], "between 0.001 and 100"),
    (SamplingParams, "logit_bias", [{-1: 1.0}, {3: 101}, {3: NAN}, {3: None}], "at least 0|between -100 and 100"),
    (SamplingParams, "logprobs", [-1, 0.5], "at least 0"),
    (SamplingParams, "prompt_logprobs", [-1, 0.5], "at least 0"),
    (SamplingParams, "logprob_mode", ["processd", None], "raw, processed"),
    (LoadConfig, "dtype", ["fp16", "int8", None], "auto, float32, bfloat16, float16"),
    (LoadConfig, "random_weights", [True], "model.path"),
    (LoadConfig, "adapters", [{"": "x"}, {"x": ""}, {"x": 3}], "a folder for each name"),
    (SchedulerConfig, "policy", ["mix", None], "mixed, prefill_first"),
    (SchedulerConfig, "max_num_seqs", [0, -1, 1.5, 8193], "at least 1|8193"),
    (SchedulerConfig, "overlap", ["yes", 1], "must be"),
    (SchedulerConfig, "token_budget", [0, 2.5, 511], "at least 1|at least schedule.max_num_seqs"),
    (SchedulerConfig, "prefill_chunk", [0, 1.5], "at least 1"),
    (KVCacheConfig, "page_size", [0, -16, 1.5], "at least 1"),
    (KVCacheConfig, "cache_tokens", [15, 0, 1e4], "at least 64"),
    (KVCacheConfig, "gpu_memory_utilization", [0, 0.99, 1.5, NAN], "between 0.01 and 0.98"),
    (OffloadConfig, "target", ["disk", None], "none, host"),
    (OffloadConfig, "offload_policy", ["some", None], "all, preempted"),
    (OffloadConfig, "host_gb", [0, -1, "8"], "at least"),
    (KVCacheConfig, "prefix_cache", [1, "yes", None], "true or false"),
    (KVCacheConfig, "shared_prefix_attention", [0, None], "true or false"),
    (ParallelConfig, "tensor_parallel", [0, 65, True], "between 1 and 64"),
    (SamplingParams, "adapter", ["", 3], "name or None"),
    (LoraConfig, "max_adapters", [-1, 1025, 1.5, True], "between 0 and 1024"),
    (LoraConfig, "max_rank", [0, 257, "8"], "between 1 and 256"),
    (ParallelConfig, "replicas", [0, 65, 1.5], "between 1 and 64"),
    (ParallelConfig, "peer_memory", [1, None], "true or false"),
    (SamplingParams, "cache_salt", ["", 5, b"x"], "1 to 256 characters"),
    (SamplingParams, "ignore_eos", [1, "false", None], "true or false"),
    (GrpoConfig, "problem", ["", None], "must be a name"),
    (GrpoConfig, "output_dir", ["", 3], "must be a name"),
    (GrpoConfig, "loss_type", ["ppo", None], "grpo, dr_grpo"),
    *(
        (GrpoConfig, name, [0, -1, 1.5, "8"], "at least 1")
        for name in ("steps", "prompts_per_step", "num_minibatches", "save_every")
    ),
    (GrpoConfig, "trainable_layers", [0, 0.5], "at least 1"),
    (GrpoConfig, "warmup_steps", [-1, 2.5], "at least 0"),
    *((GrpoConfig, name, [-0.1, 1.1, NAN], "between 0 and 1") for name in ("clip", "lr", "weight_decay")),
    (GrpoConfig, "kl_coef", [-1, 101], "between 0 and 100"),
    (GrpoConfig, "max_grad_norm", [0, -1.0], "at least"),
    *((GrpoConfig, name, [1, "yes", None], "true or false") for name in ("gradient_checkpointing", "resume", "export")),
    (QuantizationConfig, "weights", ["int8", None], "auto, none, fp8"),
    (CompileConfig, "mode", ["reduce-overhead"], "eager"),
    (CompileConfig, "batch_invariant", [1, "yes", None], "true or false"),
    (CompileConfig, "attention", ["flash", None], "sdpa, reference"),
]
GROUPS = {
    name: sorted(f.stem for f in (conf_dir() / name).glob("*.yaml"))
    for name in sorted(d.name for d in conf_dir().iterdir() if d.is_dir() and d.name != "hydra")
    if list((conf_dir() / name).glob("*.yaml"))
}
CASES = [(config_class, name, value, allowed) for config_class, name, values, allowed in BAD for value in values]


@pytest.mark.parametrize(
    ("config_class", "name", "value", "allowed"), CASES, ids=lambda x: getattr(x, "__name__", None)
)
def test_bad_value(config_class: type, name: str, value: Any, allowed: str) -> None:
    """The message has the field, the value (or its wrong part), and what is allowed."""
    with pytest.raises(ValueError, match=rf"{name}.*({allowed}|number)") as error:
        config_class(**{name: value})
    inner = [*value.items()][0] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    assert any(repr(part) in str(error.value) for part in inner) or "model.random_weights" in str(error.value)


def test_every_field_is_tested_or_free() -> None:
    """Every setting has a bad value above."""
    free = {"path", "device", "random_seed", "grammar"}
    config_classes = (
        SamplingParams,
        LoadConfig,
        SchedulerConfig,
        KVCacheConfig,
        OffloadConfig,
        ParallelConfig,
        LoraConfig,
        QuantizationConfig,
        CompileConfig,
        GrpoConfig,
    )
    assert {f.name for config_class in config_classes for f in fields(config_class)} == {
        name for _, name, _, _ in BAD
    } | free


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias"])
@pytest.mark.parametrize("value", [5, 1.5, True, object(), b"x", np.array(3)])
def test_not_a_list(name: str, value: Any) -> None:
    """A single number, bytes and other values that are no lists are rejected with the type that is expected."""
    with pytest.raises(ValueError, match=rf"SamplingParams\.{name} must (be a list of|map token ids)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("number", [np.int64(1), np.int8(1), np.float32(1), torch.tensor(1)])
def test_numbers_of_numpy_and_torch(number: Any) -> None:
    """NumPy and torch scalars become Python numbers, which a snapshot can save."""
    params = SamplingParams(temperature=number, top_p=number, repetition_penalty=number)
    assert params == SamplingParams(temperature=1, top_p=1, repetition_penalty=1)
    assert {type(x) for x in (params.temperature, params.top_p)} <= {int, float}
    if not isinstance(number, np.floating):
        lists = {
            "stop_token_ids": np.array([1, 7]),
            "logit_bias": {number: np.float32(2)},
            "stop": np.array(["a", "b"]),
        }
        params = SamplingParams(max_tokens=number, n=number, seed=number, logprobs=number, **lists)
        assert [type(x) for x in (params.max_tokens, params.seed, *params.stop_token_ids)] == [int] * 4
        assert (params.stop_token_ids, params.stop, params.logit_bias) == ((1, 7), ("a", "b"), {1: 2.0})
    with pytest.raises(ValueError, match=r"max_tokens must be a whole number, got True"):
        SamplingParams(max_tokens=np.bool_(True))  # type: ignore[arg-type]


def test_stop_is_a_tuple_of_texts() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # pyright: ignore[reportArgumentType]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # pyright: ignore[reportArgumentType]


def test_top_k_is_off_at_minus_one() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_from_flat() -> None:
    flat = EngineConfig.from_flat(token_budget=600, page_size=32, attention="reference", seed=3)
    assert flat.schedule == SchedulerConfig(token_budget=600)
    assert flat.kv_cache == KVCacheConfig(page_size=32)
    assert flat.compile.attention == "reference"
    assert flat.seed == 3
    nested = EngineConfig.from_flat(schedule=SchedulerConfig(max_num_seqs=8), token_budget=64)
    assert nested.schedule == SchedulerConfig(max_num_seqs=8, token_budget=64)
    assert EngineConfig.from_flat() == EngineConfig() and EngineConfig.from_flat().special_tokens_in_content == "text"
    assert EngineConfig.from_flat(special_tokens_in_content="control") == EngineConfig(
        special_tokens_in_content="control"
    )
    with pytest.raises(ValueError, match="special_tokens_in_content must be one of text, control, got 'tokens'"):
        EngineConfig.from_flat(special_tokens_in_content="tokens")


@pytest.mark.parametrize(
    ("name", "nearest"), [("token_bugdet", "token_budget"), ("page_sise", "page_size"), ("atention", "attention")]
)
def test_from_flat_typo(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown setting '{name}'; did you mean.* {nearest}"):
        EngineConfig.from_flat(**{name: 1})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("enforce_eager", 'use compile="eager"'),
        ("max_num_batched_tokens", "use token_budget"),
        ("max_model_len", "cache_tokens"),
        ("quantization_config", 'use quantization="fp8"'),
        ("swap_space", 'use offload="host", host_gb=8'),
        ("tensor_parallel_size", "use tensor_parallel"),
        ("mem_fraction_static", "use gpu_memory_utilization"),
        ("trust_remote_code", "never run"),
        ("torch_dtype", "use dtype"),
    ],
)
def test_settings_of_other_libraries(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting '{name}'; .*{hint}"):
        EngineConfig.from_flat(**{name: 1})
    with pytest.raises(ValueError, match=f"unknown key '{name}'; .*{hint}"):
        compose(f"{name}=1")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_new_tokens", "use max_tokens"), ("do_sample", "temperature=0"), ("num_return_sequences", "use n$"),
     ("best_of", "use n, "), ("structured_outputs", "use grammar"), ("lora_request", "adapter="),
     ("bad_words_ids", "use bad_words, .*logit_bias"), ("logits_processor", "use logits_processors$"),
     ("no_repeat_ngram_size", "use repetition_penalty"), ("custom_logit_processor", "use logits_processors"),
     ("temprature", "did you mean temperature")],
)  # fmt: skip
def test_sampling_parameters_of_other_libraries(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown sampling setting '{name}'; .*{hint}"):
        SamplingParams(**{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("use_tqdm", "use progress$"), ("lora_request", r"SamplingParams\(adapter=…\)"),
     ("sampling_params", "use sampling$"), ("max_new_tokens", "in SamplingParams, use max_tokens$"),
     ("top_p", r"SamplingParams\(top_p=…\)"), ("do_sample", "temperature=0 is greedy"),
     ("promts", "did you mean prompts"), ("a_b", "known: on_error, .*prompts")],
)  # fmt: skip
def test_arguments_of_other_libraries_calls(name: str, hint: str) -> None:
    """Unknown arguments of calls are rejected with a hint, before anything else happens."""
    engine = object.__new__(fastgen.Engine)  # never constructed: the call fails before it reads anything
    for method in (fastgen.Engine.generate, fastgen.Engine.stream, fastgen.AsyncEngine.generate):
        with pytest.raises(ValueError, match=f"unknown argument of {method.__name__} '{name}'; .*{hint}"):
            method(engine, "Hello", **{name: 1})


def test_arguments_of_chat_keep_their_names() -> None:
    """Arguments that chat has, but generate has not, are hinted at by generate alone."""
    engine = object.__new__(fastgen.Engine)
    with pytest.raises(ValueError, match=r"unknown argument of generate 'tools'; pass them to chat"):
        engine.generate("Hello", tools=[])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="chat takes a list of messages"):
        engine.chat([], tools=[])
    with pytest.raises(ValueError, match="unknown argument of chat 'use_tqdm'; use progress"):
        engine.chat([{"role": "user", "content": "Hello"}], use_tqdm=False)  # type: ignore[call-arg]


def test_hints_name_what_exists() -> None:
    """No hint is for a name that exists, and a hint that says `use name` says an existing one."""
    existing = {f.name for f in fields(SamplingParams)}
    assert not existing & SAMPLING_HINTS.keys() and "temperature" in inspect.signature(SamplingParams).parameters
    groups = [g for f in fields(EngineConfig) if is_dataclass(g := getattr(EngineConfig(), f.name))]
    settings = {f.name: f for group in map(type, groups) for f in fields(group)}
    settings |= {f.name: f for f in fields(EngineConfig)}
    known = existing | settings.keys() | {f.name for f in fields(LoadConfig)}
    assert not settings.keys() & ENGINE_HINTS.keys()
    arguments = inspect.signature(fastgen.Engine.generate).parameters.keys()
    assert not arguments & CALL_HINTS.keys()
    for hint in [*ENGINE_HINTS.values(), *SAMPLING_HINTS.values(), *CALL_HINTS.values()]:
        if match := re.match(r"use (\w+)", hint):
            assert match[1] in known | arguments | {"fastgen"}, hint


def test_every_generation_setting_of_transformers_has_a_hint() -> None:
    """GenerationConfig has no attribute that SamplingParams answers with a guess, except those that files add."""
    names = vars(GenerationConfig()).keys() - {"transformers_version", "_from_model_config"}
    assert len(names) > 50 and names <= SAMPLING_HINTS.keys() | {f.name for f in fields(SamplingParams)}


def test_from_flat_checks_values() -> None:
    with pytest.raises(ValueError, match="schedule.token_budget must be at least 1, got -1"):
        EngineConfig.from_flat(token_budget=-1)
    with pytest.raises(ValueError, match="unknown setting 'schedule'"):
        EngineConfig.from_flat(schedule={"token_budget": 4})


# --- conf/ ----------------------------------------------------------------------------------------------------


def test_no_overrides_are_the_defaults() -> None:
    """The command line has the defaults of the dataclasses, except that it is greedy where a library call samples."""
    assert compose("sampling=default") == RunConfig()
    assert compose() == compose("sampling=greedy")


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options if g not in ("experiment", "debug")]
)
def test_option(group: str, option: str) -> None:
    """An option composes into its dataclass with the values of its file; the file repeats no default."""
    value, default = getattr(compose(f"{group}={option}"), group), getattr(RunConfig(), group)
    assert type(value) is type(default)
    settings = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text()) or {}
    for name, setting in settings.items():
        if not (isinstance(setting, str) and "${" in setting):
            assert getattr(value, name) == setting
            assert group == "task" or setting != getattr(default, name)


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in ("experiment", "debug") for o in GROUPS[g]])
def test_experiment(group: str, option: str) -> None:
    """An experiment composes, differs from the default, and its file has the command that runs it."""
    assert compose(f"+{group}={option}") != compose()
    assert f"# fgrun +{group}={option}" in (conf_dir() / group / f"{option}.yaml").read_text()


def test_all_engine_options_fit_together() -> None:
    """Any option of one group composes with any option of another."""
    names, composed = ("schedule", "compile", "kv_cache", "parallel", "offload"), list[tuple[str, ...]]()
    for a, b in product(range(4), repeat=2):  # and the three orthogonal Latin squares of size 4, a + cb over GF(4)
        turns = zip(names, (a, b, a ^ b, a ^ (0, 2, 3, 1)[b], a ^ (0, 3, 1, 2)[b]), strict=True)
        options = tuple(GROUPS[name][turn % len(GROUPS[name])] for name, turn in turns)
        compose(*(f"{name}={option}" for name, option in zip(names, options, strict=True)))
        composed.append(options)
    for i, j in combinations(range(len(names)), 2):
        assert {(x[i], x[j]) for x in composed} == {*product(GROUPS[names[i]], GROUPS[names[j]])}


def test_debug_model_is_there() -> None:
    model = compose("model=debug").model
    assert model.random_weights and model.path and model.path.startswith(str(conf_dir()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.token_bugdet=5", r"unknown key 'schedule.token_bugdet'; did you mean schedule.token_budget\?"),
        ("+schedule.token_bugdet=5", r"unknown key 'schedule.token_bugdet'; did you mean schedule.token_budget\?"),
        ("grad_norm=5", r"unknown key 'grad_norm'; did you mean grpo.max_grad_norm\?"),
        ("kv_cache.token_budget=5", r"did you mean schedule.token_budget\?"),
        ("shedule=latency", r"unknown key 'shedule'; did you mean schedule\?"),
        ("promt=hello", r"unknown key 'promt'; did you mean prompt\?"),
        ("experimnt=capitals", r"did you mean \+experiment\?"),
        ("+experimnt=capitals", r"did you mean \+experiment\?"),
        ("experiment=capitals", r"\+experiment=capitals"),
        ("model=llama31_8", "unknown model 'llama31_8'; did you mean llama31_8b"),
        ("sampling=gredy", "unknown sampling 'gredy'; did you mean greedy"),
        ("+experiment=capital", "unknown experiment 'capital'; did you mean capitals"),
        ("schedule.token_budget=many", "schedule.token_budget: Value 'many' .* could not be converted to Integer"),
        ("schedule.token_budget=0", "schedule.token_budget must be at least 1, got 0"),
        ("sampling.n=null", "sampling.n: .*not Optional"),
        ("task.name=gnerate", "unknown task.name 'gnerate'; did you mean generate"),
        ("hello", "Error parsing override 'hello'"),
    ],
)
def test_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        compose(override)
    assert "\n" not in str(error.value)


def test_keys_without_their_group() -> None:
    """The group of a key may be left out, as in the library's keywords; names of groups keep their meaning."""
    short = compose("page_size=32", "temperature=0", "device=cpu", "path=a b", "max_adapters=2", "stop=[x]", "seed=3")
    long = compose("kv_cache.page_size=32", "sampling.temperature=0", "model.device=cpu", "model.path=a b",
                   "lora.max_adapters=2", "sampling.stop=[x]", "seed=3")  # fmt: skip
    assert short == long and short.seed == 3 and short.sampling.seed is None
    assert compose("parallel=tp", "parallel.size=4").parallel.tensor_parallel == 4
    with pytest.raises(ValueError, match=r"parallel\.tensor_parallel must be"):
        compose("tensor_parallel=0")
    with pytest.raises(ValueError, match=r"page_sise.*did you mean.*kv_cache\.page_size"):
        compose("page_sise=1")
    keywords = {f.name for f in fields(EngineConfig)} | {f.name for f in fields(RunConfig)}
    for config_class in (
        SamplingParams,
        LoadConfig,
        SchedulerConfig,
        KVCacheConfig,
        OffloadConfig,
        ParallelConfig,
        LoraConfig,
        QuantizationConfig,
        CompileConfig,
    ):
        assert all(f.name in KEY_ALIASES or f.name in keywords for f in fields(config_class))


def test_values_reach_the_dataclasses() -> None:
    config = compose("sampling.stop=[a,b]", "sampling.logit_bias={5:1,7:-2.5}", "sampling.temperature=0", "seed=4")
    assert config.sampling == SamplingParams(stop=("a", "b"), logit_bias={5: 1.0, 7: -2.5}, temperature=0)
    assert config.seed == 4


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["", "Name one, ", "$", "[", "{", "'", '"', "\\"]),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_text_is_a_prompt(start: str, text: str) -> None:
    """Any text is a prompt, whatever it means in Hydra's grammar."""
    prompt = compose(f"prompt={start}{text}").prompt
    assert prompt == start + text or start in ("[", "{", "'", '"')  # those may be lists and quoted texts


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("[1,2,3]", [1, 2, 3]),
        ("[[1,2],[3]]", [[1, 2], [3]]),
        ("[{role: user, content: hi}]", [{"role": "user", "content": "hi"}]),
        ("null", None),
        ("'it is, quoted'", "it is, quoted"),
        ('"Hello," she said', '"Hello," she said'),
        ("[INST] hi [/INST]", "[INST] hi [/INST]"),
        ("What's ${this}, and {that}?", "What's ${this}, and {that}?"),
        ("42", "42"),
        ("", ""),
        ("two\nlines \\", "two\nlines \\"),
    ],
)
def test_prompt(text: str, prompt: Any) -> None:
    assert compose(f"prompt={text}").prompt == prompt


def test_hydra_alone_composes_the_same() -> None:
    """Users who compose with Hydra itself get the schema from the configuration package."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra.compose("config", ["sampling=rollout"])
    assert to_dataclass(cfg) == compose("sampling=rollout")
    assert "token_budget" in OmegaConf.to_yaml(cfg)


def test_tasks() -> None:
    assert set(TASKS) == set(GROUPS["task"])
    assert all(callable(getattr(run if name in ("grpo", "dataset", "join") else run.PromptRun, name)) for name in TASKS)


def test_importing_fastgen_does_not_import_hydra() -> None:
    code = "import sys, fastgen; sys.exit(any(m.split('.')[0] in ('hydra', 'omegaconf') for m in sys.modules))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_grammar_and_where_it_ends() -> None:
    """A grammar excludes settings that decide where the output ends; errors name fields that are no numbers."""
    for others in ({"min_tokens": 1}, {"ignore_eos": True}):
        with pytest.raises(ValueError, match="grammar decides where the output ends"):
            SamplingParams(grammar="regex:a", **others)
    for value in (np.ones(2), torch.ones(2)):
        with pytest.raises(ValueError, match="SamplingParams.min_tokens must be"):
            SamplingParams(grammar="regex:a", min_tokens=value)
