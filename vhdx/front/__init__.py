# SPDX-License-Identifier: MIT
"""Front ends: each gives clients access to the disks of a session over one network protocol."""
