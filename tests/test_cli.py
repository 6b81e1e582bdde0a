# SPDX-License-Identifier: Apache-2.0
"""The command line: exit statuses and messages on bundles that are really damaged, and JSON that parses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from machete_aot import cli, errors
from machete_aot.archive import last_entry, write_archive
from machete_aot.bundle import DICTIONARY_NAME, MANIFEST_NAME, Bundle, frame_name
from machete_aot.fetch import fetch_bundle, use_bundle
from machete_aot.manifest import dump_manifest
from machete_aot.version import __version__


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return fetch_bundle()


@pytest.fixture(autouse=True)
def default_bundle_again() -> Iterator[None]:
    yield
    use_bundle(None)


@pytest.fixture
def copy(embedded: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copy(embedded.origin, tmp_path / "copy.zip"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, bundle: Bundle, manifest: bytes) -> str:
    """Writes an intact bundle with another manifest; returns the manifest's digest."""
    data, spans = path.read_bytes(), bundle.manifest
    parts = [(DICTIONARY_NAME, spans.dictionary), *((frame_name(k.id), k.frame) for k in spans.kernels)]
    files = [(name, data[s.offset : s.offset + s.length]) for name, s in parts]
    path.write_bytes(write_archive([*files, (MANIFEST_NAME, manifest)]))
    return hashlib.sha256(manifest).hexdigest()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_intact_copy_verifies(capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle) -> None:
    status, out, err = run(capsys, "verify", "--bundle", copy)
    assert (status, err) == (0, "")
    assert embedded.manifest_sha256 in out and f"{len(embedded.manifest.kernels)} kernels" in out


def test_the_embedded_bundle_verifies_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify")[0] == 0


def in_frame(b: Bundle) -> int:
    return b.manifest.kernels[-1].frame.offset + 5


def in_dictionary(b: Bundle) -> int:
    return b.manifest.dictionary.offset


def in_first_header(b: Bundle) -> int:
    return 10


def in_manifest(b: Bundle) -> int:
    return last_entry(Path(b.origin).read_bytes(), MANIFEST_NAME).offset + 100


def in_directory(b: Bundle) -> int:
    return b.size - 30


@pytest.mark.parametrize("where", [in_frame, in_dictionary, in_first_header, in_manifest, in_directory])
def test_one_flipped_bit_is_corrupt(
    capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle, where: Callable[[Bundle], int]
) -> None:
    flip(copy, where(embedded))
    status, out, err = run(capsys, "verify", "--bundle", copy)
    assert (status, out) == (4, "")
    assert "corrupt" in err and "Traceback" not in err
    status, out, _ = run(capsys, "verify", "--json", "--bundle", copy)
    report = json.loads(out)
    assert status == 4 and report["ok"] is False and report["problems"][0]["type"] == "CorruptError"


def test_two_corrupt_kernels_are_both_named(capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle) -> None:
    first, last = embedded.manifest.kernels[0], embedded.manifest.kernels[-1]
    flip(copy, first.frame.offset)
    flip(copy, last.frame.offset)
    _, _, err = run(capsys, "verify", "--bundle", copy)
    assert first.id in err and last.id in err


@pytest.mark.parametrize("keep", [0, 10, 5000, -1, -100])
def test_truncated(capsys: pytest.CaptureFixture[str], copy: Path, keep: int) -> None:
    copy.write_bytes(copy.read_bytes()[:keep])
    for command in ("verify", "list"):
        status, out, err = run(capsys, command, "--bundle", copy)
        assert (status, out) == (4, "")
        assert "truncated" in err and "Traceback" not in err


def test_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["verify"], ["list"], ["explain", 1, 128, 128]):
        status, out, err = run(capsys, *command, "--bundle", tmp_path / "none.zip")
        assert (status, out) == (3, "") and "none.zip" in err


def test_a_folder_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "list", "--bundle", tmp_path)
    assert status == 5 and str(tmp_path) in err


