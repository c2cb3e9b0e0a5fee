"""fastgen: batched generation from dense transformers, small enough to read and yours to import.

import fastgen

with fastgen.Engine.from_pretrained() as engine:
    print(engine.generate("The capital of France is")[0].completions[0].text)
"""

from fastgen.batch import stage
from fastgen.cache.prefix import Counts
from fastgen.config import SamplingParams, Settings
from fastgen.engine import Engine
from fastgen.models.spec import Rope, Spec, from_hf
from fastgen.models.transformer import forward, hidden, unembed
from fastgen.models.weights import init, load, save
from fastgen.replicas import Replicas
from fastgen.request import Completion, Event, Output
from fastgen.snapshot import Snapshot
from fastgen.step import new_cache
from fastgen.types import Batch, Cache, Edits, Filter, Layer, Params, Sampled, Sampling, Share

__all__ = [
    "Batch",
    "Cache",
    "Completion",
    "Counts",
    "Edits",
    "Engine",
    "Event",
    "Filter",
    "Layer",
    "Output",
    "Params",
    "Replicas",
    "Rope",
    "Sampled",
    "Sampling",
    "SamplingParams",
    "Settings",
    "Share",
    "Snapshot",
    "Spec",
    "forward",
    "from_hf",
    "hidden",
    "init",
    "load",
    "new_cache",
    "save",
    "stage",
    "unembed",
]
__version__ = "0.1.0"
