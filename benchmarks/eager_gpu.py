"""The plain eager forward on one GPU: the baseline that compiled steps are compared with.

    python benchmarks/eager_gpu.py                 # writes benchmarks/results/eager_gpu.json

Random weights on real configs, distinct random prompts. For Mistral 7B in bf16: seconds to make the weights, prefill
and decode rates. For Llama 3.2 1B: how far bf16 logits are from fp32's, and greedy tokens batched against alone.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

import fastgen

HERE = Path(__file__).parent


def make_prompts(num_prompts: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, vocab, (length,), generator=generator).tolist() for _ in range(num_prompts)]


def measure_speed(name: str, num_requests: int, prompt_len: int, output_len: int, attention: str = "triton") -> dict:
    """Measures a model with random weights in bf16; steps are timed between device synchronizations."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine = fastgen.Engine.from_pretrained(
        HERE / "configs" / f"{name}.json", random_weights=True, device="cuda", dtype="bfloat16", attention=attention,
        compile="eager", max_num_seqs=num_requests, token_budget=8192,
        cache_tokens=num_requests * (prompt_len + output_len + 16),
    )  # fmt: skip
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - start
    sampling = fastgen.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    engine.generate(
        make_prompts(num_requests, prompt_len, engine.model_config.vocab_size),
        fastgen.SamplingParams(temperature=0, max_tokens=4),
    )
    for prompt in make_prompts(num_requests, prompt_len, engine.model_config.vocab_size):
        engine.add(prompt, sampling)
    prefill = decode = 0.0
    steps = tokens = 0
    while engine.has_unfinished_requests:
        torch.cuda.synchronize()
        start = time.perf_counter()
        events = engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if engine.last_batch is not None and len(engine.last_batch.token_ids) > len(engine.last_batch.seq_lens):
            prefill += seconds
        else:
            decode, steps, tokens = decode + seconds, steps + 1, tokens + len(events)
    result = {
        "model": name, "dtype": "bfloat16", "attention": attention,
        "requests": num_requests, "prompt_len": prompt_len, "output_len": output_len,
        "make_weights_and_cache_s": load_seconds,
        "prefill_s": prefill, "prefill_tok_s": num_requests * prompt_len / prefill,
        "decode_ms_per_step": 1e3 * decode / steps, "decode_tok_s": tokens / decode,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip
    engine.close()
    return result


def measure_precision(name: str) -> dict:
    """Compares bf16 with fp32 on the same weights: logits of prompts, and greedy tokens alone and batched."""
    model_config = fastgen.from_hf_config(json.loads((HERE / "configs" / f"{name}.json").read_text()))
    params = fastgen.init(model_config, device="cuda", dtype=torch.bfloat16)
    params_fp32 = fastgen.init(model_config, device="cuda", dtype=torch.float32)
    from fastgen.checkpoint.weights import named_weights, update

    update(params_fp32, model_config, named_weights(params, model_config))
    prompts = make_prompts(8, 200, model_config.vocab_size)
    sampling = fastgen.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, prompt_logprobs=0)
    outputs: dict[str, list[fastgen.Output]] = {}
    tokens_alone: dict[str, list[list[int]]] = {}
    for dtype, p in (("bfloat16", params), ("float32", params_fp32)):
        with fastgen.Engine(p, model_config, cache_tokens=8192, compile="eager") as engine:
            outputs[dtype] = engine.generate(prompts, sampling)
            tokens_alone[dtype] = [engine.generate(a, sampling)[0].completions[0].token_ids for a in prompts]
    low, high = ([x for o in outputs[d] for x in (o.prompt_logprobs or [])[1:]] for d in ("bfloat16", "float32"))
    difference = torch.tensor([abs(a - b) for a, b in zip(low, high, strict=True) if a is not None and b is not None])
    return {
        "model": name,
        "prompt_logprob_difference_mean": difference.mean().item(),
        "prompt_logprob_difference_max": difference.max().item(),
        "greedy_equal_alone_and_batched": {
            d: sum(o.completions[0].token_ids == a for o, a in zip(outputs[d], tokens_alone[d], strict=True))
            for d in outputs
        },
        "requests": len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "eager_gpu.json")
    args = parser.parse_args()
    result = {
        "precision": measure_precision("llama-3.2-1b-instruct"),
        "speed": [
            measure_speed("mistral-7b-instruct-v0.3", 1, 128, 64),
            measure_speed("mistral-7b-instruct-v0.3", 64, 1024, 32),
            measure_speed("mistral-7b-instruct-v0.3", 64, 1024, 32, "sdpa"),
            measure_speed("llama-3.2-1b-instruct", 64, 1024, 32),
        ],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastgen": fastgen.__version__,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
