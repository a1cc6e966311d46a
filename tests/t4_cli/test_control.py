# SPDX-License-Identifier: MIT
"""Images that a server holds are found, asked and changed through it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import vhdx
from tests.t4_cli.command import VHDX, run, suspend
from vhdx import control
from vhdx.control import api, operations
from vhdx.control.api import NoArguments
from vhdx.control.operations import Operation
from vhdx.errors import ProtocolError
from vhdx.host import runtime as places
from vhdx.units import GIB, MIB

pytestmark = pytest.mark.usefixtures("runtime")


def test_the_command_line_reaches_a_served_image(image, served, peer):
    peer("nbdinfo")
    before = json.loads(run("info", image, "--json"))
    assert before["virtual_size"] == 64 * MIB
    run("resize", image, "80M")
    [server] = control.servers()
    uri = server.exports[0].uri
    size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=True)
    assert int(size.stdout) == 80 * MIB
    assert json.loads(run("map", image, "--json")) == [
        {"offset": 0, "length": 80 * MIB, "state": "hole", "depth": None}
    ]
    checkpoint = run("snapshot", image, "--checkpoint", image.with_name("before.vhdx")).strip()
    assert os.path.exists(checkpoint)
    assert len(json.loads(run("info", image, "--json", "--chain"))) == 2
    assert "became" in run("compact", image)
    assert "shrink" in run("resize", image, "64M", code=2)
    assert "in use by" in run("check", image, code=4)
    assert "in use by" in run("merge", image, code=4)
    run("stop", image)
    assert served.wait(10) == 0
    assert control.servers() == []
    assert vhdx.check(image).errors == 0


def test_compaction_through_the_server_wins_space(image):
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(os.urandom(MIB) * 32, 0)
    with vhdx.serve({"disk": image}) as server:
        server.exports()["disk"].trim(0, 16 * MIB)
        server.exports()["disk"].flush()
        seen = []
        done = vhdx.compact(image, progress=lambda done, total: seen.append((done, total)))
    assert done.file_size_after < done.file_size_before - 15 * MIB
    assert seen
    assert seen[-1][0] == seen[-1][1]


def test_python_reaches_what_another_process_serves(image, served):
    vhdx.resize(image, 96 * MIB)
    found = vhdx.info(image)
    assert found["virtual_size"] == 96 * MIB
    assert found["path"] == str(image)
    with pytest.raises(vhdx.InvalidArgumentError, match="cut some off") as caught:
        vhdx.resize(image, MIB)
    assert caught.value.reason == vhdx.Reason.INVALID_ARGUMENT
    with pytest.raises(vhdx.ExistsError):
        vhdx.snapshot(image, __file__)


def test_many_extents_arrive(tmp_path):
    path = tmp_path / "many.vhdx"
    vhdx.create(path, 8 * GIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        for block in range(0, 4096, 2):
            disk.pwrite(b"x", block * MIB)
        there = list(disk.extents())
    with vhdx.serve({"d": path}):
        assert control.extents(path) == there
    assert len(there) > 4000


def test_an_image_of_no_server_is_refused_with_its_holder(image):
    with vhdx.open(image, "r+"), pytest.raises(vhdx.InUseError, match="this process"):
        vhdx.resize(image, 80 * MIB)


def test_ps_lists_servers_and_dead_sockets_go(image, runtime):
    assert run("ps").strip() == "nothing is served"
    with subprocess.Popen([*VHDX, "serve", image], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        [found] = json.loads(run("ps", "--json"))
        assert found["pid"] == process.pid
        assert found["exports"][0]["path"] == str(image)
        assert str(image) in run("ps")
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(os.path.join(runtime, "vhdx"))) == 2
    assert run("ps").strip() == "nothing is served"
    assert not [n for n in os.listdir(os.path.join(runtime, "vhdx")) if n.endswith(".control")]


def test_stop_says_what_it_cannot_find(image):
    assert "no server of yours serves it" in run("stop", image, code=1)
    assert "say which" in run("stop", code=2)
    assert "no server of yours" in run("stop", "--pid", "1", code=1)


def test_a_program_that_serves_is_stopped(image):
    server = vhdx.serve({"disk": image})
    [found] = control.servers()
    found.stop()
    assert control.servers() == []
    server.close()  # a second time: nothing
    with vhdx.open(image, "r+"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_other_users_are_refused(image, runtime):
    with vhdx.serve({"disk": image}):
        [server] = control.servers()
        os.chmod(server.socket, 0o777)
        for each in [*server.socket.parents]:
            os.chmod(each, os.stat(each).st_mode | 0o005)
        ask = (
            "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
            "s = socket.socket(socket.AF_UNIX);"
            "s.connect(sys.argv[1]); s.sendall(b'GET /v1/server HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n');"
            "print(s.recv(4096).decode())"
        )
        done = subprocess.run(
            [sys.executable, "-c", ask, server.socket], capture_output=True, text=True, timeout=30
        )
    assert "403" in done.stdout.partition("\n")[0], done.stderr


def test_a_client_that_leaves_cancels_its_compaction(image):
    with vhdx.open(image, "r+") as disk:
        disk.resize(4 * GIB)
        for block in range(0, 2000):
            disk.pwrite(b"x" * 4096, block * MIB)
        disk.flush()
        disk.trim(0, 1000 * MIB)
    with vhdx.serve({"disk": image}) as server:
        asked = threading.Event()

        def cancel():
            asked.set()
            return True

        with pytest.raises(vhdx.VhdxError) as caught:
            vhdx.compact(image, progress=lambda *_: None, cancel=cancel)
        assert caught.value.reason == vhdx.Reason.CANCELLED
        assert asked.is_set()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # the server notices, and is free again
            try:
                vhdx.resize(image, 4 * GIB + MIB)
                break
            except vhdx.InUseError:
                time.sleep(0.05)
        assert server.exports()["disk"].size == 4 * GIB + MIB
        assert server.exports()["disk"].pread(1, 1500 * MIB) == b"x"


@pytest.mark.parametrize(
    "body",
    [
        "[1]",
        "{",
        "[" * 60000,
        '"' + "x" * 70000 + '"',
        *(
            '{"export": "disk", "arguments": ' + each + "}"
            for each in (
                *("[]", '{"size": "big"}', '{"size": true}', "{}", '{"size": null}'),
                *('{"size": -5}', '{"size": 1e400}', '{"size": 1%s}' % ("0" * 5000)),
            )
        ),
        '{"export": "other", "arguments": {"size": 104857600}}',
    ],
)
def test_garbage_is_refused_and_changes_nothing(image, body):
    with vhdx.serve({"disk": image}) as server:
        [found] = control.servers()
        assert b'{"error": ' in answer(found, "POST", "/v2/operations/resize", body)
        assert server.exports()["disk"].size == 64 * MIB


def answer(found, method, target, body=""):
    """The bytes with which a server answers a request."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(found.socket))
        client.settimeout(30)
        client.sendall(
            f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        return b"".join(iter(lambda: client.recv(4096), b""))


def post(found, operation, body):
    """A client that has asked, and reads nothing."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(found.socket))
    data = json.dumps(body).encode()
    client.sendall(
        f"POST /v2/operations/{operation} HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return client


@pytest.mark.parametrize(
    ("body", "status"), [([], 400), ({"export": "nobody", "arguments": {}}, 404)]
)
def test_what_is_not_begun_has_a_status(image, body, status):
    with vhdx.serve({"disk": image}):
        [found] = control.servers()
        with post(found, "resize", body) as client:
            assert client.recv(12) == f"HTTP/1.1 {status}".encode()


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/9.9",
        b"\x00\xff" * 100,
        b"POST /v2/qos HTTP/1.1\r\nContent-Length: -5",
        b"POST /v2/qos HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1",
    ],
    ids=["version", "bytes", "length", "chunk", "long"],
)
def test_what_is_no_http_is_answered_and_not_logged(image, line, caplog):
    with vhdx.serve({"disk": image}):
        [found] = control.servers()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(found.socket))
            client.settimeout(30)
            client.sendall(line + b"\r\n\r\n")
            assert client.recv(10)[9:] == b"4"
        assert control.servers()[0].answers
    assert caplog.records == []


def test_so_many_listen_to_events_and_no_more(image, monkeypatch):
    monkeypatch.setattr(control.service, "_MOST_LISTENERS", 3)
    with vhdx.serve({"disk": image}), contextlib.ExitStack() as stack:
        [found] = control.servers()
        answers = []
        for _ in range(4):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(found.socket))
            client.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            answers.append(client.recv(12))
        assert answers == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"]


def test_operations_that_take_long_do_not_hold_up_qos(image, monkeypatch):
    go, begun = threading.Event(), threading.Semaphore(0)

    def long(*_):
        begun.release()
        go.wait(60)

    monkeypatch.setattr(operations, "OPERATIONS", {"info": Operation(NoArguments, long)})
    with vhdx.serve({"disk": image}) as server, contextlib.ExitStack() as stack:
        [found] = control.servers()
        for _ in range(20):
            stack.enter_context(post(found, "info", {"export": "disk", "arguments": {}}))
        for _ in range(control.service._WORKERS):
            assert begun.acquire(timeout=30)
        try:
            found.set_disk("disk", {"maximum_iops": 77})
            assert server.qos.report().disks[0].settings.maximum_iops == 77
            assert "vhdx_" in found.metrics()
        finally:
            go.set()


@pytest.mark.parametrize("operation", ["map", "compact"])
def test_clients_that_do_not_listen_do_not_hold_a_server(tmp_path, operation, monkeypatch):
    monkeypatch.setattr(operations, "_PROGRESS_SECONDS", 0)
    path = tmp_path / "many.vhdx"
    vhdx.create(path, 64 * GIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        for block in range(0, 40000, 2):
            disk.zero(block * MIB, MIB)
    server = vhdx.serve({"disk": path})
    [found] = control.servers()
    clients = [post(found, operation, {"export": "disk"}) for _ in range(10)]
    time.sleep(0.5)
    closer = threading.Thread(target=server.close, daemon=True)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    for client in clients:
        client.close()
    with vhdx.open(path, "r+"):
        pass


def test_a_second_close_waits_for_the_first(image):
    order = []
    server = vhdx.serve({"disk": image})
    server.at_end(before=lambda: time.sleep(0.5), after=lambda: order.append("closed"))
    first = threading.Thread(target=server.close)
    first.start()
    time.sleep(0.1)
    server.close()
    order.append("second")
    first.join()
    assert order == ["closed", "second"]


def test_it_works_in_a_running_event_loop(image):
    async def ask():
        return vhdx.info(image)["virtual_size"]

    with subprocess.Popen([*VHDX, "serve", image], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert asyncio.run(ask()) == 64 * MIB
        process.kill()


def test_what_has_no_runtime_directory_is_refused_with_its_holder(image, monkeypatch):
    with vhdx.open(image, "r+"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
        with pytest.raises(vhdx.InUseError, match="this process"):
            vhdx.resize(image, 80 * MIB)


@pytest.mark.parametrize("name", [".", "..", "{x}", "a b", "\u00fc/#?%2F"])
def test_exports_of_any_name_are_reached(image, name):
    with vhdx.serve({name: image}):
        assert vhdx.info(image)["virtual_size"] == 64 * MIB


def test_stop_reaches_every_server_of_an_image_and_its_command(image):
    command = [*VHDX, "serve", "--read-only", image]
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for each in servers:
        each.stdout.readline()
    run("stop", image)
    assert [each.wait(20) for each in servers] == [0, 0]
    for each in servers:
        each.stdout.close()
    waiting = subprocess.Popen(
        [*VHDX, "serve", image, "--run", "echo on; exec sleep 600"], stdout=subprocess.PIPE
    )
    waiting.stdout.readline()
    run("stop", image)
    assert waiting.wait(20) == 128 + signal.SIGTERM
    waiting.stdout.close()


def test_a_server_that_is_stuck_is_named(image, monkeypatch):
    monkeypatch.setattr(control.client, "_ANSWER_SECONDS", 0.5)
    with subprocess.Popen([*VHDX, "serve", image], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            suspend(process)
            [found] = control.servers()
            assert (found.pid, found.answers) == (process.pid, False)
        finally:
            process.kill()


def test_a_server_of_another_environment_is_found_by_its_image(tmp_path, monkeypatch):
    """As one that a service manager started: without XDG_RUNTIME_DIR, where a login has it."""
    image = tmp_path / "disk.vhdx"
    vhdx.create(image, 4 * MIB)
    monkeypatch.setattr(places, "_OTHER_DIRECTORIES", [str(tmp_path / "other" / "vhdx")])
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
    with vhdx.serve({"disk": image}):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert control.servers() == []
        assert [owner.export for owner in control.owners(image)] == ["disk"]
        vhdx.resize(image, 8 * MIB)
    assert vhdx.info(image)["virtual_size"] == 8 * MIB


def test_a_client_of_another_version_is_refused_with_both(image):
    with vhdx.serve({"disk": image}):
        [found] = control.servers()
        refused = answer(found, "GET", "/v1/qos").decode()
    assert refused.startswith("HTTP/1.1 404")
    assert "speaks version 2 of the control interface, and the client version 1" in refused


@pytest.mark.parametrize("theirs", [1, 2], ids=["first", "later"])
def test_a_server_of_another_version_is_found_stopped_and_else_refused(image, monkeypatch, theirs):
    server = vhdx.serve({"disk": image})
    monkeypatch.setattr(control.client.api, "VERSION", 3)
    if theirs == 1:  # the first one did not say its version
        monkeypatch.setattr(control.service.api, "ServerReport", first_report)
    else:
        monkeypatch.setattr(control.service.api, "ServerReport", later_report)
    [found] = control.servers()
    wanted = f"speaks version {theirs} of the control interface .*, and this vhdx version 3"
    assert [export.path for export in found.exports] == [str(image)]
    for ask in (found.qos, found.subscribe, lambda: vhdx.resize(image, 80 * MIB)):
        with pytest.raises(ProtocolError, match=wanted):
            ask()
    found.stop()
    server.close()
    assert vhdx.info(image)["virtual_size"] == 64 * MIB


def first_report(pid, started, exports, connections, *version):
    return {"pid": pid, "started": started, "exports": exports, "connections": connections}


def later_report(*facts):
    return first_report(*facts) | {"control": 2, "vhdx": "0.3"}


def test_a_field_at_its_default_is_not_sent():
    """So that a later client may have more of them, and an older server takes what it sends."""
    assert api.encode(api.ResizeArguments(5)) == b'{"size": 5}'
    assert api.encode(api.ChangeDisk("a")) == b'{"change": "disk", "name": "a"}'


@pytest.mark.parametrize("body", ["{}", '{"seconds": 0}', '{"seconds": NaN}', '{"seconds": 1e9}'])
def test_subscriptions_have_an_end(image, body):
    with vhdx.serve({"disk": image}) as server:
        [found] = control.servers()
        refused = answer(found, "POST", "/v2/qos/subscription", body)
        assert refused.startswith(b"HTTP/1.1 400")
        assert server.qos.report().sampled_seconds == 0
        found.subscribe(5)
        assert server.qos.report().sampled_seconds > 0
