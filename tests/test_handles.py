"""HandleMap: a host-wide bound, and one callback for each handle, in its owner.

A ``Ledger`` is the outside world: what was opened, and what was closed, how often, with
which cause and in which process.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from peers import PATIENCE, Peer, names_of

import shmcache
from shmcache import Cause, HandleMap
from shmcache._format import layout as L
from shmcache._process.exit import leave_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from conftest import Clock


class Ledger:
    """What was closed in this process: handle, key, cause and PID, in order."""

    def __init__(self) -> None:
        self.closed: list[tuple[Any, Any, Cause, int]] = []
        self.changed = threading.Condition()

    def __call__(self, key: Any, handle: Any, cause: Cause) -> None:
        """To be given as ``on_evict``."""
        with self.changed:
            self.closed.append((handle, key, cause, os.getpid()))
            self.changed.notify_all()

    def wait_for(self, number: int) -> None:
        """Wait until so many handles have been closed."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.closed) >= number, PATIENCE
            ), self.closed

    def causes(self) -> dict[Any, str]:
        """The cause by handle; each was closed once."""
        assert len({handle for handle, *_ in self.closed}) == len(self.closed)
        return {handle: cause.name for handle, _, cause, _ in self.closed}


@pytest.fixture
def ledger() -> Ledger:
    """Nothing closed yet."""
    return Ledger()


@pytest.fixture
def make_map(
    new_name: Callable[[], str], ledger: Ledger
) -> Iterator[Callable[..., HandleMap]]:
    """Makes maps, by default of a new name and this ledger, and closes them."""
    made: list[HandleMap] = []

    def make(name: str | None = None, **settings: Any) -> HandleMap:
        settings = {"max_entries": 100, "on_evict": ledger, **settings}
        made.append(HandleMap(name or new_name(), **settings))
        return made[-1]

    yield make
    for handle_map in made:
        if not handle_map.closed:
            assert handle_map.check() == []
        handle_map.close()


# --- one process ----------------------------------------------------------------


def test_reading_and_writing(make_map: Callable[..., HandleMap]) -> None:
    """A handle is found under its key, in this process, as the very object."""
    handles = make_map()
    one, two = object(), object()
    handles["one"] = one
    handles.set(("two", 2), two)
    assert handles["one"] is one
    assert handles.get(("two", 2)) is two
    assert handles.get("none", 5) == 5
    with pytest.raises(KeyError):
        handles["none"]
    assert "one" in handles
    assert 1 not in handles
    assert len(handles) == 2
    assert sorted(map(str, handles)) == ["('two', 2)", "one"]
    assert dict(handles.items()) == {"one": one, ("two", 2): two}
    assert bool(make_map())


def test_keys_are_told_apart(make_map: Callable[..., HandleMap]) -> None:
    """1, "1", b"1" and (1,) are four keys, as in a Cache."""
    handles = make_map()
    for key in (1, "1", b"1", (1,)):
        handles[key] = [key]
    assert [handles[key] for key in (1, "1", b"1", (1,))] == [
        [1],
        ["1"],
        [b"1"],
        [(1,)],
    ]
    with pytest.raises(shmcache.UnsupportedKey):
        handles.get(True)


def test_causes(
    make_map: Callable[..., HandleMap], ledger: Ledger, clock: Clock
) -> None:
    """Each way to go has its cause, and the handle is closed for it once."""
    handles = make_map(max_entries=4, ttl=10, clock=clock, cleanup_interval=300)
    handles["k"] = "replaced"
    handles["k"] = "deleted"
    del handles["k"]
    handles["old"] = "expired"
    clock.advance(11)
    assert "old" not in handles
    assert handles.sweep() <= 1
    for n in range(5):
        handles[n] = f"capacity {n}"
    handles.clear()
    handles["last"] = "closed"
    assert handles.close()
    assert ledger.causes() == {
        "replaced": "REPLACED",
        "deleted": "DELETED",
        "expired": "EXPIRED",
        "capacity 0": "CAPACITY",
        **{f"capacity {n}": "CLEARED" for n in range(1, 5)},
        "closed": "CLOSED",
    }
    assert {pid for *_, pid in ledger.closed} == {os.getpid()}


