# SPDX-License-Identifier: Apache-2.0
"""Signatures of manifests: made and verified with real keys, and every way in which one is not good."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from machete_aot.errors import ArgumentError, CorruptError
from machete_aot.trust import KEYS_VARIABLE, MAX_SIGNATURE_BYTES, configured_keys, sign_manifest, signed_by

MANIFEST = b'{"schema": 1}\n'


def private_pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


KEY = ed25519.Ed25519PrivateKey.generate()
SIGNATURE = sign_manifest(MANIFEST, private_pem(KEY))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "public.pem"
    path.write_bytes(public_pem(KEY))
    return path


@pytest.fixture
def other_file(tmp_path: Path) -> Path:
    path = tmp_path / "other.pem"
    path.write_bytes(public_pem(ed25519.Ed25519PrivateKey.generate()))
    return path


def test_a_signature_is_one_line_of_base64_of_what_ed25519_defines() -> None:
    assert SIGNATURE.endswith(b"\n") and SIGNATURE.count(b"\n") == 1
    KEY.public_key().verify(base64.b64decode(SIGNATURE), MANIFEST)


def test_the_key_that_verifies_is_named(key_file: Path, other_file: Path) -> None:
    assert signed_by(MANIFEST, SIGNATURE, [other_file, key_file]) == str(key_file)
    assert signed_by(MANIFEST, SIGNATURE.strip(), [key_file]) == str(key_file)


def test_another_key_or_none_verifies_nothing(other_file: Path) -> None:
    assert signed_by(MANIFEST, SIGNATURE, [other_file]) is None
    assert signed_by(MANIFEST, SIGNATURE, []) is None


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(MANIFEST) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_manifest(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "key.pem"
    path.write_bytes(public_pem(KEY))
    changed = bytearray(MANIFEST)
    changed[at] ^= 1 << bit
    assert signed_by(bytes(changed), SIGNATURE, [path]) is None


def test_any_flipped_bit_of_the_signature(key_file: Path) -> None:
    raw = base64.b64decode(SIGNATURE)
    for i in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[i // 8] ^= 1 << i % 8
        assert signed_by(MANIFEST, base64.b64encode(changed), [key_file]) is None


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"\n",
        SIGNATURE[:-3],
        SIGNATURE + b"x",
        SIGNATURE + b"\n",
        b" " + SIGNATURE,
        base64.b64encode(bytes(63)),
        base64.b64encode(bytes(65)),
        b"<html>log in</html>",
        b"\xff" * 88,
        b"A" * (MAX_SIGNATURE_BYTES + 1),
    ],
)
def test_what_is_no_signature_is_corrupt(key_file: Path, signature: bytes) -> None:
    with pytest.raises(CorruptError, match="signature"):
        signed_by(MANIFEST, signature, [key_file])


def test_key_files_that_are_no_public_ed25519_keys(tmp_path: Path, key_file: Path) -> None:
    contents = {
        "private.pem": private_pem(KEY),
        "curve.pem": public_pem(ec.generate_private_key(ec.SECP256R1())),
        "empty.pem": b"",
        "noise.pem": bytes(range(256)),
        "large.pem": b"x" * 100_000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArgumentError, match=name):
            signed_by(MANIFEST, SIGNATURE, [key_file, tmp_path / name])
    for path in (tmp_path / "none.pem", tmp_path):
        with pytest.raises(ArgumentError, match="cannot be read"):
            signed_by(MANIFEST, SIGNATURE, [path])


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"noise",
        public_pem(KEY),
        private_pem(ec.generate_private_key(ec.SECP256R1())),
        private_pem(KEY, b"passphrase"),
    ],
)
def test_what_cannot_sign(pem: bytes) -> None:
    with pytest.raises(ArgumentError, match="signing key"):
        sign_manifest(MANIFEST, pem)


def test_keys_of_the_argument_and_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert configured_keys() == ()
    monkeypatch.setenv(KEYS_VARIABLE, os.pathsep.join(["/a/one.pem", "", "two.pem"]))
    assert configured_keys() == ("/a/one.pem", "two.pem")
    assert configured_keys([]) == ()
    assert configured_keys([Path("x.pem"), "y.pem"]) == ("x.pem", "y.pem")
    assert configured_keys("x.pem") == ("x.pem",)


def test_openssl_makes_the_same_signature(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, public, message, out = (tmp_path / n for n in ("key.pem", "public.pem", "manifest", "signature"))

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    message.write_bytes(MANIFEST)
    openssl("pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", message, "-out", out)
    assert sign_manifest(MANIFEST, key.read_bytes()) == base64.b64encode(out.read_bytes()) + b"\n"
    assert signed_by(MANIFEST, base64.b64encode(out.read_bytes()), [public]) == str(public)


def test_without_cryptography_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["cryptography"] = None
from machete_aot import errors, trust
for call in (lambda: trust.sign_manifest(b"x", b"y"), lambda: trust.signed_by(b"x", b"A" * 86 + b"==", ["k"])):
    try:
        call()
    except errors.UntrustedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'machete-aot[sign]'") == 2
