"""Solves of the problems, for the tests of solvers."""

import torch
from torch import Tensor

from fastdeq.solvers import AbstractSolver, solve
from tests.problems import Problem

TOL = 1e-8


def run(solver: AbstractSolver, problem: Problem, z0: Tensor | None = None, **options):
    with torch.no_grad():
        return solve(solver, problem.flat_f, problem.flat_z0 if z0 is None else z0, **options)
