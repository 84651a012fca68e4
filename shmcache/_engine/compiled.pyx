# cython: language_level=3, auto_pickle=False
# cython: wraparound=False, cdivision=True, initializedcheck=False
"""The compiled engine: all parts in one compilation unit, in reading order.

The parts are plain Python, and Cython compiles them as one module: calls from part to
part are C calls.  The interpreted engine, ``interpreted.py``, imports the same parts.
"""

include "../_format/fields.py"
include "../_format/keys.py"
include "../_format/richtypes.py"
include "../_format/values.py"
include "constants.py"
include "words.py"
include "lists.py"
include "recency.py"
include "wheel.py"
include "entries.py"
include "rebuild.py"
include "lock.py"
include "lookup.py"
include "writes.py"
include "steps.py"
include "in_flight.py"
include "mailbox.py"
include "numbers.py"
include "operations.py"
