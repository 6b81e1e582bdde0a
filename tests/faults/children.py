# SPDX-License-Identifier: Apache-2.0
"""A program that imports the package once and then forks processes that fetch: many at once, or one that is killed.

    python children.py '{"task": "many", "source": ..., "cache": ..., "sha256": ..., "count": 32}'

Prints its findings as JSON. A fork of this single-threaded process is a process of its own in all that matters here:
it shares no file, no lock and no connection with the others.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machete_aot.errors import MacheteError
from machete_aot.fetch import fetch_bundle
from places import DIGEST, bad_files, final_files, is_right

Job = dict[str, Any]


def fetch(job: Job) -> dict[str, Any]:
    """Fetches as the job says and looks at every kernel; says how it went."""
    try:
        bundle = fetch_bundle(
            source=job["source"], cache_dir=job["cache"], expected_sha256=job["sha256"], only=job.get("only")
        )
        right = is_right(bundle) if job["sha256"] == DIGEST else bundle.verify() == []
        return {"right": right, "error": None, "trace": list(bundle.trace)}
    except MacheteError as error:
        return {"right": False, "error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        return {"right": False, "error": f"foreign {type(error).__name__}", "message": str(error)}


def forked(work: Callable[[], Any], start: int | None = None) -> tuple[int, int]:
    """Runs ``work`` in a new process once something can be read from ``start``. Returns its id and where it writes."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    os.close(out)
    if start is not None:
        os.read(start, 1)
    with os.fdopen(into, "w") as stream:
        json.dump(work(), stream)
    os._exit(0)


def result(pid: int, out: int) -> Any:
    with os.fdopen(out) as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"right": False, "error": f"ended with status {status}", "message": ""}


def many(job: Job) -> dict[str, Any]:
    """``count`` processes that start to fetch at the same moment."""
    start, go = os.pipe()
    children = []
    for _ in range(job["count"]):
        children.append(forked(lambda: fetch(job), start))
    time.sleep(0.1)  # until all of them wait
    os.write(go, b"g" * job["count"])
    return {"results": [result(*child) for child in children]}


def unfinished(cache: Path) -> list[str]:
    """Names in the cache that are neither final nor locks."""
    final = {p.name for p in final_files(cache)}
    names = [name for _, _, files in os.walk(cache) for name in files]
    return [n for n in names if n not in final and not n.endswith(".lock")]


def killed(job: Job) -> dict[str, Any]:
    """``count`` processes, each killed at a random moment of its fetch; after each the cache must hold nothing bad."""
    rng, cache = random.Random(job["seed"]), Path(job["cache"])
    began = time.monotonic()
    first = result(*forked(lambda: fetch(job)))
    usual = time.monotonic() - began
    found: dict[str, Any] = {"bad": [], "finished": 0, "died": 0, "next_runs": [first], "cold": 0, "leftovers": 0}
    for index in range(job["count"]):
        aimed = index % 2 == 1  # at the moment when files are written, which is short
        if aimed or rng.random() < 0.5:
            shutil.rmtree(cache, ignore_errors=True)
            found["cold"] += 1
        before = set(unfinished(cache))
        pid, out = forked(lambda: fetch(job))
        if aimed:
            patience = time.monotonic() + 2 * usual
            while not unfinished(cache) and time.monotonic() < patience:
                time.sleep(0.0002)
            time.sleep(rng.random() * 0.01)
        else:
            time.sleep(rng.random() * 1.1 * usual)
        os.kill(pid, signal.SIGKILL)
        with os.fdopen(out) as stream:
            finished = bool(stream.read())
        os.waitpid(pid, 0)
        found["finished" if finished else "died"] += 1
        found["bad"] += bad_files(cache)
        found["leftovers"] += bool(set(unfinished(cache)) - before)
        if index % 10 == 9:
            found["next_runs"].append(result(*forked(lambda: fetch(job))))
    found["next_runs"].append(result(*forked(lambda: fetch(job))))
    return found


def fork_after_use(job: Job) -> dict[str, Any]:
    """A bundle fetched in part, then used by forks and by their parent at once: each fetches what is missing."""
    bundle = fetch_bundle(
        source=job["source"], cache_dir=job["cache"], expected_sha256=job["sha256"], only=job.get("only")
    )

    def use() -> dict[str, Any]:
        try:
            return {"right": is_right(bundle), "error": None}
        except BaseException as error:
            return {"right": False, "error": f"{type(error).__name__}: {error}"}

    children = [forked(use) for _ in range(job["count"])]
    return {"results": [use(), *(result(*child) for child in children)]}


def versions(job: Job) -> dict[str, Any]:
    """Processes of two versions that share a cache, in turns."""
    start, go = os.pipe()
    jobs = [{**job, "sha256": job["digests"][i % 2]} for i in range(job["count"])]
    children = [forked(lambda own=own: fetch(own), start) for own in jobs]  # type: ignore[misc]
    os.write(go, b"g" * job["count"])
    return {"results": [result(*child) for child in children]}


def bounded(job: Job) -> dict[str, Any]:
    """One fetch, and by how many bytes the process grew at its largest."""

    def work() -> dict[str, Any]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = fetch(job)
        return {**found, "grew": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10}

    return result(*forked(work))


def one(job: Job) -> dict[str, Any]:
    return result(*forked(lambda: fetch(job)))


def twice(job: Job) -> list[dict[str, Any]]:
    """A fetch, a command, and another fetch; after each, what the cache's folder holds."""

    def look() -> dict[str, Any]:
        found, cache = one(job), Path(job["cache"])
        return {**found, "bad": bad_files(cache), "other": unfinished(cache)}

    first = look()
    subprocess.run(job["between"], check=True)
    return [first, look()]


TASKS = {f.__name__: f for f in (many, killed, fork_after_use, versions, bounded, one, twice)}

if __name__ == "__main__":
    for name in ("requests", "filelock", "platformdirs"):  # the package imports them late; here, once for all forks
        importlib.import_module(name)
    request = json.loads(sys.argv[1])
    print(json.dumps(TASKS[request["task"]](request)))
