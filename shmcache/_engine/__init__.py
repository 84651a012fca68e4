"""The engine: everything that happens inside, or in place of, a shard's lock.

The same parts run compiled (one extension, ``compiled``) or ``interpreted``.  A process
uses the compiled engine if it was built, unless the environment variable
``SHMCACHE_ENGINE`` says "interpreted"; "compiled" makes the import fail if
the compiled engine was not built.  Both can be loaded side by side, because their
modules have different names.

Upper layers import the engine, and the codecs that were built with it, from here.
README.md in this folder has the rules that all parts keep.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

_wanted = os.environ.get("SHMCACHE_ENGINE", "")
if _wanted not in {"", "compiled", "interpreted"}:
    raise ImportError(
        f"SHMCACHE_ENGINE is {_wanted!r}; set it to compiled or interpreted, or unset"
        " it to use the compiled engine if there is one"
    )
if TYPE_CHECKING or _wanted == "interpreted":
    from shmcache._engine import interpreted as chosen
else:
    try:
        import shmcache._engine.compiled as chosen
    except ModuleNotFoundError as error:
        # An engine that was built but cannot be loaded is an error, which is not
        # hidden.
        if error.name != "shmcache._engine.compiled":
            raise
        if _wanted:
            raise ImportError(
                "SHMCACHE_ENGINE=compiled, but the engine was not compiled: install a C"
                " compiler and Python's headers, then reinstall shmcache"
            ) from error
        from shmcache._engine import interpreted as chosen

MISSING = chosen.MISSING
Codec = chosen.Codec
Engine = chosen.Engine
FunctionCodec = chosen.FunctionCodec
HandleCodec = chosen.HandleCodec
MsgpackCodec = chosen.MsgpackCodec
MsgspecCodec = chosen.MsgspecCodec
close_semaphores = chosen.close_semaphores
decode_key = chosen.decode_key
decode_tagged = chosen.decode_tagged
encode_key = chosen.encode_key
is_compiled: bool = chosen.compiled
leave_on_exit = chosen.leave_on_exit
left_before_exit = chosen.left_before_exit
make_codec = chosen.make_codec
recency_buffers = chosen.recency_buffers
