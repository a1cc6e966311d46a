# SPDX-License-Identifier: MIT
"""Legacy VHD images (Microsoft, Virtual Hard Disk Image Format Specification 1.0)."""
