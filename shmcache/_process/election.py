"""Elections: at most one process of the host exports metrics, and one logs statistics.

Problem: the counts are the host's, so if all workers reported them, a reader that sums
over workers would see a multiple; and the worker that reports may die at any time.

Mechanism: an office is a kernel lock on one byte of the lock file (see lockfile.py).
The process that has the lock does the work, and all others ask again when they would
do it next.

Death in the middle: the kernel drops the lock, and the next process that asks has the
office.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcache._process.lockfile import Office

if TYPE_CHECKING:
    from shmcache._process.attachment import Attachment

__all__ = ["Office", "elected", "resign"]


def elected(attachment: Attachment, office: Office) -> bool:
    """Return whether this process has an office of a segment.

    If no process has it, this one takes it.
    """
    try:
        return attachment.lockfile.intact() and attachment.lockfile.take_office(office)
    except (OSError, ValueError):
        return False  # another thread has just closed the file


def resign(attachment: Attachment, office: Office) -> None:
    """Give up an office, if this process has it."""
    try:
        if attachment.lockfile.intact():
            attachment.lockfile.leave_office(office)
    except (OSError, ValueError):
        pass  # another thread has just closed the file, so the office is free
