# SPDX-License-Identifier: Apache-2.0
"""The command line: exit statuses and messages on bundles that are really damaged, and JSON that parses."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from machete_aot import cli, download, errors
from machete_aot.archive import last_entry, write_archive
from machete_aot.bundle import MANIFEST_NAME, Bundle, dictionary_name, frame_name
from machete_aot.bundle_data import FileData
from machete_aot.fetch import fetch_bundle, use_bundle
from machete_aot.frames import manifest_frame
from machete_aot.manifest import dump_manifest
from machete_aot.part import H100
from machete_aot.version import __version__


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return fetch_bundle()


@pytest.fixture(autouse=True)
def default_bundle_again() -> Iterator[None]:
    yield
    use_bundle(None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that is this test's own."""
    for name in ("SOURCE", "PATH", "OFFLINE", "KEYS"):
        monkeypatch.delenv(f"MACHETE_AOT_{name}", raising=False)
    monkeypatch.setenv("MACHETE_AOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_DELAY", 0.005)
    return tmp_path / "cache" / "v1"


@pytest.fixture
def copy(embedded: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copy(embedded.origin, tmp_path / "copy.zip"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, bundle: Bundle, manifest: bytes) -> str:
    """Writes an intact bundle with another manifest, given its JSON; returns the stored manifest's digest."""
    manifest = manifest_frame(manifest)
    data, spans = path.read_bytes(), bundle.manifest
    parts = {dictionary_name(d.family): (d.offset, d.length) for d in spans.dictionaries}
    parts |= {frame_name(k.id): (k.frame.offset, k.frame.length) for k in spans.compiled}
    files = [(name, data[offset : offset + length]) for name, (offset, length) in parts.items()]
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
    return b.manifest.dictionaries[0].offset


def in_first_header(b: Bundle) -> int:
    return 10


def in_manifest(b: Bundle) -> int:
    return last_entry(FileData(Path(b.origin)), MANIFEST_NAME).offset + 100


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


def test_a_path_that_cannot_be_read(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    status, _, err = run(capsys, "list", "--bundle", copy / "x")
    assert status == 5 and str(copy) in err


def test_a_folder_without_bundles_is_missing_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "list", "--bundle", tmp_path)
    assert status == 3 and str(tmp_path) in err


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
    document["schema"] += 1


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
    assert [tuple(s["types"]) for s in document["schedules"]] == [s.types for s in embedded.manifest.schedules]
    assert [(h["id"], h["threads"], h["registers"], h["cubin_bytes"]) for h in document["helpers"]] == [
        (h.id, h.threads, h.registers, h.cubin.size) for h in embedded.manifest.helpers
    ]
    first, fact = embedded.manifest.kernels[0], document["kernels"][0]
    used = [first.tile.shared_memory(s.split, first.types) for s in embedded.manifest.schedules_of(first)]
    assert fact["shared_memory"] == max(used)
    assert all(k.id in out for k in embedded.manifest.compiled)
    assert all(s.name in out for s in embedded.manifest.schedules)


def test_explain_names_the_schedule_that_is_selected(capsys: pytest.CaptureFixture[str], embedded: Bundle) -> None:
    from machete_aot.selection import select

    for m, sms in ((1, 132), (16, 78), (4096, 132)):
        chosen = select(embedded.manifest, "fp16_u4b8", m, 6144, 4096, dataclasses.replace(H100, sms=sms)).name
        arguments = ("explain", m, 6144, 4096, "--a", "fp16", "--sms", sms)
        status, out, _ = run(capsys, *arguments)
        assert status == 0 and chosen in out
        status, out, _ = run(capsys, *arguments, "--json")
        assert status == 0 and chosen in json.dumps(json.loads(out))


def test_explain_of_what_the_bundle_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "explain", 1, 128, 128, "--b", "u4b8", "--zeros", "float")
    assert (status, out) == (1, "")
    assert err.startswith("machete-aot: ") and "no kernels for bf16 x u4b8 with floating zeros; it has bf16_u4" in err
    status, out, err = run(capsys, "explain", 1, 128, 128, "--group", 48)
    assert (status, out) == (2, "") and "multiple of 32" in err


