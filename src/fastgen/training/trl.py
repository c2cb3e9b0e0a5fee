"""TRL's `GRPOTrainer` with fastgen as its sampler, on the trainer's own parameters: nothing is ever sent.

from fastgen.training.trl import Rollout
trainer = GRPOTrainer(model, rewards, args, train_dataset=data, rollout_func=Rollout(cache_tokens=200_000))

Nothing here imports TRL (`pip install fastgen[trl]`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fastgen.config import SamplingParams, unknown_name_message
from fastgen.core.request import raise_on_non_finite_logits
from fastgen.engine import Engine
from fastgen.training.shared_params import adopt

# GRPOConfig's names of what SamplingParams calls otherwise; None in it is the default.
GRPO_CONFIG_TO_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_completion_length": "max_tokens",
}
GENERATION_KWARGS_TO_SAMPLING = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}  # of transformers
SAMPLING_FIELDS = [f.name for f in fields(SamplingParams)]
WeightSource = Callable[[Any], Iterable[tuple[str, Tensor]]]


class RolloutFunc:
    """A `rollout_func`: completions of the trainer's prompts, one for each, with the logprobs they were drawn with.

    `Rollout(cache_tokens=…, …)` makes an engine with these settings at the first call, on the parameters of the
    trainer's model, in one memory (see `fastgen.adopt`): after `optimizer.step()` the next rollout has the new ones.
    Where that is impossible a ValueError says why; then give an engine of its own, `Rollout(engine)`, into which the
    parameters are copied after each step. `weights(trainer)` gives (checkpoint name, tensor) pairs for that; those of
    its model unless given, with PEFT's LoRA merged.

    `release`: the cache's memory is given back between rollouts, for the trainer to use.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        weights: WeightSource | None = None,
        sleep_between_rollouts: bool = True,
        **settings: Any,
    ) -> None:
        if engine is not None and settings:
            raise ValueError(f"Rollout: {', '.join(settings)} are for an engine that it makes; set them on yours")
        if engine is None and weights is not None:
            raise ValueError("Rollout: weights are for an engine of its own: Rollout(engine, weights=…)")
        self.engine, self.settings, self._weights, self._sleep_between_rollouts = (
            engine,
            settings,
            weights,
            sleep_between_rollouts,
        )
        self._synced_step: int | None = None  # the step whose parameters were copied

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """For each prompt: its token ids, those of a completion, and their logprobs."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.engine = self.engine or self._make_engine(model, trainer)
        self.engine.wake_up()
        self._sync_weights(self.engine, model, trainer)
        if trainer.tools:  # the turn after a tool's result is not asked of a rollout_func
            if not hasattr(trainer, "_generate_single_turn"):
                raise ValueError("Rollout: this version of TRL generates what follows a tool's result in another way")
            trainer._generate_single_turn = lambda prompts, *_, **__: self._generate(prompts, trainer, fit_context=True)
        prompt_ids = encode_prompts(prompts, trainer)
        completion_ids, logprobs = self._generate(prompt_ids, trainer)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    def _generate(
        self, prompts: list[list[int]], trainer: Any, *, fit_context: bool = False
    ) -> tuple[list[list[int]], list[Any]]:
        """Token ids of a completion for each prompt, and their logprobs; `shorten`: to what fits behind the prompt."""
        engine, sampling = self.engine, sampling_params(trainer)
        assert engine is not None
        engine.wake_up()
        each = [sampling] * len(prompts)
        if fit_context and sampling.max_tokens is not None:
            longest = min(engine.model_config.context_length, engine.cache_capacity + 1)
            each = [replace(sampling, max_tokens=min(sampling.max_tokens, max(1, longest - len(p)))) for p in prompts]
        outputs = engine.generate(prompts, each, progress=False)
        if self._sleep_between_rollouts:
            engine.sleep("cache")
        raise_on_non_finite_logits(outputs)
        done = [o.completions[0] for o in outputs]
        return [c.token_ids for c in done], [c.logprobs for c in done]

    def _make_engine(self, model: Any, trainer: Any) -> Engine:
        try:
            spec, mine = adopt(model)
        except ValueError as e:
            raise ValueError(
                f"Rollout: the trainer's parameters cannot be read in place: {e}. To copy them after each step give "
                "it an engine with parameters of its own: Rollout(fastgen.Engine.from_pretrained(…))"
            ) from e
        # Completions of one process must not be those of another.
        given = {"seed": trainer.args.seed + trainer.accelerator.process_index} | self.settings
        return Engine(mine, spec, get_tokenizer(trainer), progress=False, **given)

    def _sync_weights(self, engine: Engine, model: Any, trainer: Any) -> None:
        """The trainer's parameters, unless they are the engine's."""
        if model.get_input_embeddings().weight.data_ptr() == engine.params.embed.data_ptr():
            if self._weights is not None or hasattr(model, "get_base_model"):
                raise ValueError(
                    "Rollout: the engine reads the trainer's parameters where they are, which others (weights=, or "
                    "PEFT's merged ones) would overwrite: give it an engine with parameters of its own"
                )
            return
        if self._synced_step == trainer.state.global_step:
            return
        try:
            engine.update_params(model if self._weights is None else self._weights(trainer))
        except ValueError as e:
            advice = "give Rollout weights=, a function of the trainer that gives (checkpoint name, whole tensor)"
            raise ValueError(f"Rollout: the trainer's parameters do not fit the engine: {e}; {advice}") from e
        self._synced_step = trainer.state.global_step


def get_tokenizer(trainer: Any) -> Any:
    """The trainer's. ValueError for a processor of images."""
    found = trainer.processing_class
    if hasattr(found, "tokenizer"):
        raise ValueError(f"Rollout: {type(found).__name__} is for images too, and fastgen generates from text")
    return found


def encode_prompts(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids, as the trainer makes them: messages through its chat template, each with its own tools."""
    get_tokenizer(trainer)
    return trainer._tokenize_prompts(list(prompts))[0]


def sampling_params(trainer: Any) -> SamplingParams:
    """What the trainer's arguments say of sampling. ValueError for what fastgen does not know.

    Logprobs are of the distribution that tokens are drawn from, at the trainer's temperature.
    """
    args = trainer.args
    given: dict[str, Any] = {ours: getattr(args, name) for name, ours in GRPO_CONFIG_TO_SAMPLING.items()}
    for name, value in (args.generation_kwargs or {}).items():
        ours = GENERATION_KWARGS_TO_SAMPLING.get(name) or name
        if ours not in SAMPLING_FIELDS:
            raise ValueError(
                "Rollout: "
                + unknown_name_message("generation_kwargs", name, [*SAMPLING_FIELDS, *GENERATION_KWARGS_TO_SAMPLING])
            )
        given[ours] = (value,) if ours == "stop" and isinstance(value, str) else value
    given = {name: value for name, value in given.items() if value is not None}
    stop: dict[str, Any] = {"stop_token_ids": tuple(trainer.eos_token_ids)}
    return SamplingParams(**stop | given | {"n": 1, "logprobs": 0, "logprob_mode": "processed"})
