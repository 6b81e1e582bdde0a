# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism with gloo on the CPU, several processes against the layer that was not sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

import parallel_worker
from machete_aot.errors import UnsupportedError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_against_layers_that_are_not_sharded(ranks: int, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=parallel_worker.run, args=(rank, ranks, str(tmp_path))) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    errors = "\n".join(path.read_text() for path in sorted(tmp_path.glob("error-*")))
    assert not errors, errors
    assert len(list(tmp_path.glob("done-*"))) == ranks


def test_places_to_cut() -> None:
    from machete_aot.nn.parallel import cut

    assert cut(256, 64, 2, False, "N") == [0, 128, 256]
    assert cut(300, 64, 2, True, "N") == [0, 128, 300]
    assert cut(14336, 128, 8, False, "K") == [1792 * i for i in range(9)]
    assert cut(11008, 128, 4, True, "K") == [0, 2688, 5504, 8192, 11008]
    with pytest.raises(UnsupportedError, match="K = 11008 cannot be cut evenly for 4 ranks in units of 128"):
        cut(11008, 128, 4, False, "K")
