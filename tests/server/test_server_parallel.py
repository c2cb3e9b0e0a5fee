"""`fgserve` over two ranks and over two replicas: the responses of one engine, and an end with the cause."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import SETTINGS, Server, checkpoint

import fastgen
from fastgen import SamplingParams

LAYOUTS = {"ranks": ("--tensor-parallel", "2"), "replicas": ("--replicas", "2")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(params=LAYOUTS)
def server(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Server]:
    server = Server(str(tiny), *SETTINGS, *LAYOUTS[request.param])
    try:
        yield server.ready()
    finally:
        server.stop()


def descendants(pid: int) -> list[int]:
    """Returns the ids of a process's children and of their descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in children for p in (int(child), *descendants(int(child)))]


def test_requests_then_the_end_of_a_process(server: Server, tiny: Path) -> None:
    """Concurrent requests get the library's texts; then one of the processes is killed, and all end."""
    prompts = [[1, 2, 3 + i] for i in range(8)]
    with fastgen.Engine.from_pretrained(tiny, device="cpu", page_size=16, cache_tokens=4096, progress=False) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12), progress=False)

    def complete(prompt: list[int]) -> str:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12}
        return server.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(complete, prompts)) == [o.completions[0].text for o in outputs]
    server.until(lambda: server.status()["running"] == 0)
    status = server.status()
    assert status["generation_tokens"] == sum(len(o.completions[0].token_ids) for o in outputs) and status["steps"] > 0

    # Not multiprocessing's resource tracker.
    victims = [
        p for p in descendants(server.children()["engine"]) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()
    ]
    body = {"model": "tiny", "prompt": [1], "max_tokens": 500, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(victims[-1], signal.SIGKILL)
        assert "error" in "".join(lines)
    assert server.process.wait(10) == 1 and time.monotonic() - began < 10
    server._reader.join(10)
    assert f"(process {victims[-1]}) was killed by SIGKILL" in "".join(server.lines)
    assert not any(Path(f"/proc/{p}").exists() for p in victims)
