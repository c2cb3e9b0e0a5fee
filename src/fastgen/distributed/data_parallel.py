"""Several engines behind one queue, each a process with devices of its own.

    this process: the queue (`router`) ── a pipe each ── replica 0 .. R-1 (`replica`): an engine of one or more devices

Requests get their seeds here, so that no token depends on the replica that samples it.
"""

import itertools
import multiprocessing
import os
import queue
import random
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastgen import lora
from fastgen.checkpoint import files, tokenizer
from fastgen.config import EngineConfig
from fastgen.core.extensions import Adapters, Matcher
from fastgen.core.model_config import ModelConfig, shard_config
from fastgen.core.request import Event, Output, max_length, rejection_events
from fastgen.distributed.processes import ChildFailure, ChildProcess, end_children
from fastgen.distributed.replica import ReplicaInfo, run_replica
from fastgen.distributed.router import ReplicaRequest, Router
from fastgen.engine import resolve_model
from fastgen.event_stream import GenerateMethods, OneOrManyPrompts, OneOrManySampling, map_prompts
from fastgen.lora.adapter import Adapter
from fastgen.sampling_params import SamplingParams
from fastgen.structured_output.token_masks import GrammarBackend
from fastgen.text import Tokenizer
from fastgen.text.tokenizer import Prompt, encode_with_text
from fastgen.thread_safety import AccessGuard, exclusive
from fastgen.training.sleep import EngineMemory

Inbox = deque[tuple[int, Any]]  # (replica, message); None says that the replica has ended
Outbox = queue.SimpleQueue[tuple[int, Any] | None]  # (replica, message); None ends the sending thread
SHUTDOWN_SECONDS = 8.0  # for replicas to end by themselves


