# SPDX-License-Identifier: Apache-2.0
"""What a caller wants of the sources of bundles, whom the caller trusts, and how sources are tried in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .bundle import Bundle, frame_digests
from .cache import Cache
from .errors import (
    BundleError,
    CorruptError,
    IncompatibleError,
    MissingError,
    SchemaTooNewError,
    TruncatedError,
    UnreachableError,
    UntrustedError,
)
from .manifest import Manifest
from .stored import Span
from .subset import Only, kernel_ids
from .trust import signed_by

Progress = Callable[[int, "int | None"], None]

# Of several failures the one that says most is raised: what is there but wrong, before what cannot be reached, before
# what is not there.
_TELLING = (
    *(UntrustedError, CorruptError, TruncatedError, IncompatibleError, SchemaTooNewError, BundleError),
    *(UnreachableError, MissingError),
)


@dataclass(frozen=True)
class Trust:
    """Which manifests are trusted: those with these sha256 digests, and those signed by one of these public keys.

    ``pinned``: those of ``digests`` that are this package's own.
    """

    digests: tuple[str, ...]
    keys: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()

    def digests_with(
        self, manifest: bytes, signature: Callable[[], bytes | None]
    ) -> tuple[tuple[str, ...], bytes | None]:
        """The trusted digests, with the manifest's own if a key signs it, and in that case the signature.

        ``signature`` reads the signature file; it is called only if there are keys and no digest fits.
        """
        if not self.keys:
            return self.digests, None
        digest = hashlib.sha256(manifest).hexdigest()
        if digest in self.digests:
            return self.digests, None
        text = signature()
        if text is None or signed_by(manifest, text, self.keys) is None:
            return self.digests, None
        return (*self.digests, digest), text


@dataclass
class Request:
    """A wanted bundle: of ``arch`` and of ``version`` (None: any), at least with the kernels of ``only`` (None: all).

    ``versions`` are guesses for a source without an index, best first. ``notes`` collects what happened on the way.
    """

    arch: str
    version: str | None
    versions: tuple[str, ...]
    trust: Trust
    cache: Cache
    only: Only | None = None
    offline: bool = False
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)

    def suits(self, manifest: Manifest) -> bool:
        """Whether this is a manifest of the wanted architecture and version."""
        info = manifest.bundle
        return self.arch == info.arch and self.version in (None, info.version)

    def checked(self, bundle: Bundle) -> Bundle:
        """The bundle, if it is of the wanted architecture and version. Raises IncompatibleError."""
        info = bundle.manifest.bundle
        if not self.suits(bundle.manifest):
            raise IncompatibleError(
                f"{bundle.origin} is for {info.arch} {info.version}, wanted {self.wanted}; name another source"
            )
        return bundle

    def spans(self, manifest: Manifest) -> list[Span]:
        """Offset and length of what is wanted of the bundle's file: the frames of kernels and their dictionaries.

        The helpers, which are small, belong to any choice of kernels.
        """
        if self.only is None:
            return list(frame_digests(manifest))
        return list(frame_digests(manifest, [*kernel_ids(manifest, self.only), *(h.id for h in manifest.helpers)]))

    @property
    def wanted(self) -> str:
        """The architecture and version in words."""
        return self.arch if self.version is None else f"{self.arch} {self.version}"


def first_line(error: BundleError) -> str:
    """An error for a list of them: its type and its message without the problems."""
    return f"{type(error).__name__}: {error.message}"


def first_good(openers: Iterable[Callable[[], Bundle]], nothing: str) -> Bundle:
    """What the first of ``openers`` returns that does not fail; if all do, the most telling failure lists the others.

    ``nothing``: message of the MissingError if each of them found nothing.
    """
    errors: list[BundleError] = []
    for opener in openers:
        try:
            return opener()
        except BundleError as error:
            errors.append(error)
    if all(isinstance(error, MissingError) for error in errors):
        raise MissingError(nothing, list(map(first_line, errors)))
    chosen = most_telling(errors)
    chosen.add_problems(first_line(error) for error in errors if error is not chosen)
    raise chosen


def most_telling(errors: Sequence[BundleError]) -> BundleError:
    """The error to raise where several sources failed, one after the other."""

    def rank(error: BundleError) -> int:
        kinds = [i for i, kind in enumerate(_TELLING) if isinstance(error, kind) and kind is not BundleError]
        return kinds[0] if kinds else _TELLING.index(BundleError)

    return min(errors, key=rank)