def test_another_manifest_is_not_trusted_unless_named(
    capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle
) -> None:
    changed = dataclasses.replace(
        embedded.manifest, bundle=dataclasses.replace(embedded.manifest.bundle, version="9.9")
    )
    digest = rewrite(copy, embedded, dump_manifest(changed))
    status, _, err = run(capsys, "verify", "--bundle", copy)
    assert status == 7 and digest in err and embedded.manifest_sha256 in err
    # The manifest is the last entry, so no frame has moved: the copy is intact once its digest is named.
    assert run(capsys, "verify", "--bundle", copy, "--sha256", digest)[0] == 0


def newer_schema(document: dict[str, Any]) -> None:
    document["schema"] = 2


def other_architecture(document: dict[str, Any]) -> None:
    document["bundle"]["arch"] = "sm100a"


def other_abi(document: dict[str, Any]) -> None:
    document["abi"]["version"] += 1


@pytest.mark.parametrize("change", [newer_schema, other_architecture, other_abi])
def test_a_trusted_bundle_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle, change: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(dump_manifest(embedded.manifest))
    change(document)
    raw = (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()
    digest = rewrite(copy, embedded, raw)
    status, _, err = run(capsys, "verify", "--bundle", copy, "--sha256", digest)
    assert status == 6 and err.startswith("machete-aot: ")


def test_list_shows_every_kernel_and_schedule(capsys: pytest.CaptureFixture[str], embedded: Bundle) -> None:
    _, out, _ = run(capsys, "list")
    _, as_json, _ = run(capsys, "list", "--json")
    document = json.loads(as_json)
    assert document["bundle"]["manifest_sha256"] == embedded.manifest_sha256
    assert [k["id"] for k in document["kernels"]] == [k.id for k in embedded.manifest.kernels]
    assert [s["name"] for s in document["schedules"]] == [s.name for s in embedded.manifest.schedules]
    assert all(k.id in out for k in embedded.manifest.kernels)
    assert all(s.name in out for s in embedded.manifest.schedules)


def test_explain_names_the_schedule_that_is_selected(capsys: pytest.CaptureFixture[str], embedded: Bundle) -> None:
    from machete_aot.selection import select

    for m, sms in ((1, 132), (16, 78), (4096, 132)):
        chosen = select(embedded.manifest, "fp16_u4b8", m, 6144, 4096, sms).name
        arguments = ("explain", m, 6144, 4096, "--a", "fp16", "--sms", sms)
        status, out, _ = run(capsys, *arguments)
        assert status == 0 and chosen in out
        status, out, _ = run(capsys, *arguments, "--json")
        assert status == 0 and chosen in json.dumps(json.loads(out))


def test_explain_of_what_the_bundle_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", 1, 128, 128, "--b", "u8")
    assert (status, out) == (1, "")
    assert err.startswith("machete-aot: ") and "no kernels for bf16_u8, it has bf16_u4b8" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["explain", "1", "2"], ["explain", "0", "128", "128"], ["explain", "x", "1", "1"],
     ["explain", "1", "1", "1", "--b", "int3"], ["list", "--no-such-option"]],
)  # fmt: skip
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: machete-aot" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out == f"machete-aot {__version__}\n"


def test_every_error_has_the_documented_status() -> None:
    statuses = {
        errors.MissingError("x"): 3, errors.CorruptError("x", "y", "z"): 4, errors.TruncatedError("x", 1, 2): 4,
        errors.UnreachableError("x"): 5, errors.IncompatibleError("x"): 6, errors.SchemaTooNewError(2, 1): 6,
        errors.UntrustedError("x"): 7, errors.BundleError("x"): 1,
        errors.DeviceError("x"): 1, errors.MacheteError("x"): 1, errors.ArgumentError("x"): 2,
    }  # fmt: skip
    assert {e: cli.exit_code(e) for e in statuses} == statuses


def test_qualify_without_a_gpu_is_one_clear_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, out, err = run(capsys, "qualify", "--out", tmp_path / "records")
    assert (status, out) == (1, "") and "GPU" in err
    assert not (tmp_path / "records").exists()


def test_a_closed_pipe_makes_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "machete_aot.cli", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert err == b""


def test_doctor(capsys: pytest.CaptureFixture[str], copy: Path, embedded: Bundle) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert report["ok"] is (status == 0)
    flip(copy, in_frame(embedded))
    status, out, _ = run(capsys, "doctor", "--bundle", copy)
    assert status == 1 and "fail  kernels" in out and embedded.manifest.kernels[-1].id in out
