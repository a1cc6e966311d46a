# SPDX-License-Identifier: MIT
"""Tells cffi how to build vhdx.plane._native; run by setup.py."""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(HERE)) for p in HERE.rglob("*.c"))
HEADERS = sorted(str(p.relative_to(HERE)) for p in HERE.rglob("*.h"))

ffibuilder = FFI()
ffibuilder.cdef((HERE / "native.cdef.h").read_text())
ffibuilder.set_source(
    "vhdx.plane._native",
    '#include "native.h"\n',
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{name}" for name in HEADERS],
    include_dirs=["csrc"],
    libraries=["pthread"],
    extra_compile_args=[
        "-std=c11",
        "-D_GNU_SOURCE",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Wconversion",
        "-fvisibility=hidden",
        *os.environ.get("VHDX_CFLAGS", "").split(),
    ],
    extra_link_args=os.environ.get("VHDX_LDFLAGS", "").split(),
)
