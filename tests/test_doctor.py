# SPDX-License-Identifier: Apache-2.0
"""The doctor: that it finds what is wrong with driver, devices and bundle (on the stub driver), and never raises."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from machete_aot import doctor, driver
from machete_aot.bundle import Bundle
from machete_aot.cache import Cache, manifest_name
from machete_aot.errors import MissingError
from machete_aot.fetch import fetch_bundle
from stub.harness import build

# once the stub is loaded, it is what cuda.bindings finds under the name libcuda.so.1
PROGRAM = """
import ctypes, sys
stub = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
for pair in sys.argv[2].split():
    name, value = pair.split("=")
    if name.startswith("cu"):
        stub.stub_fail(name.encode(), int(value))
    else:
        assert stub.stub_set(name.encode(), int(value)) == 0
from machete_aot.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def on_stub(settings: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the doctor in a process of its own, whose driver is the stub with these settings."""
    command = [sys.executable, "-c", PROGRAM, str(build()), settings]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.returncode, json.loads(result.stdout)


def finding(report: dict[str, Any], check: str) -> dict[str, str]:
    (found,) = [f for f in report["findings"] if f["check"] == check]
    return found


def test_a_hopper_with_a_new_driver_is_usable() -> None:
    status, report = on_stub("")
    assert (status, report["ok"], report["gpu"]) == (0, True, True)
    assert finding(report, "driver")["detail"] == "supports CUDA 13.0 (driver 580)"
    assert "9.0, 132 multiprocessors: usable" in finding(report, "device 0")["detail"]


def test_another_gpu_is_a_warning() -> None:
    status, report = on_stub("major=8 minor=6")
    assert (status, report["ok"], report["gpu"]) == (0, True, False)
    found = finding(report, "device 0")
    assert found["status"] == "warn" and "8.6" in found["detail"] and "9.0" in found["action"]


def test_an_old_driver_is_a_failure() -> None:
    wanted = driver.release_text(fetch_bundle().manifest.compat.min_driver)
    status, report = on_stub("driver=11080")
    assert (status, report["ok"], report["gpu"]) == (1, False, False)
    found = finding(report, "driver")
    assert found["status"] == "fail" and "CUDA 11.8 (driver 520)" in found["detail"] and wanted in found["action"]


def test_the_oldest_driver_that_loads_the_kernels_is_usable() -> None:
    oldest = fetch_bundle().manifest.compat.min_driver
    status, report = on_stub(f"driver={oldest}")
    assert (status, report["ok"], report["gpu"]) == (0, True, True)
    assert finding(report, "driver") == {
        "check": "driver",
        "status": "ok",
        "detail": f"supports {driver.release_text(oldest)}",
        "action": "",
    }


def test_every_device_has_its_line() -> None:
    _, report = on_stub("devices=3")
    assert [f["check"] for f in report["findings"] if f["check"].startswith("device")] == [
        f"device {i}" for i in range(3)
    ]


def test_no_device_is_a_warning() -> None:
    status, report = on_stub("devices=0")
    assert (status, report["gpu"]) == (0, False)
    assert finding(report, "devices")["status"] == "warn"


def test_a_driver_that_does_not_start_is_a_warning() -> None:
    status, report = on_stub("cuInit=100")
    assert (status, report["gpu"]) == (0, False)
    found = finding(report, "driver")
    assert found["status"] == "warn" and "cuInit" in found["detail"]


def test_a_device_that_fails_is_a_failure() -> None:
    status, report = on_stub("cuDeviceGetAttribute=999")
    assert (status, report["gpu"]) == (1, False)
    found = finding(report, "device 0")
    assert found["status"] == "fail" and "cuDeviceGetAttribute" in found["detail"]


@pytest.mark.parametrize("error", [MissingError("it is gone"), ValueError("not foreseen")])
def test_a_bundle_that_does_not_open_is_a_finding(error: Exception) -> None:
    def open_bundle() -> Bundle:
        raise error

    report = doctor.diagnose(open_bundle)
    assert report["ok"] is False and report["gpu"] is False
    found = finding(report, "bundle")
    assert found["status"] == "fail" and str(error) in found["detail"] and found["action"]
    assert {f["check"] for f in report["findings"]} >= {"machete-aot", "torch", "driver"}
    assert "Something is broken" in doctor.text(report)


def test_the_report_names_bundle_and_kernel() -> None:
    bundle = fetch_bundle()
    report = doctor.diagnose(fetch_bundle)
    assert bundle.manifest_sha256 in finding(report, "manifest")["detail"]
    assert f"{len(bundle.manifest.kernels)} kernels" in finding(report, "kernels")["detail"]
    detail = finding(report, "sample product")["detail"]
    assert any(f"kernel {k.id}," in detail for k in bundle.manifest.kernels)
    assert all(f["detail"] in doctor.text(report) for f in report["findings"])


def test_the_cache_is_described_and_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACHETE_AOT_CACHE", str(tmp_path))
    assert "empty" in finding(doctor.diagnose(fetch_bundle), "cache")["detail"]
    assert list(tmp_path.iterdir()) == []
    cache = Cache()
    name = manifest_name(sha256(b"{}").hexdigest())
    cache.put(name, b"{}")
    assert "1 files, 2 bytes" in finding(doctor.diagnose(fetch_bundle), "cache")["detail"]
    (cache.folder / name).rename(cache.folder / f"{name}.corrupt")
    found = finding(doctor.diagnose(fetch_bundle), "cache damage")
    assert (found["status"], found["action"]) == ("warn", "machete-aot cache clear") and name in found["detail"]
