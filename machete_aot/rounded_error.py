# SPDX-License-Identifier: Apache-2.0
"""How far a result is from what rounds as it: the error of its sums, without that of rounding them once."""

from __future__ import annotations

import torch


def rounded_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """||d|| / ||exact||, d being how far each element is from the nearest value that ``out.dtype`` rounds as it.

    Not how far from ``exact``, nor from that rounded: where a few elements are most of the norm, one that lies between
    two numbers of 16 bits would make up to 2e-3 of it, or 4e-3, however exact its sum was.
    """
    exact = exact.double()
    distance = (out.double() - exact).abs()
    if out.dtype != torch.float32:
        kind = torch.finfo(out.dtype)
        binade = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 1).clamp(min=kind.tiny)
        distance = (distance - binade * (kind.eps / 2)).clamp(min=0)
    return (distance.norm() / exact.norm()).item()
