"""The keeper's event loop."""

from __future__ import annotations

import os
import select
import signal
import time

from flockshim import closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TICK_SECONDS = 1.0
SPIN_TRIES = 25
NEVER = float("inf")


class Loop:
    """Calls handlers of descriptors that have become readable."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._first = -1
        self._alarm_at = NEVER

    def watch(self, descriptor: int, handler: Callable[[], None], first: bool = False) -> None:
        """Have `handler` called while `descriptor` is readable; `first`: before those of others."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLRDHUP)
        if first:
            self._first = descriptor

    def unwatch(self, descriptor: int) -> None:
        """Forget `descriptor`, which is still open."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def wake_by(self, when: float) -> None:
        """Have `alarm` called (see `run`) at monotonic time `when`, or soon after it."""
        self._alarm_at = min(self._alarm_at, when)

    def run(
        self,
        parent: int,
        after: Callable[[], None],
        tick: Callable[[float], None],
        alarm: Callable[[float], None],
    ) -> None:
        """Run until process `parent` has died: the signal of its death must be caught.

        `after` is called when a round of handlers has run, `tick` every second with the monotonic time, `alarm` with
        it when that was asked for.
        """
        orphaned, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        self.watch(orphaned, lambda: _drain(orphaned))
        handlers, poll, monotonic = self._handlers, self._epoll.poll, time.monotonic
        next_tick = monotonic() + TICK_SECONDS
        while os.getppid() == parent:
            events = _poll_soon(poll)
            if not events:
                closing.flush()
                events = poll(self._patience(monotonic()))
            if len(events) > 1:
                events.sort(key=lambda event: event[0] != self._first)
            for descriptor, _ in events:
                handler = handlers.get(descriptor)
                if handler:
                    handler()
            after()
            now = monotonic()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                tick(now)
            if now >= self._alarm_at:
                self._alarm_at = NEVER
                alarm(now)
        signal.set_wakeup_fd(-1)
        self._epoll.close()

    def _patience(self, now: float) -> float:
        return min(TICK_SECONDS, max(0.0, self._alarm_at - now))


def _poll_soon(poll: Callable[[float], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Look again a few times before sleeping: being woken takes longer than many a program holds its lock."""
    for _ in range(SPIN_TRIES):
        events = poll(0)
        if events:
            return events
        os.sched_yield()
    return []


def _drain(pipe: int) -> None:
    os.read(pipe, 4096)
