"""``ConnectionPools`` with httpx: one client for each server and worker.

python examples/pools_httpx.py http://127.0.0.1:8000/
"""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import httpx

from shmcache.pools import ConnectionPools, PoolSettings

pools = ConnectionPools(
    "example-httpx",
    factory=lambda server: httpx.Client(base_url=server, timeout=10),
    settings=PoolSettings.high_throughput(),
)


def fetch(url: str) -> bytes:
    """Return the page at a URL; its connection is kept for the next call."""
    parts = urlsplit(url)
    with pools.lease(f"{parts.scheme}://{parts.netloc}") as client:
        answer: httpx.Response = client.get(parts.path or "/")
        return answer.raise_for_status().content


if __name__ == "__main__":
    for address in sys.argv[1:]:
        print(address, len(fetch(address)), "bytes")
    print(pools.stats().opened, "pools")
