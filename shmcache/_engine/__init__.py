"""The engine: everything that happens inside, or in place of, a shard's lock.

Upper layers import the engine, and the codecs that belong to it, from here.
"""

from __future__ import annotations

from shmcache._engine.slab import (
    MISSING,
    Slab,
    close_semaphores,
    compiled,
    leave_on_exit,
    left_before_exit,
    touch_buffers,
)
from shmcache._format.keys import decode_key, encode_key
from shmcache._format.values import (
    Codec,
    FunctionCodec,
    HandleCodec,
    MsgpackCodec,
    MsgspecCodec,
    decode_tagged,
    make_codec,
)

__all__ = [
    "MISSING",
    "Codec",
    "FunctionCodec",
    "HandleCodec",
    "MsgpackCodec",
    "MsgspecCodec",
    "Slab",
    "close_semaphores",
    "compiled",
    "decode_key",
    "decode_tagged",
    "encode_key",
    "leave_on_exit",
    "left_before_exit",
    "make_codec",
    "touch_buffers",
]
