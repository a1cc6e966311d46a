# SPDX-License-Identifier: MIT
"""The command as a person uses it: output, errors, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vhdx
from tests.images import set_entry
from vhdx.units import MIB

VHDX = Path(sys.executable).parent / "vhdx"


def run(*arguments, **options):
    return subprocess.run(
        [VHDX, *map(str, arguments)], capture_output=True, text=True, timeout=60, **options
    )


@pytest.fixture
def image(fast_path):
    path = fast_path / "disk.vhdx"
    assert run("create", path, "--size", "64M", "--block-size", "1M").returncode == 0
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * (3 * MIB), MIB)
    return path


def test_alone_it_shows_what_there_is():
    for arguments in ([], ["--help"], ["-h"]):
        text = run(*arguments).stdout + run(*arguments).stderr
        for command in ("create", "info", "map", "dump", "convert", "serve"):
            assert command in text
    for command in ("create", "info", "map", "dump", "convert", "serve"):
        assert "Example: vhdx" in run(command, "--help").stdout


def test_info(image):
    facts = json.loads(run("info", image, "--json").stdout)
    wanted = "path format type virtual_size block_size logical_sector_size physical_sector_size "
    wanted += "file_size creator disk_id data_write_id log_dirty parent blocks"
    assert set(wanted.split()) <= set(facts)
    assert (facts["virtual_size"], facts["type"], facts["format"]) == (64 * MIB, "dynamic", "vhdx")
    assert facts["blocks"]["fully_present"] == 3
    text = run("info", image).stdout
    assert "64 MiB (67108864 bytes)" in text
    assert "fully present 3" in text


def test_map(image):
    extents = json.loads(run("map", image, "--json").stdout)
    assert extents == [
        {"offset": 0, "length": MIB, "state": "hole", "depth": None},
        {"offset": MIB, "length": 3 * MIB, "state": "data", "depth": 0},
        {"offset": 4 * MIB, "length": 60 * MIB, "state": "hole", "depth": None},
    ]
    assert run("map", image).stdout.splitlines()[2].split() == ["1048576", "3145728", "data", "0"]


def test_dump_prints_damaged_structures_too(image):
    for section in ("headers", "regions", "metadata", "bat", "log"):
        result = run("dump", section, image)
        assert result.returncode == 0
        assert result.stdout
        assert isinstance(json.loads(run("dump", section, image, "--json").stdout), list)
    set_entry(image, 5, 4)
    assert run("info", image).returncode == 3
    assert "reserved 4" in run("dump", "bat", image).stdout
    with image.open("r+b") as file:
        file.seek(65536 + 8)
        file.write(b"?")
    assert "valid=False" in run("dump", "headers", image).stdout


def test_convert_there_and_back(image, fast_path):
    raw, back = fast_path / "disk.raw", fast_path / "back.vhdx"
    assert run("convert", image, raw).returncode == 0
    assert raw.stat().st_blocks * 512 < 4 * MIB
    assert run("convert", raw, back, "--type", "fixed", "--block-size", "2M").returncode == 0
    with vhdx.open(image) as a, vhdx.open(back) as b:
        assert a.pread(a.size, 0) == b.pread(b.size, 0)
        assert b.block_size == 2 * MIB
    again = run("convert", image, raw)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert run("convert", image, raw, "--force").returncode == 0


def test_convert_pads_and_says_so(fast_path):
    raw = fast_path / "odd.raw"
    raw.write_bytes(b"odd" * 1000)
    result = run("convert", raw, fast_path / "out.vhdx")
    assert result.returncode == 0
    assert "72 bytes of zeros" in result.stderr
    with vhdx.open(fast_path / "out.vhdx") as disk:
        assert disk.pread(disk.size, 0) == b"odd" * 1000 + bytes(72)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["info", "nothing.vhdx"], 1, "there is no such file"),
        (["info", "."], 1, "directory"),
        (["create", "x.vhdx"], 2, "--size"),
        (["create", "x.vhdx", "--size", "elephant"], 2, "not a size"),
        (["create", "x.vhdx", "--size", "1000"], 2, "multiple of the logical sector"),
        (["create", "x.vhdx", "--size", "65T"], 2, "64T"),
        (["create", "no/x.vhdx", "--size", "1M"], 1, "no such directory"),
        (["convert", "a.vhdx", "b.qcow2"], 2, "--to"),
        (["convert", "a.vhdx", "b.raw"], 1, "there is no such file"),
        (["serve", "nothing.vhdx"], 1, "there is no such file"),
        (["serve", "a/x.vhdx", "b/x.vhdx"], 2, "NAME=PATH"),
        (["serve"], 2, "PATH"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_and_a_code(arguments, code, text, tmp_path):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_locked_images_have_codes_of_their_own(image):
    with vhdx.open(image, "r+"):
        result = run("info", image)
        assert result.returncode == 4
        assert f"process {os.getpid()}" in result.stderr
    set_entry(image, 0, 6 | 1 << 44)
    assert run("info", image).returncode == 3


def test_a_reader_that_leaves_early_is_no_traceback(image):
    script = f"{VHDX} map {image} --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in result.stderr


# ---- serve ----


def start(*arguments):
    server = subprocess.Popen(
        [VHDX, "serve", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return server, server.stdout.readline().strip()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_end_it_cleanly(image, number, code, peer):
    peer("qemu-io")
    server, uri = start(image)
    assert uri.startswith("nbd+unix:///disk?socket=")
    write = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", uri]
    subprocess.run(write, check=True, capture_output=True)
    server.send_signal(number)
    _, errors = server.communicate(timeout=30)
    assert (server.returncode, errors) == (code, "")
    assert not Path(uri.partition("socket=")[2]).exists()
    with vhdx.open(image) as disk:
        assert disk.pread(4, 0) == b"\7\7\7\7"
        assert not disk.describe()["log_dirty"]


def test_a_signal_that_another_thread_gets_ends_it_too(image):
    """After a stop the kernel may choose any thread for the next signal."""
    for _ in range(5):
        server, uri = start(image)
        server.send_signal(signal.SIGSTOP)
        server.send_signal(signal.SIGCONT)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
        assert server.returncode == 0
        assert uri


def test_every_export_has_a_line(image, fast_path):
    raw = fast_path / "second.img"
    raw.write_bytes(bytes(4096))
    server, first = start(image, f"two={raw}", "--listen", f"nbd+unix:///?socket={fast_path}/s")
    assert first == f"nbd+unix:///disk?socket={fast_path}/s"
    assert server.stdout.readline().strip() == f"nbd+unix:///two?socket={fast_path}/s"
    server.terminate()
    server.communicate(timeout=30)
    assert server.returncode == 0


def test_run_ends_with_the_code_of_its_command(image, peer):
    peer("nbdinfo")
    result = run("serve", image, "--run", 'nbdinfo --size "$uri"')
    assert (result.returncode, result.stdout.strip()) == (0, str(64 * MIB))
    assert run("serve", image, "--run", "exit 7").returncode == 7
    assert run("serve", image, "--run", "kill -9 $$").returncode == 137


def test_kill_loses_nothing_that_was_flushed(image, peer):
    peer("qemu-io")
    for round_number in range(3):
        server, uri = start(image)
        offset = (10 + 3 * round_number) * MIB
        commands = ["-c", f"write -P {round_number + 1} {offset} 2M", "-c", "flush"]
        subprocess.run(["qemu-io", "-f", "raw", *commands, uri], check=True, capture_output=True)
        server.kill()
        server.communicate()
        with vhdx.open(image) as disk:
            for n in range(round_number + 1):
                data = bytes([n + 1]) * (2 * MIB)
                assert disk.pread(2 * MIB, (10 + 3 * n) * MIB) == data
    vhdx.open(image, "r+").close()
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_kill_a_few_times_under_writers(fast_path):
    from tests.t4_cli.kill import kill_under_writers

    empty = fast_path / "empty.vhdx"
    vhdx.create(empty, 64 * MIB, block_size=MIB)
    kill_under_writers(empty, start, rounds=6)


@pytest.mark.soak
def test_kill_200_times_under_writers(fast_path):
    from tests.t4_cli.kill import kill_under_writers

    empty = fast_path / "empty.vhdx"
    vhdx.create(empty, 64 * MIB, block_size=MIB)
    kill_under_writers(empty, start, rounds=200)
