"""fastgen: an LLM inference engine to put inside an RL loop or a data pipeline.

import fastgen

with fastgen.Engine.from_pretrained() as engine:
    print(engine.generate("The capital of France is")[0].completions[0].text)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.public_api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a submodule, or all public names, when first used, so that the tools start before torch is imported."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "__all__" and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    api = import_module(f"{__name__}.public_api")
    if not hasattr(api, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(f"{__name__}.public_api").__all__})
