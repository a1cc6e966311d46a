# SPDX-License-Identifier: MIT
"""Each call of the file device fails once: nothing is corrupted, and what fails says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import STORIES

SOURCE = Path(__file__).parents[1] / "c" / "fail.c"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    target = tmp_path_factory.mktemp("shim") / "fail.so"
    options = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *options, SOURCE, "-o", target, "-ldl"], check=True)
    return target


def run(shim, story, step):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", story, str(step)],
        env=os.environ | {"LD_PRELOAD": str(shim)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout.strip())
    calls, cases = (int(word) for word in done.stdout.split() if word.isdigit())
    assert cases > calls / step


@pytest.mark.parametrize("story", STORIES)
def test_some_calls_fail(shim, story):
    run(shim, story, 29)


@pytest.mark.soak
@pytest.mark.parametrize("story", STORIES)
def test_every_call_fails(shim, story):
    run(shim, story, 1)
