# SPDX-License-Identifier: MIT
"""Builds the C data plane; everything else stands in pyproject.toml."""

import sysconfig

from setuptools import setup

# The extension uses the limited API, so one wheel serves every later Python, except the
# free-threaded ones, which know no limited API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["csrc/ffi_build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
