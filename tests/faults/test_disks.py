# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, in a mount namespace of their own, and cache folders that are no such thing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fault_server import FaultServer, running
from machete_aot.errors import CacheError
from machete_aot.fetch import fetch_bundle
from places import DATA, DIGEST, embedded, final_files, is_right, mirror_files, write_mirror
from run_children import children, no_mounts

needs_mounts = pytest.mark.skipif(bool(no_mounts()), reason=no_mounts())


def disk(folder: Path, options: str) -> str:
    """Shell that puts a small file system in memory at ``folder``."""
    folder.mkdir(parents=True)
    return f"mount -t tmpfs -o {options} tmpfs '{folder}'"


@needs_mounts
@pytest.mark.parametrize("size_kb", [64, 256, 412, 420])
def test_a_full_disk(size_kb: int, tmp_path: Path, counts: Counter[str]) -> None:
    """The real bundle does not fit. What was asked for cannot be kept, so it is an error, nothing half is there,
    and with more space the next run works."""
    data, text, digest = embedded()
    folder = tmp_path / "disk"
    grow = ["mount", "-o", "remount,size=4m", str(folder)]
    with running(mirror_files((data, text, digest))) as server:
        before = disk(folder, f"size={size_kb}k")
        job = dict(source=server.url, cache=folder, sha256=digest, between=grow)
        first, second = children("twice", before=before, **job)
    assert first["error"] == "CacheError", first
    assert "space" in first["message"]
    assert first["bad"] == second["bad"] == []
    assert first["other"] == []  # no temporary file takes the space that is left
    assert second["right"], second
    counts["full disks"] += 1


@needs_mounts
def test_a_read_only_disk(server: FaultServer, tmp_path: Path, counts: Counter[str]) -> None:
    """Root too is refused by a mount that is read-only."""
    mount = disk(tmp_path / "disk", "size=1m")
    before = f"{mount}\nmount -o remount,ro '{tmp_path}/disk'"
    found = children("one", before=before, source=server.url, cache=tmp_path / "disk", sha256=DIGEST)
    assert found["error"] == "CacheError"
    assert "Read-only" in found["message"]
    counts["read-only disks"] += 1


@needs_mounts
@pytest.mark.parametrize("options", ["size=4k,nr_inodes=2", "size=1m,ro"], ids=["full", "read-only"])
def test_a_default_cache_that_cannot_be_written_is_done_without(
    options: str, server: FaultServer, tmp_path: Path, counts: Counter[str]
) -> None:
    before = disk(tmp_path / "disk", options)
    variables = {"MACHETE_AOT_CACHE": str(tmp_path / "disk")}
    found = children("many", before=before, variables=variables, source=server.url, cache=None, sha256=DIGEST, count=4)
    assert [r["error"] for r in found["results"]] == [None] * 4, found
    assert all(r["right"] for r in found["results"])
    assert any("cache" in line for line in found["results"][0]["trace"])
    counts["processes without a cache"] += 4


@needs_mounts
def test_a_filled_cache_on_a_read_only_disk_is_used(server: FaultServer, tmp_path: Path) -> None:
    fetch_bundle(source=server.url, cache_dir=tmp_path / "warm", expected_sha256=DIGEST)
    asked = len(server.requests)
    before = (
        f"{disk(tmp_path / 'disk', 'size=1m')}\ncp -a '{tmp_path}/warm/.' '{tmp_path}/disk/'\n"
        f"mount -o remount,ro '{tmp_path}/disk'"
    )
    found = children("many", before=before, source=server.url, cache=tmp_path / "disk", sha256=DIGEST, count=8)
    assert [r["error"] for r in found["results"]] == [None] * 8, found
    assert len(server.requests) == asked


def test_a_disk_that_is_full_for_a_while(server: FaultServer, tmp_path: Path) -> None:
    """A file where the folder should be, then nothing in the way: the next run works."""
    cache = tmp_path / "cache"
    cache.write_text("not a folder")
    with pytest.raises(CacheError, match="cache"):
        fetch_bundle(source=server.url, cache_dir=cache, expected_sha256=DIGEST)
    assert cache.read_text() == "not a folder"
    cache.unlink()
    assert is_right(fetch_bundle(source=server.url, cache_dir=cache, expected_sha256=DIGEST))
    assert [p.read_bytes() for p in final_files(cache, "bundle")] == [DATA]


def test_strange_things_under_the_names_of_the_cache(server: FaultServer, tmp_path: Path) -> None:
    """Folders and dead links where files should be are in nobody's way."""
    fetch_bundle(source=server.url, cache_dir=tmp_path / "c", expected_sha256=DIGEST)
    [bundle] = final_files(tmp_path / "c", "bundle")
    bundle.unlink()
    bundle.symlink_to(tmp_path / "nowhere")
    assert is_right(fetch_bundle(source=server.url, cache_dir=tmp_path / "c", expected_sha256=DIGEST))
    assert not (tmp_path / "nowhere").exists()
    bundle.unlink()
    bundle.mkdir()
    try:
        assert is_right(fetch_bundle(source=server.url, cache_dir=tmp_path / "c", expected_sha256=DIGEST))
    except CacheError as error:
        assert str(bundle) in str(error)


def test_the_mirror_folder_is_never_written(tmp_path: Path) -> None:
    mirror = write_mirror(tmp_path / "mirror")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in mirror.iterdir()}
    assert is_right(fetch_bundle(source=mirror, cache_dir=tmp_path / "c", expected_sha256=DIGEST))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in mirror.iterdir()} == before
