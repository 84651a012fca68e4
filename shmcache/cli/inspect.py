"""Commands that only look, from outside, and change nothing."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmcache._format import layout as L
from shmcache._format.fields import sequence_of
from shmcache._parser import USAGE_ERROR
from shmcache.cli.options import (
    JSON,
    JSON_ALTERNATIVE,
    KEY,
    NAME,
    NAMES,
    OPTIONAL_NAME,
    PREFIX,
    Command,
    argument,
    key_type,
)
from shmcache.cli.output import (
    NO,
    chosen_entries,
    complain,
    entries_of,
    lacking,
    not_found,
    opened,
    print_fields,
    print_json,
    print_table,
)
from shmcache.errors import SegmentNotFound, ShmCacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shmcache._observe.records import Entry
    from shmcache._observe.snapshot import Inside, Segment
    from shmcache.cli.clean import Found


def _ls(options: argparse.Namespace) -> int:
    from shmcache.cli import clean

    survey = clean.survey()
    if options.wanted:
        known = {found.name for found in survey}
        for name in options.wanted:
            if name not in known:
                raise not_found(name)
        survey = [found for found in survey if found.name in options.wanted]
    if options.names:
        print("".join(f"{found.name}\n" for found in survey), end="")
        return 0
    caches = [_summary(found) for found in survey]
    if options.json:
        print_json({"caches": caches})
    elif caches:
        print_table(
            ("NAME", "STATE", "SIZE", "ENTRIES", "USED", "HITS", "WORKERS", "AGE"),
            map(_summary_row, caches),
        )
        for one in caches:
            if one["trouble"]:
                print(f"{one['name']}: {one['trouble']}")
    else:
        print("no caches of this user")
    return NO if any(one["trouble"] for one in caches) else 0


# What ``ls`` takes from the statistics of a cache.
_FIGURES = (
    *("entries", "max_entries", "bytes_used", "bytes_capacity"),
    *("hits", "misses", "workers", "age", "codec"),
)


def _summary(found: Found) -> dict[str, Any]:
    # One cache of `ls`.  A field is None if it cannot be read.
    from shmcache._observe.snapshot import Segment

    figures: dict[str, Any] = dict.fromkeys(_FIGURES)
    trouble = found.trouble
    if not trouble:
        try:
            with Segment(found.name) as segment:
                known = {**vars(segment.stats().stats), "codec": segment.codec}
                figures = {key: known[key] for key in _FIGURES}
                trouble = segment.trouble
        except SegmentNotFound:
            pass  # there are other files of the cache, but no segment
        except ShmCacheError as error:
            trouble = str(error)
    state = "in use" if found.in_use else "persistent" if found.persist else "unused"
    return {
        "name": found.name,
        "state": "trouble" if trouble else state,
        "in_use": found.in_use,
        "persist": found.persist,
        "bytes": found.bytes,
        **figures,
        "trouble": trouble,
    }


def _summary_row(one: dict[str, Any]) -> Sequence[str]:
    from shmcache.cli.show import ratio_text, size_text, span_text

    left = one["name"], one["state"], size_text(one["bytes"])
    if one["entries"] is None:
        return (*left, "-", "-", "-", "-", "-")
    return (
        *left,
        f"{one['entries']:,}",
        f"{100 * one['bytes_used'] / max(1, one['bytes_capacity']):.0f} %",
        ratio_text(one["hits"], one["misses"]),
        f"{one['workers']}",
        span_text(one["age"]),
    )


def _stats(options: argparse.Namespace) -> int:
    with opened(options.name) as segment:
        read = segment.stats()
        stats = vars(read.stats)
        del stats["compiled"]  # each process of a cache may run another engine
        settings = vars(segment.header.settings)
        inside = [_inside(segment, one) for one in segment.inside()]
        trouble = segment.trouble
    if options.json:
        more = {"settings": settings, "inside": inside, "trouble": trouble}
        print_json({**stats, **more, "unstable": read.unstable, "exact": read.exact})
    else:
        _print_stats(stats, settings)
        for one in inside:
            print(one["says"])
        for shard in read.unstable:
            print(
                f"shard {shard}: its counts are not of one moment, as a writer was"
                " inside all the time"
            )
        if not read.exact:
            print("hits, misses, sweeps and callbacks are not exact: workers ended")
        if trouble:
            print(trouble)
    return NO if trouble else 0


def _print_stats(stats: dict[str, Any], settings: dict[str, Any]) -> None:
    from shmcache.cli.show import ratio_text, size_text, span_text

    def seconds(ns: int) -> str:
        return span_text(ns / 1e9 if ns else None)

    s = stats
    bound = f" of {s['max_entries']:,}" if s["max_entries"] else ""
    removed = [f"{n:,} {cause.lower()}" for cause, n in s["removed"].items() if n]
    waits = s["lock_waits"]
    print_fields(
        {
            "name": s["name"],
            "age": span_text(s["age"]),
            "codec": settings["codec"],
            "ttl": seconds(settings["ttl_ns"]) + ", sliding" * settings["sliding"],
            "persist": "yes" if settings["persist"] else "no",
            "workers": f"{s['workers']}",
            "segment": f"{size_text(s['segment_bytes'])}, shards: {s['shards']}",
            "entries": f"{s['entries']:,}{bound}",
            "bytes": f"{size_text(s['bytes_used'])} of"
            f" {size_text(s['bytes_capacity'])}",
            "hits": f"{s['hits']:,} of {s['hits'] + s['misses']:,}"
            f" ({ratio_text(s['hits'], s['misses'])})",
            "sets": f"{s['sets']:,}",
            "removed": ", ".join(removed) or "0",
            "evicted unread": f"{s['unread']:,} of {s['expired'] + s['evicted']:,}",
            "too large": f"{s['too_large']:,}",
            "sweeps": f"{s['sweeps']:,}, {s['sweep_seconds']:.3f} s in all",
            "lock waits": f"{waits:,}, {s['lock_wait_seconds']:.3f} s in all,"
            f" {s['lock_timeouts']:,} timed out",
            "recoveries": f"{s['recoveries']:,}, {s['dropped']:,} entries dropped",
        }
    )
    if s["handles_opened"]:
        print_fields(
            {
                "handles": f"{s['handles_opened']:,} opened,"
                f" {s['handles_closed']:,} closed",
                "callbacks": f"{s['callbacks']:,}, {s['callback_failures']:,} failed",
            }
        )


def _inside(segment: Segment, one: Inside) -> dict[str, Any]:
    # Who is in a shard, and a sentence about it for people.
    worker = next((w for w in segment.workers() if w.token == one.token), None)
    pid = worker.pid or worker.wrote if worker else None
    who = f"process {pid}" if worker else "a process that has gone"
    says = f"shard {one.shard}: "
    if not one.token and not one.writing:
        says += "free"
    elif worker is None or not worker.alive:
        says += f"{who} died inside; the next process to need the shard takes it over"
    else:
        says += f"{who} is inside"
    return {
        "shard": one.shard,
        "pid": pid,
        "alive": bool(worker and worker.alive),
        "writing": one.writing,
        "waiting": one.waiting,
        "says": f"{says}; waiting: {one.waiting}",
    }


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _keys(options: argparse.Namespace) -> int:
    from itertools import islice

    from shmcache.cli.show import json_line, plain

    damaged = 0
    with opened(options.name) as segment:
        chosen = chosen_entries(segment, options.prefix, options.type)
        listed = []
        for entry in islice(chosen, options.limit):
            damaged += bool(entry.damage)
            if options.json:
                listed.append(
                    {
                        "key": plain(segment.key(entry)),
                        "bytes": entry.key_len + entry.value_len,
                        "age": segment.age(entry),
                        "ttl": segment.left(entry),
                        **_owner(segment, entry),
                    }
                )
            else:
                print(json_line(segment.key(entry)))
    if options.json:
        print_json({"name": options.name, "keys": listed})
    return NO if damaged else 0


def _get(options: argparse.Namespace) -> int:
    from shmcache._observe.snapshot import Undecoded
    from shmcache.cli.show import json_line, value_text

    with opened(options.name) as segment:
        found = entries_of(segment, options.key, options.type)
        found = [entry for entry in found if not segment.expired(entry)]
        values = [segment.value(entry) for entry in found]
    if not found:
        complain(f"cache {options.name!r} has no key {options.key!r}")
        return NO
    code = 0
    for entry, value in zip(found, values, strict=True):
        if entry.damage:
            complain(
                f"the entry is damaged: {entry.damage}; see shmcache inspect, and"
                " delete it"
            )
            code = NO
        elif options.raw:
            sys.stdout.flush()
            sys.stdout.buffer.write(entry.value or b"")
        elif options.json:
            print(json_line(value))
        else:
            print(value_text(value))
            if type(value) is Undecoded:
                complain(f"the value is {value.reason}; these are its bytes")
    return code


def _inspect(options: argparse.Namespace) -> int:
    from shmcache.cli.show import plain

    with opened(options.name) as segment:
        found = entries_of(segment, options.key, options.type)
        records = [_record(segment, entry) for entry in found]
    if not found:
        complain(f"cache {options.name!r} has no key {options.key!r}")
        return NO
    if options.json:
        listed = [{**record, "value": plain(record["value"])} for record in records]
        print_json({"name": options.name, "records": listed})
    else:
        for record in records:
            _print_record(record)
    return NO if any(entry.damage for entry in found) else 0


def _record(segment: Segment, entry: Entry) -> dict[str, Any]:
    from shmcache.cli.show import plain

    ring = segment.ring(entry.shard)
    tag = entry.tag
    return {
        "key": plain(segment.key(entry)),
        "value": segment.value(entry),
        "encoding": segment.codec if tag == 0 else L.Tag(tag).name.lower(),
        **_owner(segment, entry),
        "key_bytes": entry.key_len,
        "value_bytes": entry.value_len,
        "blocks": entry.blocks,
        "block_bytes": entry.blocks * segment.header.geometry.block_size,
        "age": segment.age(entry),
        "ttl": L.unpack_ttl(entry.ttl) / 1e9 or None,
        "left": segment.left(entry),
        "expired": segment.expired(entry),
        "read": entry.fetched,
        "shard": entry.shard,
        "slot": entry.slot,
        "lru_position": ring.index(entry.slot) if ring and entry.slot in ring else None,
        "lru_length": len(ring) if ring is not None else None,
        "write": sequence_of(entry.version) - segment.header.first_sequence,
        "hash": f"{entry.hash:#010x}",
        "checksum": f"{entry.checksum:#010x}",
        "damage": entry.damage,
    }


def _print_record(record: dict[str, Any]) -> None:
    from shmcache.cli.show import json_line, short, span_text, value_text

    r = record
    fields = {
        "key": json_line(r["key"]),
        "value": short(value_text(r["value"]), 200),
        "encoding": r["encoding"],
        "key, value": f"{r['key_bytes']:,} + {r['value_bytes']:,} bytes",
        "blocks": f"{r['blocks']:,}, {r['block_bytes']:,} bytes",
        "age": span_text(r["age"]),
        "ttl": span_text(r["ttl"]),
        "left": "expired, not yet removed" if r["expired"] else span_text(r["left"]),
        "read": "yes" if r["read"] else "not since it was written",
        "place": f"shard {r['shard']}, slot {r['slot']}",
        "LRU": "unknown"
        if r["lru_position"] is None
        else f"{r['lru_position']} of {r['lru_length']} in its shard; 0 was used last",
        "write": f"number {r['write']} of its shard",
        "hash": f"{r['hash']}, checksum {r['checksum']}",
    }
    if "owner" in r:
        fields["owner"] = f"{r['owner']}, {'alive' if r['owner_alive'] else 'dead'}"
    if r["damage"]:
        fields["damage"] = r["damage"]
    print_fields(fields)


def _owner(segment: Segment, entry: Entry) -> dict[str, Any]:
    # The owner of a handle.  The PID is None if the owner's row has been freed since.
    token = segment.owner(entry)
    if not token:
        return {}
    worker = next((w for w in segment.workers() if w.token == token), None)
    return {
        "owner": (worker.pid or worker.wrote) if worker else None,
        "owner_alive": bool(worker and worker.alive),
    }


def _handles(options: argparse.Namespace) -> int:
    from shmcache.cli.show import plain

    with opened(options.name) as segment:
        if not segment.holds_handles:
            complain(
                f"{options.name!r} is a cache of values, not a map of handles; shmcache"
                " keys lists what is in it"
            )
            return USAGE_ERROR
        listed = [
            {
                "key": segment.key(entry),
                **_owner(segment, entry),
                "age": segment.age(entry),
                "ttl": segment.left(entry),
                "value": segment.value(entry),
                "damage": entry.damage,
            }
            for entry in chosen_entries(segment, None, "text", values=True)
        ]
    if options.json:
        handles = [
            {**one, "key": plain(one["key"]), "value": plain(one["value"])}
            for one in listed
        ]
        print_json({"name": options.name, "handles": handles})
    elif listed:
        print_table(("OWNER", "AGE", "LEFT", "KEY", "VALUE"), map(_handle_row, listed))
    else:
        print("no handles")
    return NO if any(one["damage"] for one in listed) else 0


def _handle_row(one: dict[str, Any]) -> Sequence[str]:
    from shmcache.cli.show import json_line, short, span_text, value_text

    pid = f"{one.get('owner') or 'gone'}"
    dead = "" if one.get("owner_alive") else " (dead)"
    value = one["value"]
    return (
        f"{pid}{dead}",
        span_text(one["age"]),
        span_text(one["ttl"]),
        json_line(one["key"]),
        "" if value is None else short(value_text(value), 60),
    )


def _top(options: argparse.Namespace) -> int:
    try:
        from shmcache.cli import top
    except ImportError as error:
        return lacking("top", "cli", error)
    if not options.once and not (sys.stdout.isatty() and sys.stdin.isatty()):
        complain("top needs a terminal; --once prints one frame without one")
        return USAGE_ERROR
    return top.run(options.name, options.interval, once=options.once)


def _interval(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.1 to 3600")


COMMANDS = (
    Command(
        "ls",
        "List the caches of this user.",
        _ls,
        (
            NAMES,
            argument(
                "--names",
                alternative=True,
                action="store_true",
                help="print only the names",
            ),
            JSON_ALTERNATIVE,
        ),
        description="List the caches of this user: size, entries, hit ratio, workers,"
        " age.  The exit code is 1 if one is damaged or not safely ours.",
    ),
    Command(
        "stats",
        "Show what all processes together did with a cache.",
        _stats,
        (NAME, JSON),
    ),
    Command(
        "top",
        "Watch caches live.",
        _top,
        (
            OPTIONAL_NAME,
            argument(
                "--interval",
                type=_interval,
                default=1.0,
                metavar="S",
                help="seconds from frame to frame, 0.1 to 3600 (default: 1)",
            ),
            argument(
                "--once",
                action="store_true",
                help="print one frame, of one interval, and end; needs no terminal",
            ),
        ),
        description="Watch caches live: rates, hit ratio, evictions, locks, workers,"
        " keys.  Without NAME all caches are shown, one on a line.  The key q ends it.",
    ),
    Command(
        "keys",
        "List the keys of a cache.",
        _keys,
        (
            NAME,
            PREFIX,
            key_type("the prefix"),
            argument("--limit", metavar="N", type=_count, help="at most N keys"),
            JSON,
        ),
        description="List the keys, one on a line, as JSON.  This is not a use of the"
        " entries.",
    ),
    Command(
        "get",
        "Print the value of a key.",
        _get,
        (
            NAME,
            KEY,
            key_type(),
            argument(
                "--raw",
                alternative=True,
                action="store_true",
                help="print the value's bytes, as they are stored",
            ),
            JSON_ALTERNATIVE,
        ),
        description="Print the value of a key: a str unchanged, any other value as"
        " Python writes it.  This is not a use of the entry.  The exit code is 1 if"
        " there is none.",
    ),
    Command(
        "inspect",
        "Show the record of a key.",
        _inspect,
        (NAME, KEY, key_type(), JSON),
        description="Show the record of a key: sizes, times, place, owner.  The exit"
        " code is 1 if there is none, or if it is damaged.",
    ),
    Command("handles", "List the handles of all workers.", _handles, (NAME, JSON)),
)
