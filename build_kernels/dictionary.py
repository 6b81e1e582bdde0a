# SPDX-License-Identifier: Apache-2.0
"""Which cubins of a family are the dictionary that all of them are compressed with.

A family's first kernel in a process waits for the whole dictionary to be decompressed, 1.8 ms a MB, so few bytes must
serve many cubins. Cubins are chosen one after the other: always the one that saves most for each byte of its own,
where a cubin costs what it has as a frame with the best of the chosen ones alone.

Measured on 104 cubins of family stream and 80 of family flat: 26 of each, evenly spaced by size, were dictionaries of
1.80 and 2.61 MB, and all frames together 1.143 MB. These are 0.33 and 0.77 MB, and 1.369 MB. Chosen by what they save
in all, however long they are, 5 and 8 are 0.35 and 0.98 MB for 1.358 MB, and 6 of each 0.45 and 0.67 MB for as many as
these; fewer of stream than of flat, because its products of few tokens are the ones to which a millisecond is most. The
first choice comes last, next to the cubin that is compressed, which saves 0.1%.
"""

from __future__ import annotations

from collections.abc import Mapping

import zstandard

from machete_aot.frames import raw_dictionary

CUBINS = {"flat": 8, "stream": 5}  # the more, the smaller the bundle, and the longer a family's first kernel takes
LEVEL = 3  # enough to compare, and a hundred times as fast as the frames' level


def build_dictionary(family: str, cubins: Mapping[str, bytes]) -> bytes:
    """Raw content of a few of these cubins, by id, for all of them to refer to. Follows from them alone."""
    ids = sorted(cubins)
    best = _sizes(ids, cubins, None)
    costs = {i: _sizes(ids, cubins, cubins[i]) for i in ids}
    chosen: list[str] = []
    while len(chosen) < min(CUBINS[family], len(ids)):
        rest = (i for i in ids if i not in chosen)
        chosen.append(max(rest, key=lambda i: _saved(best, costs[i]) / len(cubins[i])))  # the first of equals
        best = list(map(min, best, costs[chosen[-1]]))
    return b"".join(cubins[i] for i in reversed(chosen))


def _sizes(ids: list[str], cubins: Mapping[str, bytes], before: bytes | None) -> list[int]:
    """What each cubin has compressed, alone or with another one before it."""
    dictionary = None if before is None else raw_dictionary(before)
    if dictionary is not None:
        dictionary.precompute_compress(level=LEVEL)
    compressor = zstandard.ZstdCompressor(level=LEVEL, dict_data=dictionary)
    return [len(compressor.compress(cubins[i])) for i in ids]


def _saved(best: list[int], cost: list[int]) -> int:
    return sum(max(0, now - then) for now, then in zip(best, cost, strict=True))
