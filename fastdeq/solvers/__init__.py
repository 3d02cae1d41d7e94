"""Fixed-point solvers: each is a record of settings with a state and a step."""

from fastdeq.solvers.anderson import Anderson
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.broyden import BroydenSolver
from fastdeq.solvers.continuous import ContinuousSolver
from fastdeq.solvers.limited_memory_broyden import LimitedMemoryBroydenSolver
from fastdeq.solvers.loop import solve
from fastdeq.solvers.newton_krylov import NewtonKrylov
from fastdeq.solvers.picard import Picard
from fastdeq.solvers.reversible import ReversibleSolver
from fastdeq.solvers.termination import Iterate

__all__ = [
    "AbstractSolver",
    "Anderson",
    "BroydenSolver",
    "ContinuousSolver",
    "Iterate",
    "LimitedMemoryBroydenSolver",
    "NewtonKrylov",
    "Picard",
    "Problem",
    "ReversibleSolver",
    "Step",
    "solve",
]
