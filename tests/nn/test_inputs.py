"""Inputs of any structure: mappings, lists and tuples, nested (torchdyn issue 137)."""

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork
from fastdeq.nn import AbstractCellLayer, UnrolledNetwork, Zeros
from fastdeq.nn.inputs import tensors_in
from tests.cells import EXACT, TIGHT, DenseTanh
from tests.loops import each
from tests.training.tasks import make_task, network

F64 = torch.float64
WIDTH = 4


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """The dtype of z₀ where the first tensor holds tokens."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def image() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=F64)


class Reads(nn.Module):
    """A cell of a tensor, fed with what `tensors_in` finds last in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = DenseTanh(WIDTH, 0.5)

    def forward(self, z: Tensor, x: Any) -> Tensor:
        y: Tensor = self.cell(z, list(tensors_in(x))[-1])
        return y


INPUTS: dict[str, Any] = {
    "dict": lambda x: {"image": x},
    "nested": lambda x: {"meta": {"name": "a", "scale": torch.tensor(2.0)}, "views": [(x,), x]},
    "list": lambda x: [x],
    "tuple": lambda x: (x, x),
    "text first": lambda x: ("text", {"x": x}),
    "whole numbers first": lambda x: {"tokens": torch.ones(3, 7, dtype=torch.int64), "x": x},
    "user mapping": lambda x: UserDict(x=x),
}


def layers() -> list[AbstractCellLayer]:
    torch.manual_seed(0)
    cell = Reads()
    zeros = Zeros(WIDTH)
    return [
        DeepEquilibriumNetwork(cell, solver=TIGHT, adjoint=EXACT, initializer=zeros),
        SkipDeepEquilibriumNetwork(cell, zeros=zeros, solver=TIGHT, adjoint=EXACT),
        UnrolledNetwork(cell, steps=60, initializer=zeros),
    ]


@each("kind", INPUTS)
def test_a_structured_input_gives_the_state_and_the_gradients_of_its_tensor(kind):
    for layer in layers():
        got, expected = image().requires_grad_(), image().requires_grad_()
        z, _ = layer(INPUTS[kind](got))
        wanted, _ = layer(expected)
        assert torch.equal(z, wanted)
        z.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(got.grad, expected.grad)


def test_the_first_tensor_with_a_batch_axis_gives_batch_and_dtype_of_the_start():
    zeros = Zeros([2, 3])
    start = zeros(lambda z: z, {"scale": torch.tensor(1.0), "a": torch.ones(5, 1).float()})
    assert isinstance(start, Tensor)
    assert (start.shape, start.dtype) == ((5, 2, 3), torch.float32)
    assert [len(scale) for scale in Zeros([[2], [1]])(lambda z: z, {"a": torch.ones(5)})] == [5, 5]


@each("x", [{}, {"a": 1, "b": [2.0, "c"]}, None, "text", torch.tensor(1.0)])
def test_an_input_without_a_batch_is_refused_with_the_cure(x):
    for layer in layers():
        with pytest.raises(TypeError, match=f"input is a {type(x).__name__} without a tensor"):
            layer(x)


def test_without_a_shape_a_mapping_is_refused_with_the_cure():
    cell = Reads()
    for layer in (DeepEquilibriumNetwork(cell), SkipDeepEquilibriumNetwork(cell)):
        for x in ({"image": image()}, [{"image": image()}], (image(), 1)):
            with pytest.raises(TypeError, match=r"give the shape .*Zeros\(shape\)"):
                layer(x)


def test_a_chain_passes_a_mapping_on_to_its_equilibrium():
    torch.manual_seed(0)
    deq = DeepEquilibriumNetwork(Reads(), initializer=Zeros(WIDTH), solver=TIGHT)
    chain = DEQChain(deq, nn.Linear(WIDTH, 2, dtype=F64))
    y, solution = chain({"image": image()})
    assert y.shape == (3, 2)
    assert torch.equal(y, chain(image())[0])
    assert solution.converged.all()


@each("kind", INPUTS)
def test_a_neural_ode_sends_gradients_to_the_tensors_of_a_structured_input(kind):
    pytest.importorskip("torchdiffeq")
    from fastdeq.nn.neural_ode import NeuralODE

    torch.manual_seed(0)
    layer = NeuralODE(Reads(), tol=1e-9, initializer=Zeros(WIDTH))
    got, expected = image().requires_grad_(), image().requires_grad_()
    layer(INPUTS[kind](got))[0].square().sum().backward()
    layer(expected)[0].square().sum().backward()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-8)


class Summed(nn.Module):
    """A cell of the sum of its input's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = DenseTanh(WIDTH, 0.5)

    def forward(self, z: Tensor, x: Any) -> Tensor:
        y: Tensor = self.cell(z, sum(tensors_in(x)))
        return y


def test_a_neural_ode_refuses_inputs_whose_gradients_it_would_count_twice():
    pytest.importorskip("torchdiffeq")
    from fastdeq.nn.neural_ode import NeuralODE

    cell, x = Summed(), image().requires_grad_()
    layer, weight = NeuralODE(cell, initializer=Zeros(WIDTH)), cell.cell.state.weight
    stem = torch.sin(x)
    for dependent in ((x, stem), {"a": stem, "b": 2 * stem}, x @ weight):
        with pytest.raises(ValueError, match="would count twice"):
            layer(dependent)
    for independent in ((x, stem.detach()), (stem, torch.cos(x)), stem.chunk(2, dim=0)[:1]):
        layer(independent)
    with torch.no_grad():
        layer((x, torch.sin(x)))


def test_outputs_of_one_operation_are_independent_inputs_of_a_neural_ode():
    pytest.importorskip("torchdiffeq")
    from fastdeq.nn.neural_ode import NeuralODE

    torch.manual_seed(0)
    layer = NeuralODE(Summed(), tol=1e-9, initializer=Zeros(WIDTH))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        z: Tensor = layer((torch.tanh(left), right, right))[0]
        return z.square().sum()

    assert torch.autograd.gradcheck(loss, (x,), atol=1e-5, rtol=1e-4)


def test_the_check_of_a_model_reports_a_structured_input_that_it_does_not_take():
    task = make_task(model=network())
    x: Any = {"image": torch.randn(2, 2)}
    with pytest.raises(ValueError, match=r"does not take inputs of type dict.*choose the arch"):
        task.check_model((x, torch.zeros(2, dtype=torch.int64), 1.0))
