"""Copies of KV cache pages, for all layers in one kernel, and of small tensors between steps.

A kernel also writes small tensors to pinned host memory: a copy engine would start some microseconds later.
"""

# pyright: reportCallIssue=false
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

WORDS_PER_PROGRAM = 2048  # words of 8 bytes in `copy_pages`, elements in `copy_concatenated`


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _copy_pages_kernel(
    source_ptrs, target_ptrs, page_pairs, num_pairs, num_words, source_stride, target_stride, B: tl.constexpr
):
    pair, tensor, word = tl.program_id(0), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    source = tl.load(source_ptrs + tensor).to(tl.pointer_type(tl.int64))
    source += tl.load(page_pairs + pair) * source_stride
    target = tl.load(target_ptrs + tensor).to(tl.pointer_type(tl.int64))
    target += tl.load(page_pairs + num_pairs + pair) * target_stride
    tl.store(target + word, tl.load(source + word, mask=word < num_words), mask=word < num_words)


def copy_pages(
    source_ptrs: Int[Tensor, " tensors"], target_ptrs: Int[Tensor, " tensors"], page_pairs: Int[Tensor, "2 pairs"],
    num_words: int, source_stride: int, target_stride: int,
) -> None:  # fmt: skip
    """Copies page `page_pairs[0, i]` of every source tensor to page `page_pairs[1, i]` of its target tensor.

    `*_ptrs` are the tensors' device addresses (int64). A page has `num_words` words of 8 bytes; strides are in words
    from one page to the next. No page may be both read and written.
    """
    num_pairs = page_pairs.shape[1]
    sizes, block = (num_pairs, num_words, source_stride, target_stride), WORDS_PER_PROGRAM
    grid = num_pairs, len(source_ptrs), triton.cdiv(num_words, block)
    _copy_pages_kernel[grid](source_ptrs, target_ptrs, page_pairs, *sizes, B=block, num_warps=8)


@triton.jit(do_not_specialize=["n", "m"], do_not_specialize_on_alignment=["first", "second", "target"])
@no_type_check
def _memcpy_concat_kernel(first, second, target, n, m, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(target + i, tl.load(first + i, mask=i < n), mask=i < n)
    tl.store(target + n + i, tl.load(second + i, mask=i < m), mask=i < m)


def copy_concatenated(
    target: Int[Tensor, " N"], first: Int[Tensor, " n"], second: Int[Tensor, " m"] | None = None
) -> None:
    """Writes `first`, and `second` after it, to the start of `target`, which may be in pinned host memory."""
    n, m = len(first), 0 if second is None else len(second)
    num_programs, second = triton.cdiv(max(n, m), WORDS_PER_PROGRAM), first if second is None else second
    _memcpy_concat_kernel[(num_programs,)](first, second, target, n, m, B=WORDS_PER_PROGRAM, num_warps=8)
