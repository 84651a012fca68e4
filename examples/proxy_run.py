"""What a host-wide bound does: open sockets of 4 workers that talk to 50 servers.

Starts 50 small servers on loopback, and gunicorn with proxy_app.py, first with a dict
of pools in each worker, then with ``ConnectionPools`` and a bound of 20 pools; asks for
random servers, and prints how many sockets the workers have open, seen from outside.

    python examples/proxy_run.py [--seconds 5] [--preload]

Exit code 0: all requests were answered, and every pool that was opened was closed.
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
EVERY = 0.5  # s, from sample to sample, and until other servers are asked for
HOT = 4  # servers that are asked for most
THINK = 0.01  # s, from answer to question
PATIENCE = 60.0  # s
NAME = f"proxy-{os.getpid()}"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # HTTP/1.1, one small answer after the other on a connection that is kept.
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
            await writer.drain()
    writer.close()


@contextmanager
def upstreams() -> Iterator[list[int]]:
    """The servers, in a thread; their ports."""
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
    """Gunicorn with the app; its process and port."""
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
    """The connections to the servers, as the kernel lists them: the workers' ends."""
    with open("/proc/net/tcp") as table:
        next(table)
        fields = [line.split() for line in table]
    return sum(
        state == "01" and int(remote.rpartition(":")[2], 16) in ports
        for _, _, remote, state, *_ in fields
    )


class Load:
    """Clients that ask mostly for a few servers, and after a while for others."""

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
        """Stop, when what is under way has been answered."""
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
    """The open sockets of a run, sample by sample; in the end, the load."""
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
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of load, each")
    parser.add_argument("--preload", action="store_true", help="load, then fork")
    options = parser.parse_args()
    settings = PoolSettings(max_server_pools=BOUND)
    with upstreams() as ports:
        print(
            f"{WORKERS} workers, {SERVERS} servers; sockets open in all workers:",
            flush=True,
        )
        *before, (_, plain) = measure(0, ports, options)
        print(f"{'seconds':>8} {'dicts':>8} {f'bound {BOUND}':>10}")
        # Attached meanwhile, so that the counts are still there when gunicorn is not.
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
