# SPDX-License-Identifier: MIT
"""The transmission phase: the fuzzer is a C program, built with sanitizers."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_nbd(source: Path, target: Path) -> Path:
    """The fuzzer of the transmission phase, under sanitizers."""
    program = target / "fuzz_nbd"
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined"]
    command += [
        "-fno-sanitize-recover=all",
        "-DVX_SERVICE_PIECE=((size_t)96<<10)",
        f"-I{source}",
        f"-I{ROOT / 'tests' / 'c'}",
    ]
    command += [*map(str, sorted(source.rglob("*.c"))), str(ROOT / "tests" / "c" / "fuzz_nbd.c")]
    subprocess.run([*command, "-o", str(program), "-lpthread"], check=True)
    return program


def fuzz_nbd(seconds: float, seed: int) -> None:
    """Raises on a bug."""
    with tempfile.TemporaryDirectory() as directory:
        program = build_nbd(ROOT / "csrc", Path(directory))
        subprocess.run([program, str(int(seconds)), str(seed)], check=True)
