"""What a benchmark ran on: the hardware, its clocks, memory and versions, and the rates it reached right then."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgen

Row = dict[str, Any]


def hardware_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _nvidia_smi_command(query: str, device: torch.device, *options: str) -> list[str]:
    """nvidia-smi's command line for one GPU."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={gpu}", *options]


@contextmanager
def measure_clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Medians of the GPU's clock and power while it is open; empty when it closes where nvidia-smi cannot say."""
    found: dict[str, float] = {}
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield found
        return
    command = _nvidia_smi_command("clocks.sm,power.draw", device, "-lms", "500")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
            with suppress(ValueError):
                lines = process.communicate()[0].splitlines()[:-1]  # the last one may be cut
                columns = zip(*([float(x) for x in line.split(",")] for line in lines), strict=True)
                found |= dict(zip(("sm_mhz", "power_w"), map(statistics.median, columns), strict=False))


def measure_peak_rates(device: torch.device, dtype: torch.dtype) -> Row:
    """Sustained rates, right now: a matrix product of random data in `dtype`, and a copy (bytes read + written)."""
    cuda = device.type == "cuda"
    size, count, seconds = (8192, 2**30, 3.0) if cuda else (1024, 2**26, 0.2)
    try:
        a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in "abc")
        source, target = (torch.ones(count, device=device, dtype=torch.uint8) for _ in "ab")
    except torch.OutOfMemoryError:
        return {"gemm_tflops": None, "copy_tb_s": None, "probe": "no memory was left"}

    def rate(work: Callable[[], Any], seconds: float) -> float:
        """Calls a second, once a third of the time has passed."""
        begin = start = time.perf_counter()
        calls, timed = 0, False
        while (now := time.perf_counter()) < begin + seconds:
            if not timed and now > begin + seconds / 3:
                start, calls, timed = now, 0, True
            for _ in range(10 if cuda else 1):
                work()
            calls += 10 if cuda else 1
            if cuda:
                torch.cuda.synchronize(device)
        return calls / (time.perf_counter() - start)

    return {
        "gemm_tflops": 2 * size**3 * rate(lambda: torch.mm(a, b, out=out), seconds) / 1e12,
        "copy_tb_s": 2 * count * rate(lambda: target.copy_(source), seconds / 3) / 1e12,
        "probe": f"{size}^3 {str(dtype).removeprefix('torch.')} product, {count >> 20} MiB copy",
    }


def total_memory_bytes(device: torch.device) -> float:
    """All there is, bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def peak_memory_bytes(device: torch.device) -> float:
    """Most memory held so far by this process, bytes: the GPU's, or else the host's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def collect_versions(device: torch.device) -> Row:
    """What ran: versions, commit and driver; None for what cannot be told."""

    def said(command: list[str]) -> str | None:
        with suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        return None

    found: Row = {
        "engine_version": fastgen.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    root = Path(fastgen.__file__).parents[2]
    checkout = (root / ".git").exists()
    found["commit"] = said(["git", "-C", str(root), "describe", "--always", "--dirty"]) if checkout else None
    found["driver"] = said(_nvidia_smi_command("driver_version", device)) if device.type == "cuda" else None
    return found
