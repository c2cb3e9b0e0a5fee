"""Measures what fp8 weights, an fp8 KV cache and bf16 change in a model's predictions, against fp32.

    python benchmarks/quality.py            # writes benchmarks/results/quality.json; then plot_quality.py

The model is the default one, with its real weights. The text needs no download: Python's language reference
(pydoc_data), docstrings of the standard library, and this project's documentation, in turn. One sequence has 7,168
tokens of it and then its own first 1,024 tokens again, which a model predicts by reading the cache 7,168 tokens back;
two more have 2,048 tokens. So 12,288 tokens are computed for each of five engines, and predictions of 11,261 tokens of
text and of the 1,024 that are a copy are compared: 11 minutes of CPU time, so about 6 minutes on two idle cores.

Every token's logits over the whole vocabulary are computed by the ops and the cache of an engine with these settings,
`CHUNK` tokens at a time. KL(fp32 || variant) and -log p are in nats. `nll_increase` is the mean difference of -log p
from fp32 for the same tokens, beside its standard error.

On a CPU the bf16 variant's matmuls multiply bf16 values in fp32 and round the sums to bf16, as a GPU does; torch's own
bf16 matmuls give the same up to the order of sums, and are slow on CPUs without instructions for them.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # other processes may be running; read when torch is imported

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastgen
from fastgen.checkpoint import tokenizer as tokenizers
from fastgen.checkpoint.hub import default_model_path, resolve
from fastgen.cli.bench.hardware import collect_versions, hardware_name
from fastgen.core.batch import build_batch
from fastgen.core.scheduler import Span
from fastgen.core.transformer import ModelOps, compute_logits, hidden_states
from fastgen.kernels.batch_invariant import compose_ops
from fastgen.kernels.select import select_cache_ops, select_quantized_ops
from fastgen.text.tokenizer import encode

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "quality.json"
REFERENCE = "fp32"
VARIANTS: dict[str, dict[str, Any]] = {  # settings of an engine; the first is what the others are compared with
    REFERENCE: {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp8 weights": {"dtype": "float32", "quantization": "fp8"},
    "fp8 cache": {"dtype": "float32", "kv_cache_dtype": "fp8"},
    "fp8 weights and cache": {"dtype": "float32", "quantization": "fp8", "kv_cache_dtype": "fp8"},
}
LENGTHS, NUM_COPIED = (8192, 2048, 2048), 1024  # tokens of each sequence; of the first, how many repeat its start
BUCKETS = (0, 512, 1024, 2048, 4096, 7168)  # edges of the positions that are reported separately
CHUNK = 1024  # tokens of a forward
LOGITS_PER_CHUNK = 2**24  # in memory at once, for each of two models
MIN_CHARS, MAX_CHARS = 1500, 6000  # of a document; longer ones are cut


class TextSequence(NamedTuple):
    """A sequence to predict."""

    token_ids: list[int]
    num_copied: int = 0  # of the last tokens, which repeat the first ones


class TokenStats(NamedTuple):
    """Statistics of predicted tokens, one value each, on the CPU."""

    position: Tensor
    is_copy: Tensor
    nll: Tensor  # -log p of the token
    reference_nll: Tensor
    kl: Tensor  # KL(reference || variant)
    agrees: Tensor  # whether both have the same most likely token


# --- text -----------------------------------------------------------------------------------------------------------


def language_reference() -> Iterator[str]:
    """Yields the topics of Python's language reference that help() shows."""
    yield from (topics[name] for name in sorted(topics))


def docstrings() -> Iterator[str]:
    """Yields the docstrings of each module of the standard library. Nothing is imported."""
    for name in sorted(sys.stdlib_module_names):
        spec = None if name.startswith("_") else importlib.util.find_spec(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        yield "\n\n".join(doc for n in nodes if (doc := ast.get_docstring(n)) and len(doc) > 200)


def project_docs() -> Iterator[str]:
    """Yields the pages of this project's documentation."""
    yield from (page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))


def documents() -> Iterator[str]:
    """Yields documents of the three sources in turn, each source in a fixed random order, until one is used up."""
    sources = []
    for source in (language_reference, docstrings, project_docs):
        texts = [text[:MAX_CHARS] for text in source() if len(text) >= MIN_CHARS]
        random.Random(0).shuffle(texts)
        sources.append(texts)
    yield from chain.from_iterable(zip(*sources, strict=False))


