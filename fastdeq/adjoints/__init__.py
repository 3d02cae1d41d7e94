"""How an equilibrium is differentiated; every adjoint works with every solver that it supports."""

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.implicit import Implicit
from fastdeq.adjoints.jacobian_free import JacobianFree
from fastdeq.adjoints.phantom import Phantom
from fastdeq.adjoints.reversible import Reversible
from fastdeq.adjoints.unrolled import Unrolled

__all__ = [
    "AbstractAdjoint",
    "Equilibrium",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "Reversible",
    "Unrolled",
]
