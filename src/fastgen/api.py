"""Gathers the public names of fastgen; `import fastgen` loads this module when the first of them is used."""

from fastgen import lora
from fastgen.aio import AsyncEngine
from fastgen.batch import stage
from fastgen.cache.prefix import Counts
from fastgen.config import SamplingParams, Settings
from fastgen.engine import Engine
from fastgen.exchange import adopt, handles, receive, send
from fastgen.models.spec import Rope, Spec, from_hf
from fastgen.models.transformer import forward, hidden, unembed
from fastgen.models.weights import init, load, save
from fastgen.replicas import Replicas
from fastgen.request import Completion, Event, Output
from fastgen.scoring import Mismatch, compare, mismatch, score
from fastgen.snapshot import Snapshot
from fastgen.step import new_cache
from fastgen.types import Adapter, Adapters, Batch, Cache, Edits, Filter, Layer, Params, Sampled, Sampling, Share

__all__ = [
    "Adapter",
    "Adapters",
    "AsyncEngine",
    "Batch",
    "Cache",
    "Completion",
    "Counts",
    "Edits",
    "Engine",
    "Event",
    "Filter",
    "Layer",
    "Mismatch",
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
    "adopt",
    "compare",
    "forward",
    "from_hf",
    "handles",
    "hidden",
    "init",
    "load",
    "lora",
    "mismatch",
    "new_cache",
    "receive",
    "save",
    "score",
    "send",
    "stage",
    "unembed",
]
