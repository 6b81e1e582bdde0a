# SPDX-License-Identifier: Apache-2.0
"""Manifests that the package pins, decoded in parts: the same values as all at once, and no more than is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest

from machete_aot import bundle as bundle_module
from machete_aot import selection
from machete_aot.bundle import Bundle, open_manifest
from machete_aot.bundle_data import MemoryData
from machete_aot.config import PRODUCTS, ProductTypes
from machete_aot.errors import BundleError, IncompatibleError, MissingError, SchemaTooNewError, UntrustedError
from machete_aot.fetch import fetch_bundle
from machete_aot.frames import manifest_frame, manifest_text
from machete_aot.manifest import Manifest, dump_manifest, parse_manifest
from machete_aot.manifest_rules import SCHEMA
from machete_aot.part import H100, Part
from machete_aot.pinned import parse_pinned
from small_bundle import small_bundle

EMBEDDED = manifest_text(fetch_bundle().manifest_bytes)
SMALL = manifest_text(small_bundle()[1])
LAZY = ("kernels", "schedules", "heuristic")


@pytest.fixture(params=["embedded", "small"])
def raw(request: pytest.FixtureRequest) -> bytes:
    return EMBEDDED if request.param == "embedded" else SMALL


def decoded(manifest: Manifest) -> set[str]:
    return set(vars(manifest)) & set(LAZY)


def test_the_embedded_manifest_needs_no_check_at_run_time() -> None:
    """It obeys every rule and is laid out as the parts are looked for."""
    assert dump_manifest(parse_manifest(EMBEDDED)) == EMBEDDED
    assert parse_pinned(EMBEDDED)._parts is not None


def test_the_parts_are_those_of_the_whole(raw: bytes) -> None:
    whole, parts = parse_manifest(raw), parse_pinned(raw)
    for types in whole.types:
        assert parts.types_named(types.name) == types
        assert parts.kernels_for(types) == whole.kernels_for(types)
        for device in (None, *(table.device for table in whole.heuristic.tables), "another"):
            own = [
                dataclasses.replace(
                    table,
                    coefficients={n: c for n, c in table.coefficients.items() if n == types.name},
                    measured={n: m for n, m in table.measured.items() if n == types.name},
                )
                for table in whole.tables_for(types.name, device)
            ]
            assert list(parts.tables_for(types.name, device)) == own
        assert parts.schedules_for(types) == whole.schedules_for(types)
    assert [parts.kernel(k.id) for k in whole.kernels] == list(whole.kernels)
    assert [parts.types_for(product) for product in PRODUCTS] == [whole.types_for(product) for product in PRODUCTS]
    assert decoded(parts) == {"schedules"}
    assert parts.types == whole.types
    assert parts == whole and whole == parts
    assert dump_manifest(parts) == raw


def test_what_it_lacks(raw: bytes) -> None:
    parts = parse_pinned(raw)
    assert parts.types_named("fp8_u4") is None
    assert parts.types_named("bf16") is None  # the beginning of a name
    for kernel_id in ("bf16_u4b8__none", "bf16_u4b8", "", "none__none"):
        with pytest.raises(MissingError, match="holds no kernel"):
            parts.kernel(kernel_id)
    with pytest.raises(AttributeError):
        _ = parts.nothing
    assert not hasattr(parts, "__deepcopy__")


def test_a_product_decodes_its_own_types_alone() -> None:
    parts = parse_pinned(EMBEDDED)
    whole = parse_manifest(EMBEDDED)
    types = parts.types_for(ProductTypes("bf16", "u4b8", "none", False))
    assert types is not None
    for part in (H100, Part.known("another", H100.sms, 1500.0, H100.peak_bytes_per_us)):
        for m in (1, 16, 4096):
            chosen = selection.explain(parts, types.name, m, 4096, 4096, part)
            assert chosen == selection.explain(whole, types.name, m, 4096, 4096, part)
            assert parts.kernel_for(types, chosen.chosen) == whole.kernel_for(types, chosen.chosen)
    assert decoded(parts) == {"schedules"}
    text = parts._parts
    assert text is not None
    assert set(vars(text)["_kernels"]) == {types.name}


def test_replacing_makes_an_ordinary_manifest(raw: bytes) -> None:
    made = dataclasses.replace(parse_pinned(raw), kernels=())
    assert made._parts is None
    assert made.types == () and made.kernels_for(parse_manifest(raw).types[0]) == ()


def edited(raw: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(raw), **fields}, sort_keys=True, indent=0, separators=(",", ":")).encode() + b"\n"


def test_another_layout_is_parsed_and_checked_in_full(raw: bytes) -> None:
    document = json.loads(raw)
    for text in (json.dumps(document), json.dumps(document, indent=2), json.dumps(document, indent=1, sort_keys=True)):
        found = parse_pinned(text.encode())
        assert found._parts is None or found == parse_manifest(raw)
    with pytest.raises(SchemaTooNewError):
        parse_pinned(edited(raw, schema=SCHEMA + 1))
    with pytest.raises(IncompatibleError):
        parse_pinned(edited(raw, schema=SCHEMA - 1))
    for damaged in (b"", b"{}", raw[:-400], b"\xff" + raw, edited(raw, schema="3")):
        with pytest.raises(BundleError):
            parse_pinned(damaged)
    more = edited(raw, more=1)
    digest = digest_of(more)
    with pytest.raises(BundleError, match="not valid"):
        opened(more, [digest], [digest])


def test_values_of_a_wrong_type_are_refused_when_they_are_asked_for() -> None:
    kernels = json.loads(SMALL)["kernels"]
    kernels[0]["threads"] = "many"
    parts = parse_pinned(edited(SMALL, kernels=kernels))
    with pytest.raises(BundleError, match="not valid") as caught:
        parts.kernel(kernels[0]["id"])
    assert any("threads: expected int" in line for line in caught.value.problems)


def digest_of(text: bytes) -> str:
    return hashlib.sha256(manifest_frame(text)).hexdigest()


def opened(text: bytes, trusted: list[str], pinned: list[str]) -> Bundle:
    return open_manifest(manifest_frame(text), lambda _: MemoryData(b""), "a test", trusted, pinned)


def test_only_what_is_pinned_goes_without_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_parsed_manifests", {})
    kernels = json.loads(SMALL)["kernels"]
    kernels[0]["registers"] = 9999
    text = edited(SMALL, kernels=kernels)
    digest = digest_of(text)
    with pytest.raises(BundleError, match="not valid"):
        opened(text, [digest], [])
    with pytest.raises(UntrustedError):
        opened(text, ["0" * 64], [digest])
    assert opened(text, [digest], [digest]).manifest.kernels[0].registers == 9999


def test_a_bundle_that_the_caller_trusts_is_checked_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = fetch_bundle().manifest_sha256
    monkeypatch.setattr(bundle_module, "_parsed_manifests", {})
    assert fetch_bundle(expected_sha256=digest).manifest._parts is None
    monkeypatch.setattr(bundle_module, "_parsed_manifests", {})
    assert fetch_bundle().manifest._parts is not None
