# SPDX-License-Identifier: MIT
"""Where alerts go: listeners, the log, and the command of the user's."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from vhdx.qos import alerts
from vhdx.qos.alerts import Alerts
from vhdx.qos.monitor import Alert, Consumer, Status


def alert(number: int, *, begins: bool = True, achieved: float = 1.0) -> Alert:
    event = Status.INSUFFICIENT if begins else Status.OK
    return Alert(float(number), event, f"disk{number}", 100, achieved, (Consumer("other", 7.0),))


def eventually(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come about")


def test_hooks_run_one_after_another_in_their_order(tmp_path):
    out = tmp_path / "out"
    # The first takes longest: started together, they would end the other way round.
    told = Alerts(
        f'sleep 0.$((5 - ${{VHDX_DISK#disk}})); echo "$VHDX_DISK $VHDX_TOP_CONSUMERS" >> {out}'
    )
    for number in range(5):
        told.tell(alert(number))
    told.close()  # what was told is told
    eventually(lambda: out.exists() and out.read_text().count("\n") == 5)
    assert out.read_text().splitlines() == [f"disk{n} other 7" for n in range(5)]


def test_a_hook_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(alerts, "_HOOK_SECONDS", 0.3)
    out = tmp_path / "pid"
    told = Alerts(f"sleep 600 & echo $! > {out}.new; mv {out}.new {out}; wait")
    with caplog.at_level(logging.WARNING):
        told.tell(alert(1))
        eventually(lambda: "was ended after" in caplog.text)
    told.close()
    child = int(out.read_text())
    eventually(lambda: not Path(f"/proc/{child}").exists() or "Z" in state(child))


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


@pytest.mark.parametrize("hook", ["exit 3", "\0"])
def test_a_hook_that_fails_is_reported(hook, caplog):
    told = Alerts(hook)
    with caplog.at_level(logging.WARNING):
        told.tell(alert(1))
        eventually(lambda: "the hook of an alert" in caplog.text)
    told.close()


def test_listeners_hear_each_once_and_their_faults_are_theirs(caplog):
    told, heard = Alerts(None), []

    def faulty(_):
        raise RuntimeError

    told.tell(alert(1))
    with told.listening(faulty), told.listening(heard.append) as before, caplog.at_level("WARNING"):
        assert before == [alert(1)]
        told.tell(alert(2))
    told.tell(alert(3))
    assert heard == [alert(2)]
    assert (
        "disk2 gets 1 of its minimum of 100 normalised IOPS; most of the rest: other 7" in caplog.text
    )


def test_ends_say_why(caplog):
    told = Alerts(None)
    with caplog.at_level("WARNING"):
        told.tell(alert(1, begins=False, achieved=100))
        told.tell(alert(2, begins=False, achieved=3))
    assert "disk1 gets its minimum of 100 normalised IOPS again (100)" in caplog.text
    told.tell(Alert(3.0, Status.OK, "disk3", 0, 123.0, ()))
    assert "disk3 does not miss a minimum any more: it has none" in caplog.text
    assert "disk2 does not miss its minimum of 100 normalised IOPS any more: it asks for less" in (
        caplog.text
    )


def test_a_hook_finds_its_facts(tmp_path):
    out = tmp_path / "out"
    told = Alerts(f"env | grep ^VHDX_ | sort > {out}.new && mv {out}.new {out}")
    told.tell(alert(4, achieved=12.4))
    eventually(out.exists)
    told.close()
    inherited = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("VHDX_")]
    assert [line for line in out.read_text().splitlines() if line not in inherited] == [
        "VHDX_ACHIEVED_IOPS=12",
        "VHDX_DISK=disk4",
        "VHDX_EVENT=InsufficientThroughput",
        f"VHDX_MESSAGE={alert(4, achieved=12.4)}",
        "VHDX_MINIMUM_IOPS=100",
        "VHDX_TOP_CONSUMERS=other 7",
    ]
