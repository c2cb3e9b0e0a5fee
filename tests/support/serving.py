"""A tiny checkpoint with a tokenizer and a chat template, and `fgserve` on it in processes of its own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import tiny
from test_tokenizer import BYTE_LEVEL

import fastgen

SPEC = fastgen.from_hf_config(tiny.config("Mistral", vocab=330, context=512, eos_token_id=BYTE_LEVEL.eos_token_id))
SETTINGS = (
    "kv_cache.page_size=16",
    "kv_cache.cache_tokens=4096",
    "schedule.max_num_seqs=24",
    "schedule.token_budget=256",
)


def checkpoint(folder: Path) -> Path:
    """Saves a checkpoint with random weights in a folder, which it returns."""
    fastgen.save(folder, SPEC, tiny.weights(SPEC, device="cpu"))
    BYTE_LEVEL.save_pretrained(folder)
    return folder


class Server:
    """`fgserve` on a free port, and the lines of its standard error."""

    def __init__(self, *arguments: str, key: str = "") -> None:
        command = [sys.executable, "-m", "fastgen.cli.serve", *arguments, "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"FGSERVE_API_KEY": key} if key else {}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.line("loading; ").rpartition("loading; ")[2].strip().removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            self._queue.put(line)
        self._queue.put("")

    def line(self, text: str, seconds: float = 180) -> str:
        """Returns the next line of standard error with `text`."""
        end = time.monotonic() + seconds
        while line := self._queue.get(timeout=max(0.01, end - time.monotonic())):
            if text in line:
                return line
        raise AssertionError(f"the server ended without {text!r}: {''.join(self.lines)}")

    def ready(self) -> "Server":
        """Waits until the server announces that it is ready; checks its health."""
        self.line("is ready")
        assert self.http.get("/health").status_code == 200
        return self

    def until(self, condition: Any, seconds: float = 60) -> None:
        """Waits until a condition is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        """Returns the present /status.json."""
        return self.http.get("/status.json").raise_for_status().json()

    def children(self) -> dict[str, int]:
        """Returns process ids by name: "engine", "worker-0" and so on."""
        lines = (line.split() for line in self.lines if "has process id" in line)
        return {words[1]: int(words[-1]) for words in lines}

    def logged(self) -> list[dict[str, Any]]:
        """Returns the log lines of requests."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def stop(self, *, terminate: bool = True) -> int:
        """Waits for the server to end, after SIGTERM with `terminate`; returns the exit status."""
        self.http.close()
        if terminate and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join(10)
            self.process.stderr.close()  # type: ignore[union-attr]
