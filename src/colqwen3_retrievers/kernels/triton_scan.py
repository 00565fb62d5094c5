"""The candidate scan as one Triton kernel: no matrix of products is ever written to memory.

Every program takes one page and up to so many query tokens, goes through the page's codes once, and keeps the running
maximum of each token. With ``TRITON_INTERPRET=1`` it runs on the CPU, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 32  # codes at a time
_COMPONENTS = 32  # of a row at a time: the least an int8 product of tensor cores takes
_TOKENS = 32
_LOWEST = tl.constexpr(-(2**31))


@triton.jit  # type: ignore[untyped-decorator]
def _page_maxima(  # type: ignore[no-untyped-def]  # noqa: ANN202 - Triton reads the annotations as its own
    codes, starts, lengths, tokens, best, n_tokens, width,  # noqa: ANN001
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, TOKENS: tl.constexpr,  # noqa: N803 - Triton's custom
):  # fmt: skip
    """Keep, for one page and some query tokens, the largest product with a row of the page's code."""
    page = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = tl.load(starts + page).to(tl.int64)
    count = tl.load(lengths + page)
    largest = tl.full([TOKENS], _LOWEST, tl.int32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        products = tl.zeros([ROWS, TOKENS], tl.int32)
        for at in range(0, width, COMPONENTS):
            component = at + tl.arange(0, COMPONENTS)
            inside = component < width
            some_codes = tl.load(
                codes + (start + row)[:, None] * width + component[None, :],
                mask=(row < count)[:, None] & inside[None, :],
                other=0,
            )
            some_tokens = tl.load(
                tokens + token[None, :] * width + component[:, None],
                mask=(token < n_tokens)[None, :] & inside[:, None],
                other=0,
            )
            products += tl.dot(some_codes, some_tokens, out_dtype=tl.int32)
        products = tl.where((row < count)[:, None], products, _LOWEST)
        largest = tl.maximum(largest, tl.max(products, axis=0))
    tl.store(best + page.to(tl.int64) * n_tokens + token, largest, mask=token < n_tokens)


def page_maxima(codes: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Give the largest product of each query token with each page's code.

    Args:
        codes: int8 (n, width), contiguous, on the device, as all the others.
        starts: int64 (n_pages,).
        lengths: int64 (n_pages,).
        tokens: int8 (n_tokens, width), contiguous.

    Returns:
        int32 (n_pages, n_tokens).
    """
    best = torch.empty((len(starts), len(tokens)), dtype=torch.int32, device=codes.device)
    grid = (len(starts), triton.cdiv(len(tokens), _TOKENS))
    _page_maxima[grid](
        codes, starts, lengths, tokens, best, len(tokens), codes.shape[1],
        ROWS=_ROWS, COMPONENTS=_COMPONENTS, TOKENS=_TOKENS,
    )  # fmt: skip
    return best
