"""Who of those that wait is served next: deficit round robin between keys, by tokens.

Owns the waiting line of one model. Pure: no clock, no event loop. Must not know permits.

Each turn of a key adds QUANTUM tokens to what it may spend; it is served while that covers its next
request (Shreedhar and Varghese, "Efficient fair queuing using deficit round robin", 1996). The
quantum is small, so that a key with one short request does not wait for a long turn of another;
rounds in which nobody could be served are skipped in one go.
A request is charged by estimate when it is served and corrected when it ends, so that a key whose
answers grow long pays for them. Within one key the lower `priority` goes first, then the earlier.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from typing import Final

QUANTUM: Final = 64  # tokens; less than nearly any request


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the line. `tokens` is what it is expected to cost, `number` its arrival."""

    tenant: bytes
    tokens: int
    priority: int = 0
    number: int = 0
    charged: bool = False  # its tenant paid `tokens` for it

    @property
    def order(self) -> tuple[int, int]:
        """Within its tenant."""
        return self.priority, self.number


@dataclass(slots=True)
class _Tenant:
    """Those of one key that wait, and what it may spend."""

    deficit: int = 0
    line: list[Ticket] = field(default_factory=list)
    tokens: int = 0  # of all in `line`
    served: int = 0  # of its tickets, charged and not settled yet


class Line:
    """The waiting line. A tenant is known as long as it waits or has charges to be settled."""

    def __init__(self) -> None:
        self._tenants: dict[bytes, _Tenant] = {}
        self._turns: deque[bytes] = deque()  # tenants that wait; the first one's turn it is
        self._arrivals = 0
        self.tokens = 0
        self.size = 0

    def push(self, ticket: Ticket) -> None:
        """It waits from now on."""
        self._arrivals += 1
        ticket.number = self._arrivals
        tenant = self._tenants.setdefault(ticket.tenant, _Tenant())
        if not tenant.line:
            self._turns.append(ticket.tenant)
        bisect.insort(tenant.line, ticket, key=lambda one: one.order)
        tenant.tokens += ticket.tokens
        self.tokens += ticket.tokens
        self.size += 1

    def pop(self) -> Ticket:
        """The next one to be served. Raises IndexError if nobody waits."""
        if len(self._turns) > 1:
            self._go_round()
        tenant = self._tenants[self._turns[0]]
        ticket = tenant.line[0]
        if len(self._turns) > 1:
            tenant.deficit -= ticket.tokens
            tenant.served += 1
            ticket.charged = True
        self.remove(ticket)
        return ticket

    def _go_round(self) -> None:
        """Turns pass until the first tenant's next request is covered."""
        tenants = [self._tenants[name] for name in self._turns]
        lacking = [tenant.line[0].tokens - tenant.deficit for tenant in tenants]
        rounds, place = min((max(0, -(-n // QUANTUM)), at) for at, n in enumerate(lacking))
        for at, tenant in enumerate(tenants):
            tenant.deficit += QUANTUM * (rounds + (at < place))
        self._turns.rotate(-place)

    def remove(self, ticket: Ticket) -> bool:
        """It waits no more. False if it did not."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None or ticket not in tenant.line:
            return False
        tenant.line.remove(ticket)
        tenant.tokens -= ticket.tokens
        self.tokens -= ticket.tokens
        self.size -= 1
        if not tenant.line:
            self._turns.remove(ticket.tenant)
            tenant.deficit = min(tenant.deficit, 0)  # who does not wait saves nothing up
            self._forget(ticket.tenant)
        return True

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """A ticket that was served has ended, and cost `tokens`."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None or not ticket.charged:
            return
        ticket.charged = False
        tenant.served -= 1
        tenant.deficit += ticket.tokens - tokens
        if not tenant.line:
            tenant.deficit = min(tenant.deficit, 0)
        self._forget(ticket.tenant)

    def tokens_of(self, tenant: bytes) -> int:
        """That wait."""
        known = self._tenants.get(tenant)
        return known.tokens if known is not None else 0

    @property
    def num_tenants(self) -> int:
        """That wait."""
        return len(self._turns)

    def last_of_heaviest(self) -> Ticket | None:
        """The one that would be served last of the tenant with most tokens waiting."""
        if not self._turns:
            return None
        heaviest = max(self._turns, key=lambda name: self._tenants[name].tokens)
        return self._tenants[heaviest].line[-1]

    def _forget(self, name: bytes) -> None:
        tenant = self._tenants[name]
        if not tenant.line and not tenant.served:
            del self._tenants[name]
