# SPDX-License-Identifier: Apache-2.0
"""The manifest of a bundle: its dataclasses, the parser that trusts nothing, and the canonical writer.

The dataclasses mirror the JSON of docs/architecture.md name by name. ``decode.py`` checks types and keys,
``manifest_rules.py`` the meaning.
"""

# Without ``from __future__ import annotations``: decode.py needs the annotations themselves, and getting them from
# their text takes part of the first product's time.
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .config import ProductTypes, TileConfig, TypeConfig
from .decode import decode, parse_json, prepare
from .errors import BundleError, IncompatibleError, MissingError, SchemaTooNewError
from .manifest_rules import MAX_MANIFEST_BYTES, SCHEMA, TYPES_END, violations


@dataclass(frozen=True)
class BundleInfo:
    """What the bundle is called. ``arch`` is the compilation target, as in "sm90a"."""

    name: str
    version: str
    arch: str


@dataclass(frozen=True)
class AbiInfo:
    """The kernels' parameters: ``parameters`` holds (offset, size) in bytes of each, in order."""

    version: int
    parameters: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayoutInfo:
    """A prepacked layout that some kernel reads."""

    name: str
    version: int


@dataclass(frozen=True)
class Toolchain:
    """What compiled the kernels. Digests are reproducible with exactly these."""

    nvcc: str
    ptxas: str
    cutlass: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """``source_digest``: sha256 over the sources of the kernels, see build_kernels/sources.py."""

    source_digest: str


@dataclass(frozen=True)
class Compat:
    """Where the kernels run. ``min_driver`` is a CUDA driver API version (13000 is 13.0)."""

    compute_capability: tuple[int, int]
    min_driver: int
    elf_abi: int


@dataclass(frozen=True)
class DictionaryInfo:
    """What the kernels of a family share: where its zstd frame lies in the bundle, and what it decompresses to."""

    family: str
    offset: int
    length: int
    sha256: str
    raw_size: int
    raw_sha256: str


@dataclass(frozen=True)
class FrameInfo:
    """A kernel's zstd frame: ``offset`` and ``length`` in bytes in the bundle's file."""

    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class CubinInfo:
    """The cubin that a frame decompresses to."""

    size: int
    sha256: str


@dataclass(frozen=True)
class KernelInfo:
    """One compiled kernel. ``id`` is ``{types.name}__{tile.name}``; ``symbol`` is its entry in the cubin."""

    id: str
    symbol: str
    layout: str
    types: TypeConfig
    tile: TileConfig
    threads: int
    registers: int
    spills: int
    static_shared_memory: int
    frame: FrameInfo
    cubin: CubinInfo


@dataclass(frozen=True)
class HelperInfo:
    """A compiled kernel that computes no product. ``id`` says what it does; ``threads``: the most of a CTA."""

    id: str
    symbol: str
    threads: int
    registers: int
    spills: int
    static_shared_memory: int
    frame: FrameInfo
    cubin: CubinInfo


@dataclass(frozen=True)
class ScheduleInfo:
    """One schedule: a tile's name and a division of K (see ScheduleConfig). ``types``: names of those that have it."""

    name: str
    tile: str
    split: int
    even_ctas: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """By how much measured times deviate from the model: ``deviations[schedule.name]`` has a character a product.

    ``chr(DEVIATION_ZERO + percent)``, where percent is 100 ln(measured / model), or ``NOT_MEASURED``.
    """

    products: tuple[tuple[int, int, int], ...]  # (M, N, K)
    deviations: Mapping[str, str]

    @cached_property
    def logarithms(self) -> tuple[list[float], ...]:
        """Base-2 logarithms of all M, of all N and of all K."""
        return tuple([*map(math.log2, sizes)] for sizes in zip(*self.products, strict=True))


