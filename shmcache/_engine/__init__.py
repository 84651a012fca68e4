"""The engine: everything that happens inside, or in place of, a shard's lock."""
