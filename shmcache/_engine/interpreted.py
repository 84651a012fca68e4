"""The interpreted engine: the same names as ``compiled``, imported from the parts."""

from shmcache._engine.lock import close_semaphores, leave_on_exit, left_before_exit
from shmcache._engine.operations import Engine, compiled
from shmcache._engine.recency import recency_buffers
from shmcache._engine.words import MISSING
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
    "Engine",
    "FunctionCodec",
    "HandleCodec",
    "MsgpackCodec",
    "MsgspecCodec",
    "close_semaphores",
    "compiled",
    "decode_key",
    "decode_tagged",
    "encode_key",
    "leave_on_exit",
    "left_before_exit",
    "make_codec",
    "recency_buffers",
]
