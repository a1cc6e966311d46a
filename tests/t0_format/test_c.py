# SPDX-License-Identifier: MIT
"""C unit tests under sanitizers, and the stress of the map with guarantees taken away."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
SOURCES = sorted((ROOT / "csrc").rglob("*.c"))
UNITS = sorted((ROOT / "tests" / "c").glob("test_*.c"))


def build(target: Path, main: Path, *options: str) -> Path:
    program = target / main.stem
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", *options, *WARNINGS]
    if "__wrap_realloc" in main.read_text():
        command.append("-Wl,--wrap=realloc")
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'c'}", *map(str, SOURCES), str(main)]
    subprocess.run([*command, "-o", str(program), "-lpthread"], check=True)
    return program


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_unit_under_address_and_undefined_behaviour_sanitizer(unit, tmp_path):
    program = build(
        tmp_path, unit, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    result = run(program)
    assert result.returncode == 0, result.stderr


MAY_INCLUDE = {
    "core": set(),
    "leaf": {"core"},
    "map": {"core"},
    "sim": {"core"},
    "qos": {"core", "sim"},
    "front": {"core"},
}


def test_folders_include_downwards_only():
    found = {
        (path.parent.name, folder)
        for path in (ROOT / "csrc").rglob("*.[ch]")
        for folder in re.findall(r'#include "(\w+)/', path.read_text())
        if path.parent.name in MAY_INCLUDE and folder != path.parent.name
    }
    assert {path.parent.name for path in SOURCES} == set(MAY_INCLUDE)
    assert [(a, b) for a, b in sorted(found) if b not in MAY_INCLUDE[a]] == []


STRESSES = sorted((ROOT / "tests" / "c").glob("stress_*.c"))
stresses = pytest.mark.parametrize("stress", STRESSES, ids=lambda path: path.stem)


@stresses
def test_stress_under_address_sanitizer(stress, tmp_path):
    program = build(tmp_path, stress, "-O1", "-fsanitize=address,undefined")
    result = run(program, "4")
    assert result.returncode == 0, result.stderr


@stresses
def test_stress_under_thread_sanitizer(stress, tmp_path):
    # -fno-builtin, or the copies of the memory leaf are inlined and nothing is seen.
    program = build(tmp_path, stress, "-O1", "-fsanitize=thread", "-fno-builtin")
    result = run(program, "6", TSAN_OPTIONS="halt_on_error=1")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("stress", "mutation"),
    [
        pytest.param("stress_map", 1, id="no quiesce after sharing"),
        pytest.param("stress_map", 2, id="no quiesce after publishing"),
        pytest.param("stress_map", 4, id="flush does not wait for the commit generation"),
        pytest.param("stress_map", 8, id="busy pages do not hold up writers"),
        pytest.param("stress_mixed", 16, id="two fill sectors of a page at a time"),
        pytest.param("stress_mixed", 32, id="bits before data"),
        pytest.param("stress_mixed", 64, id="bitmaps copied after the barrier"),
    ],
)
def test_stress_fails_without(stress, mutation, tmp_path):
    main = ROOT / "tests" / "c" / f"{stress}.c"
    program = build(tmp_path, main, "-O1", "-DVX_MUTATE", "-fno-builtin")
    result = run(program, "30", str(mutation))
    assert result.returncode == 1
    assert "failed:" in result.stderr
