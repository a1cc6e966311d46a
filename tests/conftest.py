# SPDX-License-Identifier: MIT
"""Fixtures. Folders are numbered by layer: the first failure is the lowest broken one."""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from vhdx.image.vhdx import journal

# A shell starts background jobs with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REQUIRE = os.environ.get("VHDX_REQUIRE_PEERS") == "1"
DATA = Path(os.environ.get("VHDX_TEST_DATA", Path(__file__).parents[2] / "shared"))

common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("test", max_examples=60, derandomize=True, database=None, **common)
settings.register_profile("soak", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def pytest_collection_modifyitems(items):
    """Guests first: they take minutes, one after another, and would be waited for at the end."""
    items.sort(key=lambda item: "test_guest" not in item.path.name)


def absent(what: str) -> None:
    """Skips, or fails where everything must be there."""
    if REQUIRE:
        pytest.fail(f"{what} is missing, and VHDX_REQUIRE_PEERS is set")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def peer():
    """Call it with program names: skips or fails when one is not installed."""

    def check(*programs: str) -> None:
        for program in programs:
            if shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
                absent(program)

    return check


@pytest.fixture
def sample(tmp_path):
    """Call it with the name of a sample image: a fresh, sparse copy of it."""

    def unpack(name: str) -> Path:
        for suffix, opener in ((".gz", gzip.open), (".bz2", bz2.open)):  # noqa: B007
            packed = DATA / "images" / (name + suffix)
            if packed.exists():
                break
        else:
            if not DATA.exists():
                pytest.skip(f"no sample images at {DATA}")  # data from outside, not a peer
            absent(f"sample {name}")
        target = tmp_path / name
        with opener(packed) as source, target.open("wb") as out:
            while piece := source.read(1 << 20):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), os.SEEK_CUR)
                else:
                    out.write(piece)
            out.truncate()
        return target

    return unpack


@pytest.fixture
def fast_path(tmp_path_factory):
    """A directory in memory where there is one: for images that are written a lot."""
    base = Path("/dev/shm")
    if not os.access(base, os.W_OK):
        yield tmp_path_factory.mktemp("fast")
        return
    path = base / f"vhdx-test-{os.getpid()}-{tmp_path_factory.mktemp('x').name}"
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def kept_pages_are_the_files(monkeypatch):
    """In every test: a page of metadata that is kept in memory is what the file holds."""
    plain = journal.Pages.read

    def read(self, offsets):
        pages = plain(self, offsets)
        if not np.array_equal(pages, plain(journal.Pages(self._leaf, 0), offsets)):
            raise AssertionError("a kept page of metadata differs from the file")
        return pages

    monkeypatch.setattr(journal.Pages, "read", read)
