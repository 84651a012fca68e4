"""The segment as files: names, settings, header, semaphores, creation, removal.

Reading order: ``names`` (what the files are called, and which files we trust),
``settings`` (what all processes must agree on), ``header`` (the settings as bytes),
``semaphores`` and ``block`` (the two kinds of files), ``create`` (making and removing a
whole segment), ``closed_view`` (the object that replaces the memory after close()).
"""
