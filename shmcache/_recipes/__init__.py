"""Recipes over a cache's atomic calls: single flight, and memoized functions.

Reading order: single_flight.py, memoize.py.  Neither imports ``Cache``: each has a
small class of the callables that it needs, and ``Cache`` makes an object of it.
"""