@dataclass(frozen=True)
class HeuristicTable:
    """The cost model's data for one GPU: ``coefficients[types.name][schedule.name][coefficient]``.

    ``clock_mhz`` and ``peak_bytes_per_us``: the GPU's, as in ``Part``; ``bytes_per_us``: what long products reach.
    """

    source: str
    device: str
    sms: int
    clock_mhz: float
    peak_bytes_per_us: float
    bytes_per_us: float
    coefficients: Mapping[str, Mapping[str, Mapping[str, float]]]
    measured: Mapping[str, Measured]  # by types.name


@dataclass(frozen=True)
class Heuristic:
    """Data of the cost model, a table for each GPU that was measured."""

    version: int
    tables: tuple[HeuristicTable, ...]


class Parts(Protocol):
    """What can give parts of a manifest before all of it is decoded, see ``pinned.py``."""

    def field(self, name: str) -> Any: ...
    def kernels(self, types_name: str) -> tuple[KernelInfo, ...]: ...
    def tables(self, types_name: str, device: str | None) -> tuple[HeuristicTable, ...]: ...


@dataclass(frozen=True)
class Manifest:
    """A valid manifest of schema 6. Only ``parse_manifest``, ``parse_pinned`` and the bundle's writer make one.

    ``_parts``: of one that is decoded as far as it is asked, whose fields are set when they are first read.
    """

    schema: int
    bundle: BundleInfo
    abi: AbiInfo
    layouts: tuple[LayoutInfo, ...]
    toolchain: Toolchain
    provenance: Provenance
    compat: Compat
    dictionaries: tuple[DictionaryInfo, ...]
    kernels: tuple[KernelInfo, ...]
    helpers: tuple[HelperInfo, ...]
    schedules: tuple[ScheduleInfo, ...]
    heuristic: Heuristic

    _parts: ClassVar[Parts | None] = None  # of the class; an instance may have its own

    @classmethod
    def of_text(cls, parts: Parts) -> "Manifest":
        """The manifest of these parts."""
        made = object.__new__(cls)
        object.__setattr__(made, "_parts", parts)
        return made

    if not TYPE_CHECKING:  # which knows the fields, and with this would take any other name for one

        def __getattr__(self, name: str) -> Any:
            if self._parts is None or name not in Manifest.__dataclass_fields__:
                raise AttributeError(f"a manifest has no {name}")
            object.__setattr__(self, name, self._parts.field(name))
            return getattr(self, name)

    @cached_property
    def _schedules_by_name(self) -> dict[str, ScheduleInfo]:
        return {s.name: s for s in self.schedules}

    @cached_property
    def _kernels_by_types(self) -> dict[str, tuple[KernelInfo, ...]]:
        return {types.name: tuple(k for k in self.kernels if k.types == types) for types in self.types}

    def _kernels_of(self, types_name: str) -> tuple[KernelInfo, ...]:
        return self._kernels_by_types.get(types_name, ()) if self._parts is None else self._parts.kernels(types_name)

    @property
    def compiled(self) -> tuple[KernelInfo | HelperInfo, ...]:
        """All that has a frame in the bundle, in its order: kernels, then helpers."""
        return (*self.kernels, *self.helpers)

    @cached_property
    def types(self) -> tuple[TypeConfig, ...]:
        """The types that some kernel serves, in the order of the kernels."""
        return tuple(dict.fromkeys(k.types for k in self.kernels))

    def types_named(self, name: str) -> TypeConfig | None:
        """The types of that name, None if no kernel serves them."""
        some = self._kernels_of(name)
        return some[0].types if some else None

    def kernel(self, kernel_id: str) -> KernelInfo:
        """The kernel of that id. Raises MissingError."""
        for kernel in self._kernels_of(types_of(kernel_id)):
            if kernel.id == kernel_id:
                return kernel
        raise MissingError(f"the bundle holds no kernel {kernel_id!r}; `machete-aot list` shows what it holds")

    def named(self, compiled_id: str) -> KernelInfo | HelperInfo:
        """The kernel or the helper of that id. Raises MissingError."""
        if TYPES_END not in compiled_id:
            for helper in self.helpers:
                if helper.id == compiled_id:
                    return helper
        return self.kernel(compiled_id)

    def dictionary_of(self, compiled: KernelInfo | HelperInfo) -> DictionaryInfo | None:
        """The dictionary that this kernel's frame needs; None: a helper's, which needs none."""
        if isinstance(compiled, HelperInfo):
            return None
        return next(d for d in self.dictionaries if d.family == compiled.tile.family)

    def schedule(self, name: str) -> ScheduleInfo:
        """The schedule of that name. Raises MissingError."""
        try:
            return self._schedules_by_name[name]
        except KeyError:
            raise MissingError(
                f"the bundle holds no schedule {name!r}; `machete-aot list` shows what it holds"
            ) from None

    def kernels_for(self, types: TypeConfig) -> tuple[KernelInfo, ...]:
        """Every kernel of these types, in manifest order; empty if there is none."""
        return self._kernels_of(types.name)

    def types_for(self, product: ProductTypes) -> TypeConfig | None:
        """The types of the best kernels that it has for such a product; None if there are none."""
        return next((types for types in product.kernel_types() if self.types_named(types.name) == types), None)

    def schedules_for(self, types: TypeConfig) -> tuple[ScheduleInfo, ...]:
        """Every schedule of these types, in manifest order; empty if there is none."""
        return tuple(s for s in self.schedules if types.name in s.types)

    def schedules_of(self, kernel: KernelInfo) -> tuple[ScheduleInfo, ...]:
        """Every schedule that this kernel runs, in manifest order."""
        return tuple(s for s in self.schedules_for(kernel.types) if s.tile == kernel.tile.name)

    def kernel_for(self, types: TypeConfig, schedule: str) -> KernelInfo:
        """The kernel that this schedule runs for these types. Raises MissingError."""
        return self.kernel(kernel_id(types, self.schedule(schedule).tile))

    def tables_for(self, types_name: str, device: str | None = None) -> tuple[HeuristicTable, ...]:
        """The cost model's tables, of GPUs of this name (None: all). They may lack what concerns other types alone."""
        if self._parts is not None:
            return self._parts.tables(types_name, device)
        return tuple(table for table in self.heuristic.tables if device in (None, table.device))


