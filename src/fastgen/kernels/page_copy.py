"""Pages from place to place, for all layers in one kernel: a table of addresses says where each layer's pages begin;
and small copies between steps, also to the host's memory, by a kernel: a copy engine begins some microseconds late.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

WORDS_PER_PROGRAM = 2048  # of 8 bytes, or of 4 in `copy`, copied by a program


@triton.jit
@no_type_check  # pointers, numbers and constants, in Triton's own language
def _copy_pages_kernel(
    source_ptrs, target_ptrs, page_pairs, num_pairs, num_words, source_stride, target_stride, B: tl.constexpr
):
    pair, leaf, at = tl.program_id(0), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    a = tl.load(source_ptrs + leaf).to(tl.pointer_type(tl.int64)) + tl.load(page_pairs + pair) * source_stride
    b = (
        tl.load(target_ptrs + leaf).to(tl.pointer_type(tl.int64))
        + tl.load(page_pairs + num_pairs + pair) * target_stride
    )
    tl.store(b + at, tl.load(a + at, mask=at < num_words), mask=at < num_words)


def copy_pages(
    source_ptrs: Int[Tensor, " leaves"], target_ptrs: Int[Tensor, " leaves"], page_pairs: Int[Tensor, "2 pairs"], num_words: int,
    source_stride: int, target_stride: int,
) -> None:  # fmt: skip
    """Copies `words` 8-byte words from page index[0, i] of every source leaf to page index[1, i] of its target.

    `source` and `target` hold the leaves' addresses (int64), `*_stride` the words from one page to the next. No page
    may be both read and written.
    """
    pairs = page_pairs.shape[1]
    grid = (pairs, len(source_ptrs), triton.cdiv(num_words, WORDS_PER_PROGRAM))
    _copy_pages_kernel[grid](
        source_ptrs,
        target_ptrs,
        page_pairs,
        pairs,
        num_words,
        source_stride,
        target_stride,
        B=WORDS_PER_PROGRAM,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["n", "m"], do_not_specialize_on_alignment=["first", "second", "target"])
@no_type_check
def _memcpy_concat_kernel(first, second, target, n, m, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(target + at, tl.load(first + at, mask=at < n), mask=at < n)
    tl.store(target + n + at, tl.load(second + at, mask=at < m), mask=at < m)


def copy_concatenated(
    target: Int[Tensor, " N"], first: Int[Tensor, " n"], second: Int[Tensor, " m"] | None = None
) -> None:
    """Writes `first`, and `second` after it, to the beginning of `target`, which may be pinned memory of the host."""
    n, m = len(first), 0 if second is None else len(second)
    blocks = triton.cdiv(max(n, m), WORDS_PER_PROGRAM)
    _memcpy_concat_kernel[(blocks,)](
        first, first if second is None else second, target, n, m, B=WORDS_PER_PROGRAM, num_warps=8
    )
