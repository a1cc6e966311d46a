# SPDX-License-Identifier: MIT
"""Front ends: each is a wire by which clients reach the disks of a session, and nothing else."""
