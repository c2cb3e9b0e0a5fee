"""Problems to learn by reinforcement: prompts, and rewards of completions."""

import random
import re
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from fastgen.config import unknown_name_message
from fastgen.text.tokenizer import Prompt


class Problem(NamedTuple):
    """Prompts, and the reward of a completion's text: without a tokenizer, its token ids separated by spaces."""

    sample_prompt: Callable[[random.Random], Prompt]
    reward: Callable[[Prompt, str], float]


def sample_sum_prompt(rng: random.Random) -> str:
    """Returns a sum of two digits, after an example of the format."""
    return f"2 + 1 = 3\n{rng.randint(0, 9)} + {rng.randint(0, 9)} ="


def reward_sum(prompt: Prompt, text: str) -> float:
    """Returns 1 if the text is the sum and nothing else, 0.2 if its first number is the sum, and 0 otherwise."""
    a, b = map(int, re.findall(r"\d+", str(prompt))[-2:])
    first = re.search(r"\d+", text)
    return 1.0 if text.strip() == str(a + b) else 0.2 if first and first[0] == str(a + b) else 0.0


def sample_token_prompt(rng: random.Random) -> list[int]:
    """Returns three token ids."""
    return [rng.randrange(64) for _ in range(3)]


def reward_sevens(prompt: Prompt, text: str) -> float:
    """Returns the fraction of words that are "7": a problem for models of random weights."""
    words = text.split()
    return words.count("7") / max(1, len(words))


PROBLEMS = {"addition": Problem(sample_sum_prompt, reward_sum), "sevens": Problem(sample_token_prompt, reward_sevens)}


def load_problem(name: str) -> Problem:
    """Returns a problem of `PROBLEMS`, or imports "module:attribute". Raises ValueError for other names."""
    module, colon, attribute = name.partition(":")
    if not colon and name in PROBLEMS:
        return PROBLEMS[name]
    if not colon:
        advice = "; or module:attribute, of a fastgen.training.problems.Problem"
        raise ValueError(unknown_name_message("grpo.problem", name, PROBLEMS) + advice)
    try:
        problem = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"grpo.problem={name}: {e}; it is imported from where Python looks (PYTHONPATH)") from e
    if not isinstance(problem, Problem):
        wanted = "fastgen.training.problems.Problem(sample_prompt, reward)"
        raise ValueError(f"grpo.problem={name} is a {type(problem).__name__}, not a {wanted}")
    return problem
