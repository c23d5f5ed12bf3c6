"""What becomes of a command when a guest says HELLO: one rule for every pair of views (`docs/protocol.md`).

After a lost connection, a restart of either agent, a reboot of the guest or the restore of an older snapshot, the
host and the guest may hold different views of a command. HELLO brings the guest's, and the rule for the pair says
what the host does. No rule runs a command that may have had an effect in this guest.
"""

from __future__ import annotations

import enum

from common.messages import ENDED, RUNNING


class HostView(enum.Enum):
    UNKNOWN = "unknown"  # of a host agent's earlier life, or asked after the snapshot to which the guest went back
    ASKED = "asked"  # the guest has not acknowledged the request
    DELIVERED = "delivered"  # it has; the end is not known
    ENDED = "ended"  # the result is on the host's disk


class GuestView(enum.Enum):
    ABSENT = "absent"  # HELLO does not name it
    RUNNING = RUNNING
    ENDED = ENDED  # and not yet confirmed


class Action(enum.Enum):
    NOTHING = "nothing"
    ASK = "ask"  # send the request: it cannot have had an effect
    RESUME = "resume"  # send the request with the output that we have: the guest sends what is missing, runs nothing
    LOST = "lost"  # report it lost: it may have had an effect, and its end will never be known
    STOP = "stop"  # kill it, and confirm its end when it comes: nobody waits for it
    CONFIRM = "confirm"  # the guest may forget it


H, G = HostView, GuestView

RULES: dict[tuple[HostView, GuestView], Action] = {
    (H.UNKNOWN, G.ABSENT): Action.NOTHING,
    (H.UNKNOWN, G.RUNNING): Action.STOP,
    (H.UNKNOWN, G.ENDED): Action.CONFIRM,
    (H.ASKED, G.ABSENT): Action.ASK,
    (H.ASKED, G.RUNNING): Action.RESUME,
    (H.ASKED, G.ENDED): Action.RESUME,
    (H.DELIVERED, G.ABSENT): Action.LOST,
    (H.DELIVERED, G.RUNNING): Action.RESUME,
    (H.DELIVERED, G.ENDED): Action.RESUME,
    (H.ENDED, G.ABSENT): Action.NOTHING,
    (H.ENDED, G.RUNNING): Action.STOP,
    (H.ENDED, G.ENDED): Action.CONFIRM,
}
