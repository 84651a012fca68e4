"""Looking at caches: from outside, and as numbers for exporters, logs and reports.

Read in this order::

    mapped.py     a segment's file mapped for reading: header, shards, words
    records.py    the records of a mapped segment, each as it was at one moment
    snapshot.py   the whole segment: counts, workers, locks, keys and values
    measures.py   the table of all measures, for all exporters
    stats_log.py  ``log_stats()``: statistics in the log, by one process of the host
    report.py     ``report()``: the statistics of all ready-made maps of a process
"""
