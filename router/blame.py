"""Who made an engine die: how deaths under a sequence add up until it is tried no more.

Owns nothing: one frozen value per sequence. Must not know engines, sockets or the clock.

A request that kills engines does so at the same place of its sequence each time, so it makes no
progress between two deaths; everybody else does, if engines live long enough. Therefore:

* Each engine's death makes suspects of all sequences that it worked on.
* A suspect runs on an engine on which no other suspect runs (its trial) until it has got
  `TRIAL_TOKENS` more tokens: one that came from the step over its prompt, and one from a decode
  step. Those clear it. So a second death has one suspect, and nobody else is ever convicted.
* Two deaths in a row without that progress convict. A death by a SIGKILL that neither we nor the
  kernel's OOM killer sent counts half: somebody outside did it, and nothing that a request can do
  looks like that. So killing engines at random costs no request that is slow to begin, and one
  such death puts nobody on trial: all that it interrupted goes on at once.

What is taken back from an engine that lives (drain, hand-over) is no death. Trials bound retries
as well: after a crash of everything, at most one continued sequence per engine is without progress.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TRIAL_TOKENS: Final = 2
CRASH: Final = 2  # weight of a death that the engine's work may have caused; hangs alike
OUTSIDE: Final = 1  # of one that it cannot have caused
CONVICTS: Final = 4


class Suspicion(NamedTuple):
    """What is held against a sequence that had `num_tokens` generated tokens at its last death.

    `weight` is that of all deaths in a row without `TRIAL_TOKENS` between them; 0: none yet.
    """

    num_tokens: int = 0
    weight: int = 0

    def after_death(self, num_tokens: int, *, outside: bool = False) -> Suspicion:
        """An engine died that worked on it when it had `num_tokens` generated tokens."""
        held = self.weight if num_tokens - self.num_tokens < TRIAL_TOKENS else 0
        return Suspicion(num_tokens, held + (OUTSIDE if outside else CRASH))

    def lasts(self, num_tokens: int) -> bool:
        """Must it run apart from other suspects, with so many tokens?"""
        return self.weight >= CRASH and num_tokens - self.num_tokens < TRIAL_TOKENS

    @property
    def convicts(self) -> bool:
        """It is tried no more."""
        return self.weight >= CONVICTS


NO_SUSPICION: Final = Suspicion()
