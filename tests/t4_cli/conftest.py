# SPDX-License-Identifier: MIT
"""What tests of commands share."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

import vhdx
from tests.t4_cli.command import VHDX
from vhdx.units import MIB


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A runtime directory of the test's own; unix socket paths are short."""
    base = tmp_path / "run"
    base.mkdir()
    if len(str(base)) > 60:
        base = os.path.realpath(f"/tmp/v{os.getpid()}")
        os.makedirs(base, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    yield str(base)
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def image(tmp_path):
    """A dynamic image of 64 MiB."""
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 64 * MIB, block_size=MIB)
    return path


@pytest.fixture
def served(image, runtime):
    """The image, served by the command in a process of its own."""
    with subprocess.Popen([*VHDX, "serve", image], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield process
        if process.poll() is None:
            process.kill()
