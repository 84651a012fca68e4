"""``ConfigCache`` with a TOML file, and a watcher that uses the watchfiles package.

python examples/configs_toml.py app.toml      (then edit the file; Ctrl-C ends it)
"""

from __future__ import annotations

import os
import sys
import threading
import tomllib
from typing import TYPE_CHECKING, Any

from watchfiles import watch

from shmcache.configs import ConfigCache, ConfigSettings, Version

if TYPE_CHECKING:
    from collections.abc import Callable


def load(path: str) -> dict[str, Any]:
    """Return the content of a TOML file."""
    with open(path, "rb") as file:
        return tomllib.load(file)


class FileWatcher:
    """Calls ``changed()`` whenever a file has changed, until it is stopped."""

    def __init__(self, path: str, changed: Callable[[], None]) -> None:
        self._path = path
        self._changed = changed
        self._seen = stamp(path)  # no later change is missed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # After each second without a change the stamp is compared, too, because
        # watchfiles loses a change that happens just when it reports that there is
        # none.
        options: dict[str, Any] = {"rust_timeout": 1000, "yield_on_timeout": True}
        for changes in watch(self._path, stop_event=self._stop, **options):
            seen, self._seen = self._seen, stamp(self._path)
            if changes or self._seen != seen:
                self._changed()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def stamp(path: str) -> tuple[int, int, int] | None:
    """Return a value that differs between two states of a file; None without a file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def show(path: str, old: Version | None, new: Version) -> None:
    """Print how a configuration has changed."""
    print(path, old.value if old else None, "->", new.value, flush=True)


def main(path: str) -> None:
    """Load a file, watch it, and print each change."""
    with ConfigCache(
        "example-configs", load, settings=ConfigSettings.conservative()
    ) as configs:
        configs.watch(path, lambda changed: FileWatcher(path, changed))
        configs.subscribe(path, show)
        configs.get(path)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(configs.stats().loads, "loads")


if __name__ == "__main__":
    main(sys.argv[1])