prepare(Manifest)  # at import, because it takes part of the first product's time otherwise


def kernel_id(types: TypeConfig, tile_name: str) -> str:
    """The id of the kernel of these types and this tile."""
    return id_start(types.name) + tile_name


def id_start(types_name: str) -> str:
    """How the ids of all kernels of these types begin."""
    return f"{types_name}{TYPES_END}"


def types_of(kernel_id: str) -> str:
    """The name of the types in a kernel's id."""
    return kernel_id.partition(TYPES_END)[0]


def dump_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes: ASCII JSON, sorted keys, a line for each value and no blanks, one newline at the end."""
    text = json.dumps(dataclasses.asdict(manifest), sort_keys=True, indent=0, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in ``data``, checked in full.

    Raises SchemaTooNewError if its schema is newer than this runtime's, IncompatibleError if it is older, else
    BundleError with every problem found.
    """
    problems: list[str] = []
    document = parse_json(data, MAX_MANIFEST_BYTES, problems)
    if isinstance(document, dict):
        schema = document.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise SchemaTooNewError(schema, SCHEMA)
        if type(schema) is int and 0 < schema < SCHEMA:
            raise IncompatibleError(
                f"the manifest is of schema {schema}, from an older version of machete-aot, and this one reads schema "
                f"{SCHEMA}; fetch or build the bundle of this version, or install the older one",
                [f"schema: {schema} is not {SCHEMA}"],
            )
    manifest = decode(Manifest, document, "manifest", problems) if not problems else None
    if isinstance(manifest, Manifest):
        problems.extend(violations(manifest))
        if not problems:
            return manifest
    raise BundleError("the manifest is not valid; fetch or build the bundle again", problems)
