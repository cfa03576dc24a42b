"""The signals by which a cluster asks a run to leave, noted when they come and obeyed when it suits.

Nothing is imported here that takes time, so that a command listens from its first moment.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = {name: status for name, status in {"SIGUSR1": 75, "SIGTERM": 143}.items() if hasattr(signal, name)}
"""Exit status of a run that left on a signal: 75 asks for another start (EX_TEMPFAIL), 143 does not (128 + 15)."""

SIGNALS = {signal.Signals[name] for name in STATUS}

_received: set[str] = set()


def received() -> int:
    """The exit status that the signals so far ask for; 0 for none. SIGTERM counts more than SIGUSR1."""
    return max((STATUS[name] for name in _received), default=0)


def listen() -> None:
    """Notes SIGUSR1 and SIGTERM from now on, whatever handled them before, and those that were held back.

    Python allows it in the main thread alone; in another one nothing happens.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _note)
        hold(False)


def hold(held: bool) -> None:
    """Keeps signals waiting from now on, or lets them through."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK if held else signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def listening() -> Iterator[None]:
    """Within it, signals are noted; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _received.clear()
    listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _received.add(signal.Signals(number).name)