def text_sequences(tokenizer: Any, lengths: Sequence[int], num_copied: int) -> list[TextSequence]:
    """Returns sequences of consecutive documents. The first one ends with a copy of its first `num_copied` tokens."""
    num_tokens = sum(lengths) - num_copied
    token_ids: list[int] = []
    for document in documents():
        token_ids += encode(tokenizer, document + "\n\n")
        if len(token_ids) >= num_tokens:
            break
    assert len(token_ids) >= num_tokens, f"the documents have {len(token_ids)} tokens, and {num_tokens} are needed"
    sequences, start = list[TextSequence](), 0
    for i, length in enumerate(lengths):
        copied = num_copied if i == 0 else 0
        own = token_ids[start : start + length - copied]
        sequences.append(TextSequence(own + own[:copied], copied))
        start += len(own)
    return sequences


# --- logits ---------------------------------------------------------------------------------------------------------


def widened_linear(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Returns x @ w.T + bias: products of bf16 values, summed in fp32 and rounded once to the dtype of x."""
    y = F.linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)
    return y if out is None else out.copy_(y)


def engine_ops(engine: fastgen.Engine) -> ModelOps:
    """Returns the ops of an engine. Of a bf16 engine on a CPU the matmuls are `widened_linear`."""
    if engine.device.type != "cpu" or engine.dtype == torch.float32:
        return engine.runner.ops
    ops = compose_ops(ModelOps(linear=widened_linear))
    ops = select_quantized_ops(ops, engine.params, batch_invariant=False)
    cache = engine.config.kv_cache
    return select_cache_ops(ops, cache.dtype, cache.page_size, engine.model_config)


def iter_hidden_states(engine: fastgen.Engine, token_ids: list[int]) -> Iterator[Tensor]:
    """Yields the final hidden states of `CHUNK` tokens at a time, through the engine's KV cache."""
    ops, page_size = engine_ops(engine), engine.config.kv_cache.page_size
    pages = tuple(range(1, 1 + -(-len(token_ids) // page_size)))  # page 0 is padding's
    for start in range(0, len(token_ids), CHUNK):
        span = Span(0, start, min(start + CHUNK, len(token_ids)), False, pages)
        batch = build_batch((span,), {0: token_ids}, page_size, engine.device)
        yield hidden_states(engine.params, engine.cache, batch, engine.model_config, ops.attention, ops)


def compare_logits(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Returns nll, reference nll, KL and agreement of each row, for a variant's and the reference's logits."""
    logp, logq = reference_logits.log_softmax(-1), logits.log_softmax(-1)
    nll, reference_nll = (-x.gather(1, targets[:, None])[:, 0] for x in (logq, logp))
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return nll, reference_nll, kl, logp.argmax(-1) == logq.argmax(-1)


def measure(
    load: Callable[..., fastgen.Engine], sequences: Sequence[TextSequence], variants: dict[str, dict[str, Any]],
    progress: bool = True,
) -> Iterator[tuple[str, fastgen.Engine, float, TokenStats]]:  # fmt: skip
    """Yields each variant's name, engine, CPU seconds and statistics. `load(**settings)` makes an engine.

    Two engines exist at a time. Of the first variant, the reference, the final hidden states are kept.
    """
    reference: fastgen.Engine | None = None
    reference_states: list[Tensor] = []
    num_tokens = sum(len(s.token_ids) for s in sequences)
    with torch.inference_mode(), tqdm(total=num_tokens * len(variants), unit="token", disable=not progress) as bar:
        for name, settings in variants.items():
            bar.set_description(name)
            engine, started = load(**settings), time.process_time()
            reference = reference or engine
            logits_of, reference_logits_of = (
                partial(compute_logits, e.params, ops=engine_ops(e)) for e in (engine, reference)
            )
            num_rows = max(1, LOGITS_PER_CHUNK // engine.model_config.vocab_size)
            parts: list[tuple[Tensor, ...]] = []
            for i, (token_ids, num_copied) in enumerate(sequences):
                states, start = list[Tensor](), 0
                for h in chain.from_iterable(chunk.split(num_rows) for chunk in iter_hidden_states(engine, token_ids)):
                    # Row r predicts token r + 1; the row of the last token predicts none.
                    targets = torch.tensor(token_ids[start + 1 : start + 1 + len(h)], device=h.device)
                    rows = slice(start, start + len(targets))
                    positions = torch.arange(rows.start, rows.stop) + 1
                    logits = logits_of(h[: len(targets)])
                    reference_logits = logits if engine is reference else reference_logits_of(reference_states[i][rows])
                    stats = compare_logits(logits, reference_logits, targets)
                    parts.append((positions, positions >= len(token_ids) - num_copied, *(x.cpu() for x in stats)))
                    if engine is reference:
                        states.append(h)
                    start += len(h)
                    bar.update(len(h))
                if engine is reference:
                    reference_states.append(torch.cat(states))
            columns = [torch.cat(column) for column in zip(*parts, strict=True)]
            yield name, engine, time.process_time() - started, TokenStats(*columns)
            if engine is not reference:
                engine.close()
    if reference is not None:
        reference.close()


# --- figures --------------------------------------------------------------------------------------------------------


def summarize(stats: TokenStats, mask: Tensor) -> dict[str, float]:
    """Returns the figures of the tokens that a mask selects."""
    nll, reference_nll, kl = (x[mask].double() for x in (stats.nll, stats.reference_nll, stats.kl))
    increase = nll - reference_nll
    return {
        "num_tokens": int(mask.sum()), "perplexity": math.exp(nll.mean()), "nll_increase": float(increase.mean()),
        "nll_increase_stderr": float(increase.std() / math.sqrt(len(increase))), "kl_mean": float(kl.mean()),
        "kl_p99_9": float(kl.quantile(0.999)), "kl_max": float(kl.max()),
        "top1_agreement": float(stats.agrees[mask].double().mean()),
    }  # fmt: skip


def variant_result(stats: TokenStats, buckets: Sequence[int]) -> dict[str, Any]:
    """Returns the figures of one variant: of all text, of each range of positions, and of the copy."""
    result: dict[str, Any] = {"text": summarize(stats, ~stats.is_copy), "positions": []}
    for start, stop in zip(buckets, buckets[1:], strict=False):
        mask = (stats.position >= start) & (stats.position < stop) & ~stats.is_copy
        if mask.sum() > 1:
            result["positions"].append({"start": start, "stop": stop, **summarize(stats, mask)})
    if stats.is_copy.sum() > 1:
        result["copy"] = summarize(stats, stats.is_copy)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--device", default="cpu", help="device of the engines (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of each sequence")
    parser.add_argument("--copied", type=int, default=NUM_COPIED, help="tokens of the first that repeat its start")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what is compared with fp32"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="a JSON file (%(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device)

    def load(**settings: Any) -> fastgen.Engine:
        # Capturing and compiling would not pay: these ops run a few dozen times.
        return fastgen.Engine.from_pretrained(
            args.model, device=args.device, compile="eager", prefix_cache=False, progress=False,
            cache_tokens=max(args.lengths) + 64, **settings,
        )  # fmt: skip

    tokenizer = tokenizers.load(default_model_path() if args.model is None else resolve(args.model))
    sequences = text_sequences(tokenizer, args.lengths, args.copied)
    names = [REFERENCE, *(name for name in args.variants if name != REFERENCE)]
    load_average, results = os.getloadavg()[0], dict[str, Any]()
    for name, engine, seconds, stats in measure(load, sequences, {name: VARIANTS[name] for name in names}):
        row = variant_result(stats, BUCKETS)
        results[name] = {"settings": VARIANTS[name], "cpu_seconds": round(seconds, 1), **row}
        figures = ", ".join(f"{k} {v:.4g}" for k, v in row["text"].items())
        tqdm.write(f"{name}: {engine.summary().splitlines()[0]}\n  {figures}")
    text_hash = hashlib.sha256(json.dumps([s.token_ids for s in sequences]).encode()).hexdigest()
    result = {
        "model": args.model or "SmolLM2-135M-Instruct",
        "hardware": hardware_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load_average": round(load_average, 2), "date": time.strftime("%Y-%m-%d"), **collect_versions(device),
        "text": {
            "sources": ["pydoc_data.topics", "docstrings of the standard library", "docs/*.md"],
            "lengths": list(args.lengths), "num_copied": args.copied, "sha256_of_token_ids": text_hash,
        },
        "variants": results,
    }  # fmt: skip
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
