# SPDX-License-Identifier: Apache-2.0
"""Ed25519 signatures of manifests, for bundles that the package does not pin.

A signature file holds one line: the base64 of the 64 bytes that sign a manifest as it is stored. Keys are PEM files.
The package ``cryptography`` is needed only here, and comes with the extra "sign".
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, CorruptError, UntrustedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEYS_VARIABLE = "MACHETE_AOT_KEYS"
SIGNATURE_SUFFIX = ".sig"
MAX_SIGNATURE_BYTES = 200  # of the file
MAX_KEY_BYTES = 10_000
_SIGNATURE_BYTES = 64


def configured_keys(keys: Iterable[str | os.PathLike[str]] | None = None) -> tuple[str, ...]:
    """The files of the public keys that the user trusts: ``keys``, or if that is None those in MACHETE_AOT_KEYS."""
    if keys is None:
        return tuple(filter(None, os.environ.get(KEYS_VARIABLE, "").split(os.pathsep)))
    if isinstance(keys, (str, os.PathLike)):
        return (os.fspath(keys),)
    return tuple(os.fspath(k) for k in keys)


def sign_manifest(manifest: bytes, private_key_pem: bytes) -> bytes:
    """The signature file for these bytes of a manifest.

    Raises ArgumentError if the key is not an Ed25519 private key in PEM without a passphrase, UntrustedError if the
    package ``cryptography`` is not installed.
    """
    signature: bytes = _private_key(private_key_pem).sign(manifest)
    return base64.b64encode(signature) + b"\n"


def signed_by(manifest: bytes, signature: bytes, keys: Sequence[str | os.PathLike[str]]) -> str | None:
    """The first of these public key files with which ``signature``, a file's content, signs the manifest; else None.

    Raises CorruptError if that is not a signature file, ArgumentError if a key file cannot be read or is not an Ed25519
    public key in PEM, UntrustedError if the package ``cryptography`` is not installed. No keys: None.
    """
    raw = _decode(signature)
    loaded = [(os.fspath(k), _public_key(Path(k))) for k in keys]
    return next((name for name, key in loaded if _verifies(key, raw, manifest)), None)


def _decode(signature: bytes) -> bytes:
    try:
        raw = base64.b64decode(signature.removesuffix(b"\n").removesuffix(b"\r"), validate=True)
    except binascii.Error:
        raw = b""
    if len(signature) > MAX_SIGNATURE_BYTES or len(raw) != _SIGNATURE_BYTES:
        want = f"one line with the base64 of {_SIGNATURE_BYTES} bytes"
        raise CorruptError("the signature of the manifest", f"{len(signature)} bytes that are something else", want)
    return raw


def _verifies(key: Ed25519PublicKey, signature: bytes, manifest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, manifest)
    except InvalidSignature:
        return False
    return True


def _private_key(pem: bytes) -> Ed25519PrivateKey:
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except Exception as error:  # of many kinds: not PEM, unknown algorithm, needs a passphrase
        raise ArgumentError(f"the signing key is not a PEM private key without a passphrase: {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ArgumentError(f"the signing key is a {type(key).__name__}, wanted one for Ed25519")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    serialization, ed25519 = _cryptography()
    try:
        with path.open("rb") as f:
            pem = f.read(MAX_KEY_BYTES)
    except OSError as error:
        raise ArgumentError(f"the key {path} cannot be read: {error.strerror or error}") from None
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception as error:  # of many kinds: not PEM, a private key, unknown algorithm
        raise ArgumentError(f"{path} is not a public key in PEM: {error}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ArgumentError(f"the key {path} is a {type(key).__name__}, wanted one for Ed25519")
    return key


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UntrustedError(
            "signatures need the package cryptography, which is not installed; "
            "run `pip install 'machete-aot[sign]'`, or give expected_sha256= instead"
        ) from None
    return serialization, ed25519
