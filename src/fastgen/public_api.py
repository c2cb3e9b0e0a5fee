"""Gathers the public names of fastgen; `import fastgen` loads this module when the first of them is used."""

from fastgen import lora
from fastgen.async_engine import AsyncEngine
from fastgen.checkpoint.model_families import from_hf_config
from fastgen.checkpoint.weights import init, load, save
from fastgen.config import DatasetConfig, EngineConfig
from fastgen.core.batch import build_batch
from fastgen.core.kv_cache import new_kv_cache
from fastgen.core.model_config import ModelConfig, RopeConfig
from fastgen.core.prefix_cache import CacheStats
from fastgen.core.request import Completion, Event, Output
from fastgen.core.transformer import compute_logits, forward, hidden_states
from fastgen.core.types import (
    Batch,
    KVCache,
    Layer,
    LogitEdits,
    Params,
    SamplerOutput,
    SamplingTensors,
    SharedPrefix,
    TopKTopP,
)  # fmt: skip
from fastgen.datasets.generate import generate_dataset, join_dataset
from fastgen.distributed.data_parallel import Replicas
from fastgen.engine import Engine
from fastgen.lora import Adapter
from fastgen.lora.stacked import StackedAdapters
from fastgen.sampling_params import SamplingParams
from fastgen.snapshot import Snapshot
from fastgen.text.chat_template import ChatPrompt
from fastgen.training.logprobs import LogprobMismatch, compare_logprobs, logprob_mismatch, score
from fastgen.training.shared_params import adopt
from fastgen.training.weight_sync import cuda_ipc_handles, receive, send

__all__ = [
    "Adapter", "StackedAdapters", "AsyncEngine", "Batch", "KVCache", "ChatPrompt", "Completion", "CacheStats",
    "LogitEdits", "Engine", "Event", "TopKTopP", "Layer", "LogprobMismatch", "Output", "Params", "Replicas",
    "RopeConfig", "SamplerOutput", "SamplingTensors", "SamplingParams", "EngineConfig", "SharedPrefix", "Snapshot",
    "ModelConfig", "adopt", "compare_logprobs", "forward", "from_hf_config", "cuda_ipc_handles", "hidden_states",
    "init", "load", "lora", "logprob_mismatch", "new_kv_cache", "receive", "save", "score", "send", "build_batch",
    "compute_logits", "generate_dataset", "join_dataset", "DatasetConfig",
]  # fmt: skip
