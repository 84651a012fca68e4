"""The segment's format: offsets, keys and values as bytes, and what is sound.

Read in this order:

- ``layout``: every offset, and who may write what;
- ``fields``: fields packed into a word, tokens of workers, addresses;
- ``keys``, ``values``, ``richtypes``: keys and values as bytes, the last one for types
  that msgpack lacks;
- ``seqlock``: how to read words that a writer may change meanwhile;
- ``check``: an independent reader of the format, and so the specification of a sound
  segment.

The compiled engine includes ``fields``, ``keys``, ``richtypes`` and ``values``.
Interpreted, ``shim`` stands in for the ``cython`` module.
"""