def test_least_recently_used_goes_first(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """get, lease and set are uses; ``in``, iteration and host() are not."""
    handles = make_map(max_entries=4)
    for key in "abcd":
        handles[key] = key
    handles.get("a")
    with handles.lease("b"):
        pass
    assert "c" in handles
    assert list(handles)
    assert len(handles.host()) == 4
    handles["e"] = "e"
    handles["f"] = "f"
    ledger.wait_for(2)
    assert ledger.causes() == {"c": "CAPACITY", "d": "CAPACITY"}


def test_use_renews_time(
    make_map: Callable[..., HandleMap], ledger: Ledger, clock: Clock
) -> None:
    """A use renews the time of a sliding map's handle, and not of another map's."""
    sliding = make_map(ttl=10, clock=clock)
    fixed = make_map(ttl=10, clock=clock, sliding=False)
    sliding["k"], fixed["k"] = "sliding", "fixed"
    clock.advance(6)
    assert (sliding["k"], fixed["k"]) == ("sliding", "fixed")
    clock.advance(6)
    assert sliding["k"] == "sliding"
    assert fixed.get("k") is None
    fixed.sweep()
    ledger.wait_for(1)
    assert ledger.causes() == {"fixed": "EXPIRED"}


def test_own_ttl_and_callback(
    make_map: Callable[..., HandleMap], ledger: Ledger, clock: Clock
) -> None:
    """A handle may have a time and a callback of its own."""
    mine = Ledger()
    handles = make_map(ttl=10, clock=clock)
    handles.set("short", "short", ttl=1, on_evict=mine)
    handles.set("never", "never", ttl=None)
    clock.advance(1000)
    handles.sweep()
    mine.wait_for(1)
    assert mine.causes() == {"short": "EXPIRED"}
    assert handles["never"] == "never"
    assert ledger.closed == []


def test_set_of_the_same_handle(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A handle that replaces itself stays open, and is closed once at last."""
    handles = make_map()
    handles.set("k", "h", value=1)
    with handles.lease("k"):
        handles.set("k", "h", value=2)
        del handles["k"]
        assert handles.stats().closing == 1
        assert ledger.closed == []
    ledger.wait_for(1)
    assert ledger.causes() == {"h": "DELETED"}
    stats = handles.stats().host
    assert stats.handles_opened == stats.handles_closed == 1


def test_pop_gives_the_handle_back(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A handle that was popped belongs to the caller, who closes it."""
    handles = make_map()
    handles["k"] = "h"
    assert handles.pop("k") == "h"
    assert handles.pop("k", "none") == "none"
    with pytest.raises(KeyError):
        handles.pop("k")
    handles.close()
    assert ledger.closed == []


def test_leased_handles_stay_open(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A handle evicted, replaced or closed under its leases is closed with the last
    one."""
    handles = make_map()
    leases = [handles.lease("k", lambda: "h") for _ in range(2)]
    assert [lease.__enter__() for lease in leases] == ["h", "h"]
    handles["k"] = "next"
    assert handles["k"] == "next"
    assert (handles.stats().leased, handles.stats().closing) == (1, 1)
    leases[0].__exit__(None, None, None)
    assert ledger.closed == []
    leases[1].__exit__(None, None, None)
    ledger.wait_for(1)
    assert ledger.causes() == {"h": "REPLACED"}

    with handles.lease("k"):
        handles.close()
        assert len(ledger.closed) == 1
    ledger.wait_for(2)
    assert ledger.causes()["next"] == "CLOSED"


def test_lease_of_nothing(make_map: Callable[..., HandleMap]) -> None:
    """Without a factory a lease needs a handle."""
    with pytest.raises(KeyError), make_map().lease("none"):
        pytest.fail("there is nothing to lease")


def test_bad_arguments(
    make_map: Callable[..., HandleMap], ledger: Ledger, new_name: Callable[[], str]
) -> None:
    """Arguments that make no sense are refused with a remedy, and nothing is lost."""
    handles = make_map()
    handles["k"] = "h"
    wrong: Any = "not callable"

    def fail() -> None:
        raise ZeroDivisionError

    for refused, call in (
        (TypeError, lambda: handles.set("k", None)),
        (TypeError, lambda: handles.set("k", "x", on_evict=wrong)),
        (TypeError, lambda: handles.get_or_create("n", wrong)),
        (TypeError, lambda: HandleMap(new_name(), max_entries=1, on_evict=wrong)),
        (TypeError, lambda: HandleMap(new_name(), max_entries=wrong)),
        (ValueError, lambda: HandleMap(new_name(), max_entries=0)),
        (ValueError, lambda: HandleMap(new_name(), max_entries=1, callback_threads=0)),
        (ValueError, lambda: handles.set("k", "x", ttl=0)),
        (ValueError, lambda: handles.get_or_create("n", lambda: None)),
        (ZeroDivisionError, lambda: handles.get_or_create("n", fail)),
        (shmcache.UnsupportedKey, lambda: handles.set([], "x")),
        (shmcache.UnsupportedKey, lambda: handles.get({})),
        (shmcache.UnsupportedKey, lambda: handles.lease(1.5).__enter__()),
        (shmcache.UnsupportedValue, lambda: handles.set("k", "x", value=object())),
        (shmcache.EntryTooLarge, lambda: handles.set("k", "x", value=b"v" * 2**21)),
    ):
        with pytest.raises(refused):
            call()
        assert dict(handles.items()) == {"k": "h"}
    assert handles["k"] == "h"
    assert ledger.closed == []
    assert "n" not in handles


def test_handle_that_could_not_be_registered(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A handle that a factory made and the map could not register is closed."""
    handles = make_map()
    with pytest.raises(shmcache.EntryTooLarge):
        handles.get_or_create("k", lambda: "made", value=b"v" * 2**21)
    ledger.wait_for(1)
    assert ledger.causes() == {"made": "CLOSED"}
    stats = handles.stats().host
    assert (stats.handles_opened, stats.entries) == (1, 0)


def test_handle_of_a_map_that_was_closed_meanwhile(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A handle that a factory made for a map that has been closed is closed, too."""
    handles = make_map()

    def make() -> str:
        handles.close()
        return "made"

    with pytest.raises(shmcache.CacheClosed):
        handles.get_or_create("k", make)
    ledger.wait_for(1)
    assert ledger.causes() == {"made": "CLOSED"}


def test_another_kind_of_cache(make_map: Callable[..., HandleMap]) -> None:
    """A name is of a map or of a cache, and the error says which setting differs."""
    handles = make_map()
    with pytest.raises(shmcache.ConfigMismatch, match="codec"):
        shmcache.Cache(handles.name, max_entries=100)


# --- callbacks ------------------------------------------------------------------


def test_callback_that_raises(
    make_map: Callable[..., HandleMap], caplog: pytest.LogCaptureFixture
) -> None:
    """If a callback raises, this is logged with key and cause, and counted."""

    def fail(_key: Any, _handle: Any, _cause: Cause) -> None:
        raise ZeroDivisionError

    handles = make_map(on_evict=fail)
    handles["k"] = "h"
    with caplog.at_level(logging.ERROR, "shmcache"):
        handles.close()
    [record] = caplog.records
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    told = vars(record)
    assert (told["event"], told["key"], told["cause"]) == (
        *("callback failed", "'k'", "CLOSED"),
    )


def test_callback_that_uses_the_map(make_map: Callable[..., HandleMap]) -> None:
    """No lock is held in a callback: it and other threads may use the map."""
    done = threading.Event()

    def again(key: Any, handle: Any, _cause: Cause) -> None:
        other = threading.Thread(target=lambda: handles.set("other", "x"))
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive()
        handles.set("again", (key, handle))
        done.set()

    handles = make_map()
    handles.set("k", "h", on_evict=again)
    del handles["k"]
    assert done.wait(PATIENCE)
    assert handles["again"] == ("k", "h")
    assert handles["other"] == "x"


def test_slow_callbacks_delay_nobody_else(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """With two threads one slow callback leaves one for the others; close() waits for
    it, with a limit."""
    handles = make_map(callback_threads=2)
    release, entered = threading.Event(), threading.Event()

    def slow(_key: Any, _handle: Any, _cause: Cause) -> None:
        entered.set()
        release.wait(PATIENCE)

    handles.set("slow", "slow", on_evict=slow)
    handles.discard("slow")
    assert entered.wait(PATIENCE)
    for n in range(10):
        handles[n] = n
        handles.discard(n)
    ledger.wait_for(10)
    assert not handles.close(timeout=0.01)
    release.set()


def test_close_in_a_callback(make_map: Callable[..., HandleMap]) -> None:
    """A callback that closes the map does not wait for itself."""
    results: list[bool] = []

    def close(*_: Any) -> None:
        results.append(handles.close(timeout=PATIENCE))

    handles = make_map(on_evict=close)
    handles["k"] = "h"
    handles.discard("k")
    handles._process.delivery.callbacks.wait(PATIENCE)
    assert results == [True]


def test_one_factory_call_for_many_threads(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """If many threads ask for one key at once, one makes the handle for all."""
    handles = make_map()
    start, made = threading.Barrier(8), []
    found: list[Any] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    def ask() -> None:
        start.wait()
        found.extend([handles.get_or_create(key, make) for key in range(50)])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 50
    assert len(found) == 400
    assert {id(handle) for handle in found} == {id(handle) for handle in made}
    assert ledger.closed == []


def test_factory_that_fails_leaves_it_to_another(
    make_map: Callable[..., HandleMap],
) -> None:
    """If a factory raises, only its caller gets the exception, and a waiting one tries
    next."""
    handles = make_map()
    inside, go = threading.Event(), threading.Event()
    found = []

    def fail() -> None:
        inside.set()
        go.wait(PATIENCE)
        raise ZeroDivisionError

    def first() -> None:
        with pytest.raises(ZeroDivisionError):
            handles.get_or_create("k", fail)

    one = threading.Thread(target=first)
    one.start()
    assert inside.wait(PATIENCE)
    two = threading.Thread(
        target=lambda: found.append(handles.get_or_create("k", lambda: "made"))
    )
    two.start()
    go.set()
    one.join()
    two.join()
    assert found == ["made"]


def test_factory_that_asks_for_itself(make_map: Callable[..., HandleMap]) -> None:
    """A factory that needs its own result is told so, instead of waiting for ever."""
    handles = make_map()
    with pytest.raises(shmcache.ReentrantCall):
        handles.get_or_create("k", lambda: handles.get_or_create("k", object))
    assert handles.get_or_create("k", lambda: 5) == 5


def test_storm_of_threads(make_map: Callable[..., HandleMap], ledger: Ledger) -> None:
    """Threads that set, lease, discard, pop and clear: every handle is closed once, or
    given back, and none is closed under a lease."""
    handles = make_map(max_entries=8)
    opened: list[str] = []
    popped: list[str] = []
    broken: list[str] = []
    is_closed: set[str] = set()
    ledger_of = ledger.__call__

    def close(key: Any, handle: Any, cause: Cause) -> None:
        is_closed.add(handle)
        ledger_of(key, handle, cause)

    def work(number: int) -> None:
        dice = Random(number)
        for n in range(400):
            key = dice.randrange(12)
            name = f"{number}.{n}"

            def make(name: str = name) -> str:
                opened.append(name)
                return name

            what = dice.randrange(10)
            if what < 5:
                with handles.lease(key, make, on_evict=close) as held:
                    if held in is_closed:
                        broken.append(held)
            elif what < 7:
                handles.set(key, make(), on_evict=close)
            elif what == 7:
                handles.discard(key)
            elif what == 8:
                given = handles.pop(key, None)
                if given is not None:
                    popped.append(given)
            elif n % 50 == 0:
                handles.clear()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handles.stats().entries <= 8
    assert handles.check() == []
    handles.close()
    closed = [handle for handle, *_ in ledger.closed]
    assert broken == []
    assert Counter(closed) + Counter(popped) == Counter(opened)


def test_mailbox_that_was_overwritten(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """An owner that missed more messages than a mailbox holds closes the same handles,
    each once."""
    handles = make_map(max_entries=2 * L.MAILBOX_SIZE)
    total = 3 * L.MAILBOX_SIZE
    state = handles._state()
    with state.lock:  # no thread reads messages meanwhile
        for n in range(total):
            state.register(n, n)
        head = handles.registry._attachment.words[
            handles.registry._words_of(0) + L.S_MAILBOX_HEAD
        ]
        assert head - state.delivery.read[0] >= L.MAILBOX_SIZE
        shared = state.shared_key(total - 1)
        handles.registry.discard(shared, 0, Cause.DELETED)
    ledger.wait_for(L.MAILBOX_SIZE + 1)
    gone = sorted(handle for handle, *_ in ledger.closed)
    assert gone == [*range(L.MAILBOX_SIZE), total - 1]
    handles.close()
    assert sorted(handle for handle, *_ in ledger.closed) == list(range(total))


def test_rebuilding_may_have_lost_messages(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """After a shard was rebuilt, an owner compares, and closes handles that have gone
    without a message."""
    handles = make_map()
    for n in range(10):
        handles[n] = n
    registry = handles.registry
    state = handles._state()
    with state.lock:
        at = registry._words_of(0) + L.S_MAILBOX_HEAD
        head = registry._attachment.words[at]
        registry.discard(state.shared_key(3), 0, Cause.DELETED)
        # The process that removed it died before it counted the message.
        registry._attachment.words[at] = head
        registry._rebuild_shard(0)
    ledger.wait_for(1)
    assert [handle for handle, *_ in ledger.closed] == [3]
    assert sorted(handles) == [n for n in range(10) if n != 3]


def test_messages_for_others_mean_nothing(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A message that is read twice, or is about another worker's handle of the same
    number, closes nothing."""
    handles = make_map()
    handles["k"] = "h"
    state = handles._state()
    number = next(iter(state.numbers))
    peer = HandleMap(handles.name, max_entries=100)
    assert peer.registry._attachment is handles.registry._attachment
    handles.discard("k")
    handles["k"] = "next"
    with state.lock:
        state.delivery.read[0] = 0
    state.delivery.deliver()
    ledger.wait_for(1)
    assert number not in state.numbers
    assert ledger.causes() == {"h": "DELETED"}
    peer.close()


# --- several processes ----------------------------------------------------------


class Worker(Peer):
    """A forked process that uses a map as it is told, and says what it closed."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(lambda link: serve(link, name, settings))
        assert self.hear() == "ready"

    def do(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What a method of its map returns."""
        self.say((method, arguments, options))
        kind, result = self.hear()
        assert kind == "returned", result
        return result

    def closed(self, number: int) -> dict[Any, str]:
        """Handles and causes, when so many have been closed."""
        result: dict[Any, str] = self.do("closed", number)
        return result

    def leave(self) -> dict[Any, str]:
        """End it by close(); all that it closed."""
        self.say(("leave", (), {}))
        kind, result = self.hear()
        assert kind == "left"
        self.end()
        causes: dict[Any, str] = result
        return causes


def serve(link: Connection, name: str, settings: dict[str, Any]) -> None:
    """What a Worker does."""
    mine = Ledger()
    handles = HandleMap(name, on_evict=mine, **settings)
    link.send("ready")
    while True:
        method, arguments, options = link.recv()
        if method == "leave":
            handles.close()
            link.send(("left", mine.causes()))
            return
        try:
            if method == "closed":
                mine.wait_for(*arguments)
                result: Any = mine.causes()
            elif method == "list":
                result = sorted(handles)
            elif method == "host":
                result = [(e.key, e.pid, e.value, e.ttl) for e in handles.host()]
            else:
                result = getattr(handles, method)(*arguments, **options)
            link.send(("returned", result))
        except Exception as error:
            link.send(("raised", repr(error)))


def test_bound_and_order_are_of_the_host(name: str) -> None:
    """With eight workers there are never more handles than the bound, and the least
    recently used of all workers goes first, told to its idle owner."""
    workers = [Worker(name, max_entries=20) for _ in range(8)]
    for n in range(40):
        workers[n % 8].do("set", n // 8, f"{n % 8}/{n // 8}")
        assert len(workers[0].do("host")) == min(20, n + 1)
    # Twenty are left: the last two of each worker, and a third of the last four
    # workers.
    assert workers[0].closed(3) == dict.fromkeys(("0/0", "0/1", "0/2"), "CAPACITY")
    assert workers[4].closed(2) == dict.fromkeys(("4/0", "4/1"), "CAPACITY")
    used = workers[5].do("list")
    for key in used:
        workers[5].do("get", key)
    workers[5].do("sweep")  # otherwise its uses count within about 40 ms
    for n in range(20 - len(used)):
        workers[7].do("set", f"new {n}", f"new {n}")
    assert workers[5].do("list") == used
    assert workers[3].do("list") == []
    everything: dict[Any, str] = {}
    for worker in workers:
        everything |= worker.leave()
    assert len(everything) == 40 + 20 - len(used)
    assert names_of(name) == []


def test_others_clear_expiry_and_deletion(name: str) -> None:
    """If any worker clears or sweeps a handle, its idle owner closes it, with the
    cause."""
    one, two = (Worker(name, max_entries=20, ttl=3600) for _ in range(2))
    one.do("set", "k", "cleared")
    two.do("clear")
    assert one.closed(1) == {"cleared": "CLEARED"}
    one.do("set", "k", "expired", ttl=0.001)
    while not two.do("sweep"):
        pass
    assert one.closed(2) == {"cleared": "CLEARED", "expired": "EXPIRED"}
    one.do("set", "k", "closed", value={"for": "all"})
    [(key, pid, value, ttl)] = two.do("host")
    assert (key, pid, value) == ("k", one.pid, {"for": "all"})
    assert 0 < ttl <= 3600
    assert two.leave() == {}
    assert one.leave() == {
        "cleared": "CLEARED",
        "expired": "EXPIRED",
        "closed": "CLOSED",
    }


def test_handles_of_the_dead(make_map: Callable[..., HandleMap]) -> None:
    """A killed worker's entries leave the map, counted; its keys mean nothing to
    others."""
    handles = make_map(max_entries=10)
    handles["k"] = "mine"
    worker = Worker(handles.name, max_entries=10)
    for n in range(5):
        worker.do("set", n, n)
    assert handles.stats().entries == 6
    worker.kill()
    handles.sweep()
    stats = handles.stats()
    assert (stats.entries, stats.host.removed["OWNER_DIED"]) == (1, 5)
    assert handles["k"] == "mine"


def test_entries_of_the_dead_are_reaped_without_being_asked(
    make_map: Callable[..., HandleMap],
) -> None:
    """Within seconds the others notice by themselves that a worker has died."""
    handles = make_map(max_entries=10)
    handles["k"] = "mine"
    worker = Worker(handles.name, max_entries=10)
    worker.do("set", "k", "its")
    worker.kill()
    deadline = time.monotonic() + PATIENCE
    while handles.registry.stats().removed["OWNER_DIED"] < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [entry.pid for entry in handles.host()] == [os.getpid()]


def test_forked_child_closes_nothing_of_its_parent(
    make_map: Callable[..., HandleMap], ledger: Ledger
) -> None:
    """A child begins with no handles; what it does never closes, or even destroys, its
    parent's."""

    class Precious:
        def __del__(self) -> None:
            if os.getpid() != owner:
                os._exit(99)

    owner = os.getpid()
    handles = make_map(max_entries=4)
    for n in range(4):
        handles[n] = Precious()
    leased = handles.lease(0)
    leased.__enter__()

    def child(link: Connection) -> None:
        assert len(handles) == 0
        assert handles.get(1) is None
        assert not handles.discard(1)
        for n in range(4):  # evicts all of the parent's
            handles[n] = f"child {n}"
        handles._state().delivery.deliver()
        leased.__exit__(None, None, None)
        handles.close()
        link.send(
            [(handle, cause.name, pid) for handle, _, cause, pid in ledger.closed]
        )

    peer = Peer(child)
    closed = peer.hear()
    peer.end()
    assert sorted(closed) == [(f"child {n}", "CLOSED", peer.pid) for n in range(4)]
    ledger.wait_for(3)
    assert all(pid == owner for *_, pid in ledger.closed)
    leased.__exit__(None, None, None)
    ledger.wait_for(4)
    assert {cause.name for _, _, cause, _ in ledger.closed} == {"CAPACITY"}


@pytest.mark.parametrize("end", ["close", "exit", "lease"])
def test_forked_child_that_uses_nothing_closes_nothing(
    make_map: Callable[..., HandleMap], ledger: Ledger, end: str
) -> None:
    """A child that does not use the map, but closes it, ends, or leaves a lease that
    its parent began, closes none of its parent's handles, and keeps their entries."""
    handles = make_map(max_entries=2)
    handles["k"] = "kept"
    leased = handles.lease("leased", lambda: "leased")
    leased.__enter__()
    handles.discard("leased")

    def child(link: Connection) -> None:
        if end == "close":
            assert handles.close()
        elif end == "exit":
            leave_all()
        else:
            leased.__exit__(None, None, None)
            assert handles._process.delivery.callbacks.wait(PATIENCE)
        link.send(len(ledger.closed))

    peer = Peer(child)
    assert peer.hear() == 0
    peer.end()
    assert handles["k"] == "kept"
    assert handles.stats().closing == 1
    leased.__exit__(None, None, None)
    ledger.wait_for(1)
    assert ledger.causes() == {"leased": "DELETED"}


def test_end_of_a_process_closes_its_handles(name: str) -> None:
    """Handles are closed at the end of the interpreter, and of a multiprocessing child,
    when nobody calls close()."""
    script = """
import sys
from shmcache import HandleMap
def close(key, handle, cause):
    print(key, handle, cause.name)
handles = HandleMap(sys.argv[1], max_entries=5, on_evict=close)
handles["k"] = "h"
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, name],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "k h CLOSED\n"
    assert done.stderr == ""
    assert names_of(name) == []


def open_one(name: str, path: str) -> None:
    """Registers a handle, and returns."""

    def close(key: Any, handle: Any, cause: Cause) -> None:
        Path(path).write_text(json.dumps([key, handle, cause.name]) + "\n")

    HandleMap(name, max_entries=5, on_evict=close)["k"] = "h"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_end_of_a_child_of_multiprocessing(
    name: str, tmp_path: Any, method: str
) -> None:
    """Children of multiprocessing close what they opened, too."""
    path = str(tmp_path / "closed")
    context: Any = get_context(method)
    child = context.Process(target=open_one, args=(name, path))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert Path(path).read_text() == '["k", "h", "CLOSED"]\n'
    assert names_of(name) == []


def test_pickles_as_its_settings(make_map: Callable[..., HandleMap]) -> None:
    """Another process that unpickles a map is another worker of it."""
    handles = make_map(on_evict=None)
    handles["k"] = "h"
    again = pickle.loads(pickle.dumps(handles))
    assert again.name == handles.name
    assert len(again) == 0
    assert [entry.key for entry in again.host()] == ["k"]
    again.close()


def test_attach(make_map: Callable[..., HandleMap]) -> None:
    """attach() takes the settings that are there, or says that there are none."""
    handles = make_map(max_entries=7)
    with HandleMap.attach(handles.name) as again:
        assert again.stats().host.max_entries == 7
    with pytest.raises(shmcache.SegmentNotFound):
        HandleMap.attach(handles.name + "-none")


def live_and_die(link: Connection, name: str, seed: int, path: str) -> None:
    """Opens and closes handles until it is killed or told to end, and writes down each
    opening before, and each closing after the fact."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(*what: Any) -> None:
        os.write(log, (json.dumps(what) + "\n").encode())

    def close(_key: Any, handle: Any, cause: Cause) -> None:
        write("closed", handle, cause.name)

    dice = Random(seed)
    handles = HandleMap(name, max_entries=30, on_evict=close, ttl=60)
    link.send("ready")
    n = 0
    while not link.poll(0):
        n += 1
        what = dice.randrange(12)
        key = dice.randrange(20)
        handle = f"{seed}/{n}"
        if what < 6:
            with handles.lease(key, partial(opened, write, handle)):
                pass
        elif what < 10:
            handles.set(key, opened(write, handle))
        elif what == 10:
            handles.discard(key)
        elif n % 40 == 0:
            handles.clear()
    handles.close()
    os.close(log)


def opened(write: Callable[..., None], handle: str) -> str:
    """The handle, written down."""
    write("opened", handle)
    return handle


@pytest.mark.slow
def test_storm_of_kills(name: str, tmp_path: Any) -> None:
    """Workers that evict each other's handles and are killed at random: each handle is
    closed once by its living owner, none is left open at the end, and the host's counts
    agree."""
    dice = Random(7)
    seeds = iter(range(1000))
    paths = []

    def begin() -> Peer:
        seed = next(seeds)
        paths.append(str(tmp_path / str(seed)))
        path = paths[-1]
        peer = Peer(lambda link: live_and_die(link, name, seed, path))
        assert peer.hear() == "ready"
        return peer

    watcher = HandleMap(name, max_entries=30, ttl=60)
    peers = [begin() for _ in range(4)]
    numbers = list(range(4))
    killed = set()
    for _ in range(25):
        time.sleep(dice.uniform(0.005, 0.05))  # the storm itself, not a wait
        victim = dice.randrange(len(peers))
        killed.add(numbers[victim])
        peers[victim].kill()
        peers[victim] = begin()
        numbers[victim] = len(paths) - 1
        assert watcher.stats().entries <= 30
    for peer in peers:
        peer.say()
    for peer in peers:
        peer.end()
    watcher.sweep()
    assert watcher.stats().entries == 0
    assert watcher.check() == []
    watcher.close()
    assert names_of(name) == []
    alive = set(range(len(paths))) - killed
    total = 0
    for number, path in enumerate(paths):
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        made = [handle for what, handle, *_ in lines if what == "opened"]
        closed = [handle for what, handle, *_ in lines if what == "closed"]
        assert len(set(closed)) == len(closed)
        assert set(closed) <= set(made)
        if number in alive:
            assert sorted(closed) == sorted(made)
        total += len(closed)
    assert total > 100
