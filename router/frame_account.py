"""How many frames went each way between the router and one engine process, and how many got lost.

Owns the counts of one epoch. Pure: must not know sockets, clocks or what the frames are. Sockets of
this kind keep the order and lose nothing; the counts are there to prove it, and to show it if not.
"""

from __future__ import annotations

from engine.protocol import Stats


class FrameAccount:
    """To be made when an engine becomes ready. What either side counts begins there too."""

    def __init__(self) -> None:
        self._sent = 0
        self._received = 0
        self._asked = 0  # sent, the latest ping included

    def sent(self) -> None:
        """A frame was put on its way, at once or behind others that wait for the socket."""
        self._sent += 1

    def asked(self) -> None:
        """That frame was a ping: its answer tells how many the engine had until then."""
        self._asked = self._sent

    def received(self, stats: Stats | None, *, answers: bool = False) -> int:
        """A frame came, with `stats` if it is of a kind that carries them, perhaps as the answer
        to the latest ping. Returns how many frames are found to be lost by that, in both directions
        together. An engine that does not count (zeros) is believed."""
        lost = 0
        if stats is not None and stats.frames_sent > self._received:
            lost = stats.frames_sent - self._received
            self._received = stats.frames_sent
        if stats is not None and answers and 0 < stats.frames_received < self._asked:
            missing = self._asked - stats.frames_received
            self._sent -= missing
            self._asked -= missing
            lost += missing
        self._received += 1
        return lost
