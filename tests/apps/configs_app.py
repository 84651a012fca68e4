"""What worker processes do with configurations: load, watch, listen."""

from __future__ import annotations

import os
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

from shmcache.configs import ConfigCache, ConfigSettings, Subscription, Version

_here: dict[str, Any] = {}


def open_cache(name: str, folder: str, settings: ConfigSettings) -> None:
    """Open the cache as a worker does when it starts."""
    _here["folder"] = folder
    _here["configs"] = ConfigCache(name, load, settings=settings)
    _here["told"] = {}
    _here["ended"] = []
    _here["subscriptions"] = {}


def load(key: str) -> dict[str, Any]:
    """Parse a TOML file, slowly, and leave a line that says so."""
    folder = Path(_here["folder"])
    with (folder / "loads").open("a") as loads:
        loads.write(f"{os.getpid()} {key}\n")
    time.sleep(0.05)
    return tomllib.loads((folder / key).read_text())


def get(key: str) -> Any:
    """The configuration."""
    return _here["configs"].get(key)


def put(key: str, first: int, last: int) -> None:
    """Set the configuration to each of some numbers, one after the other."""
    for n in range(first, last + 1):
        _here["configs"].set(key, {"by": os.getpid(), "n": n})


def reload(key: str) -> Any:
    """Load the configuration anew."""
    return _here["configs"].reload(key)


def subscribe(key: str) -> None:
    """Listen; what is told is kept."""
    told = _here["told"].setdefault(key, [])

    def listen(at: Any, old: Version | None, new: Version) -> None:
        assert at == key
        told.append((old, new))

    _here["subscriptions"][key] = _here["configs"].subscribe(
        key, listen, on_end=_here["ended"].append
    )


def told(key: str) -> list[tuple[Version | None, Version]]:
    """What the listener was told so far: old and new versions."""
    return list(_here["told"][key])


def ended() -> list[str]:
    """The keys whose subscriptions have ended."""
    return list(_here["ended"])


def active(key: str) -> bool:
    """Whether a subscription lives."""
    subscription: Subscription = _here["subscriptions"][key]
    return subscription.active


def cancel(key: str) -> bool:
    """Listen no more."""
    return bool(_here["subscriptions"][key].cancel())


class FileWatcher:
    """A watcher made of the watchfiles package."""

    def __init__(self, path: Path, changed: Any) -> None:
        self._path = path
        self._changed = changed
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._ready.wait(30)

    def _watch(self) -> None:
        from watchfiles import watch

        for _ in watch(
            self._path,
            stop_event=self._stop,
            rust_timeout=50,
            yield_on_timeout=True,
            step=20,
            debounce=100,
        ):
            if not self._ready.is_set():
                self._ready.set()
            elif _:
                self._changed()

    def stop(self) -> None:
        """End the thread."""
        _here["stopped"] = _here.get("stopped", 0) + 1
        self._stop.set()
        self._thread.join()


def watch(key: str) -> None:
    """Watch the configuration's file."""
    path = Path(_here["folder"]) / key
    _here["configs"].watch(key, lambda changed: FileWatcher(path, changed))


def stopped() -> int:
    """How many watchers were stopped."""
    return int(_here.get("stopped", 0))


def fork_and_put(key: str) -> int:
    """Have a forked child set the configuration; its exit code."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            put(key, 1, 1)
            own: list[Any] = []
            _here["configs"].subscribe(key, lambda *change: own.append(change))
            put(key, 2, 2)
            deadline = time.monotonic() + 30
            while not own and time.monotonic() < deadline:
                time.sleep(0.01)
            status = 0 if own and _here["configs"].close() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def stats() -> Any:
    """The counts."""
    return _here["configs"].stats()


def close() -> bool:
    """Close the cache."""
    return bool(_here.pop("configs").close())
