# SPDX-License-Identifier: MIT
"""Runs the test suites of libnbd and nbd against vhdx: python -m tests.interop DIRECTORY.

The suites are fetched and built in DIRECTORY (``build.sh``). Where they start nbdkit or nbd-server, a
program of that name in ``standins`` serves by vhdx what was asked for. What cannot be translated goes
to the real program; such a test says nothing of vhdx, and is listed as "peer" with the reason.

The run fails where a test ends otherwise than ``expected.json`` says. A failure that stays has its
reason there, behind "fail: ". ``--update`` writes the file, and keeps the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected.json"
VHDX = Path(sys.executable).with_name("vhdx")
SUITES = ("tests", "copy", "info", "dump", "sh", "interop", "python")
SECONDS = 120
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
# A VHDX block of 1 MiB at least is data as a whole; these compare maps in smaller units.
RAW = {
    "info/info-map-base-allocation.sh",
    "info/info-map-base-allocation-json.sh",
    "info/info-map-base-allocation-large.sh",
    "info/info-map-totals.sh",
    "info/info-map-totals-json.sh",
    "info/info-cmd-map-totals.sh",
}
TRIES = 3  # of tests that fail now and then against their own server, too
FLAKY = {"copy/copy-sparse.sh", "copy/copy-sparse-allocated.sh"}


@dataclass
class Outcome:
    """How a test ended: "pass", "skip", "fail", "peer" (vhdx had no part) or "none" (nobody had)."""

    word: str
    reasons: list[str]
    output: str


def run_bounded(command: list, cwd: Path, environment: dict[str, str], out: Path) -> int | None:
    """The exit code; None after too long. Everything that it left running is ended."""
    with out.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(0.5)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def outcome(code: int | None, log: Path, out: Path) -> Outcome:
    lines = log.read_text().splitlines() if log.exists() else []
    starts = [json.loads(line) for line in lines]
    reasons = sorted({s["reason"] for s in starts if s["by"] != "vhdx"})
    served = any(s["by"] == "vhdx" for s in starts)
    word = {0: "pass", 77: "skip"}.get(code, "fail") if code is not None else "fail"
    if not served and word != "skip":
        word = "peer" if starts else "none" if word == "pass" else word
    return Outcome(word, reasons, out.read_text(errors="replace")[-4000:])


def environment_of(scratch: Path, name: str, path: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LISTEN_", "VHDX", "PYTHON"))}
    return kept | {
        "INTEROP_VHDX": str(VHDX),
        "INTEROP_DIR": str(scratch),
        "INTEROP_LOG": str(scratch / "log"),
        "INTEROP_FORMAT": "raw" if name in RAW else "vhdx",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(scratch),
        "PATH": path,
    }


def libnbd_tests(tree: Path) -> list[tuple[str, str]]:
    found = []
    for suite in SUITES:
        if suite == "python":
            names = sorted(f"t/{path.name}" for path in (tree / suite / "t").glob("*.py"))
        else:
            probe = "probe:\n\t@echo '$(TESTS)'\n"
            command = ["make", "-s", "--no-print-directory", "-f", "Makefile", "-f", "-", "probe"]
            done = subprocess.run(
                command, cwd=tree / suite, input=probe, capture_output=True, text=True, check=True
            )
            names = done.stdout.split()
        found += [(suite, name) for name in names]
    return found


def run_libnbd(tree: Path, suite: str, test: str) -> Outcome:
    version = re.search(
        r"^PACKAGE_VERSION *= *(\S+)", (tree / "lib/Makefile").read_text(), re.MULTILINE
    )
    with tempfile.TemporaryDirectory(prefix="interop-") as directory:
        scratch = Path(directory)
        environment = environment_of(scratch, f"{suite}/{test}", f"{HERE}/standins:{SYSTEM}") | {
            "LIBNBD_DEBUG": "1",
            "srcdir": ".",
            "EXPECTED_VERSION": version[1],
            "QEMU_NBD": "qemu-nbd",
            "PSKTOOL": "psktool",
            "PYTHON": "/usr/bin/python3",
        }
        python = ["/usr/bin/python3"] if test.endswith(".py") else []
        command = [tree / "run", *python, f"./{test}"]
        code = run_bounded(command, tree / suite, environment, scratch / "out")
        return outcome(code, scratch / "log", scratch / "out")


def nbd_tests(tree: Path) -> list[str]:
    makefile = (tree / "tests/run/Makefile.am").read_text().replace("\\\n", " ")
    return re.search(r"^TESTS *= *(.*)$", makefile, re.MULTILINE)[1].split()


def run_nbd(tree: Path, test: str) -> Outcome:
    """In a directory of its own: the suite starts ../../nbd-server, always on the same port."""
    suite = tree / "tests/run"
    with tempfile.TemporaryDirectory(prefix="interop-") as directory:
        scratch = Path(directory)
        place = scratch / "tests/run"
        place.mkdir(parents=True)
        (place / "nbd-tester-client").symlink_to(suite / "nbd-tester-client")
        (scratch / "nbd-client").symlink_to(tree / "nbd-client")
        (scratch / "nbd-server").symlink_to(HERE / "standins/nbd-server")
        environment = environment_of(scratch, test, f"{HERE}/standins-nbd:{os.environ['PATH']}")
        command = [suite / "simple_test", f"./{test}"]
        code = run_bounded(command, place, environment, scratch / "out")
        return outcome(code, scratch / "log", scratch / "out")


def run_all(directory: Path, only: str) -> dict[str, Outcome]:
    libnbd, nbd = directory / "src/libnbd", directory / "src/nbd"
    found: dict[str, Outcome] = {}

    def note(name: str, run) -> None:
        if only not in name:
            return
        result = run()
        for _ in range(TRIES - 1 if name in FLAKY else 0):
            if result.word != "fail":
                break
            result = run()
        found[name] = result
        print(f"{result.word:5} {name}  {'; '.join(result.reasons)}", flush=True)

    for suite, test in libnbd_tests(libnbd):
        note(f"{suite}/{test}", lambda: run_libnbd(libnbd, suite, test))  # noqa: B023
    for test in nbd_tests(nbd):
        note(f"nbd/{test}", lambda: run_nbd(nbd, test))  # noqa: B023
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="tests whose name contains this")
    parser.add_argument("--update", action="store_true", help="write expected.json")
    given = parser.parse_args()
    directory = given.directory.resolve()
    subprocess.run([HERE / "build.sh", directory], check=True)
    found = run_all(directory, given.only)
    words = {name: each.word for name, each in found.items()}
    for suite in dict.fromkeys(name.split("/")[0] for name in words):
        mine = [word for name, word in words.items() if name.split("/")[0] == suite]
        print(suite, {word: mine.count(word) for word in sorted(set(mine))})
    if given.update:
        before = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
        kept = {n: before[n] for n, w in words.items() if before.get(n, "").partition(":")[0] == w}
        EXPECTED.write_text(json.dumps(words | kept, indent=1) + "\n")
        return 0
    expected = json.loads(EXPECTED.read_text())
    known = {name: words.partition(":")[0] for name, words in expected.items()}
    wrong = [name for name, word in words.items() if known.get(name) != word]
    for name in wrong:
        print(f"--- {name}: {words[name]}, expected {expected.get(name)}\n{found[name].output}")
    print(f"{len(words) - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
