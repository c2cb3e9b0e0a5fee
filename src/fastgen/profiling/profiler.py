"""Where the time of a step goes: a window of a few steps, traced by torch.

skipped steps (the tracer warms up) -> `steps` recorded ones -> trace file, Summary (`fastgen.profiling.report`)
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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastgen.core.model_config import ModelConfig
from fastgen.core.scheduler import Plan
from fastgen.profiling.report import ProfileSummary, build_category_track, measure_ceilings, read_kernels, summarize

MAX_BACKGROUND_SECONDS = 60.0  # in which a window that was requested ends
NULL_CONTEXT: AbstractContextManager[None] = nullcontext()  # shared by every range while nothing is recorded


class Profiler:
    """Owned by an engine, which wraps its steps in `step` and their stages in `range`. Off until a window opens.

    `owners` tells who holds how many bytes of memory. One window at a time; its steps all run in one thread.
    """

    _window: "ProfileWindow | None" = None
    _recording = False
    _writer: threading.Thread | None = None  # of the last window that was requested

    def __init__(
        self,
        model_config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        get_memory_usage: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        self.model_config, self.dtype, self.device, self.get_memory_usage = (
            model_config,
            dtype,
            torch.device(device),
            get_memory_usage or dict,
        )

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Around a stage of a step: its name in the trace and in the summary."""
        return record_function(name) if self._recording else NULL_CONTEXT

    def step(self, plan: Plan) -> AbstractContextManager[Any]:
        """Around a step that computes `plan`."""
        window = self._window  # read once: another thread may end it
        return NULL_CONTEXT if window is None else window._profile_step(plan)

    def window(self, num_steps: int = 8, path: str | Path | None = None, skip_first: int = 2) -> "ProfileWindow":
        """`with` it, the first `steps` steps inside are traced, after `skip` that are not; see Window.

        `path` of the trace ends in .json or .json.gz; None is a file named by the time in the working directory.
        """
        return ProfileWindow(
            self, num_steps, skip_first, Path(path) if path is not None else Path(_timestamped_name() + ".json.gz")
        )

    def profile_in_background(self, num_steps: int = 8, folder: str | Path = ".", skip_first: int = 2) -> Path:
        """Trace the next steps, from any thread; trace and summary go to `folder`, their paths to stderr.

        A thread writes them after the last step, which takes a few seconds; `wait` waits for it. The window ends after
        60 s with the steps there were. The trace's path; the summary ends in .txt instead of .json.gz. ValueError while
        another profile is being taken or written.
        """
        window = ProfileWindow(
            self, num_steps, skip_first, Path(folder) / (_timestamped_name() + ".json.gz"), background=True
        )
        self._open(window)
        return window._path

    def wait_until_written(self) -> None:
        """Until what was requested and has been recorded is written."""
        if self._writer is not None:
            self._writer.join()

    def _open(self, window: "ProfileWindow") -> None:
        if self._writer is not None and self._writer.is_alive():
            raise ValueError("a profile is being written: wait for its end")
        if (old := self._window) is not None and old._torch_profiler is None and time.monotonic() > old._deadline:
            vars(self).pop("_window", None)  # no step has come for it
        if vars(self).setdefault("_window", window) is not window:  # one operation, so that two threads cannot both
            raise ValueError("a profile is being taken already: wait for its end")

    def memory(self) -> dict[str, int]:
        """Bytes by owner, as torch counts them, and of the device."""
        held = dict(self.get_memory_usage())
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            held["torch allocated"] = torch.cuda.memory_allocated(self.device)
            held["torch reserved"] = torch.cuda.memory_reserved(self.device)
            held |= {"device used": total - free, "device total": total}
        return held


