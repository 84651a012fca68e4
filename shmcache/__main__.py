"""``python -m shmcache`` is the ``shmcache`` command."""

from __future__ import annotations

import sys

from shmcache.cli import main

sys.exit(main())
