"""Gathers the public names of fastgen; `import fastgen` loads this module when the first of them is used."""

from fastgen import lora
from fastgen.aio import AsyncEngine
from fastgen.batch import build_batch
from fastgen.cache.prefix import CacheStats
from fastgen.config import SamplingParams, EngineConfig
from fastgen.engine import Engine
from fastgen.exchange import adopt, cuda_ipc_handles, receive, send
from fastgen.models.spec import RopeConfig, ModelConfig, from_hf_config
from fastgen.models.transformer import forward, hidden_states, compute_logits
from fastgen.models.weights import init, load, save
from fastgen.replicas import Replicas
from fastgen.request import Completion, Event, Output
from fastgen.scoring import LogprobMismatch, compare_logprobs, logprob_mismatch, score
from fastgen.snapshot import Snapshot
from fastgen.step import new_kv_cache
from fastgen.types import (
    Adapter,
    StackedAdapters,
    Batch,
    KVCache,
    LogitEdits,
    TopKTopP,
    Layer,
    Params,
    SamplerOutput,
    SamplingTensors,
    SharedPrefix,
)

__all__ = [
    "Adapter",
    "StackedAdapters",
    "AsyncEngine",
    "Batch",
    "KVCache",
    "Completion",
    "CacheStats",
    "LogitEdits",
    "Engine",
    "Event",
    "TopKTopP",
    "Layer",
    "LogprobMismatch",
    "Output",
    "Params",
    "Replicas",
    "RopeConfig",
    "SamplerOutput",
    "SamplingTensors",
    "SamplingParams",
    "EngineConfig",
    "SharedPrefix",
    "Snapshot",
    "ModelConfig",
    "adopt",
    "compare_logprobs",
    "forward",
    "from_hf_config",
    "cuda_ipc_handles",
    "hidden_states",
    "init",
    "load",
    "lora",
    "logprob_mismatch",
    "new_kv_cache",
    "receive",
    "save",
    "score",
    "send",
    "build_batch",
    "compute_logits",
]
