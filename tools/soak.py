"""Run ``shmcache soak`` from a checkout: ``python tools/soak.py --help``."""

from __future__ import annotations

import sys

from shmcache.soak import main

if __name__ == "__main__":
    sys.exit(main(prog="soak"))