def test_explain_of_other_types(capsys: pytest.CaptureFixture[str], embedded: Bundle) -> None:
    for types, arguments in (
        ("bf16_u4b8", ()),
        ("bf16_u4_float_fine", ("--group", 32)),
        ("bf16_u4_float", ("--b", "u4", "--group", 64)),
        ("fp16_u8_any", ("--a", "fp16", "--b", "u8", "--zeros", "int")),
        ("bf16_u8_float", ("--b", "u8b128", "--batch-invariant")),
    ):
        status, out, _ = run(capsys, "explain", 16, 4096, 4096, *arguments, "--json")
        assert status == 0 and json.loads(out)["types"] == types


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


# ---------------------------------------------------------------- mirrors


class Handler(SimpleHTTPRequestHandler):
    delay = 0.0

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while chunk := source.read(1 << 16):
            time.sleep(self.delay)
            outputfile.write(chunk)


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "mirror"
    assert run(capsys, "export", "--to", folder)[0] == 0
    return folder


@pytest.fixture
def url(mirror: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(mirror))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def zip_of(mirror: Path) -> Path:
    return mirror / f"machete-aot-sm90a-{__version__}.zip"


def key_pair(folder: Path) -> tuple[Path, Path]:
    key, private, public = Ed25519PrivateKey.generate(), folder / "private.pem", folder / "public.pem"
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, pkcs8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def another_version(mirror: Path, bundle: Bundle) -> str:
    """Makes the mirror's bundle one of version 9.9, which nothing pins; returns its manifest's digest."""
    info = dataclasses.replace(bundle.manifest.bundle, version="9.9")
    raw = dump_manifest(dataclasses.replace(bundle.manifest, bundle=info))
    digest = rewrite(zip_of(mirror), bundle, raw)
    zip_of(mirror).rename(mirror / "machete-aot-sm90a-9.9.zip")
    for path in (mirror / "index.json", mirror / f"machete-aot-sm90a-{__version__}.json.zst"):
        path.unlink()
    (mirror / "machete-aot-sm90a-9.9.json.zst").write_bytes(manifest_frame(raw))
    return digest


def test_export_writes_a_mirror(capsys: pytest.CaptureFixture[str], tmp_path: Path, embedded: Bundle) -> None:
    status, out, _ = run(capsys, "export", "--to", tmp_path / "a" / "b", "--json")
    stem = f"machete-aot-sm90a-{__version__}"
    names = [f"{stem}.zip", f"{stem}.json.zst", "index.json"]
    assert status == 0
    assert json.loads(out)["files"] == [str(tmp_path / "a" / "b" / n) for n in names]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(names)
    assert (tmp_path / "a" / "b" / names[0]).read_bytes() == Path(embedded.origin).read_bytes()
    index = json.loads((tmp_path / "a" / "b" / "index.json").read_text())
    entry = {"arch": "sm90a", "version": __version__, "file": names[0], "size": embedded.size}
    entry |= {"manifest": names[1], "manifest_sha256": embedded.manifest_sha256}
    assert index == {"schema": 1, "bundles": [entry]}


def test_two_versions_share_a_mirror(
    capsys: pytest.CaptureFixture[str], mirror: Path, tmp_path: Path, embedded: Bundle
) -> None:
    other = tmp_path / "other"
    shutil.copytree(mirror, other)
    digest = another_version(other, embedded)
    source = ("--source", other, "--sha256", digest)
    assert run(capsys, "export", "--to", mirror, "--version", "9.9", *source)[0] == 0
    assert run(capsys, "export", "--to", mirror)[0] == 0
    index = json.loads((mirror / "index.json").read_text())
    assert [e["version"] for e in index["bundles"]] == [__version__, "9.9"]
    assert run(capsys, "fetch", "--source", mirror)[0] == 0
    _, out, _ = run(capsys, "fetch", "--source", mirror, "--version", "9.9", "--sha256", digest, "--json")
    assert json.loads(out)["bundle"]["version"] == "9.9"


