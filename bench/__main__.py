# SPDX-License-Identifier: MIT
"""Measures and reports: ``python -m bench nbd|api|stall|chain|convert|qos|start|mount|stack|spaces``.

``--quick`` gives a first look. Prints a table and writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import api, chain, convert, mount, nbd, qos, spaces, stack, stall, start
from bench.conditions import Places, machine

HERE = Path(__file__).parent
BENCHMARKS = {
    "nbd": nbd, "api": api, "stall": stall, "chain": chain, "convert": convert, "qos": qos,
    "start": start, "mount": mount, "stack": stack, "spaces": spaces,
}  # fmt: skip


def markdown(name: str, report: dict[str, Any], about: dict[str, Any]) -> str:
    """A table for each benchmark."""
    lines = [f"# {name}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    for title, rows in report.items():
        if not isinstance(rows, list):
            lines += [f"**{title}**: {rows}", ""]
            continue
        keys = list(rows[0])
        lines += [f"## {title}", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        for row in rows:
            cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="a short form, for a look")
    parser.add_argument("--fast", type=Path, default=Path("/dev/shm"), help="directory on tmpfs")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), help="directory on a disk")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    module = BENCHMARKS[arguments.what]
    run: Callable[..., dict[str, Any]] = module.run
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = run(Places(arguments.fast, arguments.disk, arguments.out), quick=arguments.quick)
    about = machine() | {"quick": arguments.quick}
    text = markdown(arguments.what, report, about)
    (arguments.out / f"{arguments.what}.json").write_text(
        json.dumps({"machine": about, "report": report}, indent=2)
    )
    (arguments.out / f"{arguments.what}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(HERE.parent))
    main()
