"""The C headers of the engine, each alone in a small program."""

from __future__ import annotations

import fcntl
import random
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

import shmcache

if TYPE_CHECKING:
    from collections.abc import Callable

HEADERS = Path(shmcache.__file__).parent / "_engine"

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler is not installed"),
]

XXH3 = r"""
#include <stdio.h>
#include "xxh3.h"

/* Lines of "seed length bytes in hex" become lines of "hash checksum". */
int main(void)
{
    static char bytes[128];
    shm_word seed;
    unsigned byte;
    int n, i;
    while (scanf("%llu %d", &seed, &n) == 2) {
        for (i = 0; i < n; i++) {
            if (scanf("%2x", &byte) != 1) return 1;
            bytes[i] = (char)byte;
        }
        printf("%llu %llu\n", shm_xxh3(bytes, n, seed), shm_checksum(bytes, n));
    }
    return 0;
}
"""

WORDS = r"""
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include "atomics.h"

static shm_word count, message, sent, taken;

static void *add(void *unused)
{
    int i;
    for (i = 0; i < 100000; i++) {
        shm_word old = shm_load(&count);
        while (!shm_cas(&count, old, old + 1)) { shm_pause(); old = shm_load(&count); }
    }
    return unused;
}

/* Wait until a word has a value; there may be one processor for both threads. */
static void await(const shm_word *word, shm_word value)
{
    while (shm_load(word) != value) { shm_pause(); sched_yield(); }
}

static void *send(void *unused)
{
    shm_word i;
    for (i = 1; i <= 5000; i++) {
        await(&taken, i - 1);
        message = i * i;
        shm_store(&sent, i);
    }
    return unused;
}

int main(void)
{
    pthread_t threads[4];
    shm_word word = 1, before, i;
    int n;
    printf("%d ", shm_cas(&word, 2, 3));
    printf("%llu ", shm_load(&word));
    printf("%d ", shm_cas(&word, 1, ~0ull));
    printf("%d ", shm_load(&word) == ~0ull);
    shm_store(&word, 7);
    printf("%llu\n", shm_load(&word));

    for (n = 0; n < 4; n++) pthread_create(&threads[n], NULL, add, NULL);
    for (n = 0; n < 4; n++) pthread_join(threads[n], NULL);
    printf("%llu\n", count);

    pthread_create(&threads[0], NULL, send, NULL);
    for (i = 1; i <= 5000; i++) {
        await(&sent, i);
        if (message != i * i) return 1;
        shm_store(&taken, i);
    }
    pthread_join(threads[0], NULL);

    printf("%d %d ", shm_lowest_bit(1), shm_lowest_bit(40));
    printf("%d\n", shm_lowest_bit(1ull << 63));
    before = shm_now();
    shm_read_fence();
    shm_write_fence();
    shm_prefetch(&word);
    printf("%d\n", before > 0 && shm_now() >= before);
    return 0;
}
"""

SEMAPHORES = r"""
#include <stdio.h>
#include "atomics.h"

int main(void)
{
    sem_t semaphore;
    shm_word sem = (shm_word)(uintptr_t)&semaphore, before;
    sem_init(&semaphore, 0, 1);
    printf("%d ", shm_sem_value(sem));
    printf("%d ", shm_sem_try(sem));
    printf("%d ", shm_sem_try(sem));
    before = shm_now();
    printf("%d ", shm_sem_wait(sem, 20000000));
    printf("%d ", shm_now() - before >= 19000000);
    shm_sem_post(sem);
    printf("%d ", shm_sem_wait(sem, 3000000000ull));
    printf("%d\n", shm_sem_value(sem));

    shm_sem_post(0);
    printf("%d %d ", shm_sem_try(0), shm_sem_wait(0, 1000000000ull));
    printf("%d ", shm_sem_value(0));
    printf("%d\n", shm_sem_open("/shmcache-test-no-such-semaphore") == 0);
    return 0;
}
"""

