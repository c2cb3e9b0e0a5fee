"""The real SmolLM2-135M-Instruct against transformers, fp32: 32 prompts of many lengths, languages and kinds."""

import itertools
import os
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import transformers

import fastgen
from fastgen.checkpoint.hub import default_model_path

TEXTS = [
    "The lighthouse keeper counted the waves until the ninth one, which was always the tallest, reached the stairs.",
    "Question: a train leaves at 9:40 and arrives at 13:05. How long is the journey? Answer:",
    "def merge(a, b):\n    out = []\n    while a and b:\n        out.append((a if a[0] <= b[0] else b).pop(0))\n",
    "Les cerises étaient mûres dès la mi-juin, et les merles le savaient bien avant nous.",
    "Der Zug nach Köln fährt heute vom Gleis 7; bitte beachten Sie die geänderte Wagenreihung.",
    "El panadero abre la puerta a las cinco, cuando la calle todavía huele a lluvia.",
    "今日は朝から雨が降っていて、駅までの道はとても静かでした。",
    "Вчера вечером мы долго говорили о старых картах и о море.",
    "قرأت الرسالة مرتين ثم وضعتها في الدرج.",
    "SELECT name, SUM(price * amount) AS total FROM orders JOIN items USING (order_id) GROUP BY name ORDER BY",
    '{"city": "Oslo", "population": 709037, "rivers": ["Akerselva", "Alna"], "twinned":',
    '#include <stdio.h>\nint main(void) {\n  for (int i = 0; i < 10; i++) printf("%d\\n", i * i);\n',
    "Dear Ms. Okafor,\n\nthank you for your letter of 3 March. We have looked into the two invoices you mention and",
    "0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89,",
]
LENGTHS = [1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 80, 96, 100, 127, 128, 160, 200, 256]
LENGTHS += [280, 300, 350, 400, 500]
NEW = 36


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Uses this process's share of the cores: the tensors here are large, and threads that wait for a core spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(device: str) -> tuple[fastgen.ModelConfig, fastgen.Params]:
    """Returns config and parameters of the default model."""
    return fastgen.load(default_model_path(), device=device, dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Returns prompts: the i-th starts with text i and continues with the following texts up to its length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model_path())
    token_lists = []
    for i, n in enumerate(LENGTHS):
        ids: list[int] = []
        for text in itertools.islice(itertools.cycle(TEXTS), i, None):
            ids += tokenizer(text + "\n").input_ids
            if len(ids) >= n:
                break
        token_lists.append(ids[:n])
    return token_lists


@pytest.fixture(scope="module")
def model(device: str) -> transformers.PreTrainedModel:
    """Returns the default model in transformers."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32).eval().to(device)
    )


@cache  # most modes sample the same tokens
def disagreements(
    model: transformers.PreTrainedModel, prompt: tuple[int, ...], sampled: tuple[int, ...]
) -> list[tuple[int, float]]:
    """Returns (step, logit gap) where transformers, after the same tokens, would have sampled another.

    If there is none, its greedy continuation is `sampled`, by induction over the steps.
    """
    with torch.no_grad():
        ids = torch.tensor([prompt + sampled[:-1]], device=model.device)
        logits = model(ids, logits_to_keep=len(sampled)).logits[0]
    best = logits.argmax(-1)
    token = torch.tensor(sampled, device=model.device)
    gap = logits.amax(-1) - logits.gather(-1, token[:, None])[:, 0]
    return [(i, gap[i].item()) for i in (best != token).nonzero()[:, 0].tolist()]


MODES = {
    "alone": {"cache_tokens": 2048},
    "together": {"cache_tokens": 2**14},
    "chunks of 16": {"cache_tokens": 2**14, "prefill_chunk": 16},
    "queueing": {"cache_tokens": 640, "page_size": 16, "token_budget": 512},
}
EVERY = {"alone": 11, "chunks of 16": 5, "queueing": 3}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(
    mode: str,
    loaded: tuple[fastgen.ModelConfig, fastgen.Params],
    prompts: list[list[int]],
    model: transformers.PreTrainedModel,
) -> None:
    """Greedy tokens are transformers': 36 of every prompt together, and 18 of several prompts in the other modes.

    A difference is allowed only at a tie within 1e-5 of transformers' own logits.
    """
    spec, params = loaded
    engine = fastgen.Engine(params, spec, **MODES[mode])
    new = NEW if mode == "together" else NEW // 2
    sampling = fastgen.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    # Of every kind; all of them in all modes would take minutes.
    prompts = prompts[slice(None) if mode == "together" else slice(1, None, EVERY[mode])]
    if mode == "alone":
        outputs = [engine.generate([p], sampling)[0] for p in prompts]
    else:
        outputs = engine.generate(prompts, sampling)
    for prompt, output in zip(prompts, outputs, strict=True):
        sampled = output.completions[0].token_ids
        assert len(sampled) == new
        gaps = disagreements(model, tuple(prompt), tuple(sampled))
        assert all(gap < 1e-5 for _, gap in gaps), f"prompt of {len(prompt)} tokens: (step, gap) {gaps}"
        if gaps:
            print(f"tie: prompt of {len(prompt)} tokens, (step, gap) {gaps}")


def test_greedy_equals_generate(
    loaded: tuple[fastgen.ModelConfig, fastgen.Params], prompts: list[list[int]], model: transformers.PreTrainedModel
) -> None:
    """Greedy tokens are those of transformers' own generate loop, for a few prompts."""
    spec, params = loaded
    few = [prompts[i] for i in (0, 7, 23)]
    sampling = fastgen.SamplingParams(temperature=0, max_tokens=NEW // 3, ignore_eos=True)
    outputs = fastgen.Engine(params, spec, cache_tokens=4096).generate(few, sampling)
    for prompt, output in zip(few, outputs, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW // 3, do_sample=False,
                                eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert output.completions[0].token_ids == wanted[0, len(prompt) :].tolist()


def test_the_default_answers(device: str) -> None:
    """The default model answers a chat message about France with Paris; stop strings cut the text."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with fastgen.Engine.from_pretrained(device=device, dtype="float32", cache_tokens=1024) as engine:
        greedy = fastgen.SamplingParams(temperature=0)
        cut = fastgen.SamplingParams(temperature=0, stop=(" Paris",))
        answer, stopped = engine.generate([question, question], [greedy, cut])
        pieces = "".join(e.text for e in engine.stream([question], cut))
    assert "Paris" in answer.completions[0].text
    assert answer.completions[0].finish_reason == "stop"
    assert stopped.completions[0].text == pieces == answer.completions[0].text.split(" Paris")[0]
