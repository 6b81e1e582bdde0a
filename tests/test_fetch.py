# SPDX-License-Identifier: Apache-2.0
"""Where bundles come from: files, the package's pins, and the bundle that a process uses."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from machete_aot import fetch
from machete_aot.bundle import open_bundle
from machete_aot.errors import (
    BundleError,
    IncompatibleError,
    MissingError,
    TruncatedError,
    UnreachableError,
    UnsupportedError,
    UntrustedError,
)
from machete_aot.manifest import parse_manifest
from small_bundle import rewritten, small_bundle

DATA, TEXT, DIGEST = small_bundle()
MANIFEST = parse_manifest(TEXT)


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package data folder that embeds the small bundle."""
    pin = {"arch": "sm90a", "version": fetch.__version__, "file": "small.zip", "manifest_sha256": DIGEST}
    (tmp_path / "pins.json").write_text(json.dumps({"schema": 1, "bundles": [pin]}))
    (tmp_path / "small.zip").write_bytes(DATA)
    monkeypatch.setattr(fetch, "_data", lambda: tmp_path)
    monkeypatch.delenv(fetch.SOURCE_VARIABLE, raising=False)
    fetch.use_bundle(None)
    fetch.pins.cache_clear()
    yield tmp_path
    fetch.pins.cache_clear()
    fetch.use_bundle(None)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with pytest.raises(MissingError, match=r"b\.zip"):
        open_bundle(path, manifest_sha256=DIGEST)
    path.write_bytes(DATA)
    bundle = open_bundle(str(path), manifest_sha256=DIGEST)
    path.write_bytes(b"overwritten later")
    assert bundle.verify() == []
    assert str(path) in repr(bundle)
    with pytest.raises(UnreachableError):
        open_bundle(tmp_path, manifest_sha256=DIGEST)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_files_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(DATA)
    path.chmod(0)
    with pytest.raises(UnreachableError):
        open_bundle(path, manifest_sha256=DIGEST)


def test_the_embedded_bundle_is_the_default(pinned: Path) -> None:
    assert fetch.fetch_bundle("sm90a").manifest == MANIFEST
    assert fetch.fetch_bundle("sm90a", "0.1.0").origin == str(pinned / "small.zip")
    (pinned / "small.zip").unlink()
    with pytest.raises(MissingError, match="build_kernels"):
        fetch.fetch_bundle()


@pytest.mark.parametrize(("arch", "version"), [("sm100a", None), ("sm90a", "9.9.9")])
def test_bundles_that_are_not_embedded(pinned: Path, arch: str, version: str | None) -> None:
    with pytest.raises(MissingError, match=r"there are: sm90a 0\.1\.0"):
        fetch.fetch_bundle(arch, version)


def test_damage_to_the_embedded_bundle(pinned: Path) -> None:
    (pinned / "small.zip").write_bytes(DATA[:-1])
    with pytest.raises(TruncatedError):
        fetch.fetch_bundle()
    (pinned / "pins.json").unlink()
    fetch.pins.cache_clear()
    with pytest.raises(MissingError, match=r"pins\.json"):
        fetch.fetch_bundle()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bundles": 3}',
        '{"bundles": [{"arch": "sm90a"}]}',
        '{"bundles": [{"arch": 1, "version": 2, "file": 3, "manifest_sha256": 4}]}',
    ],
)
def test_damaged_pins(pinned: Path, text: str) -> None:
    (pinned / "pins.json").write_text(text)
    fetch.pins.cache_clear()
    with pytest.raises(BundleError, match="damaged"):
        fetch.fetch_bundle()


def test_sources(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pinned / "elsewhere.zip"
    path.write_bytes(DATA)
    assert fetch.fetch_bundle(source=path).origin == str(path)
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, str(path))
    assert fetch.fetch_bundle().origin == str(path)
    monkeypatch.setenv(fetch.SOURCE_VARIABLE, "")
    assert fetch.fetch_bundle().origin == str(pinned / "small.zip")


def test_sources_of_another_digest(pinned: Path) -> None:
    data, digest = rewritten(
        dataclasses.replace(MANIFEST, bundle=dataclasses.replace(MANIFEST.bundle, version="0.2.0"))
    )
    path = pinned / "newer.zip"
    path.write_bytes(data)
    with pytest.raises(UntrustedError, match="expected_sha256="):
        fetch.fetch_bundle(source=path)
    with pytest.raises(UntrustedError):
        fetch.fetch_bundle(source=path, expected_sha256="1" * 64)
    assert fetch.fetch_bundle(source=path, expected_sha256=digest).manifest.bundle.version == "0.2.0"
    with pytest.raises(IncompatibleError, match=r"wanted sm90a 0\.3\.0"):
        fetch.fetch_bundle("sm90a", "0.3.0", path, expected_sha256=digest)
    with pytest.raises(IncompatibleError, match="wanted sm100a"):
        fetch.fetch_bundle("sm100a", source=path, expected_sha256=digest)


@pytest.mark.parametrize("url", ["https://example.invalid/b.zip", "http://example.invalid/b.zip", "s3://b"])
def test_remote_sources_are_not_supported(pinned: Path, url: str) -> None:
    with pytest.raises(UnsupportedError, match="is a file"):
        fetch.fetch_bundle(source=url)


def test_the_bundle_of_the_process(pinned: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch.default_bundle(), range(32)))
    assert len(set(map(id, found))) == 1
    mine = open_bundle(DATA, manifest_sha256=DIGEST)
    fetch.use_bundle(mine)
    assert fetch.default_bundle() is mine
    fetch.use_bundle(None)
    assert fetch.default_bundle() is not mine
