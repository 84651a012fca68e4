"""The parts of a handle map, which handles.py puts together.

Reading order: registry.py (the shared map: entries, mailboxes, reaping), delivery.py
(how the owner of a handle learns that its entry has gone, exactly once),
process_state.py (registering, making and leasing in one process).
"""
