"""Show what a bound for the host does to the sockets of 4 workers and 50 servers.

The script starts 50 small servers on loopback, and gunicorn with proxy_app.py: first
with a dict of pools in each worker, then with ``ConnectionPools`` and a bound of 20
pools.  Clients request random servers, and the script prints how many sockets the
workers have open, as the kernel lists them.

    python examples/proxy_run.py [--seconds 5] [--preload]

The exit code is 0 if all requests were answered, and every pool that was opened was
closed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from shmcache import HandleMap
from shmcache.pools import PoolSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS, SERVERS, BOUND, CLIENTS = 4, 50, 20, 6
# These are the seconds from sample to sample, and until other servers are requested
# most.
EVERY = 0.5
HOT = 4  # how many servers are requested most
THINK = 0.01  # s from an answer to the next request
PATIENCE = 60.0  # s
NAME = f"proxy-{os.getpid()}"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # A server that sends one small answer after the other on a kept connection
    # (HTTP/1.1).
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
            await writer.drain()
    writer.close()


@contextmanager
def upstreams() -> Iterator[list[int]]:
    """Run the servers in a thread; yields their ports."""
    loop = asyncio.new_event_loop()

    async def start() -> list[asyncio.Server]:
        return [
            await asyncio.start_server(_answer, "127.0.0.1", 0) for _ in range(SERVERS)
        ]

    async def stop() -> None:
        for server in servers:
            server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    servers = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield [server.sockets[0].getsockname()[1] for server in servers]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def gunicorn(bound: int, preload: bool) -> Iterator[tuple[psutil.Process, int]]:
    """Run gunicorn with the app; yields its process and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", f"--workers={WORKERS}"),
                *(f"--bind=fd://{listener.fileno()}", "--log-level=warning"),
                *(f"--chdir={Path(__file__).parent}", "proxy_app:app"),
                *(["--preload"] if preload else []),
            ],
            env={**os.environ, "PROXY_BOUND": str(bound), "PROXY_NAME": NAME},
            pass_fds=[listener.fileno()],
        )
        try:
            yield psutil.Process(process.pid), listener.getsockname()[1]
        finally:
            process.terminate()
            process.wait(PATIENCE)


def open_sockets(ports: set[int]) -> int:
    """Return how many connections to the servers the kernel lists for the workers."""
    with open("/proc/net/tcp") as table:
        next(table)
        fields = [line.split() for line in table]
    return sum(
        state == "01" and int(remote.rpartition(":")[2], 16) in ports
        for _, _, remote, state, *_ in fields
    )


class Load:
    """Clients that mostly request a few servers, and after a while other ones."""

    def __init__(self, address: int, ports: list[int]) -> None:
        self._address = address
        self._ports = ports
        self._stop = threading.Event()
        self.answers = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed,)) for seed in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop after the requests that are under way have been answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        started = time.monotonic()
        while not self._stop.wait(THINK):
            first = HOT * int((time.monotonic() - started) / EVERY)
            hot = [(first + n) % SERVERS for n in range(HOT)]
            many = rng.random() < 0.95
            port = self._ports[rng.choice(hot if many else range(SERVERS))]
            try:
                self._get(f"/{port}/")
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.errors.append(repr(error))
            else:
                with self._lock:
                    self.answers += 1

    def _get(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._address, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.read() != b"ok\n":
                raise http.client.HTTPException(f"{path}: {answer.status}")
        finally:
            connection.close()


def measure(
    bound: int, ports: list[int], options: argparse.Namespace
) -> Iterator[tuple[float, int | Load]]:
    """Run the app under load; yields the time and the open sockets of each sample.

    The last pair has the load itself, with its counts.
    """
    with gunicorn(bound, options.preload) as (server, address):
        deadline = time.monotonic() + PATIENCE
        while len(server.children()) < WORKERS:
            if time.monotonic() > deadline:
                raise SystemExit("gunicorn did not start its workers")
            time.sleep(0.05)
        load = Load(address, ports)
        started = time.monotonic()
        try:
            for _ in range(max(1, round(options.seconds / EVERY))):
                time.sleep(EVERY)
                yield time.monotonic() - started, open_sockets(set(ports))
        finally:
            load.end()
        yield time.monotonic() - started, load


def main() -> int:
    """Run both variants, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds of load for each variant"
    )
    parser.add_argument(
        "--preload", action="store_true", help="load the app before the fork"
    )
    options = parser.parse_args()
    settings = PoolSettings(max_server_pools=BOUND)
    with upstreams() as ports:
        print(
            f"{WORKERS} workers, {SERVERS} servers; sockets open in all workers:",
            flush=True,
        )
        *before, (_, plain) = measure(0, ports, options)
        print(f"{'seconds':>8} {'dicts':>8} {f'bound {BOUND}':>10}")
        # This process is attached to the map as well, so that the counts are still
        # there after gunicorn has ended.
        with HandleMap(
            NAME,
            max_entries=settings.max_server_pools,
            ttl=settings.server_pool_ttl,
            cleanup_interval=settings.pool_cleanup_interval,
        ) as registry:
            bounded = plain
            for n, (at, sample) in enumerate(measure(BOUND, ports, options)):
                if isinstance(sample, Load):
                    bounded = sample
                else:
                    print(f"{at:8.1f} {before[n][1]:8} {sample:10}", flush=True)
            counts = registry.stats().host
    assert isinstance(plain, Load)
    assert isinstance(bounded, Load)
    print(f"{'requests':>8} {plain.answers:8} {bounded.answers:10}")
    print(
        f"pools opened: {counts.handles_opened}, closed: {counts.handles_closed},"
        f" evicted for the bound's sake: {counts.evicted}"
    )
    errors = plain.errors + bounded.errors
    if errors:
        print(f"{len(errors)} requests failed, the first: {errors[0]}")
    return int(bool(errors) or counts.handles_opened != counts.handles_closed)


if __name__ == "__main__":
    sys.exit(main())
