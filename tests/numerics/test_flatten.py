"""A state of scales and its flat form: no loss, no copies, memory formats kept, half precision
widened."""

from typing import Any

import torch
from torch import Tensor

from fastdeq import fixed_depth, fixed_point
from fastdeq.flatten import Layout, is_channels_last
from fastdeq.solvers import Picard
from tests.loops import each


def nhwc(*shape: int) -> Tensor:
    """Random numbers in channels_last."""
    kind = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.randn(shape).contiguous(memory_format=kind)


STATES: dict[str, Any] = {
    "dense": lambda: torch.randn(3, 5),
    "conv": lambda: torch.randn(3, 2, 4, 4),
    "scalar": lambda: torch.randn(3),
    "one scale": lambda: (torch.randn(3, 5),),
    "scales": lambda: (torch.randn(3, 2, 4, 4), torch.randn(3, 5), torch.randn(3, 1, 2)),
    "scales with a scalar": lambda: (torch.randn(3), torch.randn(3, 2)),
    "channels_last": lambda: nhwc(3, 2, 4, 4),
    "channels_last, 3d": lambda: nhwc(3, 2, 4, 4, 2),
    "channels_last scales": lambda: (nhwc(3, 2, 4, 4), nhwc(3, 5, 2, 2)),
    "scales of both formats": lambda: (nhwc(3, 2, 4, 4), torch.randn(3, 5, 2, 2)),
    "one channel": lambda: nhwc(3, 1, 4, 4),
    "transposed": lambda: torch.randn(3, 4, 2).mT,
    "mixed dtypes": lambda: (torch.randn(3, 2), torch.randn(3, 2, dtype=torch.float64)),
    "half": lambda: (torch.randn(3, 2).half(), torch.randn(3, 4).bfloat16()),
}


def scales_of(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


@each("name", STATES)
def test_flatten_and_unflatten_give_the_state_back(name):
    state = STATES[name]()
    layout = Layout.of(state)
    flat = layout.flatten(state)
    again = layout.unflatten(flat)
    assert flat.shape == (3, sum(scale[0].numel() for scale in scales_of(state)))
    assert isinstance(again, Tensor) == isinstance(state, Tensor)
    for one, other in zip(scales_of(state), scales_of(again), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


@each("name", STATES)
def test_a_state_of_any_layout_is_solved_for_and_unrolled(name):
    z0 = STATES[name]()

    def f(z: Any) -> Any:
        halved = tuple(0.5 * scale + 1 for scale in scales_of(z))
        return halved[0] if isinstance(z, Tensor) else halved

    for found in (fixed_point(f, z0, solver=Picard(tol=1e-3)), fixed_depth(f, z0, depth=12)):
        assert isinstance(found.value, Tensor) == isinstance(z0, Tensor)
        for start, end in zip(scales_of(z0), scales_of(found.value), strict=True):
            assert (end.shape, end.dtype) == (start.shape, start.dtype)
            # 2⁻¹² of a start of size 3 is left, and bfloat16 has steps of 2⁻⁷ at 2.
            torch.testing.assert_close(end, torch.full_like(start, 2.0), rtol=0, atol=2e-2)


VIEWS = ["dense", "conv", "one scale", "scales", "scalar", *(s for s in STATES if "channel" in s)]


@each("name", VIEWS)
def test_the_scales_of_a_flat_state_are_views_of_it(name):
    layout = Layout.of(STATES[name]())
    flat = layout.flatten(STATES[name]())
    offset = 0
    for scale in scales_of(layout.unflatten(flat)):
        assert scale.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        assert scale.data_ptr() == flat.data_ptr() + offset * flat.element_size()
        offset += scale[0].numel()


@each("name", ["conv", "channels_last", "channels_last, 3d"])
def test_a_single_dense_scale_is_not_copied_on_the_way_in(name):
    state = STATES[name]()
    assert Layout.of(state).flatten(state).data_ptr() == state.data_ptr()


@each("name", STATES)
def test_a_scale_keeps_its_memory_format_and_is_recognized_in_a_flat_state(name):
    state = STATES[name]()
    layout = Layout.of(state)
    again = layout.unflatten(layout.flatten(state))
    assert Layout.of(again) == layout
    for one, other in zip(scales_of(state), scales_of(again), strict=True):
        assert is_channels_last(one) == is_channels_last(other)


def test_the_order_of_the_flat_state_is_that_of_z0_whatever_f_returns():
    for name in ("conv", "channels_last", "scales of both formats"):
        z0 = STATES[name]()
        layout = Layout.of(z0)
        flat = layout.flatten(z0)
        for kind in (torch.contiguous_format, torch.channels_last):
            output = tuple(scale.contiguous(memory_format=kind) for scale in scales_of(z0))
            found = layout.flatten_output(output[0] if layout.single else output, flat)
            assert torch.equal(found, flat)


def test_the_cell_sees_views_of_one_flat_state():
    seen: list[tuple[int, ...]] = []

    def f(z: Any) -> Any:
        seen.append(tuple(scale.untyped_storage().data_ptr() for scale in z))
        return tuple(0.5 * scale + 1 for scale in z)

    with torch.no_grad():
        fixed_point(f, (torch.zeros(3, 2), torch.zeros(3, 4, 4)))
    assert all(first == second for first, second in seen)


@each("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_for_the_solver_and_restored_for_the_cell(dtype):
    seen = set()

    def f(z: Any) -> Any:
        seen.add(z.dtype)
        return 0.5 * z + 1

    found = fixed_point(f, torch.zeros(3, 4, dtype=dtype))
    assert seen == {dtype}
    assert isinstance(found.value, Tensor)
    assert found.value.dtype == dtype
    assert found.residual.dtype == found.defect.dtype == torch.float32


@each(
    "dtypes, wide",
    [
        ((torch.float16,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64, torch.bfloat16), torch.float64),
    ],
)
def test_the_flat_state_has_the_widest_dtype_and_at_least_float32(dtypes, wide):
    state = tuple(torch.randn(3, 2).to(dtype) for dtype in dtypes)
    layout = Layout.of(state)
    assert layout.dtype == layout.flatten(state).dtype == wide


def test_gradients_pass_through_flatten_and_unflatten():
    state = tuple(scale.double().requires_grad_() for scale in STATES["scales"]())
    layout = Layout.of(state)
    again = layout.unflatten(layout.flatten(state))
    sum((i + 1) * scale.sum() for i, scale in enumerate(again)).backward()
    for i, scale in enumerate(state):
        assert torch.equal(scale.grad, torch.full_like(scale, i + 1.0))
