"""What is built of a cache's atomic calls: single flight and memoized functions."""
