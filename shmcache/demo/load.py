"""The load generator: clients that request pages, and what they saw.

The popularity of the pages follows Zipf's law, as on the web: the n-th most popular
page is requested in proportion to 1/n.  The sequence comes from a fixed seed, so that
two servers get the same requests.
"""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TIMEOUT = 30.0  # s, for one request
TOO_MANY_ERRORS = 10
SEED = 1


@dataclass
class Outcome:
    """What the clients of one load saw."""

    seconds: float = 0.0
    # For each answered request its latency in s, and the page's origin as the app calls
    # it.  All clients append at once; a list needs no lock for that.
    answers: list[tuple[float, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many requests were answered."""
        return len(self.answers)

    def count(self, origin: str) -> int:
        """How many requests were answered with a page of this origin."""
        return sum(origin == known for _, known in self.answers)

    def latency(self, quantile: float) -> float:
        """The time in s within which a part (0 to 1) of the requests was answered."""
        ordered = sorted(latency for latency, _ in self.answers)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def zipf(names: Sequence[str], count: int) -> list[str]:
    """``count`` names drawn by Zipf's law; each call gives the same ones."""
    rng = random.Random(SEED)  # noqa: S311 - predictable on purpose
    ranked = rng.sample(names, len(names))
    weights = itertools.accumulate(1 / rank for rank in range(1, len(ranked) + 1))
    return rng.choices(ranked, cum_weights=list(weights), k=count)


def fetch(address: tuple[str, int], name: str) -> str:
    """Request a page, and check that it is the right one.

    A socket takes less CPU time than ``http.client``, and the load generator should
    leave the CPUs to the server.

    Args:
        address: Host and port of the server.
        name: The name of the page.

    Returns:
        The page's origin, as the app calls it.

    Raises:
        OSError: The server cannot be reached, or did not answer in time.
        ValueError: The answer is not this page.
        KeyError: The answer lacks a header.
    """
    request = f"GET /{name}.html HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
    chunks = []
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        connection.sendall(request.encode())
        while chunk := connection.recv(1 << 18):
            chunks.append(chunk)
    head, _, body = b"".join(chunks).partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    if " 200 " not in f"{status} ":
        raise ValueError(f"{name}: {status or 'no answer'}")
    if len(body) != int(headers["Content-Length"]):
        raise ValueError(f"{name}: {len(body)} bytes instead of {headers}")
    if f" {name}</title>".encode() not in body[:500]:
        raise ValueError(f"{name}: another page came: {body[:100]!r}")
    return headers["X-Page"]


class Load:
    """Clients that work through a sequence of names; each has one request at a time.

    The load ends after ``seconds``, or at the end of the sequence.  The names that were
    requested until then are a prefix of the sequence.

    Args:
        address: Host and port of the server.
        names: The names of the pages, in the order of the requests.
        seconds: How long the load lasts at most.
        clients: How many clients there are.
    """

    def __init__(
        self,
        address: tuple[str, int],
        names: Sequence[str],
        seconds: float,
        clients: int,
    ) -> None:
        self._address = address
        self._names = names
        self._seconds = seconds
        self._next = itertools.count()  # calling next() on it is atomic
        self._halt = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, daemon=True) for _ in range(clients)
        ]
        self.outcome = Outcome()

    def run(self, tick: Callable[[float, int], None], every: float) -> Outcome:
        """Run the load.

        Args:
            tick: Called with the part that is done (0 to 1) and the number of answered
                requests.  An exception that it raises ends the load.
            every: Seconds between two calls of ``tick``.
        """
        started = time.perf_counter()
        self._deadline = started + self._seconds
        for thread in self._threads:
            thread.start()
        try:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(every)
                    tick(self._fraction(), self.outcome.requests)
        finally:
            self._halt.set()
        self.outcome.seconds = time.perf_counter() - started
        return self.outcome

    def _fraction(self) -> float:
        left = (self._deadline - time.perf_counter()) / self._seconds
        done = self.outcome.requests / len(self._names)
        return min(1.0, max(1 - left, done))

    def _client(self) -> None:
        outcome = self.outcome
        while not self._halt.is_set() and time.perf_counter() < self._deadline:
            index = next(self._next)
            if index >= len(self._names):
                return
            started = time.perf_counter()
            try:
                origin = fetch(self._address, self._names[index])
            except (OSError, ValueError, KeyError) as error:
                outcome.errors.append(f"{type(error).__name__}: {error}")
                if len(outcome.errors) >= TOO_MANY_ERRORS:
                    self._halt.set()
            else:
                outcome.answers.append((time.perf_counter() - started, origin))
