# SPDX-License-Identifier: MIT
"""The package itself: wheels from the sdist, exports, and the fuzzers' short form."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vhdx
from tests.fuzz import planted

ROOT = Path(__file__).parents[2]


def test_wheel_is_built_from_the_sdist_and_runs(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/ffi_build.py", "csrc/native.cdef.h", "csrc/map/map.c", "Makefile"} <= names
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import vhdx; vhdx.create('x.vhdx', 1 << 20); print(vhdx.open('x.vhdx').pread(3, 0))"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == r"b'\x00\x00\x00'", ran.stderr
    assert (tmp_path / "site" / "vhdx" / "py.typed").exists()


def test_library_exports_nothing_but_its_entry():
    (library,) = (ROOT / "vhdx" / "plane").glob("_native*.so")
    text = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in text.splitlines()] == ["PyInit__native"]


def test_everything_exported_is_there_and_documented():
    for name in vhdx.__all__:
        assert getattr(vhdx, name).__doc__, name
    public = {n for n in dir(vhdx) if not n.startswith("_")}
    modules = {"control", "errors", "files", "format", "front", "host", "image"} | {
        "mounting", "plane", "qos", "spaces", "units", "volume", "cli",
    }  # fmt: skip
    assert public - modules == set(vhdx.__all__)


@pytest.mark.parametrize("kind", ["open", "handshake", "nbd"])
def test_fuzzer_finds_nothing(kind):
    command = [sys.executable, "-m", "tests.fuzz", kind, "--seconds", "8", "--seed", "7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", sorted(planted.PLANTED))
def test_planted_bugs_still_fit_the_code(kind):
    assert len(list(planted.planted_trees(kind))) >= 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(planted.PLANTED))
def test_fuzzers_find_ten_planted_bugs_each(kind):
    assert planted.find_planted(kind, 60) == []


LATE = """
import sys, vhdx
vhdx.create("a.vhdx", 64 << 20)
with vhdx.serve({"a": "a.vhdx"}):
    before = set(sys.modules)
    vhdx.resize("a.vhdx", 128 << 20)
    vhdx.compact("a.vhdx")
    vhdx.snapshot("a.vhdx", "b.vhdx")
    vhdx.info("a.vhdx")
    print(sorted(name for name in set(sys.modules) - before if name.startswith("vhdx")))
"""


def test_a_server_loads_nothing_late(tmp_path):
    """What it loaded later could be of another version: packages are upgraded under servers."""
    run = subprocess.run(
        [sys.executable, "-c", LATE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["a.raw", "a.vhdx", "a.vhd"])
def test_an_open_disk_has_loaded_numpy(tmp_path, name):
    """Where it cannot be loaded the open fails, and not a fault, which would poison the disk."""
    script = f"import sys, vhdx; disk = vhdx.open({name!r}, 'r+'); print('numpy' in sys.modules)"
    if name == "a.raw":
        (tmp_path / name).write_bytes(bytes(1 << 20))
    else:
        vhdx.create(tmp_path / name, 64 << 20)
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "True"


LONGEST_FILE, LONGEST_CLASS, MOST_METHODS = 600, 300, 20


def large_classes():
    """Classes past the caps: name, lines, public methods."""
    for path in (ROOT / "vhdx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
                methods = sum(not name.startswith("_") for name in names)
                if lines > LONGEST_CLASS or methods > MOST_METHODS:
                    yield node.name, lines, methods


def test_files_and_classes_keep_their_caps():
    sources = [*(ROOT / "vhdx").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]")]
    assert len(sources) > 150
    assert [p for p in sources if len(p.read_text().splitlines()) > LONGEST_FILE] == []
    listed = re.findall(
        r"^\| `(\w+)` \((\d+) lines(?:, (\d+) methods)?\) \|",
        (ROOT / "docs" / "architecture.md").read_text(),
        re.MULTILINE,
    )
    allowed = {name: (int(lines), int(methods or MOST_METHODS)) for name, lines, methods in listed}
    for name, lines, methods in large_classes():
        assert name in allowed, f"{name} has {lines} lines and {methods} public methods"
        assert lines <= allowed[name][0], name
        assert methods <= allowed[name][1], name


def imports_of(path):
    """The modules of the package that a file imports, those for types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        yield from (name for name in names if name.startswith("vhdx"))


def test_no_files_import_each_other_in_a_circle():
    modules = {}
    for path in (ROOT / "vhdx").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":  # which only hands names on
            modules[name] = path
    graph = {name: {x for x in imports_of(path) if x in modules} for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
