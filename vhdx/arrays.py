# SPDX-License-Identifier: MIT
"""numpy, loaded when it is first used: ``from vhdx.arrays import np``.

Importing numpy takes longer than most commands run, and many commands read no table.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy.Module("numpy")