EXIT = r"""
#include <stdio.h>
#include <sys/wait.h>
#include "exit.h"

/* Arguments: the lock file, another file, and what to do before exit(). */
int main(int count, char **arguments)
{
    char paths[4096];
    int first = open(arguments[1], O_RDWR);
    ptrdiff_t size = 1 + snprintf(paths, sizeof paths, "%s", arguments[1]);
    size += 1 + snprintf(paths + size, sizeof paths - size, "%s", arguments[2]);
    shm_word leaver = shm_on_exit(first, 8, 4, paths, size);
    if (count != 4 || first < 0 || !leaver) return 1;
    if (!shm_lock_bytes(first, F_SETLK, F_WRLCK, 9, 1)) return 1;
    switch (arguments[3][0]) {
    case 'l': shm_has_left(leaver, first); break;        /* left before */
    case 'o': shm_has_left(leaver, first + 1); break;    /* other lock file left */
    case 'u': unlink(arguments[1]); close(creat(arguments[1], 0600)); break;
    case 'f': if (fork() == 0) exit(0); else wait(NULL); /* a child exits first */
              _exit(0);
    case 'r': shm_has_left(leaver, first);               /* the leaver is used again */
              if (shm_on_exit(first, 8, 4, paths, size) != leaver) return 1;
    }
    exit(0);
}
"""


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str], Path]:
    """Compile a program as strictly as the compiler can, and return its path."""

    def compiled(source: str) -> Path:
        path = tmp_path / "program"
        subprocess.run(
            [
                *("cc", "-x", "c", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"),
                *("-Wno-unused-function", "-Wsign-compare", "-I", str(HEADERS)),
                *("-o", str(path), "-", "-pthread"),
            ],
            input=source,
            text=True,
            check=True,
        )
        return path

    return compiled


def output(*command: str | Path, given: str = "") -> str:
    """What a program that succeeds prints."""
    return subprocess.run(
        command, input=given, capture_output=True, text=True, check=True
    ).stdout


def test_xxh3_is_what_xxhash_computes(build: Callable[[str], Path]) -> None:
    """Every length up to 128, with seeds at the edges and random ones."""
    chance = random.Random(1)
    cases = [
        (seed, content)
        for n in range(129)
        for seed in (0, 1, 1 << 63, (1 << 64) - 1, *(chance.getrandbits(64),) * 2)
        for content in (bytes(n), b"\xff" * n, chance.randbytes(n))
    ]
    given = "".join(f"{seed} {len(data)} {data.hex()}\n" for seed, data in cases)
    expected = [
        f"{xxhash.xxh3_64_intdigest(data, seed)} {xxhash.xxh3_64_intdigest(data)}"
        for seed, data in cases
    ]
    assert output(build(XXH3), given=given).splitlines() == expected


def test_atomics(build: Callable[[str], Path]) -> None:
    """Words change at once and in order, also between threads; the clock runs."""
    assert output(build(WORDS)).splitlines() == [
        "0 1 1 1 7",
        "400000",
        "0 3 63",
        "1",
    ]


def test_semaphores(build: Callable[[str], Path]) -> None:
    """Permits are counted, a wait ends in time, and 0 is no semaphore."""
    assert output(build(SEMAPHORES)).splitlines() == ["1 1 0 0 1 1 0", "0 0 -1 1"]


@pytest.mark.parametrize(
    ("what", "row", "removed"),
    [
        pytest.param("nothing", None, True, id="last one out"),
        pytest.param("nothing", 8, False, id="another process has a row"),
        pytest.param("nothing", 12, True, id="a lock behind the rows is no row"),
        pytest.param("left before", None, False, id="has left by itself"),
        pytest.param("other left", None, True, id="has left another segment"),
        pytest.param("unlinked", None, False, id="the name has a newer file"),
        pytest.param("fork", None, False, id="a forked child is not the process"),
        pytest.param("reused", None, True, id="a leaver is used again"),
    ],
)
def test_exit_removes_the_files_of_the_last_process(
    build: Callable[[str], Path],
    tmp_path: Path,
    what: str,
    row: int | None,
    removed: bool,
) -> None:
    """At C's exit() the last process that has a row removes the files."""
    program = build(EXIT)
    lock_file, segment = tmp_path / "lock", tmp_path / "segment"
    lock_file.touch()
    segment.touch()
    with lock_file.open("r+b") as file:
        if row is not None:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, row)
        output(program, lock_file, segment, what)
    assert (not lock_file.exists(), not segment.exists()) == (removed, removed)
