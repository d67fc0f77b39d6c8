"""Running totals of one engine, and their form on the wire.

Owns the counters. Must not know who counts.
"""

from __future__ import annotations

from engine.protocol import Stats


class Counters:
    """Totals since start; whoever sees the event adds to them."""

    __slots__ = (
        "bad_frames",
        "blocks_leaked",
        "frames_received",
        "frames_sent",
        "generated_tokens",
        "preemptions",
        "prefix_hit_tokens",
        "prefix_query_tokens",
        "prompt_tokens",
        "steps",
    )

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0  # of sequences that left the waiting queue, cached ones included
        self.generated_tokens = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.preemptions = 0
        self.bad_frames = 0
        self.blocks_leaked = 0  # found at idle without a holder, and taken back

        self.frames_sent = 0
        self.frames_received = 0

    def started(self, num_prompt: int, queried: int, hit: int) -> None:
        """A sequence left the waiting queue for the first time; numbers are tokens."""
        self.prompt_tokens += num_prompt
        self.prefix_query_tokens += queried
        self.prefix_hit_tokens += hit

    def snapshot(self, queues: tuple[int, int], blocks: tuple[int, int, int]) -> Stats:
        """`queues`: sequences waiting and running; `blocks`: total, held, cached."""
        waiting, running = queues
        blocks_total, blocks_held, blocks_cached = blocks
        return Stats(
            waiting=waiting,
            running=running,
            blocks_total=blocks_total,
            blocks_held=blocks_held,
            blocks_cached=blocks_cached,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            prefix_query_tokens=self.prefix_query_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            preemptions=self.preemptions,
            bad_frames=self.bad_frames,
            blocks_leaked=self.blocks_leaked,
            frames_sent=self.frames_sent,
            frames_received=self.frames_received,
        )
