# SPDX-License-Identifier: MIT
"""Delivers alerts to the log, to listeners, and to a hook, which is a command of the user.

Any thread may call any function here. No lock is held while a listener or the hook runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vhdx.qos.monitor import Alert

__all__ = ["Alerts"]

_log = logging.getLogger(__name__)
_KEPT_ALERTS = 1000
_HOOK_SECONDS = 60.0


class Alerts:
    """The alerts of one server, the latest ones kept.

    Args:
        hook: a shell command that is run for each alert; environment variables describe the alert.
    """

    def __init__(self, hook: str | None) -> None:
        self._hook = hook
        self._to_run: queue.Queue[Alert | None] = queue.Queue(_KEPT_ALERTS)
        self._lock = threading.Lock()
        # Under _lock:
        self._runner: threading.Thread | None = None
        self._kept: deque[Alert] = deque(maxlen=_KEPT_ALERTS)
        self._listeners: list[Callable[[Alert], None]] = []

    @contextlib.contextmanager
    def listening(self, listener: Callable[[Alert], None]) -> Iterator[list[Alert]]:
        """Yields the kept alerts; ``listener`` gets each new one until the block ends."""
        with self._lock:  # no alert is missed, and none is delivered twice
            before = list(self._kept)
            self._listeners.append(listener)
        try:
            yield before
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def tell(self, alert: Alert) -> None:
        """Keeps and logs ``alert``, notifies all listeners, and queues the hook."""
        with self._lock:
            self._kept.append(alert)
            listeners = list(self._listeners)
        _log.warning("QoS: %s", alert)
        for listener in listeners:
            with contextlib.suppress(Exception):
                listener(alert)
        if self._hook is not None:
            self._run_later(self._hook, alert)

    def _run_later(self, hook: str, alert: Alert) -> None:
        try:
            self._to_run.put_nowait(alert)
            with self._lock:
                if self._runner is None:
                    runner = threading.Thread(target=self._run, args=(hook,), daemon=True)
                    runner.start()
                    self._runner = runner
        except (queue.Full, RuntimeError) as error:
            _log.warning("the hook of an alert is not run: %r", error)

    def _run(self, hook: str) -> None:
        """Runs the hook for one alert after another, in order."""
        while (alert := self._to_run.get()) is not None:
            try:
                _run_hook(hook, alert)
            except Exception as error:  # the hook may succeed for the next alert
                _log.warning("the hook of an alert failed: %r", error)

    def close(self) -> None:
        """Ends the hook's thread after the queued alerts, without waiting for it.

        When the queue is full, its oldest alert is dropped.
        """
        while True:
            try:
                self._to_run.put_nowait(None)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._to_run.get_nowait()


def _run_hook(hook: str, alert: Alert) -> None:
    facts = {
        "VHDX_EVENT": alert.event.value,
        "VHDX_DISK": alert.disk,
        "VHDX_MINIMUM_IOPS": str(alert.minimum_iops),
        "VHDX_ACHIEVED_IOPS": f"{alert.achieved_iops:.0f}",
        "VHDX_TOP_CONSUMERS": ", ".join(
            f"{each.disk} {each.iops:.0f}" for each in alert.top_consumers
        ),
        "VHDX_MESSAGE": str(alert),
    }
    try:
        run = subprocess.Popen(
            # `timeout` ends the hook in time even when this server ends before the hook.
            ["timeout", "-s", "KILL", f"{_HOOK_SECONDS:g}", "/bin/sh", "-c", hook],
            env=os.environ | facts,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        _log.warning("the hook of an alert cannot be run: %s", error)
        return
    code = run.wait()
    if code == -signal.SIGKILL:
        _log.warning("the hook of an alert was ended after %g s", _HOOK_SECONDS)
    elif code != 0:
        _log.warning("the hook of an alert ended with %d", code)