def visible_devices(replica_index: int, devices_per_replica: int, num_devices: int) -> str:
    """Returns CUDA_VISIBLE_DEVICES for a replica, out of the `num_devices` GPUs that this process sees."""
    names = [n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    names = names or [str(i) for i in range(num_devices)]
    return ",".join(names[replica_index * devices_per_replica : (replica_index + 1) * devices_per_replica])


class Replicas(GenerateMethods):
    """Engines behind one queue, with `Engine`'s methods for requests; one of the engines runs each request.

    One thread at a time may call it. When a replica ends for any reason, all of them end; the call that notices and all
    later calls raise RuntimeError with the replica and the cause.
    """

    def __init__(
        self, model_path: Path, model_config: ModelConfig, load_kwargs: dict[str, Any], config: EngineConfig, *,
        progress: bool,
    ) -> None:  # fmt: skip
        parallel, device_type = config.parallel, load_kwargs["device"]
        num_replicas, tp_size = parallel.replicas, parallel.tensor_parallel
        self.access_guard = AccessGuard("these replicas", "hand requests to the thread that calls them by a queue")
        self.config, self.memory = config.resolve(device_type), EngineMemory()  # the memory is the replicas' own
        self.abandoned = deque[frozenset[int]]()  # ids of requests without a reader, for the next step or add to abort
        self.events: list[Event] = []
        self.worker_failure = ""  # why the replicas have ended
        self.tokenizer: Tokenizer | None = tokenizer.load(model_path)
        vocabulary = model_config.vocab_size, frozenset(model_config.eos_token_ids)
        self._grammar_backend = GrammarBackend(self.tokenizer, *vocabulary, is_single_rank=False)
        prefix_tokens = config.kv_cache.page_size if config.kv_cache.prefix_cache else 0
        self._router = Router(num_replicas, config.schedule.max_num_seqs, prefix_tokens)
        # Messages of all replicas; the oldest stays until it is handled, so that an interrupt loses none.
        self._inbox, self._has_received = Inbox(), threading.Event()
        self._children, self._outbox = list[ChildProcess](), Outbox()
        # Runs before multiprocessing's own exit handler, which would wait for processes that wait for this one.
        self._finalizer = Finalize(self, _close_replicas, (self._children, self._outbox), exitpriority=10)
        num_threads = max(1, torch.get_num_threads() // (num_replicas * tp_size))
        engine_config = replace(config, parallel=replace(parallel, replicas=1), seed=None)
        options = load_kwargs | {f.name: getattr(engine_config, f.name) for f in fields(EngineConfig)}
        context, infos = multiprocessing.get_context("spawn"), dict[int, ReplicaInfo]()
        try:
            for i in range(num_replicas):
                gpus = visible_devices(i, tp_size, torch.cuda.device_count()) if device_type == "cuda" else None
                args: Any = num_threads, gpus, model_path, options | {"progress": progress and i == 0}
                child = ChildProcess(context, f"replica {i}", run_replica, *args)
                self._children.append(child)
                args = i, child, self._inbox, self._has_received
                threading.Thread(target=_receive_messages, args=args, daemon=True).start()
            threading.Thread(target=_send_messages, args=(self._children, self._outbox), daemon=True).start()
            while len(infos) < num_replicas:
                index, message = self._peek_message()
                if not isinstance(message, ReplicaInfo):
                    self._fail(index, message)
                infos[index] = message
                self._inbox.popleft()
        except BaseException:
            self.close()
            raise
        info = infos[0]
        self.model_config, self.device, self.dtype = info.model_config, info.device, info.dtype
        self.cache_capacity = min(i.cache_capacity for i in infos.values())  # tokens of one replica
        self.replica_stats = [infos[i].stats for i in range(num_replicas)]  # as each replica last reported
        self._seed_rng, self._next_ids = random.Random(config.seed), itertools.count()
        # Checks what every replica holds; tensors on the meta device take no memory.
        manager: Any = partial(lora.AdapterManager, self.model_config, config.lora, torch.device("meta"), self.dtype)
        self._adapter_manager = manager() if config.lora.max_adapters else Adapters()
        for name, folder in load_kwargs["adapters"].items():
            self._adapter_manager.add(name, lora.load(folder, self.model_config, device="cpu"))

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, *, replicas: int = 2, dtype: str = "auto", device: str = "auto",
        random_weights: bool = False, random_seed: int = 0, adapters: Mapping[str, str | Path] | None = None,
        progress: bool = True, **settings: Any,
    ) -> "Replicas":  # fmt: skip
        """Creates `replicas` engines as `Engine.from_pretrained` does.

        With `tensor_parallel=N`, replica r uses the GPUs from r N to r N + N - 1. On a CPU, replicas share its threads.
        """
        config = EngineConfig.from_flat(**settings)
        lora_config = lora.expand_lora_config(config.lora, adapters or {})
        config = replace(config, parallel=replace(config.parallel, replicas=replicas), lora=lora_config)
        path, device = resolve_model(model, dtype, device)
        if device not in ("cpu", "cuda"):
            raise ValueError(f"replicas have devices of their own: device must be cpu, cuda or auto, got {device!r}")
        if variables := " and ".join(name for name in ("RANK", "WORLD_SIZE") if name in os.environ):
            raise ValueError(f"one process starts all replicas, but {variables} says that torchrun started this one")
        tp_size, model_config = config.parallel.tensor_parallel, files.read_model_config(path)
        shard_config(model_config, tp_size)
        if device == "cuda" and (num_gpus := torch.cuda.device_count()) < replicas * tp_size:
            layout = f"parallel.replicas={replicas} of parallel.tensor_parallel={tp_size}"
            raise ValueError(f"{layout} need {replicas * tp_size} GPUs, and this machine shows {num_gpus}")
        load_kwargs = {"dtype": dtype, "device": device, "random_weights": random_weights, "random_seed": random_seed}
        return cls(path, model_config, load_kwargs | {"adapters": dict(adapters or {})}, config, progress=progress)

    # --- requests -------------------------------------------------------------------------------------------------

    @exclusive()
    def add(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, stream_text: bool = True,
        matchers: Sequence[Matcher | None] | None = None,
    ) -> int:  # fmt: skip
        """Queues a request, as `Engine.add`; returns its id."""
        params, is_checked = sampling or SamplingParams(), matchers is not None
        request = self._prepare(prompt, params, stream_text=stream_text, final_only=False, grammar_checked=is_checked)
        return self._enqueue([request])[0]

    @exclusive()
    def add_many(
        self, prompts: OneOrManyPrompts, sampling: OneOrManySampling = None, *, stream_text: bool = True,
        on_error: str = "raise",
    ) -> list[int]:  # fmt: skip
        """Queues one or many prompts at once and returns their ids; the options are as for `add` and `generate`."""
        prepare = partial(self._prepare, stream_text=stream_text, final_only=not stream_text)
        requests: list[ReplicaRequest | Output] = map_prompts(prepare, prompts, sampling, on_error)
        return self._enqueue(requests)

    def compile_grammar(
        self, params: SamplingParams, cancel_event: threading.Event | None = None
    ) -> list[Matcher | None]:
        """Checks a request's grammar and other constraints, which the replica that runs the request compiles."""
        self._grammar_backend.build_filters(params, [])
        if params.grammar is not None:
            self._grammar_backend.check_grammar(params.grammar, cancel_event)
        return [None] * params.n

    def _prepare(
        self, prompt: Prompt, sampling: SamplingParams, *, stream_text: bool, final_only: bool,
        grammar_checked: bool = False,
    ) -> ReplicaRequest:  # fmt: skip
        """Returns a request that is not yet queued. Raises ValueError if no replica could run it."""
        special_tokens, has_text = self.config.special_tokens_in_content, self.tokenizer is not None
        ids, text = encode_with_text(self.tokenizer, prompt, special_tokens_in_content=special_tokens)
        ids = ids[-(sampling.truncate_prompt_tokens or 0) :]
        limit = max_length(ids, sampling, self.model_config, self.cache_capacity, has_text)
        if sampling.adapter is not None:
            self._adapter_manager[sampling.adapter]  # raises ValueError if there is none of that name
        if not grammar_checked:
            self.compile_grammar(sampling)
        seed = self._seed_rng.getrandbits(63) if sampling.seed is None else sampling.seed
        detokenize = sampling.detokenize and has_text  # the replicas have the tokenizer even where it was removed here
        params = replace(sampling, seed=seed, max_tokens=limit - len(ids), detokenize=detokenize)
        return ReplicaRequest(ids, params, stream_text, final_only, text)

    def _enqueue(self, requests: Sequence[ReplicaRequest | Output]) -> list[int]:
        """Queues requests, or the outputs of rejected ones; returns their ids."""
        self._require_alive()
        self.drain_aborts()
        ids = [next(self._next_ids) for _ in requests]
        for id, request in zip(ids, requests, strict=True):
            if isinstance(request, Output):
                request.request_id = id
                self.events += rejection_events(request)
            else:
                request.id = id
                self._router.add(request)
        self._dispatch()
        return ids

    def _dispatch(self) -> None:
        """Sends waiting requests to replicas that can take them."""
        batches: dict[int, list[ReplicaRequest]] = {}
        for index, request in self._router.dispatch():
            batches.setdefault(index, []).append(request)
        for index, batch in batches.items():
            self._outbox.put((index, ("add", batch)))

    @exclusive()
    def abort(self, request_id: int) -> None:
        """Ends a request. Its last events, with the tokens so far, come with later steps."""
        request = self._router.requests.get(request_id)
        if request is not None and request.replica_index is not None:
            self._outbox.put((request.replica_index, ("abort", request_id)))
        elif request is not None:
            self._router.remove(request_id)
            self.events += request.end_without_tokens("abort")

    def drain_aborts(self) -> None:
        """Aborts requests whose events are no longer wanted."""
        while self.abandoned:
            for id in self.abandoned.popleft():
                if (request := self._router.requests.get(id)) is not None and request.has_consumer:
                    request.has_consumer = False
                    if request.replica_index is not None:
                        self._outbox.put((request.replica_index, ("abort", id)))

    @property
    def requests(self) -> "Replicas":
        """These replicas, for `generate`, `stream` and `as_completed`."""
        return self

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether requests are unfinished, or events have not been returned."""
        return bool(self._router.requests or self.events)

    def has_events_for(self, request_ids: Collection[int]) -> bool:
        """Returns whether any of these requests will have events."""
        return any(id in self._router.requests for id in request_ids) or bool(self.events)

    @exclusive()
    def step(self) -> list[Event]:
        """Waits until replicas have added to requests; returns the events. RuntimeError once a replica has ended."""
        self._require_alive()
        self.drain_aborts()
        self._dispatch()
        while self._inbox or (any(self._router.num_assigned_seqs) and not self.events):
            self._handle_message(*self._peek_message())
            self._inbox.popleft()
            if not (self.events or self._inbox):
                break  # no event, but the caller may have other work
        self._dispatch()
        events, self.events = self.events, []
        return events

    def _peek_message(self) -> tuple[int, Any]:
        """Waits for a message; returns the oldest one and its replica."""
        while not self._inbox:
            self._has_received.wait()
            self._has_received.clear()
        return self._inbox[0]

    def _handle_message(self, replica_index: int, message: Any) -> None:
        """Takes a replica's events and stats. Raises RuntimeError if the message is that the replica has ended."""
        if not isinstance(message, tuple) or isinstance(message, ChildFailure):
            self._fail(replica_index, message)
        events, self.replica_stats[replica_index] = message
        while events:  # an interrupt leaves the other events for the next call
            event = events[0]
            if (request := self._router.requests.get(event.request_id)) is not None:
                if request.has_consumer:
                    self.events.append(event)
                if event.output is not None:
                    event.output.prompt = request.prompt
                    self._router.remove(event.request_id)
            events.popleft()

    def _require_alive(self) -> None:
        if self.worker_failure:
            raise RuntimeError(self.worker_failure)

    def _fail(self, replica_index: int, failure: ChildFailure | None) -> NoReturn:
        """Ends all replicas after one has ended; raises the cause."""
        child = self._children[replica_index]
        child.process.join(1)
        child.failure = failure
        self.worker_failure = child.describe_end()
        self.close()
        raise (ValueError if failure and failure.is_value_error else RuntimeError)(self.worker_failure)

    def stats(self) -> dict[str, int]:
        """Returns `Engine.stats`, summed over the replicas."""
        return {name: sum(stats[name] for stats in self.replica_stats) for name in self.replica_stats[0]}

    def prepare_grammars(self) -> None:
        """Does now what the first grammar would wait for, a second or two, if grammars can be used at all."""
        self._grammar_backend.prepare()

    # --- adapters -------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> frozenset[str]:
        """Names of the adapters that requests may choose."""
        return frozenset(self._adapter_manager.loaded)

    @exclusive()
    def add_adapter(self, name: str, adapter: Adapter, scale: float | None = None) -> None:
        """Copies a LoRA adapter into every replica, as `Engine.add_adapter`."""
        adapter = lora.with_scale(adapter, scale)
        self._require_alive()
        self._adapter_manager.add(name, adapter)
        self._broadcast_call("add_adapter", name, lora.to_cpu(adapter))

    @exclusive()
    def update_adapter(self, name: str, adapter: Adapter) -> None:
        """Copies new tensors of the same shapes into an adapter of every replica, as `Engine.update_adapter`."""
        self._require_alive()
        self._adapter_manager.update(name, adapter)
        self._broadcast_call("update_adapter", name, lora.to_cpu(adapter))

    @exclusive()
    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, so that another can be added. Raises ValueError while requests use it."""
        self._require_alive()
        self.drain_aborts()
        self._adapter_manager[name]
        if using := [id for id, r in self._router.requests.items() if r.params.adapter == name]:
            raise ValueError(f"adapter {name!r} is used by requests {using[:8]}: abort them or let them end first")
        self._adapter_manager.remove(name)
        self._broadcast_call("remove_adapter", name)

    def _broadcast_call(self, method: str, *args: Any) -> None:
        """Makes every replica's engine call a method, in the order of all messages."""
        for i in range(len(self._children)):
            self._outbox.put((i, ("call", (method, args))))

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the replicas and their requests, from any thread. Does nothing in a fork of the process."""
        if self.access_guard.pid != os.getpid():
            return
        self.worker_failure = self.worker_failure or "the replicas are closed"
        self._finalizer()
        self._grammar_backend.close()
        self._router.clear()
        self.events.clear()


def _receive_messages(index: int, child: ChildProcess, inbox: Inbox, has_received: threading.Event) -> None:
    """Runs in a thread: an interrupt in the caller's thread would leave half of a message in the pipe."""
    message: Any = ()
    while message is not None:
        try:
            message = child.pipe.recv()
        except (EOFError, OSError):
            message = None
        inbox.append((index, message))
        has_received.set()


def _send_messages(children: list[ChildProcess], outbox: Outbox) -> None:
    """Runs in a thread, for the same reason. A replica always reads, so that none delays the messages to the others."""
    while (message := outbox.get()) is not None:
        with suppress(OSError):  # `_receive_messages` reports the end of the replica
            children[message[0]].pipe.send(message[1])


def _close_replicas(children: list[ChildProcess], outbox: Outbox) -> None:
    """Ends the replicas, and kills those that take longer than SHUTDOWN_SECONDS."""
    for i in range(len(children)):
        outbox.put((i, ("close", ())))
    outbox.put(None)
    end_children(children, SHUTDOWN_SECONDS)
