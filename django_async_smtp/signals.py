"""
Signals around every message; both give ``message``, ``delivery`` and ``alias``.

The sender is the backend's class. Receivers may be sync or async, and run in the
thread of the caller. One that raises is logged (by ``django.dispatch``) and changes
nothing.
"""

from django.dispatch import Signal

# Before a message is built; ``delivery`` is None.
pre_send = Signal()

# After its outcome is known; ``delivery`` is its ``Delivery``.
post_send = Signal()
