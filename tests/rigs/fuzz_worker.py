"""A process of the storm of self-checking values: what it does, and how it judges."""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from fuzz_scenes import (
    ADDED_TALLY,
    ASKED,
    CHAIN_TALLY,
    CHAINS,
    DONE,
    EXPIRED_BY,
    EXPIRING,
    INTENT,
    LASTING,
    MEANT,
    MORTAL,
    NUMBERS,
    OPERATIONS,
    OWN,
    PID,
    POPPED_TALLY,
    QUEUES,
    SEQUENCE,
    SHARED,
    SURE,
    UNTIL,
    Proof,
    Stage,
    Violation,
    make_value,
    prove,
)

import shmcache
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable

# This is five times as long as a death may delay the others, as test machines are busy.
LONGEST_WAIT = 5.0
SHORT = 0.05  # s; what touch() cuts the life of a sliding entry to
HITS, BURST = 200, 50  # of a key in use, between two bursts of inserts
PAGES, PAGE_READS = 7, 2  # of a process between two increments, at most
SET_PARENT_DEATH_SIGNAL = 1  # for prctl


class Worker:
    """A process of the storm: what it does, and how it judges what it sees."""

    def __init__(self, stage: Stage, cache: Any, slot: int, seed: int) -> None:
        self.stage = stage
        self.scene = stage.scene
        self.ledger = stage.ledger
        self.cache = cache
        self.random = random.Random(seed)
        self.largest = max(0, int(stage.room * self.scene.largest) - 160)
        self.seen: dict[tuple[str, int], int] = {}
        self.counted = Counter[str]()
        self.acts = [getattr(self, act) for act in self.scene.acts]
        self.weights = list(self.scene.acts.values())
        self.takes_locks = True  # otherwise it reads only in ways that take none
        self.take_slot(slot)

    def take_slot(self, slot: int) -> None:
        """Write to this page of the ledger from now on."""
        self.slot = slot
        self.words = self.ledger.pages[slot]

    # --- values -----------------------------------------------------------------------

    def number(self) -> int:
        """The next sequence number of this writer."""
        self.words[SEQUENCE] += 1
        return self.words[SEQUENCE]

    def size(self) -> int:
        """Nothing, a part of a block, some blocks, or up to the largest."""
        chance = self.random.random()
        block = self.stage.block
        limit = 0 if chance < 0.3 else block if chance < 0.7 else 8 * block
        return self.random.randint(
            0, self.largest if chance > 0.97 else min(limit, self.largest)
        )

    def value(self, key: str, mark: int = 0) -> Any:
        """A new value of a key."""
        proof = Proof(self.slot, self.number(), mark)
        return make_value(key, proof, self.size())

    def judge(self, key: str, value: Any, began: int) -> Proof:
        """What a value says that a read has returned; Violation if it cannot be.

        Args:
            key: The key that was read.
            value: The value that was found.
            began: When the read began, in ns.
        """
        proof = prove(key, value)
        last = self.seen.get((key, proof.writer), 0)
        if proof.sequence < last:
            raise Violation(f"{key}: found {proof} after number {last} of that writer")
        self.seen[key, proof.writer] = proof.sequence
        page = self.ledger.pages[proof.writer]
        if proof.sequence > page[SEQUENCE]:
            raise Violation(f"{key}: {proof} was found before it was made")
        if key[0] in "ot" and 0 < proof.mark < began:
            at = int(key[-1]) + (OWN if key[0] == "t" else 0)
            stored = page[EXPIRING + at]
            over = page[EXPIRED_BY + at]
            noted = stored == page[EXPIRING + at] == proof.sequence
            if noted and over < began:
                raise Violation(
                    f"{key}: {proof} was found by a read that began"
                    f" {(began - over) / 1e6:.3f} ms after it had expired"
                )
        return proof

    def judge_any(self, key: str, value: Any, began: int) -> None:
        """Judge a value of a key of any kind."""
        if key[0] != "n":
            self.judge(key, value, began)
        elif type(value) is not int or value < 0:
            raise Violation(f"{key}: found {value!r}, which is no sum of increments")

    def read(self, key: str) -> Any:
        """The value of a key, read in one of several ways; None if it is absent."""
        how = self.random.randrange(5 if self.takes_locks else 4)
        if how == 0:
            return self.cache.peek(key)
        if how == 1:
            return self.cache.get_many([key]).get(key)
        if how == 2:
            with suppress(KeyError):
                return self.cache[key]
            return None
        return self.cache.get(key) if how == 3 else self.cache.gets(key)[0]

    # --- keys that all write, and everything may happen to ----------------------------

    def a_shared_key(self) -> str:
        """A key of which nothing is certain but its values."""
        return f"s{self.random.randrange(SHARED)}"

    def look_at_shared(self) -> None:
        """Judge what is there."""
        key, began = self.a_shared_key(), time.monotonic_ns()
        value = self.read(key)
        if value is not None:
            self.judge(key, value, began)

    def change_shared(self) -> None:
        """Do one of all operations."""
        key, began = self.a_shared_key(), time.monotonic_ns()
        cache, found = self.cache, None
        how = self.random.randrange(12)
        if how < 3:
            cache.set(key, self.value(key), ttl=self.random.choice([..., None, 1000]))
        elif how == 3:
            keys = {key, self.a_shared_key()}
            cache.set_many({each: self.value(each) for each in keys})
        elif how == 4:
            self.random.choice([cache.add, cache.replace])(key, self.value(key))
        elif how == 5:
            found, token = cache.gets(key)
            cache.cas(key, self.value(key), token)
        elif how == 6:
            found = cache.pop(key, None)
        elif how == 7:
            found = cache.setdefault(key, self.value(key))
        elif how == 8:
            found = cache.get_or_set(key, lambda: self.value(key))
        elif how == 9:
            cache.touch(key, ttl=self.random.choice([None, 1000]))
        elif how == 10:
            self.random.choice([cache.delete, lambda k: cache.delete_many([k])])(key)
        else:
            with suppress(KeyError):
                cache.ttl(key)
        if found is not None:
            self.judge(key, found, began)

    def pop_oldest(self) -> None:
        """Take whatever is the least recently used."""
        began = time.monotonic_ns()
        with suppress(KeyError):
            key, value = self.cache.popitem()
            self.judge_any(key, value, began)

    def iterate(self) -> None:
        """Judge all entries; each one that is always there is met once."""
        began = time.monotonic_ns()
        met = Counter[str]()
        for key, value in self.cache.items():
            met[key] += 1
            self.judge_any(key, value, began)
        for key in self.scene.lasting:
            if met[key] != 1:
                raise Violation(f"{key}: iteration met it {met[key]} times, not once")

    def clear(self) -> None:
        """Remove all keys of this kind."""
        self.cache.clear(prefix="s")

    def sweep(self) -> None:
        """Remove what has expired."""
        self.cache.sweep()

    def reopen(self) -> None:
        """Leave the cache, and come back."""
        self.cache.close()
        if self.random.random() < 0.5:
            self.cache = shmcache.Cache.attach(
                self.stage.name, lock_timeout=LONGEST_WAIT
            )
        else:
            self.cache = shmcache.Cache(self.stage.name, **self.stage.settings)

    # --- keys that expire -------------------------------------------------------------

    def with_deadline(self, at: int, act: Callable[[int, float], Any]) -> Any:
        """Store an entry that expires, and note by when it will be gone.

        Args:
            at: The number of the key in the ledger.
            act: Stores a value with a mark and a TTL.
        """
        ttl = self.random.choice([0.001, 0.005, 0.02, 0.05])
        made = self.words[SEQUENCE]
        result = act(time.monotonic_ns() + round(ttl * 1e9), ttl)
        over = time.monotonic_ns() + round(ttl * 1e9)
        if self.words[SEQUENCE] == made:
            return result  # no value was made; that of the last number lives on
        self.words[EXPIRING + at] = 0
        self.words[EXPIRED_BY + at] = over
        self.words[EXPIRING + at] = self.words[SEQUENCE]
        return result

    def change_mortal(self) -> None:
        """Store an entry that lives for some milliseconds."""
        number = self.random.randrange(MORTAL)
        key, cache = f"t{number}", self.cache
        how = self.random.randrange(4)

        def store(mark: int, ttl: float) -> Any:
            if how == 0:
                return cache.get_or_set(key, lambda: self.value(key, mark), ttl)
            value = self.value(key, mark)
            if how == 1:
                return cache.setdefault(key, value, ttl)
            if how == 2:
                return cache.add(key, value, ttl) or None
            return cache.set(key, value, ttl)

        began = time.monotonic_ns()
        found = self.with_deadline(OWN + number, store)
        if found is not None and found is not True:
            self.judge(key, found, began)

    def look_at_mortal(self) -> None:
        """Judge an entry that may be about to expire."""
        key, began = f"t{self.random.randrange(MORTAL)}", time.monotonic_ns()
        value = self.read(key)
        if value is not None:
            self.judge(key, value, began)

    # --- keys that have one writer ----------------------------------------------------

    def look_at_own(self, slot: int | None = None, at: int | None = None) -> None:
        """Compare a key of some process with what that process has noted."""
        slot = self.random.randrange(self.ledger.slots) if slot is None else slot
        at = self.random.randrange(OWN) if at is None else at
        page, key = self.ledger.pages[slot], f"o{slot}:{at}"
        done, until = page[DONE + at], page[UNTIL + at]
        began = time.monotonic_ns()
        value = self.read(key)
        ended = time.monotonic_ns()
        intent = page[INTENT + at]
        if value is None:
            settled = done == intent and done & 1
            if self.scene.roomy and settled and (until == 0 or ended < until):
                raise Violation(
                    f"{key}: absent, although its only writer {slot} has stored number"
                    f" {done >> 1}, and has done nothing to it since"
                )
            return
        proof = self.judge(key, value, began)
        if not done >> 1 <= proof.sequence <= intent >> 1:
            was = "stored" if done & 1 else "deleted"
            raise Violation(
                f"{key}: found {proof}, but its only writer had {was} it as number"
                f" {done >> 1} before, and was at {intent >> 1} afterwards"
            )

    def change_own(self) -> None:
        """Change a key that no other process changes, and note it."""
        at = self.random.randrange(OWN)
        key, words, cache = f"o{self.slot}:{at}", self.words, self.cache
        done = words[DONE + at]
        certain = done == words[INTENT + at] and words[UNTIL + at] == 0
        how = self.random.randrange(8)
        if how < 2:
            intent = self.number() << 1
            words[INTENT + at] = intent
            began = time.monotonic_ns()
            found = None
            if how:
                found = cache.pop(key, None)
            else:
                cache.delete(key)
            words[DONE + at] = intent
            if found is not None:
                self.judge(key, found, began)
        elif how < 4:
            self.store_for_a_while(at, key)
        elif how < 6 and certain:
            self.store_if(at, key, done)
        else:
            value = self.value(key)
            words[INTENT + at] = intent = words[SEQUENCE] << 1 | 1
            words[UNTIL + at] = 0
            cache[key] = value
            words[DONE + at] = intent

    def store_for_a_while(self, at: int, key: str) -> None:
        """Store an entry that expires."""

        def store(mark: int, ttl: float) -> None:
            value = self.value(key, mark)
            self.words[INTENT + at] = self.words[SEQUENCE] << 1 | 1
            self.words[UNTIL + at] = mark
            self.cache.set(key, value, ttl)

        self.with_deadline(at, store)
        self.words[DONE + at] = self.words[INTENT + at]

    def store_if(self, at: int, key: str, done: int) -> None:
        """Store on a condition; in a roomy cache it is known whether it holds."""
        value = self.value(key)
        self.words[INTENT + at] = intent = self.words[SEQUENCE] << 1 | 1
        act = self.random.choice(["add", "replace", "cas"])
        arguments = [key, value]
        if act == "cas":
            arguments.append(self.cache.gets(key)[1])
        stored = getattr(self.cache, act)(*arguments)
        there = bool(done & 1)
        expected = {"add": not there, "replace": there, "cas": True}[act]
        if self.scene.roomy and stored != expected:
            raise Violation(
                f"{key}: {act}() of number {intent >> 1} returned {stored}, although"
                f" its only writer {self.slot} had left it as {done >> 1},"
                f" {'stored' if there else 'deleted'}"
            )
        if stored:
            self.words[DONE + at] = intent
        else:
            self.words[INTENT + at] = done

    # --- keys that are always there ---------------------------------------------------

    def look_at_lasting(self) -> None:
        """Look at keys that are never deleted, expired or evicted."""
        keys = self.scene.lasting
        for key in self.random.sample(keys, min(4, len(keys))):
            if self.random.random() < 0.2:
                if key not in self.cache:
                    raise Violation(f"{key}: not in the cache, though never deleted")
            else:
                self.look_at_one(key)

    def look_at_idle(self) -> None:
        """Look at a key that is always there, without using it."""
        number = self.random.randrange(self.scene.filled)
        value = self.cache.peek(f"f{number}")
        if value != number:
            raise Violation(f"f{number}: found {value!r}, though never changed")

    def look_at_one(self, key: str) -> None:
        """Judge one of them, and compare numbers with the ledger."""
        tally = int(key[1:]) + (CHAIN_TALLY if key[0] == "c" else 0)
        began = time.monotonic_ns()
        sure = self.ledger.sure(tally) if key[0] in "nc" else 0
        value = self.read(key)
        if value is None:
            raise Violation(f"{key}: absent, though never deleted; {sure} sure")
        self.judge_any(key, value, began)
        if key[0] in "nc":
            number = value if key[0] == "n" else prove(key, value).mark
            self.compare(key, tally, number, sure)

    def compare(self, key: str, tally: int, number: int, sure: int) -> None:
        """Compare a number that was found with what was sure before the look."""
        meant = self.ledger.meant(tally)
        if not sure <= number <= meant:
            raise Violation(
                f"{key}: found {number}, expected {sure} (sure before the look) to"
                f" {meant} (meant until after it)"
            )

    def overwrite(self) -> None:
        """Store a new value in place of the old one, in one of several ways."""
        key = f"e{self.random.randrange(LASTING)}"
        how = self.random.randrange(5)
        stored = True
        if how == 0:
            stored = self.cache.replace(key, self.value(key))
        elif how == 1:
            began = time.monotonic_ns()
            found, token = self.cache.gets(key)
            stored = found is not None
            if stored:
                self.judge(key, found, began)
                self.cache.cas(key, self.value(key), token)
        elif how == 2:
            stored = self.cache.touch(key, ttl=self.random.choice([None, 3600]))
        elif how == 3:
            self.cache.set(key, self.value(key), ttl=3600)
        else:
            self.cache.set_many({key: self.value(key)})
        if not stored:
            raise Violation(f"{key}: absent for a writer, though never deleted")

    def hammer(self) -> None:
        """Overwrite so fast that a process stopped by chance is often inside."""
        key = f"e{self.random.randrange(LASTING)}"
        values = [self.value(key) for _ in range(20)]
        for value in values:
            self.cache[key] = value

    def replace_large(self) -> None:
        """Replace a value by one that cannot stand beside it."""
        size = round(self.random.uniform(0.55, 0.85) * self.stage.room)
        proof = Proof(self.slot, self.number(), 0)
        self.cache["b0"] = make_value("b0", proof, size)

    def tally(self, at: int, amount: int, act: Callable[[], Any]) -> Any:
        """Do something that is counted; it was not done if the result is None or
        False."""
        words = self.words
        words[MEANT + at] += amount
        try:
            result = act()
        except shmcache.LockTimeout:
            words[MEANT + at] -= amount  # nothing was changed
            raise
        if result is None or result is False:
            words[MEANT + at] -= amount
        else:
            words[SURE + at] += amount
        return result

    def count(self, number: int | None = None) -> None:
        """Add to a number."""
        at = self.random.randrange(NUMBERS) if number is None else number
        key, delta = f"n{at}", self.random.choice([1, 1, 1, 5])
        lasting = key in self.scene.lasting
        more: dict[str, Any] = {"initial": 0}
        if lasting and self.random.random() < 0.5:
            more.clear()
        if at == 1 and self.scene.roomy:
            more["ttl"] = 3600  # it is not overwritten in place
        turns = left = self.random.choice([1, 1, 30])
        self.words[MEANT + at] += turns * delta
        value = 0
        try:
            while left:
                value = self.cache.incr(key, delta, **more)
                left -= 1
        except KeyError:
            raise Violation(f"{key}: absent for incr(), though never deleted") from None
        finally:
            self.words[SURE + at] += (turns - left) * delta
            self.words[MEANT + at] -= left * delta
        before = self.counted[key] if lasting else 0
        if value < before + (turns if lasting else 1) * delta:
            raise Violation(
                f"{key}: {turns} times incr({delta}) returned {value} after {before}"
            )
        self.counted[key] = value

    def chain(self) -> None:
        """Store by cas the next value of a key that is changed in no other way."""
        at = self.random.randrange(CHAINS)
        key, began = f"c{at}", time.monotonic_ns()
        sure = self.ledger.sure(CHAIN_TALLY + at)
        found, token = self.cache.gets(key)
        if found is None:
            raise Violation(f"{key}: absent for gets(), though never deleted")
        before = self.judge(key, found, began).mark
        self.compare(key, CHAIN_TALLY + at, before, sure)
        value = self.value(key, before + 1)
        self.tally(CHAIN_TALLY + at, 1, lambda: self.cache.cas(key, value, token))

    def look_at_chain(self) -> None:
        """As many values were stored as tokens were won."""
        self.look_at_one(f"c{self.random.randrange(CHAINS)}")

    def offer(self) -> None:
        """Add a value that will be popped."""
        at = self.random.randrange(QUEUES)
        key = f"p{at}"
        value = self.value(key)
        self.tally(ADDED_TALLY + at, 1, lambda: self.cache.add(key, value))

    def take(self) -> None:
        """Pop a value that was added."""
        at = self.random.randrange(QUEUES)
        key, began = f"p{at}", time.monotonic_ns()
        found = self.tally(POPPED_TALLY + at, 1, lambda: self.cache.pop(key, None))
        if found is not None:
            self.judge(key, found, began)

    def look_at_queue(self) -> None:
        """Not more was popped than was added."""
        at = self.random.randrange(QUEUES)
        popped = self.ledger.sure(POPPED_TALLY + at)
        added = self.ledger.meant(ADDED_TALLY + at)
        if popped > added:
            raise Violation(f"p{at}: popped {popped} times, added at most {added}")

    # --- scenes of their own ----------------------------------------------------------

    def flood_and_count(self) -> None:
        """Use some pages, each of which may evict another, and then every number."""
        for _ in range(self.random.randint(1, PAGES)):
            key = f"g{self.random.randrange(1_000)}"
            self.cache[key] = self.value(key)
        for _ in range(PAGE_READS):
            key, began = f"g{self.random.randrange(1_000)}", time.monotonic_ns()
            value = self.read(key)
            if value is not None:
                self.judge(key, value, began)
        for number in range(NUMBERS):
            self.count(number)

    def cut_short(self) -> None:
        """Give a long-lived entry a short life; no reader may prolong it by more."""
        key, cache = f"x{self.slot}", self.cache
        cache.set(key, self.value(key), ttl=3600)
        for _ in range(20):
            if not cache.touch(key, 3600) or not cache.touch(key, SHORT):
                # It expires if this process was stopped meanwhile.
                return
            began = time.monotonic_ns()
            try:
                left = cache.ttl(key)
            except KeyError:
                return
            # Readers may have renewed it until the very end of the call.
            if left > SHORT and left > SHORT + (time.monotonic_ns() - began) / 1e9:
                raise Violation(
                    f"{key}: {left:.3f} s left, after its writer {self.slot} has"
                    f" touched number {self.words[SEQUENCE]} with {SHORT} s"
                )

    def look_at_sliding(self) -> None:
        """Use an entry, which renews its time."""
        pages = enumerate(self.ledger.pages)
        key = f"x{self.random.choice([i for i, p in pages if p[SEQUENCE]] or [0])}"
        began = time.monotonic_ns()
        value = self.read(key)
        if value is not None:
            self.judge(key, value, began)

    def look_at_length(self) -> None:
        """The number of entries, where entries are only overwritten."""
        expected = len(self.scene.lasting)
        for _ in range(20):
            length = len(self.cache)
            if length != expected:
                raise Violation(
                    f"len() is {length}, with {expected} keys only overwritten"
                )
        stats = self.cache.stats()
        if stats.unstable_shards == 0 and stats.entries != expected:
            raise Violation(
                f"stats().entries is {stats.entries}, with {expected} keys only"
                " overwritten"
            )

    def look_at_ages(self) -> None:
        """No entry was older than the cache when it went."""
        kills = self.ledger.kills[0]
        stats = self.cache.stats()
        unit = (1 << L.STAMP_SHIFT) / 1e9
        age = (time.monotonic_ns() - self.stage.born) / 1e9 + unit
        gone = stats.expired + stats.evicted
        if stats.unstable_shards:
            return
        if stats.eviction_age_seconds > gone * age:
            raise Violation(
                f"eviction_age_seconds is {stats.eviction_age_seconds:.1f} after"
                f" {gone} evictions, but the cache is only {age:.1f} s old"
            )
        older = stats.eviction_age_buckets[1:]
        for bound, number in zip(L.AGE_BOUNDS, older, strict=True):
            # The last bucket is what the others lack, and a process that was killed
            # between two counts has left one there.
            allowed = kills + 1 if bound == L.AGE_BOUNDS[-1] else 0
            if bound > age and number > allowed:
                raise Violation(
                    f"{number} entries were over {bound:.0f} s old when they went, but"
                    f" the cache is only {age:.1f} s old"
                )

    def use(self, key: str, asking: int, answering: int) -> None:
        """Read one key again and again, and write nothing, when asked to."""
        os.read(asking, 1)
        for hit in range(HITS):
            began = time.monotonic_ns()
            value = self.cache.get(key)
            if value is None:
                raise Violation(
                    f"{key}: absent at hit {hit} of a turn, in a cache of 100, though"
                    f" this process uses it {HITS} times before each {BURST} inserts"
                )
            self.judge(key, value, began)
        os.write(answering, b"!")

    # --- life -------------------------------------------------------------------------

    def step(self) -> None:
        """Do one thing."""
        if self.words[ASKED]:
            self.fork()
        act = self.random.choices(self.acts, self.weights)[0]
        # A process that holds the lock may have been stopped for long.
        with suppress(shmcache.LockTimeout):
            act()
        self.words[OPERATIONS] += 1

    def fork(self) -> None:
        """Fork a process that goes on with all that this one knows, in a page of its
        own."""
        slot = self.words[ASKED] - 1
        self.words[ASKED] = 0
        seed = self.random.getrandbits(64)
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return
        # The conductor shall be the parent of the new process, to hear of its end.
        if os.fork():
            os._exit(0)
        while os.getppid() != self.stage.conductor:
            time.sleep(0.000_5)
        self.take_slot(slot)
        self.random.seed(seed)
        die_with_parent()
        self.words[PID] = os.getpid()

    def live(self) -> NoReturn:
        """Do one thing after the other, until all shall end."""
        code = 1
        try:
            while not self.ledger.ending[0]:
                self.step()
            self.cache.close()
            code = 0
        except Violation as violation:
            self.tell(f"process {self.slot} says: {violation}")
        except BaseException:
            self.tell(f"process {self.slot} failed:\n{traceback.format_exc()}")
        finally:
            os._exit(code)

    def tell(self, text: str) -> None:
        """Tell the conductor what was wrong."""
        os.write(self.stage.verdict, f"{text}\n".encode()[-select.PIPE_BUF :])


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent has ended."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
