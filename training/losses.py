"""The four losses: characters per cell, characters per visual token, alignment of word pieces, and MaxSim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

FAR = -1e4
TINY = 1e-30


def order_cells(cells: Tensor) -> Tensor:
    """Bring a grid of cells ``(B, H/8, W/8)`` in the order of the patches: ``(B, tokens, 4 patches, 4 cells)``."""
    b, h, w = cells.shape
    x = cells.view(b, h // 4, 2, 2, w // 4, 2, 2)  # token row, patch row, cell row, token column, ...
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, (h // 4) * (w // 4), 4, 4)


def character_loss(logits: Tensor, cells: Tensor, blank: Tensor) -> Tensor:
    """Cross-entropy of the character of each cell; blank cells weigh less, being most."""
    return fn.cross_entropy(logits.float().reshape(-1, len(blank)), cells.reshape(-1), weight=blank)


def letters_of_cells(cells: Tensor, n_chars: int) -> Tensor:
    """Which characters each visual token shows: ``(B, tokens, n_chars)``; blank (0) is left out."""
    shown = torch.zeros(*cells.shape[:2], n_chars)
    shown.scatter_(2, cells.flatten(2), 1.0)
    shown[..., 0] = 0.0
    return shown


def letter_loss(head: nn.Linear, embeddings: Tensor, letters: Tensor, weight: Tensor) -> Tensor:
    """Predict the characters of a query piece or of a visual token from its normalised embedding, with one head."""
    logits = 8.0 * fn.normalize(embeddings, dim=-1) @ head.weight.T + head.bias
    loss = fn.binary_cross_entropy_with_logits(logits, letters, reduction="none").sum(-1)
    return (loss * weight).sum() / weight.sum()


@dataclass
class QueryBatch:
    """Right-padded queries of a batch: token ids, which tokens count, and what shows them."""

    ids: Tensor  # (Q, L)
    valid: Tensor  # (Q, L) bool, augmentation pads included
    piece: Tensor  # (Q, L) bool, tokens that a rectangle belongs to
    pad: Tensor  # (Q, L) bool, augmentation pads
    places: Tensor  # (Q, L, 4)
    slots: Tensor  # (Q, L) which word of the query a token belongs to, -1 for none
    owner: Tensor  # (Q,) the page that the query was taken from
    asked: Tensor  # (Q, 4) hashes of the words of the query, 0 for none
    printed: Tensor  # (B, W) hashes of the words on each page, 0 for none

    def holds(self, printed: Tensor) -> tuple[Tensor, Tensor]:
        """Whether pages print each word, ``(Q, 4, B)``, and all words of a query, ``(Q, B)``."""
        words, places = torch.unique(self.asked, return_inverse=True)
        on_page = torch.stack([torch.isin(words, page) for page in printed], 1)  # (unique words, B)
        each = on_page[places.view(self.asked.shape)].transpose(1, 2).contiguous().transpose(1, 2)
        none = (self.asked == 0)[..., None]
        return each & ~none, (each | none).all(1)

    def veto(self, counted: Tensor, query_of: Tensor, printed: Tensor) -> tuple[Tensor, Tensor]:
        """Pages that print what a token asks for, ``(n, B)``, so are no negatives of it; and of a query, ``(Q, B)``."""
        each, whole = self.holds(printed)
        slot = self.slots.flatten()[counted]
        of_word = each[query_of, slot.clamp(min=0)]
        return torch.where((slot >= 0)[:, None], of_word, whole[query_of]), whole


def positives(batch: QueryBatch, rows: int, cols: int) -> Tensor:
    """Visual tokens of the own page that show each query token; a pad stands for all words: ``(Q, L, rows*cols)``."""
    r = torch.arange(rows).view(1, 1, rows, 1)
    c = torch.arange(cols).view(1, 1, 1, cols)
    top, bottom, left, right = (batch.places[..., i, None, None] for i in range(4))
    shown = ((r >= top) & (r <= bottom) & (c >= left) & (c <= right)).flatten(2) & batch.piece[..., None]
    whole = shown.any(dim=1, keepdim=True)
    return shown | (batch.pad[..., None] & whole)


def _summary(
    similarity: Tensor, scale: Tensor, matched: Tensor, negative: Tensor, n_docs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exp(scale * (similarity - 1)) by row and (over matched rows) by column, and the best token per page.

    ``negative`` (n, n_docs) is 1 where the tokens of a page count in the sums.
    """
    grouped = similarity.view(similarity.shape[0], n_docs, -1).float()
    weights = torch.exp(scale * (grouped - 1.0)) * negative[..., None]
    return weights.sum((1, 2)), (weights * matched[:, None, None]).sum(0).flatten(), grouped.amax(-1)


