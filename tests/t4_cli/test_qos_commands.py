# SPDX-License-Identifier: MIT
"""What the QoS commands say and keep."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest

import vhdx
from tests.t3_nbd.client import Client
from tests.t4_cli.command import VHDX, run, suspend


@pytest.fixture
def limited(image, runtime):
    """The image, served with a limit and a minimum that it cannot have."""
    command = [*VHDX, "serve", image, "--max-iops", "400", "--min-iops", "300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.uri = process.stdout.readline().strip()
        yield process
        if process.poll() is None:
            process.kill()


@pytest.mark.usefixtures("runtime", "limited")
def test_a_run_is_written_and_drawn(tmp_path):
    picture = tmp_path / "run.svg"
    assert "disk" in run("qos", "watch", "--seconds", "1", "--plot", picture)
    assert picture.read_text().startswith("<?xml")
    moment = json.loads(run("qos", "watch", "--seconds", "1", "--json").splitlines()[0])
    assert moment["disk"] == "disk"
    assert abs(moment["time"] - time.time()) < 60


@pytest.mark.usefixtures("runtime", "limited")
def test_policies_from_the_command_line(image):
    assert run("qos", "policy", "list") == "there are no policies\n"
    made = run("qos", "policy", "set", "gold", "--kind", "aggregated", "--max-iops", "200").strip()
    run("qos", "set", image, "--policy", "gold", "--min-iops", "none")
    assert "gold" in run("qos", "show")
    refused = run("qos", "policy", "set", "gold", "--kind", "dedicated", code=2)
    assert "policy 'gold' is aggregated, and that cannot change" in refused
    assert made in run("qos", "policy", "list", "--json")
    assert "has this id" in run("qos", "policy", "set", "silver", "--id", made, code=1)
    run("qos", "policy", "remove", "gold")
    assert "UnknownPolicyId" in run("qos", "show")
    assert "no policy 'gold'" in run("qos", "policy", "remove", "gold", code=1)
    run("qos", "policy", "set", "gold", "--id", made, "--kind", "aggregated")
    assert "UnknownPolicyId" not in run("qos", "show")
    wanted = json.loads(run("top", "--json"))[0]["disks"][0]
    assert (wanted["policy_id"], wanted["settings"]["maximum_iops"]) == (made, 400)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        (["--max-iops", "0"], 2, "maximum iops is 0"),
        (["--max-iops", "-4"], 2, "maximum iops is -4"),
        (["--max-iops", "many"], 2, "not a valid integer"),
        (["--min-iops", "900"], 2, "above the maximum iops"),
        (["--max-bandwidth", "100000"], 2, "which is 195 sectors"),
        (["--policy", "gold"], 1, "no policy 'gold'"),
        ([], 2, "say what to change"),
    ],
)
def test_what_cannot_be_is_said(limited, image, wrong, code, says):
    before = json.loads(run("qos", "show", image, "--json"))["disks"][0]["settings"]
    assert says in run("qos", "set", image, *wrong, code=code)
    assert json.loads(run("qos", "show", image, "--json"))["disks"][0]["settings"] == before
    assert limited.poll() is None


@pytest.mark.usefixtures("runtime")
def test_a_server_that_is_stopped_is_named(limited, image):
    suspend(limited)
    try:
        said = run("qos", "show", code=4)
        assert str(limited.pid) in said
        assert "does not answer" in run("qos", "set", image, "--max-iops", "3", code=4)
    finally:
        os.kill(limited.pid, signal.SIGCONT)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(
    "options", [(), ("--keep-minimums", "--model", "nvme"), ("--credit-iops", "800")]
)
def test_a_suspended_server_gains_nothing(image, options):
    rate, clients, each, read = 500, 40, 50, 0
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"x" * 512 * each, 0)  # what is a hole has shorter replies
    command = [*VHDX, "serve", image, "--max-iops", str(rate), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        path = process.stdout.readline().strip().split("socket=")[1]
        flows = [Client(path, "disk") for _ in range(clients)]
        for client in flows:
            for n in range(each):
                client.send(read, offset=512 * n, length=512)
        time.sleep(0.5)  # a credit is used up
        suspend(process)
        for client in flows:  # what was answered before does not count
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while client.socket.recv(1 << 20):
                    pass
        time.sleep(2)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        suspend(process)
        took, answered = time.monotonic() - began, 0
        for client in flows:
            with contextlib.suppress(BlockingIOError):
                while found := client.socket.recv(1 << 20):
                    answered += len(found) / (512 + 28)
        os.kill(process.pid, signal.SIGCONT)
        process.terminate()
    assert 0.1 * rate * took <= answered  # nor is it held to account for it
    assert answered <= rate * took + 0.1 * rate + clients  # a tenth of a second is made up for


@pytest.mark.usefixtures("runtime")
def test_settings_come_back_with_the_file(image, tmp_path):
    kept = tmp_path / "qos.json"
    starts = {
        "--max-iops 123": (123, 0),  # what is given at the start is kept as well
        "": (123, 0),
        "--burst-iops 7": (123, 7),
        "--min-iops 5": (123, 7),
        "--max-iops none": (None, 0),
        "--weight 5 --keep-minimums": (None, 0),
    }
    for options, wanted in starts.items():
        command = [*VHDX, "serve", image, "--qos", kept, *options.split()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                process.stdout.readline()
                disk = json.loads(run("qos", "show", "--json"))[0]["disks"][0]["settings"]
                assert (disk["maximum_iops"], disk["burst_iops"]) == wanted
                assert "another server" in run("serve", image, "--qos", kept, code=4)
                run("stop", image)
            finally:
                process.terminate()
    kept.write_bytes(kept.read_bytes().replace(b"null", b"1234", 1))
    assert "checksum" in run("serve", image, "--qos", kept, code=3)
