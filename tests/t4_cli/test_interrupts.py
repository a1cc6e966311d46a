# SPDX-License-Identifier: MIT
"""Long commands, interrupted by a signal at any moment: nothing lost, nothing left, nothing false."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

import vhdx
from tests.images import edit
from tests.t3_nbd.client import Client
from vhdx.cli import commands
from vhdx.format import header
from vhdx.interrupts import DONE_NOTE, completing, uninterrupted
from vhdx.units import MIB

VHDX = Path(sys.executable).with_name("vhdx")
SIZE = 96 * MIB
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A disk, a child with content of its own, another parent, and a raw disk; and what they hold."""
    place = tmp_path_factory.mktemp("originals")
    rng = random.Random(1)
    base, child, other = (place / f"{n}.vhdx" for n in ("base", "child", "other"))
    vhdx.create(base, SIZE, block_size=MIB)
    with vhdx.open(base, "r+") as disk:
        for block in range(0, 96, 2):
            disk.pwrite(rng.randbytes(MIB), block * MIB)
        disk.flush()
        disk.trim(0, 16 * MIB)
    vhdx.create(child, parent=base)
    with vhdx.open(child, "r+") as disk:
        for block in range(0, 96, 3):
            disk.pwrite(rng.randbytes(MIB // 2), block * MIB + 4096)
    shutil.copy(base, other)
    with vhdx.open(other, "r+", force=True) as disk:
        disk.pwrite(rng.randbytes(8 * MIB), 40 * MIB)
    vhdx.convert(base, place / "disk.raw")
    contents = {}
    for name in ("base.vhdx", "child.vhdx", "disk.raw"):
        with vhdx.open(place / name) as disk:
            contents[name] = disk.pread(disk.size, 0)
    return place, contents


def content(path: Path) -> bytes:
    with vhdx.open(path) as disk:
        return disk.pread(min(disk.size, 3 * SIZE), 0)


def whole_or_absent(path: Path, expected: bytes, code: int) -> None:
    assert path.exists() == (code == 0)
    if path.exists():
        assert content(path)[: len(expected)] == expected


def is_done(code: int, done: bool) -> None:
    """What ended with 130 was not done, and what ended with 0 was."""
    assert done == (code == 0)


def parent_of(path: Path) -> str:
    return os.path.basename(vhdx.info(path)["parent"]["found"])


# Arguments, and what must hold afterwards: of (place, contents, exit code).
COMMANDS = {
    "create fixed": (
        ["create", "new.vhdx", "--size", "256M", "--type", "fixed", "--no-sparse"],
        lambda place, contents, code: whole_or_absent(place / "new.vhdx", b"", code),
    ),
    "convert raw": (
        ["convert", "disk.raw", "new.vhdx"],
        lambda place, contents, code: whole_or_absent(place / "new.vhdx", contents["disk.raw"], code),
    ),
    "convert to raw": (
        ["convert", "child.vhdx", "new.raw", "--no-sparse"],
        lambda place, contents, code: whole_or_absent(
            place / "new.raw", contents["child.vhdx"], code
        ),
    ),
    "convert to vhd": (
        ["convert", "base.vhdx", "new.vhd", "--type", "fixed"],
        lambda place, contents, code: whole_or_absent(place / "new.vhd", contents["base.vhdx"], code),
    ),
    "compact": (["compact", "lone.vhdx"], lambda place, contents, code: None),
    "merge": (
        ["merge", "child.vhdx"],
        lambda place, contents, code: is_done(code, not (place / "base.vhdx").exists()),
    ),
    "rebase": (
        ["rebase", "child.vhdx", "--parent", "other.vhdx"],
        lambda place, contents, code: is_done(code, parent_of(place / "child.vhdx") == "other.vhdx"),
    ),
    "snapshot": (
        ["snapshot", "child.vhdx"],
        lambda place, contents, code: is_done(code, parent_of(place / "child.vhdx") != "base.vhdx"),
    ),
    "resize": (
        ["resize", "child.vhdx", "1T"],
        lambda place, contents, code: is_done(
            code, vhdx.info(place / "child.vhdx")["virtual_size"] == 1 << 40
        ),
    ),
    "repair": (
        ["check", "--repair", "damaged.vhdx"],
        lambda place, contents, code: is_done(
            code, not any(each.repair for each in vhdx.check(place / "damaged.vhdx").findings)
        ),
    ),
    "map": (["map", "child.vhdx"], lambda place, contents, code: None),
    "info": (["info", "child.vhdx"], lambda place, contents, code: None),
}
LONG = {
    "create fixed",
    "convert raw",
    "convert to raw",
    "convert to vhd",
    "compact",
    "merge",
    "rebase",
}


def prepare(place: Path, originals: Path) -> None:
    for name in os.listdir(place):
        (place / name).unlink()
    for name in ("base.vhdx", "child.vhdx", "other.vhdx"):
        shutil.copy(originals / name, place)
    shutil.copy(originals / "disk.raw", place)
    shutil.copy(originals / "base.vhdx", place / "lone.vhdx")
    (place / "damaged.vhdx").write_bytes((originals / "base.vhdx").read_bytes())
    edit(place / "damaged.vhdx", header.HEADER_OFFSETS[0], bytes(8))


def start(place: Path, arguments: list[str]) -> subprocess.Popen:
    """The command, when it has seen to signals: before that nothing of ours runs."""
    pipe = subprocess.PIPE
    handled = ["env", "--default-signal=INT,HUP,TERM"]  # also where nohup, or a shell, ignores them
    process = subprocess.Popen(
        [*handled, VHDX, *arguments], cwd=place, stdout=pipe, stderr=pipe, text=True
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(x for x in status.splitlines() if x.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGHUP - 1) & 1:
            break
        time.sleep(0.002)
    return process


def interrupt_at(name, place, originals, contents, moment, number, *, twice=False) -> int:
    arguments, holds = COMMANDS[name]
    prepare(place, originals)
    process = start(place, arguments)
    time.sleep(moment)
    process.send_signal(number)
    if twice:  # as timeout(1) does: to the process, then to its group
        time.sleep(0.01)
        process.send_signal(number)
    _, error = process.communicate(timeout=120)
    what = f"{name} after {moment:.3f} s of {number!r}: {process.returncode} {error}"
    assert process.returncode in {0, 130}, what
    assert "Traceback" not in error, what
    assert "may be lost" not in error, what
    assert (process.returncode == 130) == ("vhdx: interrupted: " in error), what
    left = [each for each in os.listdir(place) if each.endswith(".partial")]
    assert left == [], what
    holds(place, contents, process.returncode)
    assert content(place / "child.vhdx")[:SIZE] == contents["child.vhdx"], what
    if name != "merge":
        assert content(place / "base.vhdx") == contents["base.vhdx"], what
    assert content(place / "lone.vhdx") == contents["base.vhdx"], what
    for each in place.glob("*.vhdx"):
        if each.name != "damaged.vhdx":
            assert vhdx.check(each).errors == 0, what
    return process.returncode


def duration(name, place, originals) -> float:
    prepare(place, originals)
    process = start(place, COMMANDS[name][0])
    began = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return time.monotonic() - began


def interrupt_many(name, place, originals, count: int, seed: int) -> dict[int, int]:
    where, contents = originals
    rng, ends = random.Random(seed), {0: 0, 130: 0}
    longest = min(duration(name, place, where) for _ in range(3))
    for _ in range(count):
        moment, number = rng.uniform(0, longest * 1.05), rng.choice(SIGNALS)
        twice = rng.random() < 0.3
        ends[interrupt_at(name, place, where, contents, moment, number, twice=twice)] += 1
    return ends


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_interrupted(name, fast_path, originals):
    interrupt_many(name, fast_path, originals, 5, seed=3)


@pytest.mark.soak
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_interrupted_at_a_hundred_moments(name, fast_path, originals):
    ends = interrupt_many(name, fast_path, originals, 100, seed=int(time.time()))
    print(f"{name}: {ends[130]} ended with 130, {ends[0]} were done")
    if name in LONG:
        assert ends[130] > 10


# ---- a server ----


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("times", [1, 3])  # timeout(1) sends it twice, a shell perhaps once more
def test_every_signal_ends_a_server_cleanly(tmp_path, number, times):
    image = tmp_path / "a.vhdx"
    vhdx.create(image, SIZE)
    process = start(tmp_path, ["serve", "a.vhdx"])
    uri = process.stdout.readline()
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", uri.strip()],
        check=True,
        capture_output=True,
    )
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.01)
    assert process.wait(60) == (130 if number == signal.SIGINT else 0)
    process.communicate()
    with vhdx.open(image) as disk:
        assert disk.pread(4096, 0) == b"\5" * 4096
        assert not disk.describe()["log_dirty"]


def test_hangups_that_are_ignored_stay_ignored(tmp_path):
    image = tmp_path / "a.vhdx"
    vhdx.create(image, SIZE)
    command = ["nohup", str(VHDX), "serve", "a.vhdx"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline().startswith("nbd+unix")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 0
    process.communicate()


def left_overs(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.endswith(".partial")]


def test_a_killed_convert_leaves_what_the_next_one_removes(tmp_path, originals):
    place, contents = originals
    killed = 0
    for _ in range(50):
        process = start(tmp_path, ["convert", str(place / "disk.raw"), "new.vhdx"])
        while process.poll() is None and not left_overs(tmp_path):
            time.sleep(0.001)
        process.kill()
        process.communicate()
        killed += bool(left_overs(tmp_path))
        (tmp_path / "new.vhdx").unlink(missing_ok=True)
        if killed == 3:
            break
    assert killed
    vhdx.convert(place / "disk.raw", tmp_path / "new.vhdx")
    assert os.listdir(tmp_path) == ["new.vhdx"]
    assert content(tmp_path / "new.vhdx") == contents["disk.raw"]


# ---- from Python ----

PROGRAM = """
import os, random, signal, sys, threading, time, vhdx
MIB = 1 << 20
path, rng = sys.argv[1], random.Random(int(sys.argv[2]))
inside, ending = False, threading.Event()

def handle(number, frame):
    if inside:
        raise KeyboardInterrupt

def send():
    while not ending.wait(rng.uniform(0, 0.004)):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, handle)
disk = vhdx.open(path, "r+")
interrupted = done = value = 0
threading.Thread(target=send, daemon=True).start()
ends = time.monotonic() + 3
while time.monotonic() < ends:
    try:
        inside = True
        while time.monotonic() < ends:
            value = value % 255 + 1
            disk.pwrite(bytes([value]) * 4096, rng.randrange(64) * MIB)
            if rng.random() < 0.3:
                disk.flush()
            if rng.random() < 0.3:
                disk.trim(rng.randrange(64) * MIB, MIB)
            if rng.random() < 0.02:
                disk.compact()
            done += 1
        inside = False
    except KeyboardInterrupt:
        inside = False
        interrupted += 1
ending.set()
disk.flush()
disk.close()
print(done, interrupted)
"""


@pytest.mark.parametrize("seed", range(3))
def test_interrupts_never_poison_an_open_disk(fast_path, seed):
    path = fast_path / "a.vhdx"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    command = [sys.executable, "-c", PROGRAM, path, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    operations, interrupted = map(int, done.stdout.split())
    assert operations > 50
    assert interrupted > 50
    assert vhdx.check(path).errors == 0


def test_an_interruption_waits_for_what_cannot_stop_and_says_so():
    begun, ended = threading.Event(), threading.Event()

    def work(progress, cancel):
        begun.set()
        while not cancel():
            time.sleep(0.01)
        ended.set()
        return "done"

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt) as raised:
        uninterrupted(work)
    assert ended.is_set()
    assert DONE_NOTE in raised.value.__notes__


def test_callbacks_run_on_the_calling_thread_and_may_fail():
    seen = []

    def progress(done, total):
        seen.append((threading.get_ident(), done, total))
        if done == 2:
            raise RuntimeError("enough")

    def work(progress, cancel):
        for n in range(5):
            progress(n, 5)

    with pytest.raises(RuntimeError, match="enough"):
        uninterrupted(work, progress)
    assert seen == [(threading.get_ident(), n, 5) for n in range(3)]


def test_a_dropped_disk_is_closed_without_a_garbage_collection(tmp_path):
    path = tmp_path / "a.vhdx"
    vhdx.create(path, SIZE)
    gc.disable()
    try:
        for n in range(5):
            disk = vhdx.open(path, "r+")
            disk.pwrite(bytes([n + 1]) * 512, n * MIB)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                del disk
            assert [w.category for w in caught] == [ResourceWarning]
            assert "a.vhdx" in str(caught[0].message)
        with vhdx.open(path, "r+") as disk:
            for n in range(5):
                assert disk.pread(512, n * MIB) == bytes([n + 1]) * 512
    finally:
        gc.enable()


def test_a_program_that_calls_a_command_has_its_handlers_back(tmp_path):
    path = tmp_path / "a.vhdx"
    vhdx.create(path, SIZE)
    before = [signal.getsignal(number) for number in SIGNALS]
    assert CliRunner().invoke(commands.main, ["info", str(path)]).exit_code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_disk_in_a_reference_cycle_is_closed(tmp_path):
    path = tmp_path / "a.vhdx"
    vhdx.create(path, SIZE)

    def fail():
        disk = vhdx.open(path, "r+")
        disk.pwrite(b"kept", 0)
        try:
            disk.pwrite(b"x", disk.size)
        except vhdx.RangeError as error:
            kept = error  # its traceback holds this frame, and the frame holds it
            assert kept is not None

    for _ in range(20):
        fail()
        with pytest.warns(ResourceWarning, match="a.vhdx"):
            gc.collect()
        with vhdx.open(path, "r+") as disk:
            assert disk.pread(4, 0) == b"kept"
            disk.trim(0, disk.size)


def test_disks_that_are_open_at_the_end_are_closed(tmp_path):
    path = tmp_path / "a.vhdx"
    vhdx.create(path, SIZE)
    code = (
        "import atexit, sys, vhdx\n"
        "late = vhdx.open(sys.argv[2], 'r+')\n"
        "atexit.register(lambda: late.close())\n"
        "disk = vhdx.open(sys.argv[1], 'r+')\n"
        "disk.pwrite(b'kept', 0)\n"
        "late.pwrite(b'kept', 0)\n"
    )
    other = tmp_path / "b.vhdx"
    vhdx.create(other, SIZE)
    command = [sys.executable, "-c", code, path, other]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for each in (path, other):
        with vhdx.open(each) as disk:
            assert disk.pread(4, 0) == b"kept"
            assert not disk.describe()["log_dirty"]


def test_an_operation_inside_a_callback_does_not_complete_the_outer_one():
    seen = []

    def outer(progress, cancel):
        progress(1, 2)
        return "done"

    with completing() as completion:

        def progress(done, total):
            uninterrupted(lambda progress, cancel: None)
            seen.append(completion.done)

        assert uninterrupted(outer, progress) == "done"
    assert seen == [False]
    assert completion.done


def test_without_a_thread_nothing_begins(monkeypatch):
    """Not on the main thread, where a signal would end it in the middle."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(vhdx.HostIOError, match="needs a thread"):
        uninterrupted(lambda progress, cancel: pytest.fail("it began"))


def test_asking_a_server_twice_to_stop_does_not_hurry_it(tmp_path):
    """Its client reads nothing, so it drains; what was written is kept all the same."""
    vhdx.create(tmp_path / "a.vhdx", SIZE)
    process = start(tmp_path, ["serve", "a.vhdx", "--drain-seconds", "3"])
    uri = process.stdout.readline().strip()
    client = Client(uri.partition("socket=")[2], "a")
    assert client.ask(1, offset=0, payload=b"w" * 4096)[0] == 0
    for cookie in range(8):
        client.send(0, cookie=cookie, length=32 * MIB)
    asking = [subprocess.Popen([VHDX, "stop", "a.vhdx"], cwd=tmp_path)]
    time.sleep(1)
    asking.append(subprocess.Popen([VHDX, "stop", "a.vhdx"], cwd=tmp_path, stderr=subprocess.DEVNULL))
    assert process.wait(60) == 0
    process.communicate()
    assert asking[0].wait(60) == 0
    asking[1].wait(60)
    client.close()
    with vhdx.open(tmp_path / "a.vhdx") as disk:
        assert disk.pread(4096, 0) == b"w" * 4096
        assert not disk.describe()["log_dirty"]
