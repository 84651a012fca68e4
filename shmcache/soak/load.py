"""The operations of a worker: on a cache, a handle map, or both.

Keys follow Zipf's law, or a trace.  Which keys are popular changes slowly, and so do
the sizes of the values: after an hour a cache holds quite different entries than at the
beginning.  Each value contains its key, so a value that comes back under another key,
or torn, is recognised.  A handle is a descriptor and some memory, so lost handles show
in the figures of the process.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import random
import threading
from array import array
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shmcache import Cache
from shmcache.handles import HandleMap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcache import Cause

# Environment variables: a Load as JSON, and the descriptor of a pipe to which workers
# write a line for each fault.
SETTINGS = "SHMCACHE_SOAK"
FAULTS = "SHMCACHE_SOAK_FAULTS"

BATCH = 20  # operations of a batch
KEYS = 20_000  # keys that are in use at one time
MAX_ENTRIES, MAX_BYTES, TTL = 2000, 2 << 20, 20.0
MAX_HANDLES, HANDLE_TTL = 120, 15.0
HANDLE_BYTES = 4000
LOCK_TIMEOUT = 60.0  # s; the machine may be very busy
LONGEST = 1_000_000  # accesses that are taken from a trace
LEAK_BYTES = 200_000  # that a leaking worker takes in each batch
FEW = 400  # descriptors or threads that a leaking worker takes at most


@dataclass(frozen=True)
class Load:
    """What a worker must know."""

    name: str  # the caches are called NAME-cache and NAME-handles
    profile: str
    seed: int
    rate: float  # operations of one worker per second
    trace: str | None = None  # the path of a trace
    leak: str | None = None  # what to leak on purpose, for the self-test

    def to_json(self) -> str:
        """This load as a text for the environment of the workers."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Load:
        """The load that the environment of this worker describes."""
        return cls(**json.loads(os.environ[SETTINGS]))


def uses(profile: str) -> tuple[bool, bool]:
    """Whether a profile has a cache, and whether it has a handle map."""
    return profile != "handles", profile != "cache"


def open_cache(name: str) -> Cache:
    """The cache of the run with this name."""
    return Cache(
        f"{name}-cache",
        max_entries=MAX_ENTRIES,
        max_bytes=MAX_BYTES,
        ttl=TTL,
        jitter=0.2,
        cleanup_interval=1.0,
        lock_timeout=LOCK_TIMEOUT,
    )


def open_handles(name: str) -> HandleMap:
    """The handle map of the run with this name."""
    return HandleMap(
        f"{name}-handles",
        max_entries=MAX_HANDLES,
        ttl=HANDLE_TTL,
        cleanup_interval=1.0,
        lock_timeout=LOCK_TIMEOUT,
        on_evict=_close,
    )


class Resource:
    """A handle: a descriptor, and some memory."""

    __slots__ = ("data", "fd")

    def __init__(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDONLY)
        self.data = bytes(HANDLE_BYTES)

    def close(self) -> None:
        """Close the descriptor; a second call is an error."""
        fd, self.fd = self.fd, -1
        os.close(fd)


def _close(_key: Any, resource: Resource, _cause: Cause) -> None:
    resource.close()


def fault(what: str) -> None:
    """Report to the run, in one line, that something is wrong."""
    line = f"worker {os.getpid()}: {what}".replace("\n", " ")[:400]
    os.write(int(os.environ[FAULTS]), f"{line}\n".encode())


