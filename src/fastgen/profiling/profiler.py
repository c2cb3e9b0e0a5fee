"""A window of a few engine steps, traced by torch: where the time of a step goes.

skipped steps (the tracer warms up) -> recorded steps -> trace file and ProfileSummary (`fastgen.profiling.report`)
"""

import gzip
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastgen.core import extensions
from fastgen.core.extensions import NULL_CONTEXT
from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Plan
from fastgen.profiling.report import ProfileSummary, build_category_track, measure_ceilings, read_kernels, summarize

MemoryUsage = Callable[[], dict[str, int]]  # returns device memory in bytes by owner
MAX_BACKGROUND_SECONDS = 60.0  # a background window ends then, with the steps so far


class Profiler(extensions.Profiler):
    """Part of an engine, which wraps its steps in `step` and a step's stages in `range`. Idle until a window opens.

    One window at a time; its steps all run in one thread.
    """

    _window: "ProfileWindow | None" = None
    _recording = False
    _writer: threading.Thread | None = None  # writes the last background window

    def __init__(
        self, model_config: ModelConfig, dtype: torch.dtype, device: torch.device, get_memory_usage: MemoryUsage,
        cache_bytes_per_element: float | None = None,
    ) -> None:  # fmt: skip
        self.model_config, self.dtype, self.device = model_config, dtype, device
        self.cache_bytes_per_element = cache_bytes_per_element  # None: that of `dtype`
        self.get_memory_usage = get_memory_usage

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Returns a context for a stage of a step, with its name in the trace and in the summary."""
        return record_function(name) if self._recording else NULL_CONTEXT

    def step(self, plan: Plan) -> AbstractContextManager[Any]:
        """Returns a context for a step that computes `plan`."""
        window = self._window  # read once: another thread may end it
        return NULL_CONTEXT if window is None else window._profile_step(plan)

    def window(self, num_steps: int = 8, path: str | Path | None = None, skip_first: int = 2) -> "ProfileWindow":
        """Returns a context in which `num_steps` steps are traced, after `skip_first` steps that are not.

        The trace's path must end in .json or .json.gz; by default it is named by the time, in the working directory.
        """
        return ProfileWindow(self, num_steps, skip_first, Path(path or _timestamped_name()), False)

    def profile_in_background(self, num_steps: int = 8, folder: str | Path = ".", skip_first: int = 2) -> Path:
        """Traces the next steps, called from any thread. Returns the path that the trace will have.

        A thread writes trace and summary to `folder` after the last step, and their paths to stderr, which takes a few
        seconds. The summary's name ends in .txt in place of .json.gz. The window ends after
        60 s with the steps so far. Raises ValueError while another profile is taken or written.
        """
        path = Path(folder) / _timestamped_name()
        self._open(ProfileWindow(self, num_steps, skip_first, path, True))
        return path

    def _open(self, window: "ProfileWindow") -> None:
        if self._writer is not None and self._writer.is_alive():
            raise ValueError("a profile is being written: wait for its end")
        old = self._window
        if old is not None and old._torch_profiler is None and time.monotonic() > old._deadline:
            vars(self).pop("_window", None)  # no step has come for it
        if vars(self).setdefault("_window", window) is not window:  # atomic, for two threads at once
            raise ValueError("a profile is being taken already: wait for its end")


class ProfileWindow:
    """A window of profiled steps. After it, `summary` has the results and `trace` is the file, for ui.perfetto.dev.

    If fewer steps ran than were asked for, those are reported. An error or interrupt inside ends the window too.
    """

    def __init__(self, profiler: Profiler, num_steps: int, skip_first: int, path: Path, background: bool) -> None:
        if num_steps < 1 or skip_first < 0:
            raise ValueError(f"steps must be at least 1 and skip at least 0, got {num_steps} and {skip_first}")
        if not path.name.endswith((".json", ".json.gz")):
            raise ValueError(f"the trace's path must end in .json or .json.gz, got {path}")
        self._profiler, self._path, self._background = profiler, path, background
        self._skip_first, self._stop_at_step = skip_first, skip_first + num_steps
        self._deadline = time.monotonic() + MAX_BACKGROUND_SECONDS if background else math.inf
        self._torch_profiler: profile | None = None
        self._num_steps_run = self._thread_id = 0
        self._plans: list[Plan] = []
        self._memory: dict[str, int] = {}
        self._summary: ProfileSummary | None = None

    @property
    def summary(self) -> ProfileSummary:
        """The window's results. Raises ValueError if no step was recorded."""
        return self._write_trace()

    @property
    def trace(self) -> Path:
        """The trace file. Raises ValueError if no step was recorded."""
        self._write_trace()
        return self._path

    def __enter__(self) -> "ProfileWindow":
        self._profiler._open(self)
        return self

    def __exit__(self, error_type: Any, error: BaseException | None, traceback: Any) -> None:
        if self._profiler._window is self and self._thread_id not in (0, threading.get_ident()):
            # Torch stops a trace only in the thread that started it: at the end of its next step.
            self._stop_at_step = 0
            return
        try:
            self._stop()
            if self._plans:
                self._write_trace()
        except Exception as e:
            if error is None:
                raise
            error.add_note(f"the profile could not be written: {e}")

    @contextmanager
    def _profile_step(self, plan: Plan) -> Iterator[None]:
        self._run_safely(self._start)
        label = NULL_CONTEXT
        if self._profiler._recording:
            num_tokens = sum(span.stop - span.start for span in plan)
            label = record_function(f"step {len(self._plans)} (tokens {num_tokens}, rows {len(plan)})")
            self._plans.append(plan)
        try:
            with label:
                yield
        finally:
            self._num_steps_run += 1
            self._run_safely(self._on_step_end)

    def _on_step_end(self) -> None:
        if self._num_steps_run < self._stop_at_step and time.monotonic() < self._deadline:
            self._start()
        elif self._profiler._window is self:
            self._stop()
            if self._background:
                self._profiler._writer = threading.Thread(target=self._run_safely, args=(self._write,))
                self._profiler._writer.start()

    def _write(self) -> None:
        """Writes trace and summary; runs in a thread, so that neither steps nor a request wait for the files."""
        path = self._path.with_name(self._path.name.split(".json")[0] + ".txt")
        path.write_text(f"{self.summary}\n", encoding="utf-8")
        _log_to_stderr(f"profiled {len(self._plans)} steps: {self._path} and {path}")

    def _start(self) -> None:
        """Starts recording once enough steps were skipped; at a step's end, to include what runs between steps."""
        if self._profiler._window is not self:
            return
        cuda = self._profiler.device.type == "cuda"
        if self._torch_profiler is None:
            self._thread_id = threading.get_ident()
            self._torch_profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
            self._torch_profiler.prepare_trace()
        if self._num_steps_run >= self._skip_first and not self._profiler._recording:
            if cuda:
                torch.cuda.synchronize(self._profiler.device)  # every recorded kernel has its launch recorded too
            self._torch_profiler.start_trace()
            self._profiler._recording = True

    def _stop(self) -> None:
        """Closes the window, also if an error occurs here."""
        profiler = self._profiler
        if profiler._window is not self:
            return
        recording, profiler._recording = profiler._recording, False
        vars(profiler).pop("_window")
        if self._torch_profiler is not None:
            try:
                if not recording:  # nothing but a start and a stop undoes prepare_trace
                    self._torch_profiler.start_trace()
                elif profiler.device.type == "cuda":
                    torch.cuda.synchronize(profiler.device)
            finally:
                self._torch_profiler.stop_trace()
        self._memory = profiler.get_memory_usage()
        if profiler.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(profiler.device)
            self._memory["torch allocated"] = torch.cuda.memory_allocated(profiler.device)
            self._memory["torch reserved"] = torch.cuda.memory_reserved(profiler.device)
            self._memory |= {"device used": total - free, "device total": total}

    def _run_safely(self, fn: Callable[[], None]) -> None:
        """Calls `fn`. A background window's error closes the window and is logged: it must not end an engine's step."""
        try:
            fn()
        except Exception as e:
            if not self._background:
                raise
            if self._profiler._window is self:
                self._profiler._recording = False
                vars(self._profiler).pop("_window", None)
            _log_to_stderr(f"the profile failed: {e}")

    def _write_trace(self) -> ProfileSummary:
        """Writes the trace and summarizes it, once."""
        if self._summary is not None:
            return self._summary
        profiler, model_config = self._profiler, self._profiler.model_config
        if profiler._window is self or not self._plans or self._torch_profiler is None:
            num_run = f"{self._num_steps_run} ran, of which the first {self._skip_first} are skipped"
            problem = "the window is still open" if profiler._window is self else "no step was recorded"
            raise ValueError(f"{problem} ({num_run}): run more steps inside, or skip fewer")
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "trace.json"
            self._torch_profiler.export_chrome_trace(str(exported))
            trace = json.loads(exported.read_text(encoding="utf-8", errors="replace"), strict=False)
        events = trace["traceEvents"]
        cuda, gpu = profiler.device.type == "cuda", any(e.get("cat") == "kernel" for e in events)
        if gpu:
            trace["traceEvents"] = events + build_category_track(read_kernels(events), model_config.num_layers)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if self._path.name.endswith(".gz") else open)(self._path, "wt") as file:
            json.dump(trace, file)
        ceilings, itemsize = None, profiler.dtype.itemsize
        if gpu or not cuda:
            with suppress(torch.OutOfMemoryError):
                ceilings = measure_ceilings(profiler.device, profiler.dtype)
        else:
            cause = "CUPTI is missing, or another profiler uses it"
            _log_to_stderr(f"no GPU kernel was recorded ({cause}): times are the host's")
        device_name = torch.cuda.get_device_name(profiler.device) if cuda else str(profiler.device)
        self._summary = summarize(
            events, self._plans, model_config, itemsize, ceilings, self._memory, device_name,
            profiler.cache_bytes_per_element,
        )  # fmt: skip
        self._torch_profiler = None
        return self._summary


def profile_on_signal(profiler: Profiler, folder: str | Path, num_steps: int = 8) -> None:
    """Profiles the next `num_steps` steps in the background whenever the process gets a SIGUSR2."""

    def handle(signum: int, frame: object) -> None:
        try:
            profiler.profile_in_background(num_steps, folder)
        except ValueError as e:
            _log_to_stderr(f"signal ignored: {e}")

    signal.signal(signal.SIGUSR2, handle)


def _timestamped_name() -> str:
    return datetime.now().strftime("fastgen-%Y%m%d-%H%M%S-%f.json.gz")


def _log_to_stderr(text: str) -> None:
    os.write(2, f"fastgen: {text}\n".encode())  # not print, which a signal handler must not enter a second time
