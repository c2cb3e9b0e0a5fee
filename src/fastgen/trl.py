"""TRL's `GRPOTrainer` with fastgen as its sampler, on the trainer's own parameters: nothing is ever sent.

from fastgen.trl import Rollout
trainer = GRPOTrainer(model, rewards, args, train_dataset=data, rollout_func=Rollout(cache_tokens=200_000))

Nothing here imports TRL (`pip install fastgen[trl]`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastgen.config import SamplingParams, unknown
from fastgen.engine import Engine
from fastgen.exchange import adopt

# GRPOConfig's names of what SamplingParams calls otherwise; None in it is the default.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_completion_length": "max_tokens",
}
KWARGS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}  # of transformers
NAMES = [f.name for f in fields(SamplingParams)]
Weights = Callable[[Any], Iterable[tuple[str, Tensor]]]


class Rollout:
    """A `rollout_func`: completions of the trainer's prompts, one for each, with the logprobs they were drawn with.

    `Rollout(cache_tokens=…, …)` makes an engine with these settings at the first call, on the parameters of the
    trainer's model, in one memory (see `fastgen.adopt`): after `optimizer.step()` the next rollout has the new ones.
    Where that is impossible a ValueError says why; then give an engine of its own, `Rollout(engine)`, into which the
    parameters are copied after each step. `weights(trainer)` gives (checkpoint name, tensor) pairs for that; those of
    `merged` unless given.

    `release`: the cache's memory is given back between rollouts, for the trainer to use.
    """

    def __init__(
        self, engine: Engine | None = None, *, weights: Weights | None = None, release: bool = True, **settings: Any
    ) -> None:
        if engine is not None and settings:
            raise ValueError(f"Rollout: {', '.join(settings)} are for an engine that it makes; set them on yours")
        if engine is None and weights is not None:
            raise ValueError("Rollout: weights are for an engine of its own: Rollout(engine, weights=…)")
        self.engine, self.settings, self._weights, self._release = engine, settings, weights, release
        self._synced: int | None = None  # the step whose parameters were copied

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """For each prompt: its token ids, those of a completion, and their logprobs."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        engine = self.engine = self.engine or self._make(model, trainer)
        engine.restore()
        self._sync(engine, model, trainer)
        sampling = params(trainer)
        outputs = engine.generate(encode(prompts, trainer), sampling, progress=False)
        if self._release:
            engine.release("cache")
        done = [o.completions[0] for o in outputs]
        return {
            "prompt_ids": [o.prompt_token_ids for o in outputs],
            "completion_ids": [c.token_ids for c in done],
            "logprobs": [c.logprobs for c in done],
        }

    def _make(self, model: Any, trainer: Any) -> Engine:
        try:
            spec, mine = adopt(model)
        except ValueError as e:
            raise ValueError(
                f"Rollout: the trainer's parameters cannot be read in place: {e}. To copy them after each step give "
                "it an engine with parameters of its own: Rollout(fastgen.Engine.from_pretrained(…))"
            ) from e
        # Completions of one process must not be those of another.
        given = {"seed": trainer.args.seed + trainer.accelerator.process_index} | self.settings
        return Engine(mine, spec, tokenizer(trainer), progress=False, **given)

    def _sync(self, engine: Engine, model: Any, trainer: Any) -> None:
        """The trainer's parameters, unless they are the engine's."""
        if model.get_input_embeddings().weight.data_ptr() == engine.params.embed.data_ptr():
            if self._weights is not None or hasattr(model, "get_base_model"):
                raise ValueError(
                    "Rollout: the engine reads the trainer's parameters where they are, which others (weights=, or "
                    "PEFT's merged ones) would overwrite: give it an engine with parameters of its own"
                )
            return
        if self._synced == trainer.state.global_step:
            return
        try:
            engine.update_params(merged(model) if self._weights is None else self._weights(trainer))
        except ValueError as e:
            advice = "give Rollout weights=, a function of the trainer that gives (checkpoint name, whole tensor)"
            raise ValueError(f"Rollout: the trainer's parameters do not fit the engine: {e}; {advice}") from e
        self._synced = trainer.state.global_step


@torch.no_grad()
def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by their names in its checkpoint; PEFT's active LoRA is added to copies of what it wraps."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, p in base.named_parameters():
        owner, _, own = name.rpartition(".")
        if owner.endswith(".base_layer"):
            layer = base.get_submodule(owner.removesuffix(".base_layer"))
            if getattr(layer, "lora_variant", None) or not hasattr(layer, "scaling"):
                raise ValueError(f"{owner} is wrapped by {type(layer).__name__}, not by plain LoRA")
            for adapter in layer.active_adapters if own == "weight" else ():
                p = p + layer.get_delta_weight(adapter) if adapter in layer.scaling else p
            yield name.replace(".base_layer", ""), p
        elif ".lora_" not in name:
            yield name, p


def tokenizer(trainer: Any) -> Any:
    """The trainer's. ValueError for a processor of images."""
    found = trainer.processing_class
    if hasattr(found, "tokenizer"):
        raise ValueError(f"Rollout: {type(found).__name__} is for images too, and fastgen generates from text")
    return found


def encode(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids, as the trainer makes them: messages through its chat template, with its tools."""
    found = tokenizer(trainer)
    if isinstance(prompts[0], str):
        return found(text=list(prompts))["input_ids"]
    return found.apply_chat_template(
        conversation=list(prompts),
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )["input_ids"]


def params(trainer: Any) -> SamplingParams:
    """What the trainer's arguments say of sampling. ValueError for what fastgen does not know.

    Logprobs are of the distribution that tokens are drawn from, at the trainer's temperature.
    """
    args = trainer.args
    given: dict[str, Any] = {ours: getattr(args, name) for name, ours in SETTINGS.items()}
    for name, value in (args.generation_kwargs or {}).items():
        ours = KWARGS.get(name) or name
        if ours not in NAMES:
            raise ValueError("Rollout: " + unknown("generation_kwargs", name, [*NAMES, *KWARGS]))
        given[ours] = (value,) if ours == "stop" and isinstance(value, str) else value
    given = {name: value for name, value in given.items() if value is not None}
    stop: dict[str, Any] = {"stop_token_ids": tuple(trainer.eos_token_ids)}
    return SamplingParams(**stop | given | {"n": 1, "logprobs": 0, "logprob_mode": "processed"})
