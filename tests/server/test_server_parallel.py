"""`fgserve` over two ranks and over two replicas: the answers of one engine, and an end with the cause."""

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
from fastgen.core.tokenizer import load

LAYOUTS = {"ranks": ("--tensor-parallel", "2"), "replicas": ("--replicas", "2")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(params=LAYOUTS)
def server(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Server]:
    made = Server(str(tiny), *SETTINGS, *LAYOUTS[request.param])
    try:
        yield made.ready()
    finally:
        made.stop()


def descendants(pid: int) -> list[int]:
    """Processes that another one has started, and these."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in children for p in (int(child), *descendants(int(child)))]


def test_serves(server: Server, tiny: Path) -> None:
    """Several at a time, streamed or not; then one of the processes is killed, and all end."""
    prompts = [[1, 2, 3 + i] for i in range(8)]
    with fastgen.Engine.from_pretrained(tiny, device="cpu", page_size=16, cache_tokens=4096, progress=False) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12), progress=False)
    words = load(tiny)
    assert words is not None

    def ask(prompt: list[int]) -> str:
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12}
        return server.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == [o.completions[0].text for o in outputs]
    server.until(lambda: server.status()["running"] == 0)
    found = server.status()
    assert found["generation_tokens"] == sum(len(o.completions[0].token_ids) for o in outputs) and found["steps"] > 0

    engine_process = server.children()["engine"]
    tracker_too = descendants(engine_process)
    victims = [p for p in tracker_too if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    body = {"model": "tiny", "prompt": [1], "max_tokens": 500, "ignore_eos": True, "stream": True}
    began = time.monotonic()
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(victims[-1], signal.SIGKILL)
        assert "error" in "".join(lines)
    assert server.process.wait(10) == 1 and time.monotonic() - began < 10
    server._reader.join(10)
    said = "".join(server.lines)
    assert f"(process {victims[-1]}) was killed by SIGKILL" in said
    assert not any(Path(f"/proc/{p}").exists() for p in victims)
