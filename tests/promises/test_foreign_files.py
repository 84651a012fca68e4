"""Promise 8: files that are not the cache's own, or are damaged, are refused."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peers import SHM, names_of, run

from shmcache import Cache, SegmentCorrupt, SegmentRefused
from shmcache._format import layout as L

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def snapshot(name: str) -> dict[str, Any]:
    """All that is in /dev/shm for a cache: kinds, modes, owners and contents."""
    found = {}
    for entry in names_of(name):
        path = Path(SHM, entry)
        is_ = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(is_.st_mode) else None
        found[entry] = (is_.st_mode, is_.st_uid, is_.st_ino, content)
    return found


@pytest.fixture
def left(name: str) -> Iterator[tuple[str, Path, Path]]:
    """The name of a persistent cache that no process uses, its segment, and its lock
    file."""
    with Cache(name, max_entries=10, persist=True) as cache:
        cache["there"] = "value"
        names = cache._names
    yield name, Path(names.segment_path), Path(names.lock_path)
    for entry in names_of(name):
        path = Path(SHM, entry)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def refused(name: str, error: type[Exception], reason: str) -> None:
    """Assert that attaching and creating are refused for this reason and change
    nothing."""
    before = snapshot(name)
    uses: tuple[Callable[[], object], ...] = (
        lambda: Cache.attach(name),
        lambda: Cache(name, max_entries=10, persist=True),
        lambda: Cache(name, max_entries=99),
    )
    for use in uses:
        with pytest.raises(error, match=reason):
            use()
        assert before == snapshot(name)


def overwrite(path: Path, word: int, value: int) -> None:
    """Change a word of a file."""
    with path.open("r+b") as file:
        file.seek(8 * word)
        file.write(struct.pack("=Q", value))


@pytest.mark.once
@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        (L.H_MAGIC, L.MAGIC ^ 1, "is not a segment of this package"),
        (L.H_MAGIC, int.from_bytes(b"shmcache", "big"), "is not a segment"),
        (L.H_FORMAT, L.FORMAT + 1, f"has format {L.FORMAT + 1}, .* format {L.FORMAT}"),
        (L.H_SHARDS, 0, "claims 0 shards"),
        (L.H_SHARDS, 1 << 63, "claims 9223372036854775808 shards"),
        (L.H_SIZE, 1 << 40, "damaged geometry"),
        (L.H_SLOTS, 1 << 32, "damaged geometry"),
        (L.H_BLOCK_SIZE, 0, "damaged geometry"),
        (L.H_MAX_BYTES, 1 << 62, "damaged geometry"),
        (L.H_MAX_ENTRIES, 1 << 63, "damaged geometry"),
        (L.NAME_AT // 8, 0, "was made for a cache named"),
    ],
)
def test_8_damaged_header(
    left: tuple[str, Path, Path], word: int, value: int, reason: str
) -> None:
    """A segment whose header makes no sense is refused, says why, and stays as is."""
    name, segment, _ = left
    overwrite(segment, word, value)
    refused(name, SegmentCorrupt, reason)


@pytest.mark.once
@pytest.mark.parametrize("shift", [-1, 1, -4096, 4096, 1 << 20])
def test_8_wrong_size(left: tuple[str, Path, Path], shift: int) -> None:
    """A segment that was cut short or made longer is refused, without a SIGBUS."""
    name, segment, _ = left
    size = segment.stat().st_size
    os.truncate(segment, size + shift)
    refused(
        name, SegmentCorrupt, f"has {size + shift:,} bytes and should have {size:,}"
    )


@pytest.mark.once
@pytest.mark.parametrize("size", [0, 1, 7, 4096])
def test_8_stump(left: tuple[str, Path, Path], size: int) -> None:
    """A file that is too short for a header is refused, unless it is as empty as a
    killed creator leaves it."""
    name, segment, _ = left
    os.truncate(segment, size)
    if size:
        refused(name, SegmentCorrupt, f"has {size} bytes, too few")
    else:
        with Cache(name, max_entries=10, persist=True) as cache:
            assert len(cache) == 0


@pytest.mark.once
@pytest.mark.parametrize("which", ["segment", "lock file"])
@pytest.mark.parametrize("mode", [0o644, 0o660, 0o606, 0o777])
def test_8_wrong_mode(left: tuple[str, Path, Path], which: str, mode: int) -> None:
    """A file that other users can open is refused."""
    name, *paths = left
    paths[which == "lock file"].chmod(mode)
    refused(name, SegmentRefused, f"has mode {mode:o}, so others can open it")


@pytest.mark.once
@pytest.mark.parametrize("which", ["segment", "lock file"])
@pytest.mark.parametrize("what", ["symlink", "dangling", "directory", "fifo", "socket"])
def test_8_no_regular_file(
    left: tuple[str, Path, Path], tmp_path: Path, which: str, what: str
) -> None:
    """Another kind of file under the name of a segment or lock file is refused; it is
    neither followed nor waited for."""
    name, *paths = left
    path = paths[which == "lock file"]
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    other.chmod(0o600)
    path.unlink()
    if what == "symlink":
        path.symlink_to(other)
    elif what == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path, 0o600)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    refused(name, SegmentRefused, "is not a regular file|is no file of ours")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.once
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["segment", "lock file"])
def test_8_another_users_file(left: tuple[str, Path, Path], which: str) -> None:
    """Another user's file under this user's name is refused, also to root."""
    name, *paths = left
    os.chown(paths[which == "lock file"], 12345, -1)
    refused(name, SegmentRefused, "belongs to user 12345, and we are user 0")


@pytest.mark.once
def test_8_refusal_leaves_no_lock_file(left: tuple[str, Path, Path]) -> None:
    """A refused foreign segment leaves no new lock file beside it."""
    name, segment, lock_file = left
    lock_file.unlink()
    segment.chmod(0o644)
    refused(name, SegmentRefused, "has mode 644")


@pytest.mark.damaged
def test_8_header_damaged_while_in_use(
    name: str, make_cache: Callable[..., Cache]
) -> None:
    """Attached processes go on when the magic word is overwritten; newcomers are
    refused, and the data stays."""
    cache = make_cache(name, max_entries=10)
    cache["there"] = "value"
    cache._attachment.words[L.H_MAGIC] = 0
    assert run(REFUSED, name).count("no magic word") == 2
    cache["more"] = 1
    assert (cache["there"], cache["more"]) == ("value", 1)
    cache._attachment.words[L.H_MAGIC] = L.MAGIC
    assert cache.check() == []


REFUSED = """
import sys
from shmcache import Cache, SegmentCorrupt
for use in Cache.attach, Cache:
    try:
        use(sys.argv[1])
    except SegmentCorrupt as error:
        print(error)
"""
