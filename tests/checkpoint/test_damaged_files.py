"""Damaged files: whatever is in them, a ValueError that names the file, at once, or a model of the right shapes.

`FASTGEN_DAMAGED_FILES=300 pytest tests/checkpoint/test_damaged_files.py` tries so many of each type.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import serving
import test_gguf
import tiny
from torch.utils._pytree import tree_leaves

import fastgen
from fastgen import lora
from fastgen.checkpoint.tokenizer import load as load_tokenizer
from fastgen.text import chat_template, tokenizer

CASES = int(os.environ.get("FASTGEN_DAMAGED_FILES", "6"))  # of each type of file
SECONDS, MEMORY = 5, 500e6  # that a case may take at most; bytes
INDEX = "model.safetensors.index.json"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<s>{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message.content | trim }}\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX,
    "model-00001-of-00002.safetensors", "gguf/m.gguf", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]  # fmt: skip
ABSURD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**32 - 1, 2**63, 10**18, 10**400, 1e308, 1e-308, 0.5, -2.5,
    64.0, float("nan"), float("inf"), "", "x", "64", "\ud800", "../x", "/etc/passwd", "a" * 10**5, [], {}, [[]], [None],
    [-1], [0.5],
    [10**18], ["x"] * 1000, {"x": 1}, {"rope_type": "yarn"}, [0] * 10**5,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with one undamaged file of each type."""
    folder = tmp_path_factory.mktemp("whole")
    serving.checkpoint(folder)
    fastgen.save(folder, serving.SPEC, tiny.weights(serving.SPEC, device="cpu"), shard_bytes=90_000)
    assert (folder / "model-00001-of-00002.safetensors").is_file()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    lora.save(folder / "adapter", serving.SPEC, lora.init(serving.SPEC, 4, device="cpu"))
    (folder / "gguf").mkdir()
    test_gguf.write(folder / "gguf" / "m.gguf", "llama", test_gguf.model(), **test_gguf.vocabulary("smollm"))
    return folder


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yields the paths of all values in a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def nested(depth: int) -> str:
    """Returns a JSON list nested `depth` deep."""
    return "[" * depth + "]" * depth


def damage_json(data: bytes, r: random.Random) -> bytes:
    """Returns JSON with absurd values, missing and repeated keys, and deep nesting, mostly near the root."""
    tree = json.loads(data)
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        places = [*paths(tree)]
        if not places:
            break
        *at, key = min(r.sample(places, min(len(places), r.choice((1, 3, 20)))), key=len)
        parent = tree
        for step in at:
            parent = parent[step]
        what = r.randrange(10)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[r.choice((key + "x", "x", "rope_scaling", "quantization_config", "auto_map"))] = parent.pop(key)
        elif what == 2 and isinstance(parent[key], int | float):
            parent[key] *= r.choice((-1, 2, 1000, 10**12, 0.1))
        elif what == 3:
            parent[key] = "NESTED"
        else:
            parent[key] = deepcopy(r.choice(ABSURD))
    if r.randrange(20) == 0:
        tree = r.choice(ABSURD)
    text = json.dumps(tree)
    text = text.replace('"NESTED"', nested(r.choice((5, 500, 10**5))))
    if r.randrange(10) == 0 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ', "' + r.choice([*json.loads(data)]) + '": ' + json.dumps(r.choice(ABSURD)) + "}"
    return text.encode("utf-8", "surrogatepass")


def damage_bytes(data: bytes, r: random.Random) -> bytes:
    """Returns bytes flipped, cut, repeated, zeroed or inserted, mostly near the beginning, where the structure is."""
    out = bytearray(data)
    near = lambda: min(int(len(data) * r.random() ** r.choice((1, 3, 8))), max(len(data) - 1, 0))  # noqa: E731
    what = r.randrange(8)
    if what == 0:
        return data[: near()]
    if what == 1:
        i = near()
        out[i:i] = r.randbytes(r.choice((1, 4, 100)))
    elif what == 2:
        i, j = sorted((near(), near()))
        out[i:j] = bytes(j - i)
    elif what == 3:
        i, j = sorted((near(), near()))
        out[i:j] = out[i:j] * 2
    elif what == 4:
        return r.randbytes(r.choice((0, 1, 8, 1000)))
    else:
        for _ in range(r.choice((1, 2, 8, 64))):
            out[near()] ^= 1 << r.randrange(8)
    return bytes(out)


