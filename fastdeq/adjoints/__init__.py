"""How an equilibrium is differentiated; every adjoint works with every solver that it supports."""

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.direct import Direct
from fastdeq.adjoints.implicit import Implicit
from fastdeq.adjoints.jacobian_free import JacobianFree
from fastdeq.adjoints.neumann import Neumann
from fastdeq.adjoints.phantom import Phantom
from fastdeq.adjoints.reversible import Reversible
from fastdeq.adjoints.shine import Shine
from fastdeq.adjoints.unrolled import Unrolled

__all__ = [
    "AbstractAdjoint",
    "Direct",
    "Equilibrium",
    "Implicit",
    "JacobianFree",
    "Neumann",
    "Phantom",
    "Reversible",
    "Shine",
    "Unrolled",
]
