# SPDX-License-Identifier: Apache-2.0
"""What works here, what does not, and what to do: findings about torch, the driver, the devices and the bundle.

Nothing here raises for what it finds: a check that fails is a finding.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from . import driver, loader
from .bundle import Bundle
from .cache import Cache
from .config import TypeConfig
from .errors import DeviceError
from .manifest import Compat
from .part import H100
from .selection import select
from .version import __version__

OK, WARN, FAIL = "ok", "warn", "fail"
SAMPLE = (TypeConfig("bf16", "u4b8", "bf16"), 16, 4096, 4096)  # types, M, N, K


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``status`` is "ok", "warn" (something will not run here) or "fail" (broken)."""

    check: str
    status: str
    detail: str
    action: str = ""


def diagnose(open_bundle: Callable[[], Bundle]) -> dict[str, Any]:
    """Looks at everything; never raises. ``open_bundle`` returns the bundle or raises what is wrong with it.

    Returns {"ok": bool, "gpu": whether kernels run here, "findings": [{"check", "status", "detail", "action"}, ...]},
    where ok means that no finding is a failure. Having no GPU is a warning: the reference runs on the CPU.
    """
    findings = [*_guarded("versions", _versions), *_guarded("torch", _torch)]
    bundle = None
    try:
        bundle = open_bundle()
    except Exception as error:
        findings.append(_failure("bundle", error, "install machete-aot again, or name another bundle"))
    else:
        findings += _guarded("bundle", _bundle, bundle)
        findings += _guarded("sample product", _sample, bundle)
    findings += _guarded("cache", _cache)
    findings += _guarded("loader", _loader)
    compat = bundle.manifest.compat if bundle else None
    platform_findings = [*_guarded("driver", _driver, compat), *_guarded("devices", _devices, compat)]
    findings += platform_findings
    good = {f.check.split()[0] for f in platform_findings if f.status == OK}
    return {
        "ok": all(f.status != FAIL for f in findings),
        "gpu": bundle is not None and good >= {"driver", "device"},
        "findings": [asdict(f) for f in findings],
    }


def text(report: dict[str, Any]) -> str:
    """The report of ``diagnose`` for people: one line a finding, and below it what to do."""
    width = max(len(f["check"]) for f in report["findings"])
    lines = []
    for f in report["findings"]:
        lines.append(f"{f['status']:<5} {f['check']:<{width}}  {f['detail']}")
        if f["action"]:
            lines.append(f"{'':<5} {'':<{width}}  -> {f['action']}")
    if not report["ok"]:
        lines.append("Something is broken: see the lines that say fail.")
    elif report["gpu"]:
        lines.append("Kernels run here.")
    else:
        lines.append("No kernel runs here; tensors on the CPU run the reference.")
    return "\n".join(lines)


def _guarded(check: str, find: Callable[..., Iterator[Finding]], *arguments: Any) -> list[Finding]:
    """The findings, up to the first exception, which becomes the last of them."""
    findings: list[Finding] = []
    try:
        for finding in find(*arguments):
            findings.append(finding)
    except Exception as error:
        findings.append(_failure(check, error))
    return findings


def _failure(check: str, error: Exception, action: str = "") -> Finding:
    return Finding(check, FAIL, f"{type(error).__name__}: {error}", action)


def _versions() -> Iterator[Finding]:
    yield Finding("machete-aot", OK, f"{__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in ("cuda-bindings", "zstandard", "requests", "filelock", "platformdirs", "tqdm"):
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, FAIL, "not installed", f"pip install {name}")


def _torch() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        found = f"{torch.__version__}, built without CUDA"
        yield Finding("torch", WARN, found, "on a machine with a GPU, install torch with CUDA")
    else:
        yield Finding("torch", OK, f"{torch.__version__}, built with CUDA {torch.version.cuda}")


def _bundle(bundle: Bundle) -> Iterator[Finding]:
    info = bundle.manifest.bundle
    yield Finding("bundle", OK, f"{info.name} {info.version} {info.arch}, {bundle.size} bytes, from {bundle.origin}")
    yield Finding("manifest", OK, f"sha256 {bundle.manifest_sha256}")
    for line in bundle.trace:
        yield Finding("source", OK if line == bundle.trace[-1] else WARN, line)
    types = ", ".join(t.name for t in bundle.manifest.types)
    counts = f"{len(bundle.manifest.kernels)} kernels and {len(bundle.manifest.schedules)} schedules for {types}"
    problems = bundle.verify()
    if problems:
        for problem in problems:
            yield Finding("kernels", FAIL, str(problem), "install machete-aot again, or build the bundle again")
    else:
        yield Finding("kernels", OK, f"{counts}; every digest is right")


def _driver(compat: Compat | None) -> Iterator[Finding]:
    try:
        version = driver.driver_version()
    except DeviceError as error:
        yield Finding("driver", WARN, str(error))
        return
    found = f"supports {driver.release_text(version)}"
    if compat and version < compat.min_driver:
        wanted = driver.release_text(compat.min_driver)
        action = f"upgrade to a driver for {wanted} or newer"
        yield Finding("driver", FAIL, f"{found}, the kernels need {wanted}", action)
    else:
        yield Finding("driver", OK, found)


def _devices(compat: Compat | None) -> Iterator[Finding]:
    try:
        count = driver.device_count()
    except DeviceError:
        yield Finding("devices", WARN, "none, without a driver")
        return
    if not count:
        yield Finding("devices", WARN, "none", "look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    for index in range(count):
        yield from _guarded(f"device {index}", _device, index, compat)


def _device(index: int, compat: Compat | None) -> Iterator[Finding]:
    device = driver.device(index)
    have = ".".join(map(str, device.capability))
    found = f"{device.name}, compute capability {have}, {device.sms} multiprocessors"
    if compat and device.capability != compat.compute_capability:
        wanted = ".".join(map(str, compat.compute_capability))
        yield Finding(f"device {index}", WARN, f"{found}: not usable", f"the kernels need compute capability {wanted}")
    else:
        yield Finding(f"device {index}", OK, f"{found}: usable" if compat else found)


def _loader() -> Iterator[Finding]:
    """Both ways give the same results; the library takes less of the host's time."""
    yield Finding("loader", OK, loader.status()[1])


def _cache() -> Iterator[Finding]:
    cache = Cache()
    entries = cache.entries()
    if not entries:
        yield Finding("cache", OK, f"{cache.folder}: empty; nothing is written to it while the embedded bundle is used")
        return
    yield Finding("cache", OK, f"{cache.folder}: {len(entries)} files, {sum(e.size for e in entries)} bytes")
    damaged = [e.name for e in entries if e.kind == "corrupt"]
    if damaged:
        yield Finding("cache damage", WARN, f"set aside as damaged: {', '.join(damaged)}", "machete-aot cache clear")


def _sample(bundle: Bundle) -> Iterator[Finding]:
    """What a small product would load, and that it can be read."""
    types, m, n, k = SAMPLE
    schedule = select(bundle.manifest, types.name, m, n, k, H100)
    kernel = bundle.manifest.kernel_for(types, schedule.name)
    cubin = bundle.cubin(kernel.id)
    yield Finding(
        "sample product",
        OK,
        f"{types.name} M={m} N={n} K={k} on {H100.sms} multiprocessors: schedule {schedule.name}, "
        f"kernel {kernel.id}, {len(cubin)} bytes",
    )
