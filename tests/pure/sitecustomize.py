"""Makes shmcache.* import from its .py sources, ignoring built .so files beside them.

Active in every Python process that has this directory in PYTHONPATH.
"""

from __future__ import annotations

import sys
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec


class PureFinder:
    """A finder that knows one suffix: packages fall through to the usual finders."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, _target: object = None
    ) -> ModuleSpec | None:
        """The spec of a shmcache submodule's source, None for everything else."""
        if path and name.startswith("shmcache."):
            for root in path:
                source = Path(root, name.rpartition(".")[2] + ".py")
                if source.is_file():
                    return spec_from_file_location(name, source)
        return None


sys.meta_path.insert(0, PureFinder)