def damage_safetensors(data: bytes, r: random.Random) -> bytes:
    """Returns a safetensors file with a damaged header or header length."""
    size = struct.unpack("<Q", data[:8])[0]
    if r.randrange(4) == 0:
        return struct.pack("<Q", r.choice((0, 1, size - 1, size + 1, 2**31, 2**60, 2**64 - 1, len(data)))) + data[8:]
    header = damage_json(data[8 : 8 + size], r)
    if r.randrange(3) == 0:
        for old, new in ((b'"F32"', r.choice((b'"F64"', b'"I32"', b'"BF16"', b'"F8_E4M3"', b'"F4"', b'"X"'))),):
            header = header.replace(old, new, r.choice((1, -1)))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def damage_gguf(data: bytes, r: random.Random) -> bytes:
    """Returns a GGUF file with damaged counts, lengths, types and offsets, anywhere in the header."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5))):
        at = r.choice((4, 8, 16, r.randrange(0, 600), r.randrange(0, 15000), data.find(b"blk.") + r.randrange(200)))
        size, value = r.choice(((4, "<I"), (8, "<Q")))
        number = r.choice((0, 1, 2, 8, 9, 10, 255, 2**31, 2**32 - 1, 2**60, 2**64 - 1, r.getrandbits(16)))
        out[at : at + size] = struct.pack(value, number % 2 ** (8 * size))
    if r.randrange(4) == 0:
        key = b"general.alignment"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, r.choice((0, 1, 3, 2**31, 2**32 - 1)))
        out[16:24] = struct.pack("<Q", (struct.unpack("<Q", out[16:24])[0] + 1) % 2**64)
        out[24:24] = entry
    return bytes(out)


PIECES = [
    "{% for i in range(10**12) %}x{% endfor %}", "{% for i in range(99999) %}x{% endfor %}",
    "{{ range(10**6) | list }}", "{{ 'x' * 9999999999 }}", "{{ messages | sum }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10 ** 10 ** 10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% macro f(x) %}{{ caller() }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n, s='x') %}{% if n %}{{ f(n - 1, s ~ s) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 'x' * 10 ** 12 }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ 'x' | center(10**11) }}", "{{ '%999999999999d' % 1 }}",
    "{{ '{:999999999999999999}'.format(1) }}", "{{ lipsum(99999999) }}", "{{ messages[10**9] }}",
    "{{ 1 / 0 }}", "{{ messages.x.y }}", "{{ messages + 1 }}", "{{ ''.__class__.__mro__ }}", "{% if %}", "{{", "}}",
    "{% endfor %}", "{% endset %}", "{% set %}", "{% set x %}", "{% set x = x + 1 %}", "{% set a.b = 1 %}",
    "{% macro %}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ none.x }}", "{{ raise_exception(5) }}",
    "{{ strftime_now(5) }}", "{{ (1).bit_length }}", "{{ dict(a=1, **5) }}", "{{ [1, 'a'] | sort }}", "{{ cycler() }}",
    "{{ 'a' | int + 'b' }}", "{{ namespace(_x=1) }}", "{{ messages[0] | items | list | first | join(1) }}",
    "{{ 'a'.encode('x') }}", "{{ 1_0 + 0x10 }}", "{# ", "{% raw %}", "{{ messages.clear() }}", "{{ '\\x' }}", "\ufffe",
]  # fmt: skip


def damage_template(data: bytes, r: random.Random) -> bytes:
    """Returns a chat template with loops, recursion, powers, and pieces of syntax in odd places."""
    i = r.choice([0, len(data), r.randrange(len(data) + 1)])
    return data[:i] + r.choice(PIECES).encode() + data[i:]


DAMAGE: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".json": [damage_json, damage_json, damage_json, damage_bytes],
    ".safetensors": [damage_safetensors, damage_safetensors, damage_bytes],
    ".gguf": [damage_gguf, damage_gguf, damage_bytes],
    ".jinja": [damage_template, damage_template, damage_bytes],
}


def use(folder: Path, file: str) -> None:
    """Loads the model or adapter that a file belongs to, and does with it what a first request does."""
    if file.startswith("adapter"):
        adapter = lora.load(folder / "adapter", serving.SPEC, device="cpu")
        assert lora.adapter_rank(adapter) == lora.read_peft_config(folder / "adapter")["r"]
        lora.merge(fastgen.init(serving.SPEC), serving.SPEC, adapter)
        return
    path = folder / file if file.endswith(".gguf") else folder
    if "token" not in file and "template" not in file:
        spec, params = fastgen.load(path, progress=False)
        shapes = [leaf.shape for leaf in tree_leaves(fastgen.checkpoint.weights.weight_specs(spec)) if leaf is not None]
        assert shapes == [tuple(x.shape) for x in tree_leaves(params) if x is not None]
        assert spec.hidden_size == (test_gguf.DIM if file.endswith(".gguf") else serving.SPEC.hidden_size)
        with fastgen.Engine(params, spec, cache_tokens=256, token_budget=32, max_num_seqs=2) as e:
            assert (
                len(e.generate([[1, 2, 3]], fastgen.SamplingParams(max_tokens=2, ignore_eos=True), progress=False)) == 1
            )
    if "token" in file or "template" in file or file.endswith(".gguf"):
        loaded = load_tokenizer(path)
        assert loaded is not None
        tokens = tokenizer.encode(loaded, "Hello 12 \u6f22 <s>")
        assert all(type(t) is int for t in tokens)
        assert isinstance(loaded.decode(tokens), str)
        chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        assert isinstance(chat_template.render(loaded, chat), str)


@contextmanager
def limited() -> Iterator[None]:
    """Raises AssertionError if the body takes too long or too much memory."""

    def late(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} seconds")

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.mark.parametrize("file", FILES)
def test_damaged(file: str, whole: Path, tmp_path: Path) -> None:
    """Each damage is an error that names the file or its folder, or has no effect."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    use(folder, file)
    data, failures, refused = (folder / file).read_bytes(), [], 0
    first = int(os.environ.get("FASTGEN_DAMAGED_FIRST", "0"))
    for seed in range(first, first + CASES):
        r = random.Random(f"{file} {seed}")
        (folder / file).write_bytes(r.choice(DAMAGE[Path(file).suffix])(data, r))
        try:
            with limited():
                use(folder, file)
        except ValueError as e:
            refused += 1
            if str(folder) not in str(e) and "template" not in str(e):
                failures.append(f"{seed}: does not name the file: {e}"[:300])
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            frame = e.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
            failures.append(f"{seed}: {type(e).__name__} {str(e)[:200]} at {place}")
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n".join(failures[:60])
    assert refused >= CASES // 4
