"""Looking at caches: from outside, and as numbers for exporters, logs and reports."""
