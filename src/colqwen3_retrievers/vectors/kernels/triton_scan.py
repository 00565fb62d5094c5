"""The candidate scan as one Triton kernel: no matrix of products is ever written to memory.

Every program takes one page and some query tokens, reads the page's codes once, and keeps the running maximum of each
token. Programs of one page are neighbours, so that codes are read again from the L2 cache. With ``TRITON_INTERPRET=1``
it runs on the CPU, for tests without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST = 512
"""Components of the widest row supported; for wider ones the products are small beside the codes."""

_ROWS = 32  # codes at a time: 10 KB of dim 320
_STAGES = 3  # of them on their way at once, and one under work: with four programs a core, enough to hide memory
_WARPS = 4
_LEAST = 32  # components and query tokens that an int8 product of tensor cores takes
_LOWEST = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["n_blocks"])  # type: ignore[untyped-decorator]
def _page_maxima(  # type: ignore[no-untyped-def]  # noqa: ANN202 - Triton reads the annotations as its own
    codes, starts, lengths, tokens, best, n_blocks,  # noqa: ANN001
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,  # noqa: N803 - Triton's custom
    ROWS: tl.constexpr, TOKENS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Keep, for one page and some query tokens, the largest product with a row of the page's code.

    ``WIDTH`` is known when this is compiled, so that rows are seen to begin at multiples of 8 bytes and are read by as
    many, asynchronously. A row is cut in two powers of two, and what the tail has too many meets zeros.
    """
    page = tl.program_id(0) // n_blocks
    token = tl.program_id(0) % n_blocks * TOKENS + tl.arange(0, TOKENS)
    start = tl.load(starts + page)
    count = tl.load(lengths + page).to(tl.int32)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    asked = tokens + token[None, :] * (HEAD + TAIL)
    head_tokens = tl.load(asked + head[:, None])
    tail_tokens = tl.load(asked + tail[:, None])
    largest = tl.full([ROWS, TOKENS], _LOWEST, tl.int32)
    for first in range(0, count, ROWS):
        row = tl.minimum(first + tl.arange(0, ROWS), count - 1)  # the last row again changes no maximum
        at = codes + (start + row)[:, None] * WIDTH  # of int64, as start is
        some = tl.load(at + head[None, :], mask=(head < WIDTH)[None, :], other=0)
        rest = tl.load(at + tail[None, :], mask=(tail < WIDTH)[None, :], other=0)
        products = tl.dot(some, head_tokens, out_dtype=tl.int32)
        products = tl.dot(rest, tail_tokens, products, out_dtype=tl.int32)
        largest = tl.maximum(largest, products)
    tl.store(best + page.to(tl.int64) * (n_blocks * TOKENS) + token, tl.max(largest, axis=0))


def page_maxima(codes: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the largest product of each query token with each page's code.

    Args:
        codes: int8 (n, width), contiguous, on the device, as all the others; width a multiple of 8, at most
            :data:`WIDEST`.
        starts: int64 (n_pages,).
        lengths: int64 (n_pages,), at least 1 each.
        tokens: int8 (n_tokens, width).

    Returns:
        int32 (n_pages, n_tokens).
    """
    count, width = tokens.shape
    head, tail = parts(width)
    block = tokens_at_once(count)
    n_blocks = triton.cdiv(count, block)
    padded = torch.nn.functional.pad(tokens, (0, head + tail - width, 0, n_blocks * block - count))
    best = torch.empty((len(starts), len(padded)), dtype=torch.int32, device=codes.device)
    with torch.cuda.device(codes.get_device()):  # Triton launches on the current one; -1, the CPU, changes nothing
        _page_maxima[(len(starts) * n_blocks,)](
            codes, starts, lengths, padded, best, n_blocks,
            WIDTH=width, HEAD=head, TAIL=tail, ROWS=_ROWS, TOKENS=block, num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return best[:, :count]


def tokens_at_once(count: int) -> int:
    """Return how many of ``count`` query tokens a program takes: beyond 64, tensor cores are slower than memory.

    >>> tokens_at_once(25), tokens_at_once(33), tokens_at_once(256)
    (32, 64, 64)
    """
    return _LEAST if count <= _LEAST else 2 * _LEAST


def parts(width: int) -> tuple[int, int]:
    """Return two powers of two that together are no less than a width.

    >>> parts(136), parts(328), parts(8), parts(512)
    ((128, 32), (256, 128), (32, 32), (512, 32))
    """
    head = max(_LEAST, 1 << (width.bit_length() - 1))
    return head, max(_LEAST, triton.next_power_of_2(max(1, width - head)))