def accesses(path: str) -> Iterator[int]:
    """The accesses of a trace, as numbers in their order.

    Args:
        path: A file of 32-bit big-endian numbers (.xz), or of one number on each line
            (.gz or plain).
    """
    if path.endswith(".xz"):
        with lzma.open(path) as file:
            while piece := file.read(4 * 8192):
                numbers = array("I", piece[: len(piece) // 4 * 4])
                numbers.byteswap()  # they are big-endian
                yield from numbers
        return
    opened = (gzip.open if path.endswith(".gz") else open)(
        path, "rt", encoding="ascii", errors="replace"
    )
    with opened as lines:
        for line in lines:
            if line.strip().isdecimal():  # other lines are marks, not accesses
                yield int(line)


class Traffic:
    """The operations of one worker, from a seed or a trace."""

    def __init__(self, load: Load, serial: int) -> None:
        self._rng = random.Random(f"{load.seed}/{serial}")  # noqa: S311 - repeatable
        self._load = load
        self._batches = 0
        self._fresh = itertools.count()
        self._serial = serial
        with_cache, with_handles = uses(load.profile)
        self._cache = open_cache(load.name) if with_cache else None
        self._handles = open_handles(load.name) if with_handles else None
        self._numbers = self._traced(load.trace) if load.trace else self._zipf()
        self._kept: list[Any] = []
        churn = load.profile == "churn"
        self._on_cache = self._churn_cache if churn else self._use_cache
        self._on_handles = self._churn_handles if churn else self._use_handles

    def _zipf(self) -> Iterator[int]:
        # The n-th most popular key is used in proportion to 1/n.  After each 100
        # operations all ranks move by one key, so that another key is the most popular.
        for step in itertools.count():
            yield int(KEYS ** self._rng.random()) + step // 100

    def _traced(self, path: str) -> Iterator[int]:
        # The trace is read at the beginning, because the memory of a decoder that works
        # all the time would grow for minutes.
        numbers = array("Q", itertools.islice(accesses(path), LONGEST))
        if not numbers:
            raise ValueError(f"{path} has no accesses")
        at = self._rng.randrange(len(numbers))
        while True:
            yield numbers[at]
            at = (at + 1) % len(numbers)

    def batch(self) -> None:
        """Do some operations.  A fault is reported, and the worker goes on."""
        self._batches += 1
        try:
            for _ in range(BATCH):
                number = next(self._numbers)
                if self._cache is not None:
                    self._on_cache(self._cache, number)
                if self._handles is not None and (self._cache is None or number % 2):
                    self._on_handles(self._handles, number)
            if self._load.leak:
                self._leak(self._load.leak)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
            fault(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Close the handles of this worker, and leave the cache and the map."""
        if self._handles is not None and not self._handles.close(timeout=60.0):
            fault("callbacks were still running after a minute")
        if self._cache is not None:
            self._cache.close()

    # --- a cache --------------------------------------------------------------------

    def _size(self) -> int:
        # The usual size grows to 2.7 times and falls again in the course of minutes.
        drift = abs(self._batches % 20_000 - 10_000) / 10_000
        return int(self._rng.lognormvariate(5.0 + drift, 1.0)) % 16_000

    def _value(self, key: str) -> Any:
        data = (f"{key}|".encode() * (self._size() // len(key) + 1))[: self._size()]
        return {"key": key, "data": data} if self._rng.random() < 0.3 else data

    def _verify(self, key: str, value: Any) -> None:
        data = value["data"] if isinstance(value, dict) else value
        whole = f"{key}|".encode() * (len(data) // len(key) + 1)
        sound = whole.startswith(data)
        if isinstance(value, dict):
            sound = sound and value["key"] == key
        if not sound:
            fault(f"key {key} has another one's value, or a torn one: {data[:40]!r}")

    def _use_cache(self, cache: Cache, number: int) -> None:
        key = f"key-{number}"
        what = self._rng.random()
        if what < 0.70:
            value = cache.get(key)
            if value is None:
                cache.set(key, self._value(key))
            else:
                self._verify(key, value)
        elif what < 0.85:
            cache.set(key, self._value(key), ttl=self._rng.choice((1, 5, 60, None)))
        elif what < 0.90:
            cache.delete(key)
        elif what < 0.95:
            cache.incr(f"count-{number % 50}", initial=0)
        else:
            keys = [f"key-{number + i}" for i in range(5)]
            for found, value in cache.get_many(keys).items():
                self._verify(str(found), value)

    def _churn_cache(self, cache: Cache, number: int) -> None:
        # Hardly any key is used twice.  Sizes are up to a hundredth of the cache.
        key = f"{number % 7}-{self._serial}-{next(self._fresh)}"
        size = int(20_000 ** self._rng.random())
        data = (f"{key}|".encode() * (size // len(key) + 1))[:size]
        cache.set(key, data, ttl=self._rng.choice((0.05, 0.5, 3, 3, 30)))
        found = cache.get(key)
        if found is not None:
            self._verify(key, found)
        what = self._rng.random()
        if what < 0.1:
            cache.pop(key, None)
        elif what < 0.1001:
            cache.clear()

    # --- handles --------------------------------------------------------------------

    def _use_handles(self, handles: HandleMap, number: int) -> None:
        key = f"resource-{number % 300}"
        what = self._rng.random()
        if what < 0.75:
            handles.get_or_create(key, Resource)
        elif what < 0.85:
            with handles.lease(key, Resource) as resource:
                if os.fstat(resource.fd) is None or len(resource.data) != HANDLE_BYTES:
                    fault(f"handle {key} is not what it was")
        elif what < 0.90:
            self._replace(handles, key)
        elif what < 0.95:
            handles.discard(key)
        else:
            resource = handles.pop(key, None)
            if resource is not None:
                resource.close()

    def _churn_handles(self, handles: HandleMap, number: int) -> None:
        ttl = self._rng.choice((0.05, 0.5, 5))
        self._replace(handles, f"{number % 7}-{next(self._fresh)}", ttl)
        if self._rng.random() < 0.0001:
            handles.clear()

    def _replace(self, handles: HandleMap, key: str, ttl: Any = ...) -> None:
        resource = Resource()
        try:
            handles.set(key, resource, ttl=ttl)
        except BaseException:
            resource.close()
            raise

    # --- what the self-test must find -----------------------------------------------

    def _leak(self, what: str) -> None:
        if what == "memory":
            self._kept.append(b"x" * LEAK_BYTES)
        elif len(self._kept) < FEW:
            leaks: dict[str, Callable[[], Any]] = {
                "descriptors": lambda: os.open("/dev/null", os.O_RDONLY),
                "threads": _idle_thread,
            }
            self._kept.append(leaks[what]())


def _idle_thread() -> threading.Thread:
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    return thread
