"""The histories of quasi-Newton methods, Anderson and GMRES, (B, k, D) with k at most `memory`,
and their algebra."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastdeq.autodiff import is_recorded
from fastdeq.norms import sample_norm

HistoryDtype: TypeAlias = Literal["bfloat16"]
"""In which a history may be kept, instead of in the dtype of the states."""

_FIRST = 4  # initial capacity of a history, in rows


class History:
    """The newest rows of a method, each (B, D), `memory` of them at most: the oldest is replaced.

    A row is written into a buffer that doubles until its capacity is `memory` rows: a short solve
    uses little memory, a step reads its history without a copy, and all copies made for growing
    are together smaller than one of the full history. Where derivatives are recorded, every row
    makes a new buffer instead, so that the unrolled adjoint can differentiate through the old ones.

    dtype: of the buffer; None: that of the first row. `project` and `add_combination` compute in
        the dtype of the states.
    """

    def __init__(self, memory: int, dtype: HistoryDtype | None = None) -> None:
        self.memory = memory
        self._dtype = None if dtype is None else torch.bfloat16
        self._pushed = 0
        self._buffer: Tensor | None = None

    def __len__(self) -> int:
        return min(self._pushed, self.memory)

    @property
    def rows(self) -> Tensor:
        """(B, k, D), a view, in no particular order once rows have been replaced; k is above 0."""
        assert self._buffer is not None
        return self._buffer[:, : len(self)]

    def push(self, row: Tensor, scale: Tensor | float = 1.0) -> int:
        """Add scale · row, (B, D); returns its place among the rows. scale: a number or (B, 1)."""
        if is_recorded(row):
            row = row * scale
            kept = [self.rows[:, max(0, len(self) + 1 - self.memory) :]] if len(self) else []
            self._buffer = torch.cat((*kept, row[:, None].to(self._dtype or row.dtype)), dim=1)
            self._pushed = self._buffer.shape[1]
            return self._pushed - 1
        place = self._pushed % self.memory
        torch.mul(row, scale, out=self.slot(row))
        return place

    def slot(self, like: Tensor) -> Tensor:
        """The slot of the next row, (B, D) as `like`, for the caller to write; no gradients."""
        if self._buffer is None:
            self._buffer = self._empty_rows(like, min(_FIRST, self.memory))
        elif self._pushed == self._buffer.shape[1] < self.memory:
            grown = self._empty_rows(like, min(2 * self._pushed, self.memory))
            grown[:, : self._pushed] = self._buffer
            self._buffer = grown
        place = self._pushed % self.memory
        self._pushed += 1
        return self._buffer[:, place]

    def _empty_rows(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(like.shape[0], rows, like.shape[1], dtype=self._dtype)

    def clear(self) -> None:
        """Remove all rows; the buffer stays."""
        self._pushed = 0


class FixedHistory:
    """The same rows in a buffer of `memory` rows from the start: for compiled solves, whose shapes
    do not change and whose decisions are not made on the host. Rows that are not used yet are zero.
    """

    def __init__(self, memory: int, like: Tensor) -> None:
        self.memory = memory
        self.rows = like.new_zeros(len(like), memory, like.shape[1])
        self.place = torch.zeros(1, dtype=torch.int64, device=like.device)  # of the next row

    def push(self, row: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """As `History.push`; the place is a tensor, (1,)."""
        place = self.place
        # CUDA graphs take no arguments that are written to; elsewhere a copy would cost more.
        put = self.rows.index_copy if row.is_cuda else self.rows.index_copy_
        self.rows = put(1, place, (row * scale)[:, None])
        self.place = (place + 1) % self.memory  # the oldest row is replaced
        return place


def writable(matrix: Tensor) -> Tensor:
    """A tensor to write into: itself, or a copy where autograd may have saved it."""
    return matrix.clone() if is_recorded(matrix) else matrix


def project(history: Tensor, v: Tensor) -> Tensor:
    """Inner products of v (B, D) with every row: (B, k)."""
    if history.dtype != v.dtype:
        parts = zip(_widened(history, v.dtype), v.split(_samples(history)), strict=True)
        return torch.cat([project(rows, part) for rows, part in parts])
    # As a row times a matrix: on the CPU, a matrix times a column takes up to 15 times as long.
    return torch.bmm(v[:, None], history.mT)[:, 0]


def add_combination(
    v: Tensor, history: Tensor, coefficients: Tensor, *, keep: float = 1.0, scale: float = 1.0
) -> Tensor:
    """keep · v + scale · Σ of the rows with (B, k) coefficients: (B, D), in one pass."""
    if history.dtype != v.dtype:
        n = _samples(history)
        parts = zip(v.split(n), _widened(history, v.dtype), coefficients.split(n), strict=True)
        return torch.cat([add_combination(*part, keep=keep, scale=scale) for part in parts])
    total = torch.baddbmm(
        v[:, None], coefficients[:, None], history, beta=keep, alpha=scale
    )  # (B, 1, D)
    return total[:, 0]


def _samples(history: Tensor) -> int:
    """How many samples are widened at once: their rows are as large as one state of the batch."""
    batch, k = history.shape[:2]
    return max(1, -(-batch // max(1, k)))


def _widened(history: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (part.to(dtype) for part in history.split(_samples(history)))


def safe_inverse(v: Tensor, dg: Tensor) -> Tensor:
    """1 / (v · dg) per sample, (B,), and 0 where the product vanishes to rounding."""
    product = torch.linalg.vecdot(v, dg)
    rounding = torch.finfo(v.dtype).eps * sample_norm(v) * sample_norm(dg)
    vanishes = ~(product.abs() > rounding)  # also where it is NaN
    # Filled before and after: the slope of 1 / 0 would be NaN however it is masked later.
    inverse: Tensor = product.masked_fill(vanishes, 1.0).reciprocal().masked_fill(vanishes, 0.0)
    return inverse
