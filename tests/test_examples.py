"""The examples do what they say."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_pools import http_servers, postgres

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 120  # s; only a failing test waits so long

pytestmark = [pytest.mark.once, pytest.mark.slow]


def run(name: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("library", ["urllib3", "requests", "httpx"])
def test_http_pools(library: str) -> None:
    """Each HTTP example fetches pages, with one pool for each server."""
    pytest.importorskip(library)
    with http_servers(2) as (one, two):
        lines = run(f"pools_{library}.py", one, two, f"{one}again")
    assert [f"{one} 5 bytes", f"{two} 5 bytes", f"{one}again 5 bytes", "2 pools"] == [
        re.sub(r"\b\d bytes", "5 bytes", line) for line in lines
    ]


def test_database_pool() -> None:
    """The psycopg example queries a database."""
    pytest.importorskip("psycopg_pool")
    with postgres() as port:
        dsn = f"host=127.0.0.1 port={port} user=test dbname=postgres"
        assert ["[('postgres',)]", "1 pools"] == run("pools_psycopg.py", dsn)


def test_correlations() -> None:
    """The other worker knows the request; both spans end, and the forgotten one says
    why."""
    pytest.importorskip("opentelemetry.sdk.trace")
    other, *ended = run("correlations_otel.py")
    assert re.fullmatch(r"other worker: [0-9a-f]{32} \{'user': 'u7'\}", other)
    assert [
        "ended: GET /orders {'http.status_code': 200}",
        "ended: GET /never-ends {'shmcache.evicted': 'CLOSED'}",
    ] == [line for line in ended if line]


def test_configs(tmp_path: Path) -> None:
    """The TOML example tells of a file's first content, and of its change."""
    pytest.importorskip("watchfiles")
    path = tmp_path / "app.toml"
    path.write_text("n = 1\n")
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "configs_toml.py"), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as example:
        assert example.stdout is not None
        overdue = threading.Timer(PATIENCE, example.kill)
        overdue.start()
        try:
            first = example.stdout.readline()
            with path.open("r+") as file:  # in one piece: never seen empty
                file.write("n = 2\n")
            second = example.stdout.readline()
            example.send_signal(signal.SIGINT)
            rest = example.stdout.read()
            code = example.wait(PATIENCE)
        finally:
            overdue.cancel()
            example.kill()
    assert f"{path} None -> {{'n': 1}}\n" == first
    assert f"{path} {{'n': 1}} -> {{'n': 2}}\n" == second
    assert "loads\n" == rest[-6:]
    assert 0 == code


@pytest.mark.servers
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["each", "preload"])
def test_proxy_keeps_its_bound(preload: list[str]) -> None:
    """Under gunicorn the dicts' sockets grow past the bound, those of ConnectionPools
    stay about it, and as many pools are closed as were opened."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("urllib3")
    lines = run("proxy_run.py", "--seconds", "2", *preload)
    samples = [re.fullmatch(r" *[\d.]+ +(\d+) +(\d+)", line) for line in lines]
    dicts, bounded = zip(*(map(int, m.groups()) for m in samples if m), strict=True)
    assert max(dicts) > 40
    # An evicted pool may be open for a moment beside the one that came for it: one in
    # each of the four workers that closes it, and one that is being opened.
    assert max(bounded) <= 20 + 2 * 4
    counts = re.fullmatch(
        r"pools opened: (\d+), closed: (\d+), evicted for the bound's sake: (\d+)",
        lines[-1],
    )
    assert counts is not None
    opened, closed, evicted = map(int, counts.groups())
    assert opened == closed
    assert 0 < evicted <= opened - 20
