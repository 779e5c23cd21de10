"""One encoder step's texts, one behind the other, and how attention sees them.

Linear layers and norms work on all tokens as one long list, without padding. Attention needs texts
side by side: ones of similar length are padded to a rectangle, so that at most a quarter of it is
nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SHARE = 0.75
"""Of the longest text in a rectangle, what the shortest must have."""


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """`num_texts` texts, of which the longest has `num_columns` tokens; theirs are the tokens
    `[first, end)` of the batch.

    `places` [end - first] are the tokens' places in the padded rectangle, and `mask`
    [num_texts, 1, 1, num_columns] tells tokens from padding; both None if there's no padding.
    """

    first: int
    end: int
    num_texts: int
    num_columns: int
    places: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """`token_ids` and `offsets` [num_tokens]: each token, and its index in its text. `lengths`
    int64 [num_texts]. All on the model's device, texts in descending order of length."""

    token_ids: Tensor
    offsets: Tensor
    lengths: Tensor
    rectangles: tuple[Rectangle, ...]


def longest_first(texts: Sequence[Sequence[int]]) -> list[int]:
    """Indexes of `texts` in the order that `make_text_batch` wants."""
    return sorted(range(len(texts)), key=lambda i: -len(texts[i]))


def make_text_batch(texts: Sequence[Sequence[int]], device: torch.device) -> TextBatch:
    """`texts` are token ids, none of them empty, the longest first."""
    counts = [len(text) for text in texts]
    lengths = torch.tensor(counts)
    token_ids = torch.tensor([token_id for text in texts for token_id in text])
    starts = lengths.cumsum(0) - lengths
    offsets = torch.arange(len(token_ids)) - starts.repeat_interleave(lengths)
    return TextBatch(
        token_ids.to(device),
        offsets.to(device),
        lengths.to(device),
        tuple(_rectangles(counts, offsets, device)),
    )


def _rectangles(counts: list[int], offsets: Tensor, device: torch.device) -> Iterator[Rectangle]:
    start, first = 0, 0
    while start < len(counts):
        longest = counts[start]
        end = start
        while end < len(counts) and counts[end] >= _LEAST_SHARE * longest:
            end += 1
        num_tokens = sum(counts[start:end])
        places = mask = None
        if counts[end - 1] < longest:
            lengths = torch.tensor(counts[start:end])
            rows = torch.arange(end - start).repeat_interleave(lengths)
            places = (rows * longest + offsets[first : first + num_tokens]).to(device)
            mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(device)
        yield Rectangle(first, first + num_tokens, end - start, longest, places, mask)
        start, first = end, first + num_tokens
