"""Measure what crash safety costs on the hot path, in instructions.

The script builds the tree twice: as it is, and with ``-DSHMCACHE_UNPROTECTED`` (values
have no checksum, and the holder is written without compare-and-swap).  It runs each
operation under ``valgrind --tool=callgrind`` with two numbers of repetitions, and
prints the difference for one operation.  These counts repeat within a percent on any
machine, however busy it is.

    python tools/protection_cost.py        # needs valgrind and a C compiler
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 1_000, 51_000
OPERATIONS = ("get", "set", "get raw", "set raw", "miss", "incr", "delete")
TARGET = 5.0  # percent

SCRIPT = """
import os, sys
from shmcache import Cache, compiled
assert compiled
what, repetitions = sys.argv[1], int(sys.argv[2])
record = {"id": 12345678, "name": "user-123", "email": "user12345@example.com",
          "active": True, "score": 3.14159, "tags": [1, 2]}
raw = bytes(range(100))
keys = [f"user:{i:015d}" for i in range(8000)]
with Cache(f"cost-{os.getpid()}", max_entries=10_000) as cache:
    for key in keys:
        cache.set(key, 1 if what == "incr" else raw if "raw" in what else record)
    if what == "miss":
        keys = [key + "x" for key in keys]
    call = getattr(cache, {"miss": "get"}.get(what, what.split()[0]))
    arguments = () if "set" not in what else (raw,) if "raw" in what else (record,)
    def run(keys):
        for key in keys:
            call(key, *arguments)
    for start in range(0, repetitions, 1000):
        run(keys[start % 8000:][:1000])
"""


def build(into: Path, flags: str) -> None:
    """Install the tree into a folder, compiled with extra flags for the C compiler."""
    environment = {**os.environ, "CFLAGS": flags}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-cache-dir", "--target", str(into), str(ROOT)],
        env=environment,
        check=True,
    )


def instructions(package: Path, operation: str, repetitions: int) -> int:
    """Return how many instructions a whole run takes."""
    path = os.pathsep.join([str(package), *filter(None, sys.path[1:])])
    done = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
            *(sys.executable, "-P", "-c", SCRIPT, operation, str(repetitions)),
        ],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None or done.returncode:
        raise RuntimeError(done.stderr)
    return int(found[1])


def main() -> int:
    """Print the table; return 1 if an operation costs more than the target."""
    with tempfile.TemporaryDirectory() as scratch:
        protected, bare = Path(scratch, "protected"), Path(scratch, "bare")
        build(protected, "")
        build(bare, "-DSHMCACHE_UNPROTECTED")
        print("| operation | instructions | without protection | cost |")
        print("| --------- | -----------: | -----------------: | ---: |")
        worst = 0.0
        for operation in OPERATIONS:
            counts = [
                (
                    instructions(package, operation, MANY)
                    - instructions(package, operation, FEW)
                )
                / (MANY - FEW)
                for package in (protected, bare)
            ]
            cost = 100 * (counts[0] / counts[1] - 1)
            worst = max(worst, cost)
            print(
                f"| {operation} | {counts[0]:.0f} | {counts[1]:.0f} | {cost:+.1f} % |"
            )
    return worst > TARGET


if __name__ == "__main__":
    sys.exit(main())