def test_export_refuses_a_damaged_index_and_a_file_as_folder(
    capsys: pytest.CaptureFixture[str], mirror: Path, tmp_path: Path
) -> None:
    (mirror / "index.json").write_text("{")
    status, _, err = run(capsys, "export", "--to", mirror)
    assert status == 1 and "remove it" in err
    (tmp_path / "file").write_text("")
    assert run(capsys, "export", "--to", tmp_path / "file")[0] == 5


def test_fetch_from_a_mirror_and_again_without_it(
    capsys: pytest.CaptureFixture[str], url: str, own_cache: Path, embedded: Bundle
) -> None:
    status, out, err = run(capsys, "fetch", "--source", url, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["bundle"]["manifest_sha256"] == embedded.manifest_sha256
    assert url in report["bundle"]["trace"][-1]
    status, out, _ = run(capsys, "fetch", "--source", "http://127.0.0.1:1", "--offline")
    assert status == 0 and embedded.manifest_sha256 in out
    _, out, _ = run(capsys, "cache", "list", "--json")
    assert f"bundle-{embedded.manifest_sha256}.zip" in [f["name"] for f in json.loads(out)["files"]]


def test_fetch_names_every_source_that_failed(
    capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path, mirror: Path
) -> None:
    dead = "http://user:secret@127.0.0.1:1/x?token=hidden"
    status, out, _ = run(capsys, "fetch", "--source", dead, "--source", tmp_path / "none", "--source", url)
    assert status == 0 and "http://127.0.0.1:1/x" in out and str(tmp_path / "none") in out
    status, out, err = run(
        capsys, "fetch", "--source", dead, "--source", f"{url}/none", "--cache-dir", mirror, "--json"
    )
    error = json.loads(out)["error"]
    assert status == 5 and error["type"] == "UnreachableError"
    assert any("127.0.0.1:1" in p for p in error["problems"]) and any(f"{url}/none" in p for p in error["problems"])
    assert "secret" not in out + err and "hidden" not in out + err


def test_fetch_of_a_part(capsys: pytest.CaptureFixture[str], url: str, own_cache: Path) -> None:
    # this server does not do ranges, so the whole file comes
    assert run(capsys, "fetch", "--source", url, "--only", "bf16_u4b8", "--only", "16x4096x4096")[0] == 0
    status, _, err = run(capsys, "fetch", "--source", url, "--only", "nonsense")
    assert status == 2 and "nonsense" in err


def test_statuses_of_fetch(
    capsys: pytest.CaptureFixture[str], url: str, mirror: Path, embedded: Bundle, own_cache: Path
) -> None:
    def fetch(*arguments: object) -> int:
        status, out, err = run(capsys, "fetch", "--cache-dir", own_cache / str(time.monotonic_ns()), *arguments)
        assert "Traceback" not in err and (err == "") == (status == 0) and (out == "") == (status != 0)
        return status

    assert fetch("--source", url) == 0
    assert fetch("--source", "ftp://host/x") == 2
    assert fetch("--source", url, "--sha256", "abc") == 2
    assert fetch("--source", f"{url}/none") == 3
    assert fetch("--source", url, "--version", "7.7") == 3
    assert fetch("--source", url, "--offline") == 3
    assert fetch("--source", "http://127.0.0.1:1") == 5
    trusted = ("--sha256", embedded.manifest_sha256)
    assert fetch("--source", f"{url}/{zip_of(mirror).name}", "--arch", "sm100a", *trusted) == 6
    flip(zip_of(mirror), in_frame(embedded))
    assert fetch("--source", url) == 4
    digest = another_version(mirror, embedded)
    assert fetch("--source", url, "--version", "9.9") == 7
    assert fetch("--source", url, "--version", "9.9", "--sha256", digest) == 4


def test_import_serves_a_machine_without_a_network(
    capsys: pytest.CaptureFixture[str], mirror: Path, own_cache: Path, embedded: Bundle
) -> None:
    for file in (mirror, zip_of(mirror)):
        status, out, _ = run(capsys, "import", file, "--json")
        assert status == 0 and all(Path(f).is_file() and Path(f).parent == own_cache for f in json.loads(out)["files"])
    shutil.rmtree(mirror)
    status, out, _ = run(capsys, "fetch", "--offline", "--source", "https://mirror.invalid")
    assert status == 0 and embedded.manifest_sha256 in out


def test_import_of_what_is_wrong(
    capsys: pytest.CaptureFixture[str], mirror: Path, own_cache: Path, tmp_path: Path, embedded: Bundle
) -> None:
    assert run(capsys, "import", "https://mirror.invalid/x.zip")[0] == 2
    assert run(capsys, "import", tmp_path / "none.zip")[0] == 3
    flip(zip_of(mirror), in_frame(embedded))
    assert run(capsys, "import", mirror)[0] == 4
    another_version(mirror, embedded)
    assert run(capsys, "import", mirror, "--version", "9.9")[0] == 7
    assert not own_cache.exists() or not list(own_cache.glob("bundle-*"))


def test_a_signed_bundle(
    capsys: pytest.CaptureFixture[str], url: str, mirror: Path, tmp_path: Path, embedded: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    private, public = key_pair(tmp_path)
    (tmp_path / "other").mkdir()
    _, wrong = key_pair(tmp_path / "other")
    digest = another_version(mirror, embedded)
    manifest = mirror / "machete-aot-sm90a-9.9.json.zst"
    status, out, _ = run(capsys, "sign", manifest, "--key", private, "--json")
    assert status == 0 and json.loads(out) == {"ok": True, "file": f"{manifest}.sig", "manifest_sha256": digest}
    keys = ("--key", wrong, "--key", public)
    version = ("--version", "9.9")  # without an index, only a version that is named is looked for
    for number, source in enumerate((url, mirror)):
        bundle = ("--source", source, "--cache-dir", tmp_path / f"cache{number}")
        assert run(capsys, "fetch", *bundle, *keys)[0] == 3
        assert run(capsys, "fetch", *bundle, *version)[0] == 7
        assert run(capsys, "fetch", *bundle, *version, "--key", wrong)[0] == 7
        assert run(capsys, "fetch", *bundle, *version, *keys)[0] == 0
    for number, source in enumerate((f"{url}/machete-aot-sm90a-9.9.zip", mirror / "machete-aot-sm90a-9.9.zip")):
        bundle = ("--source", source, "--cache-dir", tmp_path / f"other{number}")
        assert run(capsys, "verify", *bundle)[0] == 7
        assert run(capsys, "verify", *bundle, "--key", wrong)[0] == 7
        assert run(capsys, "verify", *bundle, *keys)[0] == 0
    monkeypatch.setenv("MACHETE_AOT_KEYS", str(public))
    assert run(capsys, "import", mirror, "--version", "9.9")[0] == 0
    assert run(capsys, "fetch", "--source", "http://127.0.0.1:1", "--offline", "--version", "9.9")[0] == 0
    status, _, err = run(capsys, "verify", "--source", f"{url}/machete-aot-sm90a-9.9.zip", "--key", private)
    assert status == 2 and "private.pem" in err
    assert run(capsys, "export", "--to", tmp_path / "again", "--source", mirror, "--version", "9.9")[0] == 0
    assert (tmp_path / "again" / f"{manifest.name}.sig").read_bytes() == Path(f"{manifest}.sig").read_bytes()


def test_sign_refuses(capsys: pytest.CaptureFixture[str], mirror: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    manifest = mirror / f"machete-aot-sm90a-{__version__}.json.zst"
    assert run(capsys, "sign", tmp_path / "none", "--key", private)[0] == 3
    assert run(capsys, "sign", manifest, "--key", tmp_path / "none")[0] == 3
    assert run(capsys, "sign", manifest, "--key", public)[0] == 2
    assert run(capsys, "sign", zip_of(mirror), "--key", private)[0] == 1
    assert run(capsys, "sign", mirror, "--key", private)[0] == 5
    assert not list(mirror.glob("*.sig"))


def test_verify_all_and_repair(capsys: pytest.CaptureFixture[str], url: str, own_cache: Path, embedded: Bundle) -> None:
    assert run(capsys, "fetch", "--source", url)[0] == 0
    assert run(capsys, "verify", "--all")[0] == 0
    cached = own_cache / f"bundle-{embedded.manifest_sha256}.zip"
    good = cached.read_bytes()
    flip(cached, in_frame(embedded))
    status, out, err = run(capsys, "verify", "--all", "--json")
    report = json.loads(out)
    assert status == 4 and report["cache"]["set_aside"] == [cached.name] and report["ok"] is False
    assert not cached.exists() and Path(f"{cached}.corrupt").exists() and cached.name in err
    cached.write_bytes(good[:1000])
    status, out, err = run(capsys, "verify", "--repair", "--json", "--source", url)
    report = json.loads(out)
    assert status == 0 and report["ok"] is True and report["cache"]["set_aside"] == [cached.name]
    assert cached.read_bytes() == good and "set aside" in err


def test_a_repair_without_a_source_that_answers_fails(
    capsys: pytest.CaptureFixture[str], url: str, own_cache: Path, embedded: Bundle
) -> None:
    assert run(capsys, "fetch", "--source", url)[0] == 0
    flip(own_cache / f"bundle-{embedded.manifest_sha256}.zip", in_frame(embedded))
    assert run(capsys, "verify", "--repair", "--source", "http://127.0.0.1:1")[0] == 5


def test_cache_removes_only_its_own_files(capsys: pytest.CaptureFixture[str], url: str, own_cache: Path) -> None:
    assert run(capsys, "cache", "list")[:2] == (0, f"{own_cache}: 0 files\n")
    assert run(capsys, "cache", "clear")[0] == 0
    assert run(capsys, "fetch", "--source", url)[0] == 0
    foreign = [own_cache / "notes.txt", own_cache.parent / "other", own_cache / "bundle-short.zip"]
    for path in foreign:
        path.write_text("mine")
    assert run(capsys, "cache", "prune", "--keep", 1)[0] == 0
    assert list(own_cache.glob("bundle-????????*.zip"))
    status, out, _ = run(capsys, "cache", "clear", "--json")
    assert status == 0 and len(json.loads(out)["removed"]) >= 2
    assert all(path.read_text() == "mine" for path in foreign)
    assert {p.name for p in own_cache.iterdir()} == {"notes.txt", "bundle-short.zip"}
    with pytest.raises(SystemExit) as exit_:
        cli.main(["cache", "prune", "--keep", "-1"])
    assert exit_.value.code == 2


def test_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], url: str, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "/dev/null/cache"
    status, out, err = run(capsys, "import", mirror, "--cache-dir", nowhere)
    assert (status, out) == (5, "") and nowhere in err
    assert run(capsys, "fetch", "--source", url, "--cache-dir", nowhere)[0] == 5
    monkeypatch.setenv("MACHETE_AOT_CACHE", nowhere)  # the default: only used where it can be
    assert run(capsys, "fetch", "--source", url)[0] == 0
    assert run(capsys, "cache", "list")[0] == 0


def test_doctor_and_explain_tell_the_trace(
    capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACHETE_AOT_SOURCE", f"{tmp_path / 'none.zip'},{url}")
    for arguments in (["doctor"], ["explain", 16, 4096, 4096]):
        _, out, _ = run(capsys, *arguments)
        assert str(tmp_path / "none.zip") in out and f"{url}: in use" in out
    _, out, _ = run(capsys, "explain", 16, 4096, 4096, "--json")
    assert len(json.loads(out)["bundle"]["trace"]) == 2


def test_every_command_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli._parser()
    (commands,) = [a.choices for a in parser._actions if a.choices and "fetch" in a.choices]
    assert isinstance(commands, dict) and len(commands) == 12
    for name, sub in commands.items():
        assert "--json" in sub.format_help(), name
    for arguments in (["list"], ["export", "--to", "/dev/null/x"], ["explain", 1, 64, 64]):
        status, out, err = run(capsys, *arguments, "--json", "--source", "/dev/null/none")
        document = json.loads(out)
        assert document["ok"] is False and status != 0 and document["error"]["message"] in err


def on_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """What a command writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
    command = [sys.executable, "-m", "machete_aot.cli", *arguments]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return text.decode()


def test_a_progress_bar_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "delay", 0.02)
    environment = dict(os.environ)
    assert "fetching" in on_terminal(["fetch", "--source", url], environment)
    assert run(capsys, "cache", "clear")[0] == 0
    assert run(capsys, "fetch", "--source", url)[2] == ""
