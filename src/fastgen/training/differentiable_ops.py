"""Gradients for the ops of a forward whose kernels have none: the gradients of their torch equivalents."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.core.attention import AttentionFn, sdpa
from fastgen.core.autocast import no_autocast
from fastgen.core.model_config import ModelConfig
from fastgen.core.transformer import TORCH_OPS, ModelOps
from fastgen.core.types import Batch

OPS_WITH_REFERENCE_GRADIENTS = ("add_norm_qkv", "add_norm_gate_up", "apply_qk_norm", "linear", "final_norm", "lm_head")


class _ReferenceBackward(torch.autograd.Function):
    """Runs a kernel; backward, recomputes its torch equivalent from the saved inputs and differentiates that."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> Any:
        ctx.reference, ctx.other_args = reference, [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        return kernel(*args)

    @staticmethod
    @no_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs_grad = ctx.needs_input_grad[2:]
        args = list(ctx.other_args)
        for i, saved in enumerate(ctx.saved_tensors):
            args[i] = args[i] if saved is None else saved.detach().requires_grad_(needs_grad[i])
        with torch.enable_grad():
            result = ctx.reference(*args)
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        inputs = [a for a, needed in zip(args, needs_grad, strict=True) if needed]
        input_grads = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        return None, None, *(next(input_grads) if needed else None for needed in needs_grad)


class _RopeAndCacheKV(torch.autograd.Function):
    """Runs `ops.rope_and_cache_kv` and returns the caches too, so that attention's gradients flow through them."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, qkv: Tensor, *args: Tensor) -> Any:
        cos, sin, slot, k, v = args
        ctx.save_for_backward(cos, sin, slot)
        q = kernel(qkv, *args)
        ctx.mark_dirty(k, v)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> Any:
        cos, sin, slot = ctx.saved_tensors

        def rotate_back(grad: Tensor) -> Tensor:  # the gradient of a rotation is the inverse rotation
            a, b = grad.float().chunk(2, -1)
            return torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(grad.dtype)

        grad_qkv = torch.cat((rotate_back(grad_q), rotate_back(grad_k[slot]), grad_v[slot]), 1)
        return None, grad_qkv, None, None, None, None, None


def make_differentiable(ops: ModelOps, reference_gradients: bool) -> ModelOps:
    """Returns ops with gradients. With `reference_gradients`, kernels get the gradients of their torch equivalents."""
    if not reference_gradients:
        return ops

    def with_gradient(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        return kernel if kernel is reference else lambda *args: _ReferenceBackward.apply(kernel, reference, *args)

    def attention(batch: Batch, model_config: ModelConfig) -> AttentionFn:
        return with_gradient(ops.attention(batch, model_config), sdpa(batch, model_config))

    def rope_and_cache_kv(qkv: Tensor, cos: Tensor, sin: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _RopeAndCacheKV.apply(ops.rope_and_cache_kv, qkv, cos, sin, slot.long(), k, v)[0]

    def logprobs(logits: Tensor, token_ids: Tensor, num_top_logprobs: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = with_gradient(lambda x, t: ops.logprobs(x, t, 0)[0], lambda x, t: TORCH_OPS.logprobs(x, t, 0)[0])
        no_top = logits.new_zeros(len(logits), 0)
        return chosen(logits, token_ids), no_top.long(), no_top

    names = OPS_WITH_REFERENCE_GRADIENTS
    fields = {name: with_gradient(getattr(ops, name), getattr(TORCH_OPS, name)) for name in names}
    return ops._replace(attention=attention, rope_and_cache_kv=rope_and_cache_kv, logprobs=logprobs, **fields)
