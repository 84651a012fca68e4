"""The segment's format: offsets, keys and values as bytes, and what is sound.

Read in this order: ``layout`` (every offset, and who may write what), ``keys`` and
``values`` (bytes of keys and values), ``richtypes`` (what msgpack lacks), ``check`` (an
independent reader of the format: the specification of a sound segment).  ``shim``
stands in for the ``cython`` module where Cython is not installed.
"""
