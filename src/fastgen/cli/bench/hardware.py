"""Describes the machine of a benchmark: its name, clocks, memory and versions, and the rates it reaches."""

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastgen
from fastgen.profiling import report


def hardware_name(device: torch.device) -> str:
    """Returns the GPU's name, or "CPU" and the processor architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def _nvidia_smi_command(query: str, device: torch.device, *options: str) -> list[str]:
    """Returns the nvidia-smi command line that queries one GPU."""
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={gpu}", *options]


@contextmanager
def measure_clocks(device: torch.device) -> Iterator[dict[str, float]]:
    """Samples the GPU's clock and power twice a second while the context is open.

    Yields a dict that receives the medians `sm_mhz` and `power_w` on exit, unless nvidia-smi does not report them.
    """
    medians: dict[str, float] = {}
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield medians
        return
    command = _nvidia_smi_command("clocks.sm,power.draw", device, "-lms", "500")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield medians
        finally:
            process.terminate()
            with suppress(ValueError):
                lines = process.communicate()[0].splitlines()[:-1]  # the last line may be cut off
                columns = zip(*([float(x) for x in line.split(",")] for line in lines), strict=True)
                medians |= dict(zip(("sm_mhz", "power_w"), map(statistics.median, columns), strict=False))


def measure_peak_rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the sustained rates of a GEMM in `dtype` and of a copy as fields of a row; see `profiling.report`."""
    size, num_bytes, seconds = (8192, 2**30, 3.0) if device.type == "cuda" else (1024, 2**26, 0.2)
    try:
        gemm, copy = report.measure_peak_rates(device, dtype, size, num_bytes, seconds)
    except torch.OutOfMemoryError:
        return {"gemm_tflops": None, "copy_tb_s": None, "probe": "out of memory"}
    probe = f"{size}^3 {str(dtype).removeprefix('torch.')} GEMM, {num_bytes >> 20} MiB copy"
    return {"gemm_tflops": gemm / 1e12, "copy_tb_s": copy / 1e12, "probe": probe}


def total_memory_bytes(device: torch.device) -> float:
    """Returns the size of the GPU's memory, or of the host's for a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def peak_memory_bytes(device: torch.device) -> float:
    """Returns the most memory this process has reserved so far: GPU memory, or host memory for a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    import resource  # does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def collect_versions(device: torch.device) -> dict[str, Any]:
    """Returns the versions of the software, the git commit and the GPU driver; None where one is unknown."""

    def output_of(command: list[str]) -> str | None:
        with suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        return None

    triton = None
    with suppress(PackageNotFoundError):
        triton = version("triton")
    root = Path(fastgen.__file__).parents[2]
    is_checkout = (root / ".git").exists()
    return {
        "engine_version": fastgen.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton,
        "commit": output_of(["git", "-C", str(root), "describe", "--always", "--dirty"]) if is_checkout else None,
        "driver": output_of(_nvidia_smi_command("driver_version", device)) if device.type == "cuda" else None,
    }  # fmt: skip
