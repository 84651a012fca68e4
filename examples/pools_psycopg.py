"""``ConnectionPools`` with psycopg's pool: one for each database and worker.

python examples/pools_psycopg.py "host=127.0.0.1 dbname=postgres"
"""

from __future__ import annotations

import sys
from typing import Any

from psycopg_pool import ConnectionPool

from shmcache.pools import ConnectionPools, PoolSettings

pools = ConnectionPools(
    "example-psycopg",
    factory=lambda dsn: ConnectionPool(dsn, min_size=1, max_size=4, open=True),
    settings=PoolSettings(max_server_pools=50, server_pool_ttl=600.0),
)


def query(dsn: str, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows that a statement returns."""
    with pools.lease(dsn) as pool, pool.connection() as connection:
        rows: list[tuple[Any, ...]] = connection.execute(statement).fetchall()
        return rows


if __name__ == "__main__":
    for database in sys.argv[1:]:
        print(query(database, "SELECT current_database()"))
    print(pools.stats().opened, "pools")
