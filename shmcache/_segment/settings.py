"""The settings of a cache: what all processes that share its segment must agree on.

``plan_settings`` makes them from the arguments of a constructor, the header of the
segment keeps them (see header.py), and ``Settings.require_same`` compares the two when
another process attaches with arguments of its own.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from shmcache._arguments import check_count, check_flag, parse_size, ttl_to_ns
from shmcache._format import layout as L
from shmcache.errors import ConfigMismatch

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("shmcache")

# These bound the default cleanup interval, in seconds.  If it were shorter, a process
# would spend its time on sweeps; if longer, expired entries would stay for too long.
MIN_CLEANUP, MAX_CLEANUP = 1.0, 300.0


@dataclass(frozen=True)
class Settings:
    """The settings that all processes that share a segment must agree on."""

    max_entries: int  # 0: bounded by bytes alone
    max_bytes: int
    ttl_ns: int  # 0: never
    sliding: bool
    jitter_ppm: int
    cleanup_ns: int
    shards: int
    persist: bool
    codec: str  # its name

    @property
    def geometry(self) -> L.Geometry:
        """Return the plan of the segment, which follows from these settings."""
        return L.plan_for(self.max_entries, self.max_bytes, self.shards)

    def capacities(self) -> list[int]:
        """Return how many entries each shard may hold."""
        blocks = self.geometry.blocks
        return [
            L.shard_capacity(self.max_entries, self.shards, shard, blocks)
            for shard in range(self.shards)
        ]

    def require_same(self, wanted: Settings, name: str) -> None:
        """Compare the settings of a segment with those that were asked for.

        Args:
            wanted: What was asked for.
            name: The cache, for the message.

        Raises:
            ConfigMismatch: If they differ; the message names each difference.
        """
        different = [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(wanted, field.name)
        ]
        if not different:
            return
        differences = "; ".join(
            f"{_argument(each)} is {_shown(each, getattr(self, each))}"
            f" but asked for {_shown(each, getattr(wanted, each))}"
            for each in different
        )
        log.warning(
            "cache %s exists with other settings: %s",
            name,
            differences,
            extra={
                "cache": name,
                "event": "config mismatch",
                "exists": {each: getattr(self, each) for each in different},
                "asked": {each: getattr(wanted, each) for each in different},
            },
        )
        raise ConfigMismatch(
            f"cache {name!r} exists with other settings: {differences}."
            " Ask for the same in all processes, use Cache.attach() to take what"
            f" is there, or remove it with: shmcache unlink {name}"
        )


# These settings have another unit than the constructor's argument: the table has the
# argument's name, and the setting in the argument's unit.
_SHOWN: dict[str, tuple[str, Callable[[Any], object]]] = {
    "ttl_ns": ("ttl", lambda v: f"{v / 1e9:g} s" if v else None),
    "jitter_ppm": ("jitter", lambda v: v / 1e6),
    "cleanup_ns": ("cleanup_interval", lambda v: f"{v / 1e9:g} s"),
}


def _argument(field: str) -> str:
    return _SHOWN[field][0] if field in _SHOWN else field


def _shown(field: str, value: object) -> object:
    return _SHOWN[field][1](value) if field in _SHOWN else repr(value)


# --- from a constructor's arguments -----------------------------------------------


def plan_settings(
    max_entries: Any,
    max_bytes: Any,
    ttl: Any,
    sliding: Any,
    jitter: Any,
    cleanup_interval: Any,
    shards: Any,
    persist: Any,
    codec: str,
) -> Settings:
    """Check a constructor's arguments and make the settings that they ask for.

    Args:
        max_entries: As for ``Cache``; so are the others up to ``persist``.
        max_bytes: None for 512 bytes an entry.
        ttl: Seconds; None means "never".
        sliding: Whether a hit renews the time to live.
        jitter: The largest part by which a TTL is shortened, from 0 to below 1.
        cleanup_interval: Seconds, None for a quarter of the TTL.
        shards: None for a number that follows from the other sizes.
        persist: Whether the segment outlives its last process.
        codec: The name of the codec.

    Raises:
        TypeError: If an argument has a type that makes no sense.
        ValueError: If an argument is out of bounds, or two of them contradict.
    """
    check_count(max_entries, "max_entries", 0, L.MAX_INDEX, "0 bounds by bytes alone")
    size = _size_for(max_entries, max_bytes)
    ttl_ns = 0 if ttl is None else ttl_to_ns(ttl)
    _check_jitter(jitter)
    if cleanup_interval is None:
        seconds = math.inf if ttl is None else ttl / 4
        cleanup_interval = min(MAX_CLEANUP, max(MIN_CLEANUP, seconds))
    settings = Settings(
        max_entries=max_entries,
        max_bytes=size,
        ttl_ns=ttl_ns,
        shards=_shards_for(max_entries, size, shards),
        sliding=check_flag(sliding, "sliding"),
        jitter_ppm=round(jitter * 1_000_000),
        cleanup_ns=ttl_to_ns(cleanup_interval, "cleanup_interval"),
        persist=check_flag(persist, "persist"),
        codec=codec,
    )
    _check_room(settings)
    return settings


def _size_for(max_entries: int, max_bytes: Any) -> int:
    # Return how many bytes of keys and values the segment has room for.
    if max_bytes is not None:
        return parse_size(max_bytes)
    if max_entries == 0:
        raise ValueError(
            "max_entries=0 leaves the bound to the bytes: give max_bytes, for"
            ' example "64 MiB"'
        )
    return L.default_max_bytes(max_entries)


def _check_jitter(jitter: Any) -> None:
    number = isinstance(jitter, (int, float)) and not isinstance(jitter, bool)
    if not number or not 0 <= jitter < 1:
        raise (ValueError if number else TypeError)(
            f"jitter must be a number from 0 to below 1, not {jitter!r}: it is the"
            " largest part by which a TTL is shortened, 0.1 for 10 %"
        )


def _shards_for(max_entries: int, size: int, shards: Any) -> int:
    if shards is None:
        return L.default_shards(max_entries, size)
    hint = "leave it out to have it follow from max_entries"
    check_count(shards, "shards", 1, L.MAX_SHARDS, hint)
    if max_entries and shards > max_entries:
        raise ValueError(f"shards={shards} cannot share {max_entries} entries; {hint}")
    return int(shards)


def _check_room(settings: Settings) -> None:
    # Each shard must have at least one block, and at most as many as links can count.
    geometry = settings.geometry
    size, shards = settings.max_bytes, settings.shards
    if size < shards * geometry.block_size:
        raise ValueError(
            f"max_bytes of {size} has no room for a block of {geometry.block_size}"
            f" bytes in each of {shards} shards; raise max_bytes or lower shards"
        )
    if geometry.blocks > L.MAX_INDEX:
        raise ValueError(
            f"max_bytes of {size} makes {geometry.blocks} blocks a shard, which is"
            f" over {L.MAX_INDEX}; raise shards, or lower max_bytes"
        )
