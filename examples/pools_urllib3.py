"""``ConnectionPools`` with urllib3: one pool for each server and worker.

python examples/pools_urllib3.py http://127.0.0.1:8000/
"""

from __future__ import annotations

import sys

import urllib3

from shmcache.pools import ConnectionPools, PoolSettings

pools = ConnectionPools(
    "example-urllib3",
    factory=urllib3.connection_from_url,
    settings=PoolSettings(max_server_pools=100),
)


def fetch(url: str) -> bytes:
    """Return the page at a URL; its connection is kept for the next call."""
    parts = urllib3.util.parse_url(url)
    server = f"{parts.scheme}://{parts.netloc}"
    with pools.lease(server) as pool:
        return bytes(pool.request("GET", parts.request_uri).data)


if __name__ == "__main__":
    for address in sys.argv[1:]:
        print(address, len(fetch(address)), "bytes")
    print(pools.stats().opened, "pools")
