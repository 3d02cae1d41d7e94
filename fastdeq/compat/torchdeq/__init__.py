"""The interface of torchdeq 0.1 (Geng & Kolter 2023, arXiv 2310.18605): in a program that uses it,
`import torchdeq` becomes `from fastdeq.compat import torchdeq`.

Solves and gradients are fastdeq's: equal to torchdeq's to the tolerance of the solves.
docs/torchdeq.md lists what differs.
"""

from fastdeq.compat.torchdeq.arguments import add_deq_args
from fastdeq.compat.torchdeq.deq import DEQIndexing, DEQSliced, get_deq, reset_deq
from fastdeq.compat.torchdeq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from fastdeq.compat.torchdeq.losses import fp_correction, jac_reg, power_method
from fastdeq.compat.torchdeq.norm import apply_norm, remove_norm, reset_norm

__all__ = [
    "DEQIndexing",
    "DEQSliced",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "apply_norm",
    "fp_correction",
    "get_deq",
    "jac_reg",
    "power_method",
    "remove_norm",
    "reset_deq",
    "reset_dropout",
    "reset_norm",
]
