"""Commands that look, and change nothing."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmcache._format import layout as L
from shmcache.cli.options import (
    json_option,
    key_option,
    name_option,
    names_option,
    type_option,
)
from shmcache.cli.output import (
    NO,
    USAGE_ERROR,
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

    from shmcache._observe.snapshot import Entry, Segment
    from shmcache.cli.clean import Found


def _ls_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the caches of this user: size, entries, hit ratio, workers, age."
        "  Exit code 1 if one is damaged or not safely ours."
    )
    names_option(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--names", action="store_true", help="print names alone")
    json_option(how)


def _ls(options: argparse.Namespace) -> int:
    from shmcache.cli import clean as _clean

    survey = _clean.survey()
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


_TOLD = (
    *("entries", "max_entries", "bytes_used", "bytes_capacity"),
    *("hits", "misses", "workers", "age", "codec"),
)


def _summary(found: Found) -> dict[str, Any]:
    # One cache of `ls`; what is None cannot be told.
    from shmcache._observe.snapshot import Segment

    told: dict[str, Any] = dict.fromkeys(_TOLD)
    trouble = found.trouble
    if not trouble:
        try:
            with Segment(found.name) as segment:
                stats = vars(segment.stats())
                stats["codec"] = segment.codec
                told = {key: stats[key] for key in _TOLD}
                trouble = segment.trouble
        except SegmentNotFound:
            pass  # other files than the segment are left
        except ShmCacheError as error:
            trouble = str(error)
    state = "in use" if found.in_use else "persistent" if found.persist else "unused"
    return {
        "name": found.name,
        "state": "trouble" if trouble else state,
        "in_use": found.in_use,
        "persist": found.persist,
        "bytes": found.bytes,
        **told,
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
        stats = vars(segment.stats())
        del stats["compiled"]  # the processes that use a cache may differ in that
        settings = vars(segment.header.settings)
        inside = [_inside(segment, one) for one in segment.inside()]
        trouble = segment.trouble
    if options.json:
        more = {"settings": settings, "inside": inside, "trouble": trouble}
        print_json({**stats, **more})
    else:
        _print_stats(stats, settings)
        for one in inside:
            print(one["says"])
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


def _inside(segment: Segment, one: Any) -> dict[str, Any]:
    # Who is in a shard, and what that means, for people.
    worker = next((w for w in segment.workers() if w.token == one.token), None)
    pid = worker.pid or worker.wrote if worker else None
    who = f"process {pid}" if worker else "a process that has gone"
    says = f"shard {one.shard}: "
    if not one.token and not one.writing:
        says += "free"
    elif worker is None or not worker.alive:
        says += f"{who} died inside; who needs the shard next will repair it"
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


def _keys_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the keys, one on a line, as JSON.  Which of them are used does not"
        " change by it."
    )
    name_option(parser)
    parser.add_argument("--prefix", metavar="P", help="only keys that begin with it")
    type_option(parser, "the prefix")
    parser.add_argument("--limit", metavar="N", type=_count, help="at most so many")
    json_option(parser)


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


def _get_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the value of a key: a str as it is, all else as Python writes it.  Not a"
        " use of the entry.  Exit code 1 if there is none."
    )
    name_option(parser)
    key_option(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--raw", action="store_true", help="the value's bytes, as they are stored"
    )
    json_option(how)


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


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show the record of a key: sizes, times, place, owner.  Exit code 1 if there is"
        " none, or if it is damaged."
    )
    name_option(parser)
    key_option(parser)
    json_option(parser)


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
        "write": entry.version >> 1,
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
    # Of a handle: the PID of its owner, None if its row is another's by now.
    token = segment.owner(entry)
    if not token:
        return {}
    worker = next((w for w in segment.workers() if w.token == token), None)
    return {
        "owner": (worker.pid or worker.wrote) if worker else None,
        "owner_alive": bool(worker and worker.alive),
    }


def _handles(options: argparse.Namespace) -> int:
    from shmcache.cli.show import json_line, plain, short, span_text, value_text

    damaged = False
    listed: list[dict[str, Any]] = []
    rows: list[Sequence[str]] = []
    with opened(options.name) as segment:
        if not segment.holds_handles:
            complain(
                f"{options.name!r} is a cache of values, not a map of handles; shmcache"
                " keys lists what is in it"
            )
            return USAGE_ERROR
        for entry in chosen_entries(segment, None, "text", values=True):
            key, value = segment.key(entry), segment.value(entry)
            owner = _owner(segment, entry)
            age, left = segment.age(entry), segment.left(entry)
            damaged = damaged or bool(entry.damage)
            listed.append(
                {"key": plain(key), **owner, "age": age, "ttl": left}
                | {"value": plain(value), "damage": entry.damage}
            )
            pid = f"{owner.get('owner') or 'gone'}"
            dead = "" if owner.get("owner_alive") else " (dead)"
            shown = "" if value is None else short(value_text(value), 60)
            times = span_text(age), span_text(left)
            rows.append((f"{pid}{dead}", *times, json_line(key), shown))
    if options.json:
        print_json({"name": options.name, "handles": listed})
    elif rows:
        print_table(("OWNER", "AGE", "LEFT", "KEY", "VALUE"), rows)
    else:
        print("no handles")
    return NO if damaged else 0


def _top_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Watch caches live: rates, hit ratio, evictions, locks, workers, keys.  Without"
        " NAME all of them, one on a line.  q ends it."
    )
    name_option(parser, nargs="?")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="seconds from frame to frame, 0.1 to 3600 (default: 1)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="print one frame, of one interval, and end; needs no terminal",
    )


def _top(options: argparse.Namespace) -> int:
    try:
        from shmcache.cli import top as _top
    except ImportError as error:
        return lacking("top", "cli", error)
    if not options.once and not (sys.stdout.isatty() and sys.stdin.isatty()):
        complain("top needs a terminal; --once prints one frame without one")
        return USAGE_ERROR
    return _top.run(options.name, options.interval, once=options.once)


def _interval(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.1 to 3600")
