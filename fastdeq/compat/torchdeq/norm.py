"""torchdeq's weight and spectral norm: W ← W · min(clip_value, target / norm), once per reset."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeq.compat.torchdeq.arguments import norm_options

_AXES: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1),
}
"""The axis of the outputs in the weight."""


@dataclass(frozen=True)
class _Norm:
    """How the weight of a module is computed from `weight_v` (or `weight_orig`) and `weight_g`."""

    spectral: bool
    axis: int
    learn_scale: bool
    target_norm: float
    clip: bool
    clip_value: float
    iterations: int
    eps: float

    @property
    def name(self) -> str:
        return "weight_orig" if self.spectral else "weight_v"

    def apply(self, module: nn.Module) -> None:
        weight = module.get_parameter("weight")
        rows = weight.detach().movedim(self.axis, 0).flatten(1)
        outputs, inputs = rows.shape
        shape = [outputs if i == self.axis else 1 for i in range(weight.ndim)]
        scale = torch.full_like(rows[:, 0], self.target_norm) if self.spectral else rows.norm(dim=1)
        if self.spectral:
            for name, size in (("weight_u", outputs), ("weight_v", inputs)):
                start = F.normalize(weight.new_empty(size).normal_(), dim=0, eps=self.eps)
                module.register_buffer(name, start.detach())
        del module._parameters["weight"]
        if self.learn_scale:
            module.register_parameter("weight_g", nn.Parameter(scale.view(shape)))
        module.register_parameter(self.name, nn.Parameter(weight.detach()))
        # Spectral norm takes effect at the first reset, as in torchdeq.
        module.weight = weight.detach() if self.spectral else self.weight(module)

    def weight(self, module: nn.Module, iterate: bool = False) -> Tensor:
        v = module.get_parameter(self.name)
        rows = v.movedim(self.axis, 0).flatten(1)
        if self.spectral:
            norm = self._largest(module, rows, iterate)
        else:
            shape = [len(rows) if i == self.axis else 1 for i in range(v.ndim)]
            norm = rows.norm(dim=1).view(shape)
        target = module.get_parameter("weight_g") if self.learn_scale else self.target_norm
        factor = target / norm
        return v * (factor.clamp(max=self.clip_value) if self.clip else factor)

    def _largest(self, module: nn.Module, rows: Tensor, iterate: bool) -> Tensor:
        """The largest singular value, by the power method on vectors that the module keeps."""
        u, v = module.get_buffer("weight_u"), module.get_buffer("weight_v")
        if iterate:
            with torch.no_grad():
                for _ in range(self.iterations):
                    v.copy_(F.normalize(rows.mT @ u, dim=0, eps=self.eps))
                    u.copy_(F.normalize(rows @ v, dim=0, eps=self.eps))
        return torch.dot(u.clone(), rows @ v.clone())  # the next reset changes both in place

    def remove(self, module: nn.Module) -> None:
        weight = self.weight(module).detach()
        del module.weight
        for name in ("weight_g", "weight_v", "weight_orig", "weight_u"):
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        module.register_parameter("weight", nn.Parameter(weight))


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | list[str] | None = None,
    filter_out: str | list[str] | None = None,
    args: Any = None,
    *,
    learn_scale: bool = True,
    target_norm: float = 1.0,
    clip: bool = False,
    clip_value: float = 1.0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> None:
    """Normalize the weights of the linear and convolutional layers of `model`, in place. They are
    computed again by `reset_norm` or `reset_deq`, to be called before every training step.

    norm_type: "weight_norm", "spectral_norm" or "none". prefix_filter_out, filter_out: modules to
    leave out, whose names begin with, or contain, one of these. args: a Namespace or a mapping with
    torchdeq's options (norm_type, norm_no_scale, norm_target_norm, norm_clip, norm_clip_value,
    sn_n_power_iters), which take precedence.

    Raises: ValueError for another norm_type or fewer than one power iteration; TypeError for an
    unknown option.
    """
    options = norm_options(args)
    norm_type = options.get("norm_type", norm_type)
    if norm_type == "none":
        return
    if norm_type not in ("weight_norm", "spectral_norm"):
        raise ValueError(
            f"norm_type is {norm_type!r}, but must be 'weight_norm', 'spectral_norm' or 'none'"
        )
    iterations = options.get("sn_n_power_iters", n_power_iterations)
    if iterations < 1:
        raise ValueError(f"n_power_iterations is {iterations}, but must be at least 1")
    for name, module in model.named_modules():
        kept = not name.startswith(_names(prefix_filter_out)) if prefix_filter_out else True
        if type(module) in _AXES and kept and not any(part in name for part in _names(filter_out)):
            norm = _Norm(
                spectral=norm_type == "spectral_norm",
                axis=_AXES[type(module)],
                learn_scale=not options.get("norm_no_scale", not learn_scale),
                target_norm=options.get("norm_target_norm", target_norm),
                clip=options.get("norm_clip", clip),
                clip_value=options.get("norm_clip_value", clip_value),
                iterations=iterations,
                eps=eps,
            )
            norm.apply(module)
            vars(module)["_deq_norm"] = norm


def _names(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def reset_norm(model: nn.Module) -> None:
    """Compute the normalized weights again, from the current parameters."""
    for module in model.modules():
        if isinstance(norm := vars(module).get("_deq_norm"), _Norm):
            module.weight = norm.weight(module, iterate=module.training)


def remove_norm(model: nn.Module) -> None:
    """Make the normalized weights ordinary parameters again."""
    for module in model.modules():
        if isinstance(norm := vars(module).pop("_deq_norm", None), _Norm):
            norm.remove(module)
