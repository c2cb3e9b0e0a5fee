"""Compiles the Triton kernels for a Hopper GPU as far as that works without one: to Triton's first representation.

The interpreter runs kernels as Python, which forgives what the compiler rejects, such as a name whose type depends on a
branch. Run as a script, since a process that interprets kernels cannot compile them. The wrappers are called as an
engine on a GPU calls them; their launches compile, and compute nothing.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend
from triton.runtime import driver, jit

TARGET = GPUTarget("cuda", 90, 32)
COMPILED = set[str]()


class Driver:
    """A driver for no device, as far as Triton asks it before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def compile_to_ir(src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> object:
    backend: Any = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    src.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    COMPILED.add(src.fn.__name__)
    return object()


def main() -> None:
    driver.set_active(Driver())
    launch = jit.JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.device_caches[0]  # made on first use, with Triton's whole compiler
        self.compile = compile_to_ir
        launch(self, *args, grid=grid, warmup=True, **options)

    jit.JITFunction.run = compile_launch  # type: ignore[method-assign]

    import fastgen
    from fastgen.core.layers import rope_cos_sin
    from fastgen.core.scheduler import Span
    from fastgen.core.types import SharedPrefix
    from fastgen.kernels import attention, fp8_matmul, pdl, rope_cache, small_batch
    from fastgen.kernels.fp8_matmul import QuantizedLinear
    from fastgen.quantization.fp8 import QuantizedWeight, quantize_rows
    from fastgen.quantization.kv_cache import fp8_row_bytes

    pdl.launch_options = lambda x: {"PDL": True, "launch_pdl": True} if len(x) <= 16 else {"PDL": False}
    cpu, page, q_heads, kv_heads, head = torch.device("cpu"), 64, 8, 2, 64
    config: Any = fastgen.ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=64, hidden_size=q_heads * head, intermediate_size=512, num_layers=1,
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head, context_length=128, sliding_windows=(None,),
    )  # fmt: skip
    plans = {
        "decode": (Span(0, 99, 100, True, (1, 2)), Span(1, 69, 70, True, (1, 3))),
        "prefill": (Span(0, 0, 100, True, (1, 2)), Span(1, 69, 70, True, (1, 3))),
    }
    for kind, plan in plans.items():
        batch = fastgen.build_batch(plan, {0: [0] * 100, 1: [0] * 70}, page, cpu)
        groups = SharedPrefix(torch.tensor([[0, 1]]), torch.tensor([64]), torch.tensor([64, 64]))
        tokens = len(batch.token_ids)
        qkv = torch.zeros(tokens, q_heads + 2 * kv_heads, head, dtype=torch.bfloat16)
        cos_sin = rope_cos_sin(batch.positions, config)
        rows = {torch.bfloat16: (kv_heads, head), torch.uint8: (1, fp8_row_bytes(kv_heads, head))}
        for dtype, row in rows.items():
            k, v = (torch.zeros(4 * page, *row, dtype=dtype) for _ in "kv")
            sizes = {} if dtype != torch.uint8 else {"num_kv_heads": kv_heads, "page_size": page}
            q = rope_cache.rope_and_cache_kv(qkv, *cos_sin, batch.slot_mapping, k, v, **sizes)
            for window in (None, 70):
                attention.paged_attention(batch, config)(q, k, v, window)
                if kind == "decode":
                    unrotated = attention.UnrotatedQKV(qkv, *cos_sin, batch.slot_mapping)
                    attention.paged_attention(batch, config)(unrotated, k, v, window)
                    attention.paged_attention(batch._replace(shared_prefix=groups), config)(q, k, v, window)
    for num_rows in (1, 9, 40):
        x, norm = torch.zeros(num_rows, 512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
        fp8_matmul.add_norm_quantize(x, x, norm, 1e-5)
        fp8_matmul.swiglu_quantize(x)
        quantized = fp8_matmul.quantize(x)
        if num_rows <= 16:
            w = QuantizedWeight(*quantize_rows(torch.zeros(96, 512)))
            QuantizedLinear(cpu, torch.bfloat16)(quantized, w, torch.zeros(96, dtype=torch.bfloat16))
            small_batch.linear(x, torch.zeros(96, 512, dtype=torch.bfloat16))
            small_batch.add_norm(x, x, norm, 1e-5)
            small_batch.swiglu(x)
    weight = torch.zeros(96, 512, dtype=torch.bfloat16)
    fp8_matmul.quantize_into(QuantizedWeight(*quantize_rows(weight)), weight)
    print(triton.__version__, *sorted(COMPILED))


if __name__ == "__main__":
    main()
