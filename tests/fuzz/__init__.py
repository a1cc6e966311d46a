# SPDX-License-Identifier: MIT
"""Fuzzers: ``python -m tests.fuzz open|handshake|nbd|all|planted --seconds 600 [--seed N]``.

open       structures of real images, mutated with their checksums put right, opened, read and
           written; a second reader must agree, and nothing may hang or grow
handshake  option streams into the handshake; a second parser must agree
nbd        request streams into the transmission phase, in C under sanitizers
planted    ten bugs planted into each of them, one at a time: each must be found
"""
