"""A cell whose state has several scales (Bai et al. 2020, arXiv 2006.08656, §3)."""

from collections.abc import Sequence

from torch import Tensor, nn


class MultiScaleCell(nn.Module):
    """f(z, x) for a state of n scales, z = (z₁, …, zₙ): each branch separately, then all into all.

        h₁ = f₁(z₁, x),  hⱼ = fⱼ(zⱼ) for j > 1,    yᵢ = pᵢ(Σⱼ mⱼᵢ(hⱼ))

    branches: f₁ … fₙ; the input is injected into the first alone.
    mappings: n rows of n; mappings[j][i] takes hⱼ to the shape of scale i (nn.Identity() for i = j,
        usually).
    scales: the shapes of z₁ … zₙ for one sample, without the batch axis: [[24, 32, 32], [24, 16,
        16]], or [[4], [3]] for vectors.
    post_fusion: p₁ … pₙ; None leaves them out.

    Raises: ValueError where the numbers of branches, mappings, scales and post-fusion layers
    differ, and, when called, for a state that is not of these scales and a mapping that does not
    make them; TypeError for parts that are not modules.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        mappings: Sequence[Sequence[nn.Module]],
        scales: Sequence[Sequence[int]],
        post_fusion: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_counts(branches, mappings, scales, post_fusion)
        self.branches = nn.ModuleList(branches)
        self.mappings = nn.ModuleList(nn.ModuleList(row) for row in mappings)
        self.post_fusion = None if post_fusion is None else nn.ModuleList(post_fusion)
        self.scales = [tuple(shape) for shape in scales]

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        self._check_state(z)
        first, *others = self.branches
        h = [first(z[0], x), *(branch(z_j) for branch, z_j in zip(others, z[1:], strict=True))]
        fused = [self._fuse(h, i) for i in range(len(h))]
        if self.post_fusion is None:
            return tuple(fused)
        return tuple(layer(y) for layer, y in zip(self.post_fusion, fused, strict=True))

    def _fuse(self, h: list[Tensor], i: int) -> Tensor:
        parts = []
        for j, (row, h_j) in enumerate(zip(self.mappings, h, strict=True)):
            part: Tensor = row[i](h_j)  # type: ignore[index]  # a ModuleList
            if part.shape[1:] != self.scales[i]:  # broadcasting would hide it
                raise ValueError(
                    f"mapping {j + 1} → {i + 1} makes {tuple(part.shape[1:])} per sample, but "
                    f"scale {i + 1} is {self.scales[i]}: give mappings[{j}][{i}] that shape"
                )
            parts.append(part)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _check_state(self, z: object) -> None:
        if not isinstance(z, tuple) or [scale.shape[1:] for scale in z] != self.scales:
            found = [tuple(s.shape[1:]) for s in z] if isinstance(z, tuple) else "not a tuple"
            raise ValueError(
                f"the state is {found}, but the scales of the cell are {self.scales}: let the "
                "explicit network (or the initializer) return a tuple of these"
            )


def _check_counts(
    branches: Sequence[nn.Module],
    mappings: Sequence[Sequence[nn.Module]],
    scales: Sequence[Sequence[int]],
    post_fusion: Sequence[nn.Module] | None,
) -> None:
    n = len(branches)
    counts = {"mappings": len(mappings), "scales": len(scales)}
    counts |= {f"mappings[{j}]": len(row) for j, row in enumerate(mappings)}
    if post_fusion is not None:
        counts["post_fusion"] = len(post_fusion)
    for name, count in counts.items():
        if count != n or not n:
            raise ValueError(
                f"there are {n} branches, but {name} has {count} entries: give one per scale, and "
                "at least one"
            )