class ProfileWindow:
    """A window of profiled steps. Afterwards `summary` is what was found and `trace` the file, for ui.perfetto.dev.

    If fewer steps ran, they are what is reported. An error or interrupt inside ends it too.
    """

    def __init__(
        self, profiler: Profiler, num_steps: int, skip_first: int, path: Path, background: bool = False
    ) -> None:
        if num_steps < 1 or skip_first < 0:
            raise ValueError(f"steps must be at least 1 and skip at least 0, got {num_steps} and {skip_first}")
        if not path.name.endswith((".json", ".json.gz")):
            raise ValueError(f"the trace's path must end in .json or .json.gz, got {path}")
        self._profiler, self._skip_first, self._stop_at_step, self._path, self._background = (
            profiler,
            skip_first,
            skip_first + num_steps,
            path,
            background,
        )
        self._deadline = time.monotonic() + MAX_BACKGROUND_SECONDS if background else math.inf
        self._torch_profiler: profile | None = None
        self._num_steps_run, self._thread_id = 0, 0
        self._plans: list[Plan] = []
        self._memory: dict[str, int] = {}
        self._summary: ProfileSummary | None = None

    @property
    def summary(self) -> ProfileSummary:
        """ValueError if no step was recorded."""
        return self._write_trace()

    @property
    def trace(self) -> Path:
        """ValueError if no step was recorded."""
        self._write_trace()
        return self._path

    def __enter__(self) -> "ProfileWindow":
        self._profiler._open(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profiler._window is self and self._thread_id not in (0, threading.get_ident()):
            self._stop_at_step = 0  # torch stops a trace in the thread that started it: at the end of its next step
            return
        try:
            self._stop()
            if self._plans:
                self._write_trace()
        except Exception as e:
            if exc is None:
                raise
            exc.add_note(f"the profile could not be written: {e}")

    @contextmanager
    def _profile_step(self, plan: Plan) -> Iterator[None]:
        self._report_errors(self._start)
        label: AbstractContextManager[Any] = NULL_CONTEXT
        if self._profiler._recording:
            tokens = sum(span.stop - span.start for span in plan)
            label = record_function(f"step {len(self._plans)} (tokens {tokens}, rows {len(plan)})")
            self._plans.append(plan)
        try:
            with label:
                yield
        finally:
            self._num_steps_run += 1
            self._report_errors(self._on_step_end)

    def _on_step_end(self) -> None:
        if self._num_steps_run < self._stop_at_step and time.monotonic() < self._deadline:
            self._start()
        elif self._profiler._window is self:
            self._stop()
            if self._background:
                self._profiler._writer = threading.Thread(target=self._report_errors, args=(self._write,))
                self._profiler._writer.start()

    def _write(self) -> None:
        """A thread: neither the engine's steps nor a request waits for the files."""
        summary = self._path.with_name(self._path.name.split(".json")[0] + ".txt")
        text = f"{self.summary}\n"
        summary.write_text(text, encoding="utf-8")
        _log_to_stderr(f"profiled {len(self._plans)} steps: {self._path} and {summary}")

    def _start(self) -> None:
        """Trace from now on if enough steps were skipped; at a step's end, so that what lies between steps is seen."""
        if self._profiler._window is not self:
            return
        cuda = self._profiler.device.type == "cuda"
        if self._torch_profiler is None:
            self._thread_id = threading.get_ident()
            self._torch_profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
            self._torch_profiler.prepare_trace()
        if self._num_steps_run >= self._skip_first and not self._profiler._recording:
            if cuda:
                torch.cuda.synchronize(self._profiler.device)  # no kernel without its launch
            self._torch_profiler.start_trace()
            self._profiler._recording = True

    def _stop(self) -> None:
        """Off again, whatever fails here."""
        profiler = self._profiler
        if profiler._window is not self:
            return
        recording, profiler._recording = profiler._recording, False
        vars(profiler).pop("_window")
        if self._torch_profiler is not None:
            try:
                if not recording:  # only prepared, which nothing else takes back
                    self._torch_profiler.start_trace()
                elif profiler.device.type == "cuda":
                    torch.cuda.synchronize(profiler.device)
            finally:
                self._torch_profiler.stop_trace()
        self._memory = profiler.memory()

    def _report_errors(self, fn: Callable[[], None]) -> None:
        """A window that nobody waits for must not end the engine's step."""
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
        """Write the trace and read it, once."""
        if self._summary is not None:
            return self._summary
        if self._profiler._window is self or not self._plans or self._torch_profiler is None:
            ran = f"{self._num_steps_run} ran, of which the first {self._skip_first} are skipped"
            what = "the window is still open" if self._profiler._window is self else "no step was recorded"
            raise ValueError(f"{what} ({ran}): run more steps inside, or skip fewer")
        profiler = self._profiler
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "trace.json"
            self._torch_profiler.export_chrome_trace(str(raw))
            trace = json.loads(raw.read_text(encoding="utf-8", errors="replace"), strict=False)
        events = trace["traceEvents"]
        cuda, gpu = profiler.device.type == "cuda", any(e.get("cat") == "kernel" for e in events)
        if gpu:
            trace["traceEvents"] = events + build_category_track(read_kernels(events), profiler.model_config.num_layers)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if self._path.name.endswith(".gz") else open)(self._path, "wt") as file:
            json.dump(trace, file)
        name = torch.cuda.get_device_name(profiler.device) if cuda else str(profiler.device)
        ceiling = None
        if gpu or not cuda:
            with suppress(torch.OutOfMemoryError):
                ceiling = measure_ceilings(profiler.device, profiler.dtype)
        else:
            _log_to_stderr(
                "no GPU kernel was recorded (CUPTI is missing, or another profiler has it): parts are the host's time"
            )
        width = profiler.dtype.itemsize
        self._summary = summarize(events, self._plans, profiler.model_config, width, ceiling, self._memory, name)
        self._torch_profiler = None
        return self._summary


def profile_on_signal(profiler: Profiler, folder: str | Path, signum: int | None = None, num_steps: int = 8) -> None:
    """Take a profile of the next `steps` steps whenever the process gets a signal (None: SIGUSR2); see `request`."""
    signum = getattr(signal, "SIGUSR2", None) if signum is None else signum
    if signum is None:
        raise ValueError("this system has no SIGUSR2: name another signal")

    def handle(signum: int, frame: object) -> None:
        try:
            profiler.profile_in_background(num_steps, folder)
        except ValueError as e:
            _log_to_stderr(f"signal ignored: {e}")

    signal.signal(signum, handle)


def _timestamped_name() -> str:
    return datetime.now().strftime("fastgen-%Y%m%d-%H%M%S-%f")


def _log_to_stderr(text: str) -> None:
    os.write(2, f"fastgen: {text}\n".encode())  # a signal may arrive within a print, which cannot be entered twice
