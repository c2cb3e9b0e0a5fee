"""torch.compile: one compiled function per model op and weight shape, each for any number of tokens.

Kernels are not compiled: `kernels.select` puts them in the place of ops.

The ops between two matmuls or attentions see activations and weights only, never the cache. So nothing about a cache
can cause a copy or a recompilation, and start-up costs the compilation of one decoder layer.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.core import transformer
from fastgen.core.layers import swiglu
from fastgen.core.step import fill_pending_tokens
from fastgen.core.transformer import ModelOps

# Positions of each op's arguments whose first dimension is the step's number of tokens.
DYNAMIC_ARGS: dict[Callable[..., Any], tuple[int, ...]] = {
    fill_pending_tokens: (0,),
    transformer.embed: (1, 2),
    transformer.add_norm_qkv: (0, 1),
    transformer.add_norm_gate_up: (0, 1),
    transformer.add_norm: (0, 1),
    swiglu: (0,),
    transformer.apply_qk_norm: (0,),
    transformer.final_norm: (0, 1),
}


class CompiledOps:
    """Compiled versions of functions, made on first use, one for each shape of weights."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def compile_ops(self, ops: ModelOps) -> ModelOps:
        """Replaces every op that `DYNAMIC_ARGS` lists by its compiled version."""
        compiled: dict[str, Any] = {name: self(f) for name, f in ops._asdict().items() if f in DYNAMIC_ARGS}
        return ops._replace(**compiled)

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the compiled version of a function listed in `DYNAMIC_ARGS`."""
        dynamic = DYNAMIC_ARGS[f]

        def call(*args: Any) -> Any:
            static = tuple(a.shape if isinstance(a, Tensor) else a for i, a in enumerate(args) if i not in dynamic)
            compiled = self._compiled.get((f, *static))
            if compiled is None:
                # A code object per compilation: otherwise all engines of a process share one recompilation limit.
                inner = inspect.unwrap(f)
                code = inner.__code__.replace(co_name=f"{f.__name__}_{len(self._compiled)}")
                copy = types.FunctionType(code, inner.__globals__, code.co_name, inner.__defaults__, inner.__closure__)
                compiled = self._compiled[(f, *static)] = torch.compile(copy, fullgraph=True)
                for i in dynamic:
                    torch._dynamo.mark_dynamic(args[i], 0)
            return compiled(*args)

        return call
