# SPDX-License-Identifier: Apache-2.0
"""Which cubins become the dictionary of their family."""

from __future__ import annotations

import random

import pytest

from build_kernels import dictionary
from build_kernels.dictionary import build_dictionary
from machete_aot.frames import compressor
from small_bundle import cubin_like


def noise(seed: int, size: int = 2000) -> bytes:
    return random.Random(seed).randbytes(size)


def changed(content: bytes, seed: int) -> bytes:
    """Mostly the same, as another cubin of the same sources."""
    own = random.Random(seed)
    return bytes(own.randrange(256) if i % 200 == 0 else b for i, b in enumerate(content))


FAMILIES = {f"{kind}{i}": changed(noise(kind), i) for kind, count in ((1, 6), (2, 4), (3, 2)) for i in range(count)}


def pick(monkeypatch: pytest.MonkeyPatch, count: int, cubins: dict[str, bytes]) -> list[str]:
    """The ids of the cubins in the dictionary, in its order."""
    monkeypatch.setitem(dictionary.CUBINS, "flat", count)
    content, found = build_dictionary("flat", cubins), []
    while content:
        (name,) = [i for i, cubin in cubins.items() if content.startswith(cubin)]
        found.append(name)
        content = content[len(cubins[name]) :]
    return found


def test_each_choice_is_of_what_most_cubins_still_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [i[0] for i in pick(monkeypatch, 3, FAMILIES)] == ["3", "2", "1"]  # the first one is the last
    assert [i[0] for i in pick(monkeypatch, 1, FAMILIES)] == ["1"]


def test_a_long_cubin_must_save_as_much_for_each_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"long": noise(5, 1000) + noise(6, 9000), **{f"short{i}": changed(noise(5, 1000), i) for i in range(4)}}
    (chosen,) = pick(monkeypatch, 1, both)
    assert chosen.startswith("short")


def test_it_follows_from_ids_and_contents_alone() -> None:
    turned = dict(reversed(FAMILIES.items()))
    assert build_dictionary("flat", turned) == build_dictionary("flat", FAMILIES)
    equal = {name: noise(1) for name in "cab"}
    assert build_dictionary("stream", equal) == noise(1) * 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_families_with_fewer_cubins_than_it_takes(count: int) -> None:
    cubins = {str(i): cubin_like(i, 300 + i) for i in range(count)}
    content = build_dictionary("flat", cubins)
    assert len(content) == sum(map(len, cubins.values())) and all(cubin in content for cubin in cubins.values())


def test_it_serves_better_than_the_same_number_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dictionary.CUBINS, "flat", 3)
    names = sorted(FAMILIES)

    def total(content: bytes) -> int:
        made = compressor(content)
        return sum(len(made.compress(cubin)) for cubin in FAMILIES.values())

    first = b"".join(FAMILIES[i] for i in names[:3])
    assert total(build_dictionary("flat", FAMILIES)) < 0.6 * total(first)
