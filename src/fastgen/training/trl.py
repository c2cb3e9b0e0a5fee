"""fastgen as the sampler of TRL's `GRPOTrainer`, on the trainer's own parameters: nothing is ever sent.

    from fastgen.training.trl import RolloutFunc
    rollout = RolloutFunc(cache_tokens=200_000)
    trainer = GRPOTrainer(model, rewards, args, train_dataset=data, rollout_func=rollout)

This module does not import TRL (the extra `trl`).
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fastgen.config import unknown_name_message
from fastgen.engine import Engine
from fastgen.sampling_params import SamplingParams
from fastgen.training.logprobs import raise_on_non_finite_logits
from fastgen.training.shared_params import adopt

# Names in GRPOConfig -> names in SamplingParams. None in a GRPOConfig leaves the default.
SAME_NAMES = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
GRPO_CONFIG_TO_SAMPLING = {name: name for name in SAME_NAMES} | {"max_completion_length": "max_tokens"}
# transformers' names -> names in SamplingParams.
GENERATION_KWARGS_TO_SAMPLING = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}
SAMPLING_FIELDS = [f.name for f in fields(SamplingParams)]
WeightSource = Callable[[Any], Iterable[tuple[str, Tensor]]]


class RolloutFunc:
    """A `rollout_func`: samples a completion for each of the trainer's prompts, with logprobs.

    `RolloutFunc(cache_tokens=…, …)` makes an engine with these settings at the first call, in the memory of the
    trainer's model (see `fastgen.adopt`): after `optimizer.step()` the next rollout uses the new parameters. If memory
    cannot be shared a ValueError says why. Then pass an engine with parameters of its own, `RolloutFunc(engine)`, into
    which the trainer's parameters are copied after each step. `weights(trainer)` returns the (checkpoint name, tensor)
    pairs to copy; by default those of the trainer's model, with PEFT's LoRA merged. `sleep_between_rollouts` frees the
    cache's memory for the trainer between rollouts.
    """

    def __init__(
        self, engine: Engine | None = None, *, weights: WeightSource | None = None,
        sleep_between_rollouts: bool = True, **settings: Any,
    ) -> None:  # fmt: skip
        if engine is not None and settings:
            raise ValueError(f"RolloutFunc: {', '.join(settings)} are for an engine that it makes; set them on yours")
        if engine is None and weights is not None:
            raise ValueError("RolloutFunc: weights are for an engine of its own: RolloutFunc(engine, weights=…)")
        self.engine, self.settings = engine, settings
        self._weights, self._sleep_between_rollouts = weights, sleep_between_rollouts
        self._synced_step: int | None = None  # the trainer's step whose parameters were copied

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Returns, for each prompt, its token ids, a completion's token ids and their logprobs."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.engine = self.engine or self._make_engine(model, trainer)
        self.engine.wake_up()
        self._sync_weights(self.engine, model, trainer)
        if trainer.tools:  # TRL does not call a rollout_func for the turn after a tool's result
            if not hasattr(trainer, "_generate_single_turn"):
                raise ValueError("RolloutFunc: this version of TRL generates turns after a tool's result differently")
            trainer._generate_single_turn = lambda prompts, *_, **__: self._generate(prompts, trainer, fit_context=True)
        get_tokenizer(trainer)  # raises ValueError
        prompt_ids = trainer._tokenize_prompts(list(prompts))[0]  # messages by the chat template, with tools
        completion_ids, logprobs = self._generate(prompt_ids, trainer)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    def _generate(
        self, prompts: list[list[int]], trainer: Any, *, fit_context: bool = False
    ) -> tuple[list[list[int]], list[Any]]:
        """Returns token ids and logprobs of a completion for each prompt. `fit_context` limits a completion's length to
        the space after its prompt in the context and the cache."""
        engine, sampling = self.engine, sampling_params(trainer)
        assert engine is not None
        engine.wake_up()
        per_prompt = [sampling] * len(prompts)
        if fit_context and (limit := sampling.max_tokens) is not None:
            context = min(engine.model_config.context_length, engine.cache_capacity + 1)
            per_prompt = [replace(sampling, max_tokens=min(limit, max(1, context - len(p)))) for p in prompts]
        outputs = engine.generate(prompts, per_prompt, progress=False)
        if self._sleep_between_rollouts:
            engine.sleep("cache")
        raise_on_non_finite_logits(outputs)
        completions = [o.completions[0] for o in outputs]
        return [c.token_ids for c in completions], [c.logprobs for c in completions]

    def _make_engine(self, model: Any, trainer: Any) -> Engine:
        try:
            model_config, params = adopt(model)
        except ValueError as e:
            advice = "pass an engine with parameters of its own: RolloutFunc(fastgen.Engine.from_pretrained(…))"
            problem = f"the trainer's parameters cannot be read in place: {e}. To copy them after each step"
            raise ValueError(f"RolloutFunc: {problem}, {advice}") from e
        # Each process of the trainer samples its own completions.
        settings = {"seed": trainer.args.seed + trainer.accelerator.process_index} | self.settings
        return Engine(params, model_config, get_tokenizer(trainer), progress=False, **settings)

    def _sync_weights(self, engine: Engine, model: Any, trainer: Any) -> None:
        """Copies the trainer's parameters to the engine once per step, unless they share memory."""
        if model.get_input_embeddings().weight.data_ptr() == engine.params.embed.data_ptr():
            if self._weights is not None or hasattr(model, "get_base_model"):
                problem = "the engine reads the trainer's parameters in place, and copying others would overwrite them"
                advice = "pass an engine with parameters of its own"
                raise ValueError(f"RolloutFunc: {problem} (weights=, or PEFT's merged ones): {advice}")
            return
        if self._synced_step == trainer.state.global_step:
            return
        try:
            engine.update_params(model if self._weights is None else self._weights(trainer))
        except ValueError as e:
            advice = "pass weights=, a function of the trainer that returns (checkpoint name, full tensor) pairs"
            raise ValueError(f"RolloutFunc: the trainer's parameters do not fit the engine: {e}; {advice}") from e
        self._synced_step = trainer.state.global_step


def get_tokenizer(trainer: Any) -> Any:
    """Returns the trainer's tokenizer. Raises ValueError for a processor of images."""
    processor = trainer.processing_class
    if hasattr(processor, "tokenizer"):
        raise ValueError(f"RolloutFunc: {type(processor).__name__} is for images too; fastgen generates from text")
    return processor


def sampling_params(trainer: Any) -> SamplingParams:
    """Returns the sampling settings of the trainer's arguments. Raises ValueError for settings fastgen does not have.

    Logprobs are those of the distribution that tokens are sampled from, at the trainer's temperature.
    """
    args = trainer.args
    settings: dict[str, Any] = {ours: getattr(args, name) for name, ours in GRPO_CONFIG_TO_SAMPLING.items()}
    for name, value in (args.generation_kwargs or {}).items():
        ours = GENERATION_KWARGS_TO_SAMPLING.get(name) or name
        if ours not in SAMPLING_FIELDS:
            known = [*SAMPLING_FIELDS, *GENERATION_KWARGS_TO_SAMPLING]
            raise ValueError("RolloutFunc: " + unknown_name_message("generation_kwargs", name, known))
        settings[ours] = (value,) if ours == "stop" and isinstance(value, str) else value
    settings = {name: value for name, value in settings.items() if value is not None}
    stop: dict[str, Any] = {"stop_token_ids": tuple(trainer.eos_token_ids)}
    return SamplingParams(**stop | settings | {"n": 1, "logprobs": 0, "logprob_mode": "processed"})
