"""The library in short, for a Python that the tests do not run under; needs torch alone."""

import torch

import fastdeq
from fastdeq import adjoints, solvers
from fastdeq.nn import DenseCell

torch.manual_seed(0)
linear, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
for adjoint in (adjoints.Implicit(), adjoints.JacobianFree(), adjoints.Neumann()):
    for solver in (solvers.Anderson(), solvers.LimitedMemoryBroydenSolver(), solvers.Picard()):
        linear.zero_grad()
        solution = fastdeq.fixed_point(
            lambda z: torch.tanh(0.3 * linear(z) + x),
            torch.zeros(4, 8),
            solver=solver,
            adjoint=adjoint,
        )
        solution.value.square().mean().backward()
        assert solution.converged.all(), solution
        assert linear.weight.grad is not None
        assert linear.weight.grad.isfinite().all()

deq = fastdeq.SkipDeepEquilibriumNetwork(DenseCell(16), explicit=torch.nn.Linear(16, 16))
model = fastdeq.DEQChain(torch.nn.Linear(8, 16), deq, torch.nn.Linear(16, 3))
logits, solution = model(x)
(logits.logsumexp(1).mean() + fastdeq.regularizers.skip_loss(solution)).backward()
assert all(p.grad is not None for p in model.parameters())
