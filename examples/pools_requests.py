"""``ConnectionPools`` with requests: one session for each server and worker.

python examples/pools_requests.py http://127.0.0.1:8000/
"""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import requests

from shmcache.pools import ConnectionPools, PoolSettings

pools = ConnectionPools(
    "example-requests",
    factory=lambda _: requests.Session(),
    settings=PoolSettings.conservative(),
)


def fetch(url: str) -> bytes:
    """Return the page at a URL; its connection is kept for the next call."""
    with pools.lease(urlsplit(url).netloc) as session:
        answer: requests.Response = session.get(url, timeout=10)
        answer.raise_for_status()
        return answer.content


if __name__ == "__main__":
    for address in sys.argv[1:]:
        print(address, len(fetch(address)), "bytes")
    print(pools.stats().opened, "pools")
