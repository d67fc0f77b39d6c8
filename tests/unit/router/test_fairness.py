"""The waiting line: shares by tokens, priorities, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fairness import QUANTUM, Line, Ticket


def test_one_tenants_line_goes_by_priority_then_arrival() -> None:
    line = Line()
    tickets = [Ticket(b"", 10, priority) for priority in (0, 5, -1, 0, -1)]
    for ticket in tickets:
        line.push(ticket)
    order = [tickets.index(line.pop()) for _ in range(5)]
    assert order == [2, 4, 0, 3, 1]
    with pytest.raises(IndexError):
        line.pop()


@pytest.mark.parametrize("sizes", [(100, 100), (100, 3000), (20_000, 50)])
def test_a28_shares_are_equal_in_tokens(sizes: tuple[int, int]) -> None:
    """R20: within 10 % over a long run, whatever the sizes of the requests."""
    line = Line()
    served = dict.fromkeys((b"a", b"b"), 0)
    of_size = dict(zip(served, sizes, strict=True))
    for tenant, size in of_size.items():
        for _ in range(4000):
            line.push(Ticket(tenant, size))
    while sum(served.values()) < 1_000_000 and line.num_tenants == 2:
        ticket = line.pop()
        served[ticket.tenant] += ticket.tokens
        line.settle(ticket, ticket.tokens)
    least, most = sorted(served.values())
    assert least > 0.45 * (least + most) or line.num_tenants < 2
    assert most - least <= 0.1 * (least + most) + max(sizes) + QUANTUM


@pytest.mark.parametrize("size", [50, 400, 3000])
def test_r20_a_short_request_waits_for_two_others_at_most(size: int) -> None:
    """Not for a long turn of the key whose crowd was there before, whenever it comes."""
    for served_before in range(20):
        line = Line()
        for _ in range(200):
            line.push(Ticket(b"crowd", size))
        line.push(Ticket(b"third", size))
        for _ in range(served_before):
            line.pop()
        line.push(Ticket(b"light", min(size, 50)))
        waited = 0
        while line.pop().tenant != b"light":
            waited += 1
        assert waited * size <= 2 * (size + 64)  # and not a thousand tokens


def test_r20_a_request_far_larger_than_a_turn_costs_no_time_to_find() -> None:
    line = Line()
    for tenant in (b"a", b"b", b"c"):
        line.push(Ticket(tenant, 10**12))
    assert [line.pop().tenant for _ in range(3)] == [b"a", b"b", b"c"]


def test_what_an_answer_cost_beyond_the_estimate_is_paid_for() -> None:
    line = Line()
    for _ in range(2000):
        line.push(Ticket(b"short", 100))
        line.push(Ticket(b"long", 100))
    cost = {b"short": 100, b"long": 900}
    served = dict.fromkeys(cost, 0)
    for _ in range(1000):
        ticket = line.pop()
        served[ticket.tenant] += cost[ticket.tenant]
        line.settle(ticket, cost[ticket.tenant])
    assert served[b"long"] == pytest.approx(served[b"short"], rel=0.1)


def test_nobody_saves_up_while_not_waiting() -> None:
    line = Line()
    for _ in range(50):
        line.push(Ticket(b"busy", 1000))
    line.push(Ticket(b"rare", 10))
    popped = [line.pop() for _ in range(20)]
    assert any(ticket.tenant == b"rare" for ticket in popped)
    for _ in range(50):
        line.push(Ticket(b"rare", 1000))
    next_ones = [line.pop().tenant for _ in range(20)]
    assert 5 <= next_ones.count(b"rare") <= 15


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "remove", "settle"]),
            st.integers(0, 3),
            st.integers(1, 20_000),
            st.integers(-2, 2),
        ),
        max_size=80,
    )
)
def test_nothing_is_lost_or_counted_twice(steps: list[tuple[str, int, int, int]]) -> None:
    line = Line()
    waiting: list[Ticket] = []
    served: list[Ticket] = []
    for what, tenant, tokens, priority in steps:
        if what == "push":
            ticket = Ticket(bytes([tenant]), tokens, priority)
            waiting.append(ticket)
            line.push(ticket)
        elif what == "pop" and waiting:
            ticket = line.pop()
            rivals = [one for one in waiting if one.tenant == ticket.tenant]
            assert ticket.order == min(one.order for one in rivals)
            waiting.remove(ticket)
            served.append(ticket)
        elif what == "remove" and waiting:
            ticket = waiting.pop(tenant % len(waiting))
            assert line.remove(ticket)
            assert not line.remove(ticket)
        elif what == "settle" and served:
            line.settle(served.pop(), tokens)
        assert line.size == len(waiting)
        assert line.tokens == sum(ticket.tokens for ticket in waiting)
        assert line.num_tenants == len({ticket.tenant for ticket in waiting})
    while waiting:
        waiting.remove(line.pop())
    for ticket in served:
        line.settle(ticket, 1)
