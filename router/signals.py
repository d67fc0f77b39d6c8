"""What each signal does: the one place that installs handlers while the server runs.

Owns the handlers. Must not know what the actions do.

    SIGTERM, SIGINT     stop
    SIGHUP              reload, if there is something to reload; else stop (unless it was ignored at
                        start, as under nohup)
    SIGUSR1             dump of the state to the log
    SIGUSR2             open the log file anew
    SIGQUIT             stacks of router and engines, then abort: for a server that hangs
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Final, NamedTuple

ABORT_S: Final = 1.0  # for the engines' stacks to arrive in the log


class Actions(NamedTuple):
    """`stop(number)` is told the signal; `reload` None: SIGHUP stops."""

    stop: Callable[[int], None]
    dump: Callable[[], None]
    reopen_logs: Callable[[], None]
    ask_engines_for_stacks: Callable[[], None]
    reload: Callable[[], None] | None = None


@contextlib.contextmanager
def handled(actions: Actions) -> Generator[None]:
    """Until the block ends, from when on they are ignored: nothing is left to interrupt."""
    loop = asyncio.get_running_loop()
    stops = [signal.SIGTERM, signal.SIGINT]
    if actions.reload is not None:
        loop.add_signal_handler(signal.SIGHUP, actions.reload)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    for number in stops:
        loop.add_signal_handler(number, actions.stop, number)
    loop.add_signal_handler(signal.SIGUSR1, actions.dump)
    loop.add_signal_handler(signal.SIGUSR2, actions.reopen_logs)
    _dump_stacks_and_abort(actions.ask_engines_for_stacks)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGQUIT)
        for number in (*stops, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _dump_stacks_and_abort(ask_engines: Callable[[], None]) -> None:
    """Our own stacks come from the signal itself, whatever the process is stuck in.

    The rest needs the interpreter, but no event loop: one that is stuck is what this is for.
    """

    def abort(_number: int, _frame: FrameType | None) -> None:
        ask_engines()
        timer = threading.Timer(ABORT_S, os.abort)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGQUIT, abort)
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True, chain=True)
