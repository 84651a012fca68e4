"""Recipes over a cache's atomic calls: single flight, and memoized functions.

Reading order: single_flight.py, memoize.py.  Neither knows ``Cache``: each says in a
small class of callables what it uses of one, and ``Cache`` makes it.
"""