_compiled_summary = torch.compile(_summary, dynamic=True)


def retrieval_losses(
    queries: Tensor,
    documents: Tensor,
    batch: QueryBatch,
    shown: Tensor,
    first: int,
    scale: Tensor,
    maxsim_scale: Tensor,
    dims: tuple[int, ...],
    bank: Sequence[tuple[Tensor, Tensor]] = (),
    compiled: bool = True,
) -> dict[str, Tensor]:
    """Alignment and MaxSim losses at each of ``dims``, the full width first.

    ``queries`` is (Q, L, D), ``documents`` (B, T, D), both before normalisation; ``shown`` comes from ``positives`` and
    the visual tokens start at ``first`` in each document. ``bank`` holds pages of earlier batches, as tokens
    (B', T', D) and printed words (B', W): more wrong pages for each query, which get no gradient.
    """
    n_queries, length, _ = queries.shape
    n_docs, tokens, _ = documents.shape
    counted = batch.valid.flatten().nonzero().squeeze(1)
    own = shown.flatten(0, 1)[counted]  # (n, visual tokens of the own page)
    matched = own.any(-1).float()
    owner = batch.owner.repeat_interleave(length)[counted]
    query_of = torch.arange(n_queries).repeat_interleave(length)[counted]
    rows = torch.arange(len(counted))
    last = first + own.shape[1]
    seen = torch.zeros(n_docs, own.shape[1]).index_add(0, owner, own.float()) > 0
    weight = torch.where(batch.pad.flatten()[counted], 0.5, 1.0) * matched
    veto, holds_all = batch.veto(counted, query_of, batch.printed)
    is_own = torch.arange(n_docs)[None] == owner[:, None]
    negative = (~veto | is_own).float()
    allowed = ~holds_all | (torch.arange(n_docs)[None] == batch.owner[:, None])
    vetoes = [batch.veto(counted, query_of, printed) for _, printed in bank]
    allowed = torch.cat([allowed, *(~whole for _, whole in vetoes)], 1)
    nothing = torch.zeros(len(counted))
    summary = _compiled_summary if compiled else _summary
    totals = {"align": torch.zeros(()), "back": torch.zeros(()), "maxsim": torch.zeros(())}
    hits = torch.zeros(())
    for dim, share in zip(dims, (1.0,) if len(dims) == 1 else (0.6, 0.4), strict=True):
        q = fn.normalize(queries.flatten(0, 1)[counted][:, :dim], dim=-1)
        d = fn.normalize(documents[..., :dim].flatten(0, 1), dim=-1)
        similarity = q @ d.T
        by_row, by_column, best = summary(similarity, scale, matched, negative, n_docs)
        bests = [best]
        for (tokens_before, _), (vetoed, _) in zip(bank, vetoes, strict=True):
            before = fn.normalize(tokens_before[..., :dim].flatten(0, 1).float(), dim=-1).to(torch.bfloat16)
            far = q.to(torch.bfloat16) @ before.T
            more, _, best = summary(far, scale, nothing, (~vetoed).float(), len(tokens_before))
            by_row = by_row + more
            bests.append(best)
        mine = similarity.view(-1, n_docs, tokens)[rows, owner, first:last]
        positive = torch.exp(scale * (mine - 1.0)) * own
        align = torch.log(by_row + TINY) - torch.log(positive.sum(1) + TINY)
        totals["align"] = totals["align"] + share * (align * weight).sum() / weight.sum()
        column_positive = torch.zeros(n_docs, own.shape[1]).index_add(0, owner, positive)[seen]
        back = torch.log(by_column.view(n_docs, tokens)[:, first:last][seen] + TINY) - torch.log(column_positive + TINY)
        totals["back"] = totals["back"] + share * back.mean()
        best = torch.cat(bests, 1)
        scores = torch.zeros(n_queries, best.shape[1]).index_add(0, query_of, best) * maxsim_scale
        scores = scores.masked_fill(~allowed, FAR)
        totals["maxsim"] = totals["maxsim"] + share * fn.cross_entropy(scores, batch.owner)
        if dim == dims[0]:
            hits = (scores.argmax(1) == batch.owner).float().mean()
    return {**totals, "hits": hits}
