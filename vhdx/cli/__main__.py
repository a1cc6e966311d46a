# SPDX-License-Identifier: MIT
"""``python -m vhdx.cli``: the same as ``vhdx``."""

from vhdx.cli import main

main()
