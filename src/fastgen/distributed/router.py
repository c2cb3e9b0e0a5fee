"""Which replica runs a request: the queue in front of several engines, the load and the cached prefixes of each.

A request waits here until a replica can take it. It goes to the replica with the least load, or to one that has
computed the prompt's first page, which it then finds in its prefix cache.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fastgen.core.request import Completion, Event, FinishReason, Output
from fastgen.sampling_params import SamplingParams

PREFIX_AFFINITY = 4  # a cached prefix outweighs a load that is larger by this many times the request's own tokens
MAX_PREFIXES = 2**14  # prefixes that are remembered


@dataclass(slots=True, eq=False)
class ReplicaRequest:
    """A request that has not ended, as the parent queues it and as a replica receives it."""

    prompt_token_ids: list[int]
    params: SamplingParams  # with a seed and max_tokens
    stream_text: bool
    final_only: bool  # whether only the last event is wanted
    prompt: str | None = None  # its text, as in the output
    id: int = -1  # the parent's; -1 before the request is queued
    replica_index: int | None = None  # None while the request waits
    has_consumer: bool = True  # False once its events are no longer wanted

    @property
    def max_total_tokens(self) -> int:
        """The most tokens that prompt and completions can have together."""
        return len(self.prompt_token_ids) + self.params.n * (self.params.max_tokens or 0)

    def end_without_tokens(self, reason: FinishReason, error: str = "") -> list[Event]:
        """Returns the events of a request that ends before it runs."""
        indices = range(self.params.n)
        completions = [Completion(finish_reason=reason, error=error) for _ in indices]
        events = [Event(self.id, i, [], "", finish_reason=reason, error=error) for i in indices]
        events[-1].output = Output(self.id, self.prompt_token_ids, completions, prompt=self.prompt)
        return events


def choose_replica(
    assigned_tokens: Sequence[int], accepts_requests: Sequence[bool], prefix_replicas: Collection[int], num_tokens: int
) -> int | None:
    """Returns the replica for a request of `num_tokens`, or None if no replica accepts requests.

    That is the replica with the least load, or the least loaded of `prefix_replicas`, which have cached the request's
    prefix, unless their load is so much larger that computing the prefix again is quicker.
    """
    free = [i for i, accepts in enumerate(accepts_requests) if accepts]
    if not free:
        return None
    least_loaded = min(free, key=assigned_tokens.__getitem__)
    cached = min((i for i in free if i in prefix_replicas), key=assigned_tokens.__getitem__, default=least_loaded)
    excess_tokens = assigned_tokens[cached] - assigned_tokens[least_loaded]
    return cached if excess_tokens <= PREFIX_AFFINITY * num_tokens else least_loaded


class Router:
    """The unfinished requests of several replicas, and what each replica has been assigned."""

    def __init__(self, num_replicas: int, max_num_seqs: int, prefix_tokens: int) -> None:
        self.requests: dict[int, ReplicaRequest] = {}  # by id
        self.waiting: deque[ReplicaRequest] = deque()
        self.assigned_tokens, self.num_assigned_seqs = [0] * num_replicas, [0] * num_replicas
        self.max_assigned_seqs = max_num_seqs * 5 // 4  # those that a replica runs at once, and a quarter to follow
        self.prefix_tokens = prefix_tokens  # of a page, by which prompts are compared; 0: replicas cache no prefixes
        self._prefix_replicas: dict[int, set[int]] = {}  # by the hash of a prefix

    def add(self, request: ReplicaRequest) -> None:
        """Queues a request."""
        self.requests[request.id] = request
        self.waiting.append(request)

    def dispatch(self) -> Iterator[tuple[int, ReplicaRequest]]:
        """Assigns waiting requests in their order while a replica accepts them; yields (replica, request)."""
        while self.waiting:
            request = self.waiting[0]
            if not request.has_consumer:
                del self.requests[self.waiting.popleft().id]
                continue
            prefix, n = self._hash_prefix(request), request.params.n
            accepts = [num_seqs == 0 or num_seqs + n <= self.max_assigned_seqs for num_seqs in self.num_assigned_seqs]
            replicas = set[int]() if prefix is None else self._prefix_replicas.get(prefix, set())
            index = choose_replica(self.assigned_tokens, accepts, replicas, request.max_total_tokens)
            if index is None:
                break
            self.waiting.popleft()
            request.replica_index = index
            self.assigned_tokens[index] += request.max_total_tokens
            self.num_assigned_seqs[index] += n
            if prefix is not None:
                self._prefix_replicas[prefix] = replicas | {index}
                if len(self._prefix_replicas) > MAX_PREFIXES:
                    del self._prefix_replicas[next(iter(self._prefix_replicas))]
            yield index, request

    def _hash_prefix(self, request: ReplicaRequest) -> int | None:
        """Returns the hash of what the prefix cache compares of a prompt's first page; None if it has no whole page."""
        if not self.prefix_tokens or len(request.prompt_token_ids) <= self.prefix_tokens:
            return None
        params, tokens = request.params, request.prompt_token_ids[: self.prefix_tokens]
        return hash((params.adapter, params.cache_salt, *tokens))

    def clear(self) -> None:
        """Removes all requests."""
        self.requests.clear()
        self.waiting.clear()

    def remove(self, request_id: int) -> None:
        """Removes a request that has ended, or that still waits."""
        request = self.requests.pop(request_id)
        if request.replica_index is None:
            self.waiting.remove(request)
        else:
            self.assigned_tokens[request.replica_index] -= request.max_total_tokens
            self.num_assigned_seqs[request.replica_index] -= request.params.n
