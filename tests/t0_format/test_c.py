# SPDX-License-Identifier: MIT
"""C unit tests under sanitizers, and the stress of the map with guarantees taken away."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
SOURCES = sorted((ROOT / "csrc").rglob("*.c"))
GCC = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g"]
UNITS = sorted((ROOT / "tests" / "c").glob("test_*.c"))


@functools.cache
def compiled(*options: str) -> Path:
    """An archive of all sources, compiled once with these options."""
    directory = Path(tempfile.mkdtemp(prefix="vhdx-test-c-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    command = [*GCC, *options, *WARNINGS, f"-I{ROOT / 'csrc'}", "-c", *map(str, SOURCES)]
    subprocess.run(command, cwd=directory, check=True)
    archive = directory / "all.a"
    subprocess.run(["ar", "rcs", archive, *directory.glob("*.o")], check=True)
    return archive


def build(target: Path, main: Path, *options: str, instead: Path | None = None) -> Path:
    """A program of ``main`` and all sources; the source ``instead`` takes the place of its namesake."""
    program = target / main.stem
    wrapped = sorted(set(re.findall(r"__wrap_(\w+)", main.read_text())))
    command = [*GCC, *options, *WARNINGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'c'}"]
    command += [f"-Wl,--wrap={name}" for name in wrapped]
    # The linker takes from the archive only what the files before it do not define.
    command += [str(main), *([] if instead is None else [str(instead)]), str(compiled(*options))]
    subprocess.run([*command, "-o", str(program), "-lpthread"], check=True)
    return program


SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


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
    program = build(tmp_path, unit, *SANITIZED)
    result = run(program)
    assert result.returncode == 0, result.stderr


MAY_INCLUDE = {
    "core": set(),
    "array": {"core"},
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
    program = build(tmp_path, stress, *SANITIZED)
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


WITHOUT = [
    ("no writer keeps out", "ranges", "atomic_store(&b->written, true);", ";"),
    ("readers do not keep writers out", "ranges", "(alone ? b->readers", "(alone ? 0 * b->readers"),
    ("ranges are taken in any order", "ranges", "bits &= bits - 1) {\n            uint32_t at = word * 64 + (uint32_t)__builtin_ctzll(bits);\n            if (take", "bits &= ~(1ull << (63 - __builtin_clzll(bits)))) {\n            uint32_t at = word * 64 + 63 - (uint32_t)__builtin_clzll(bits);\n            if (take"),
    ("a fan does not wait for its helpers", "fan", "while (fan->ended < fan->count)", "while (false)"),
    ("only helpers take children", "fan", "    take_children(fan);\n    pthread_mutex_lock", "    pthread_mutex_lock"),
    ("a child is taken twice", "fan", "atomic_fetch_add(&fan->taken, 1)", "fan->taken; fan->taken = index + 1"),
    ("a barrier covers what came during it", "leaf", "    bool succeeded = synchronise(file);", "    bool succeeded = synchronise(file);\n    covered = atomic_load(&file->changes);"),
    ("a flush takes any barrier that ends", "leaf", "while (file->durable < wanted && file->in_barrier)\n        pthread_cond_wait(&file->synchronised, &file->lock);", "if (file->in_barrier) {\n        pthread_cond_wait(&file->synchronised, &file->lock);\n        wanted = 0;\n    }"),
    ("a change leaves the watched mark", "moves", "entry & ~VX_ENTRY_WATCHED", "entry"),
    ("changes are noted late", "moves", "    if (taken != 0)\n        vx_epoch_quiesce(&map->epochs);", "    "),
    ("notes are reset when changes are noted already", "moves", "    vx_epoch_quiesce(&map->epochs); /* changes that have not seen it */\n", "    vx_epoch_quiesce(&map->epochs);\n    atomic_store(&map->tracked_changes, 0);\n"),
    ("tracking begins without a quiesce", "moves", "    vx_epoch_quiesce(&map->epochs); /* changes that have not", "    /* changes that have not"),
    ("a barrier does not wait for FUA writes", "leaf", "pthread_rwlock_wrlock(&file->errors);", "pthread_rwlock_rdlock(&file->errors);"),
    ("a FUA write does not wait for a barrier", "leaf", "file->in_barrier && file->finished == finished;)", "file->in_barrier && file->finished == finished && false;)"),
    ("a failed barrier does not poison", "leaf", "fail_barrier(file, request, 0); /*", "fail_here(file, request, 0); /*"),
    ("reads do not wait for changes of copies", "layout", "waits && is_busy(layout, spans, count)", "waits && count == 0"),
    ("changes of copies do not wait for each other", "layout_write", "spans, c->part_count, true, nowait)", "spans, 0, true, nowait)"),
    ("a disk that failed is read until it is out", "layout_write", "    suspect(c, t);\n", "    (void)suspect;\n"),
    ("copies stay different where there was no space", "layout_write", "int32_t soft = settle(c);", "int32_t soft = VX_OK;\n    (void)settle;\n    for (uint32_t i = 0; i < c->target_count; i++)\n        soft = is_soft(&c->targets[i]) ? c->targets[i].result : soft;"),
    ("a failed copy counts as written", "layout_write", "return t->result != 0 && !is_soft(t);", "return t->result == 12345;"),
    ("a second copy may answer again", "layout_write", "i == 0 ? c->flags : c->flags & ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK)", "c->flags"),
    ("stale members are not written", "layout_write", "vx_layout_leaf(layout, entry, true)", "vx_layout_leaf(layout, entry, false)"),
    ("stale members are read", "layout_read", "vx_layout_leaf(layout, entry, false)", "vx_layout_leaf(layout, entry, true)"),
    ("old slabs are free while they are used", "layout_core", "    atomic_fetch_add(&device->progress, 1);\n    vx_epoch_quiesce(&layout->epochs);\n    return mismatches;", "    atomic_fetch_add(&device->progress, 1);\n    return mismatches;"),
    ("a row is clean while it is changed", "layout_core", "        vx_epoch_quiesce(&layout->epochs); /* changes that found it marked */", "        (void)0;"),
    ("rows need no mark", "layout_write", "!(mark & VX_MARKED)", "false"),
    ("a copy does not keep changes out", "layout_repair", "    vx_ranges_enter(layout->ranges, &p->span, 1, true, false);", "    p->span.count = 0;\n    vx_ranges_enter(layout->ranges, &p->span, 1, true, false);"),
    ("changes do not look again whether a slab moves", "layout_write", "locks || !atomic_load(&layout->locks)", "true"),
]  # fmt: skip
FILES = {
    "layout": "array/layout_read.c",
    "layout_core": "array/layout.c",
    "layout_read": "array/layout_read.c",
    "layout_write": "array/layout_write.c",
    "layout_repair": "array/layout_repair.c",
    "ranges": "core/ranges.c",
    "fan": "core/fan.c",
    "leaf": "leaf/file.c",
    "moves": "map/map_watch.c",
}


@pytest.mark.parametrize(
    ("name", "old", "new"), [pytest.param(*each[1:], id=each[0]) for each in WITHOUT]
)
def test_stress_fails_on_sources_without(name, old, new, tmp_path):
    source = ROOT / "csrc" / FILES[name]
    text = source.read_text()
    assert text.count(old) == 1
    changed = tmp_path / source.name
    changed.write_text(text.replace(old, new))
    main = ROOT / "tests" / "c" / f"stress_{name.partition('_')[0]}.c"
    program = build(tmp_path, main, "-O1", "-fno-builtin", "-Wno-unused-function", instead=changed)
    result = run(program, "30")
    assert result.returncode == 1, result.stdout
    assert "failed:" in result.stderr
