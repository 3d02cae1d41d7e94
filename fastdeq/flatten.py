"""A tuple or dictionary of scales ↔ one flat (B, D) tensor.

The solvers see one (B, D) tensor and the cell sees its scales as views of it, so the concatenation
of the cell's outputs is the only copy an evaluation makes; a single scale is not copied at all. A
scale that is channels_last in z0 is flattened in its order in memory, (H, W, C), and the cell sees
it as channels_last again. States in half precision are widened to float32 on the way in: f may run
in bf16, the solver's arithmetic does not. A state without a batch axis is one row, (1, D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeq.notation import State


@dataclass(frozen=True)
class Layout:
    """The shapes, dtypes and memory formats of a state, and the way to its flat form and back."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    channels_last: tuple[bool, ...]
    single: bool
    names: tuple[str, ...] | None = None  # of a dictionary's scales
    batched: bool = True

    @staticmethod
    def of(z0: State, name: str = "z0", *, batched: bool = True) -> "Layout":
        """The layout of a start, or of another state, which errors then call `name`.

        Raises: TypeError for what is not a floating-point tensor; ValueError for an empty axis
        other than the batch, a tensor without a batch, or scales that disagree about the batch.
        """
        scales = scales_of(z0, name)
        for scale in scales:
            _check_scale(scale, name, batched)
        # Not len, here and below: the batch of an exported model is symbolic.
        sizes = [scale.shape[0] for scale in scales] if batched else []
        if any(size != sizes[0] for size in sizes):
            raise ValueError(f"the scales of {name} have batch sizes {sizes}: give all the same")
        if len({scale.device for scale in scales}) > 1:
            raise ValueError(f"the scales of {name} are on different devices: move them to one")
        return Layout(
            shapes=tuple(scale.shape[1:] if batched else scale.shape for scale in scales),
            dtypes=tuple(scale.dtype for scale in scales),
            channels_last=tuple(batched and is_channels_last(scale) for scale in scales),
            single=isinstance(z0, Tensor),
            names=tuple(z0) if isinstance(z0, dict) else None,
            batched=batched,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat state: the widest of the scales, and at least float32."""
        wide = torch.float32
        for dtype in self.dtypes:
            wide = torch.promote_types(wide, dtype)
        return wide

    def flatten(self, state: State) -> Tensor:
        """(B, D) from a state of this layout; a single scale is only reshaped.

        A scale of another memory format costs a copy.
        """
        kinds = zip(self._scales(state, "the state"), self.shapes, self.channels_last, strict=True)
        flat = [
            (scale.movedim(1, -1) if last else scale)
            .reshape(scale.shape[0] if self.batched else 1, shape.numel())  # not −1: B may be 0
            .to(self.dtype)
            for scale, shape, last in kinds
        ]
        return flat[0] if self.single else torch.cat(flat, dim=1)

    def flatten_output(self, output: State, z: Tensor) -> Tensor:
        """The same for what f returned at the flat state `z`.

        Raises: TypeError or ValueError where f(z) does not have the dtype and shape of z: its
            imaginary part, or its gradients, would be lost.
        """
        scales = self._scales(output, "f(z)")
        wanted = [(z.shape[0], *shape) if self.batched else tuple(shape) for shape in self.shapes]
        found = [tuple(scale.shape) for scale in scales]
        if found != wanted:
            raise ValueError(
                f"f(z) has shape {_listed(found)} but z has shape {_listed(wanted)}: an "
                "equilibrium z = f(z) needs both the same; let f's last layer restore the shape"
            )
        for scale in scales:
            check_floating(scale, "f(z)")
        return self.flatten(output)

    def unflatten(self, flat: Tensor) -> State:
        """The scales as views of the flat tensor (copies only where the dtype differs)."""
        sizes = [shape.numel() for shape in self.shapes]
        # Not split() for one scale: writing into its views raises an obscure error.
        parts = (flat,) if self.single else flat.split(sizes, dim=1)
        kinds = zip(parts, self.shapes, self.dtypes, self.channels_last, strict=True)
        views = (_scale(part, shape, last).to(dtype) for part, shape, dtype, last in kinds)
        scales = tuple(view if self.batched else view[0] for view in views)
        if self.names is not None:
            return dict(zip(self.names, scales, strict=True))
        return scales[0] if self.single else scales

    def _scales(self, state: State, name: str) -> tuple[Tensor, ...]:
        """The scales in the order of z0's. Raises: ValueError for a state of another structure."""
        scales = scales_of(state, name)
        given, own = _structure(state), self.names or ("a tensor" if self.single else "a tuple")
        if isinstance(state, dict) and isinstance(own, tuple) and set(given) == set(own):
            return tuple(state[key] for key in own)
        if given != own:
            shown = [
                each if isinstance(each, str) else f"a dictionary of {', '.join(each)}"
                for each in (given, own)
            ]
            raise ValueError(
                f"{name} is {shown[0]} but z is {shown[1]}: let f return what it takes"
            )
        return scales


def is_channels_last(scale: Tensor) -> bool:
    """Whether each sample of a (B, C, H, W) or (B, C, D, H, W) tensor is channels_last in memory.

    The batch may have any stride: a scale is a part of a flat state. False where the formats do not
    differ, such as for one channel.
    """
    if scale.ndim not in (4, 5) or not scale.shape[0]:
        return False
    sample = scale.detach()[0]
    return not sample.is_contiguous() and sample.movedim(0, -1).is_contiguous()


def _scale(part: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The (B, *shape) view of the (B, D_i) part of a flat state."""
    if channels_last:
        return part.view(part.shape[0], *shape[1:], shape[0]).movedim(-1, 1)
    return part.view(part.shape[0], *shape)


def scales_of(state: State, name: str = "the state") -> tuple[Tensor, ...]:
    """The tensors of a state, in order: itself, or its entries.

    Raises: TypeError for what is not a state; ValueError for one without a scale.
    """
    kind = type(state).__name__
    scales = (state,) if isinstance(state, Tensor) else state
    if isinstance(scales, dict):
        scales = tuple(scales.values())
    if not isinstance(scales, tuple) or not all(isinstance(scale, Tensor) for scale in scales):
        if isinstance(scales, tuple):
            odd = [type(scale).__name__ for scale in scales if not isinstance(scale, Tensor)]
            kind = f"{kind} with {', '.join(odd)}"
        raise TypeError(
            f"{name} must be a tensor or a tuple of tensors, one per scale, or a dictionary of "
            f"them; it is a {kind}"
        )
    if not scales:
        raise ValueError(f"{name} is an empty {kind}: give at least one scale")
    return scales


def map_scales(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with the function applied to each of its scales."""
    if isinstance(state, dict):
        return {name: function(scale) for name, scale in state.items()}
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def _structure(state: State) -> str | tuple[str, ...]:
    if isinstance(state, dict):
        return tuple(state)
    return "a tensor" if isinstance(state, Tensor) else "a tuple"


def check_floating(tensor: Tensor, name: str) -> None:
    """Raises: TypeError for complex numbers, whole numbers and bool."""
    if tensor.is_complex():
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, but a state is real: give real and imaginary parts "
            "an axis of their own with torch.view_as_real"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}: convert it with {name}.float()")


def _check_scale(scale: Tensor, name: str, batched: bool) -> None:
    check_floating(scale, name)
    if (batched and scale.ndim < 1) or 0 in scale.shape[int(batched) :]:
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)}: the first axis is the batch (or give "
            "batched=False), and no other may be empty"
        )


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)
