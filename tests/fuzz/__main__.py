# SPDX-License-Identifier: MIT
from __future__ import annotations

import argparse
import sys

import tests.fuzz
from tests.fuzz.handshake import fuzz_handshake
from tests.fuzz.mending import fuzz_check, fuzz_log, fuzz_repair
from tests.fuzz.opening import fuzz_open
from tests.fuzz.planted import PLANTED, find_planted
from tests.fuzz.transmission import fuzz_nbd

RUN = {
    "open": fuzz_open,
    "log": fuzz_log,
    "check": fuzz_check,
    "repair": fuzz_repair,
    "handshake": fuzz_handshake,
    "nbd": fuzz_nbd,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=tests.fuzz.__doc__)
    parser.add_argument("what", choices=[*RUN, "all", "planted"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(PLANTED))
    arguments = parser.parse_args()
    if arguments.what == "planted":
        kinds = [arguments.only] if arguments.only else list(PLANTED)
        missed = [each for kind in kinds for each in find_planted(kind, arguments.seconds)]
        return 1 if missed else 0
    for name in RUN if arguments.what == "all" else [arguments.what]:
        RUN[name](arguments.seconds, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
