# SPDX-License-Identifier: MIT
"""Planted bugs: a fuzzer counts when it finds each of ten within a minute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.transmission import ROOT, build_nbd

# File, text, and what a tired programmer might have written instead.
PLANTED: dict[str, list[tuple[str, str, str]]] = {
    "open": [
        ("vhdx/format/header.py", "data[:4] != b\"head\" or not verify(data)", "data[:4] != b\"head\""),
        ("vhdx/format/region.py", "if count > _MOST_ENTRIES:\n        return None", "pass"),
        ("vhdx/format/metadata.py", "signature != b\"metadata\" or count", "count"),
        ("vhdx/format/metadata.py", "if len(data) != struct.calcsize(layout):", "if False:"),
        ("vhdx/format/metadata.py", "size == 0 or size > LARGEST_DISK or size % logical", "size % 512"),
        ("vhdx/format/metadata.py", "if not _power_of_two(block_size, MIB, 256 * MIB):", "if False:"),
        ("vhdx/format/locator.py", "at == 0 or length == 0 or at + length > len(data)", "False"),
        ("vhdx/format/header.py", "if header.version != 1:", "if False:"),
        ("vhdx/image/vhdx/structure.py", "if geometry.entries * 8 > bat.length:", "if False:"),
        ("vhdx/image/vhdx/allocation.py", "bad = bad_state | bad_reserved | bad_offset", "bad = bad_state"),
    ],
    "handshake": [
        ("vhdx/front/nbd/handshake.py", "if length > self.option_bytes:", "if length > 1 << 40:"),
        ("vhdx/front/nbd/handshake.py", "if self._options > self.most_options:", "if False:"),
        ("vhdx/front/nbd/handshake.py", "if length <= len(data) - 6 and length <= _LONGEST_STRING:", "if True:"),
        ("vhdx/front/nbd/handshake.py", "if len(data) - at < 4:\n            return None", "pass"),
        ("vhdx/front/nbd/handshake.py", "if name is None or len(data) - name[1] < 4:", "if name is None:"),
        ("vhdx/front/nbd/handshake.py", "except UnicodeDecodeError:", "except KeyError:"),
        ("vhdx/front/nbd/handshake.py", "if len(data) >= 6:", "if True:"),
        ("vhdx/front/nbd/handshake.py", "if terms is None:\n            return _refuse(option, ERR_UNKNOWN", "if False:\n            return _refuse(option, ERR_UNKNOWN"),
        ("vhdx/front/nbd/handshake.py", "self._contexts.allocation and self._contexts.export == name", "self._contexts.allocation"),
        ("vhdx/front/nbd/handshake.py", "bytes(self._input)\n        )\n        self._input.clear()", "b\"\"\n        )\n        self._input.clear()"),
    ],
    "nbd": [
        ("front/nbd_reply.c", "bool last = nbd_is_complete(command), sent", "bool last = true, sent"),
        ("front/nbd_request.c", "    piece.offset += command->begun;\n    piece.length = divisible", "    piece.length = divisible"),
        ("front/nbd_wire.c", "if (request->flags & ~allowed_flags(request, terms))", "if (false)"),
        ("front/nbd_wire.c", "if (terms->read_only)\n            return NBD_EPERM;\n        if (request->length", "if (request->length"),
        ("front/nbd_wire.c", "nbd_put_chunk(out, last, NBD_CHUNK_HOLE, cookie, 12)", "nbd_put_chunk(out, last, NBD_CHUNK_HOLE, cookie, 8)"),
        ("front/nbd_wire.c", "!terms->block_status || request->length == 0", "!terms->block_status"),
        ("front/nbd_request.c", "if (wire->length <= present && write_inline(c, wire, payload)) {\n        c->begin += wire->length;", "if (wire->length <= present && write_inline(c, wire, payload)) {\n        c->begin += wire->length + 1;"),
        ("front/nbd_request.c", "size_t part = present < task->wire.length ? present : task->wire.length;", "size_t part = present;"),
        ("front/nbd_request.c", "wire->length <= INLINE_READ && read_inline", "read_inline"),
        ("front/nbd_reply.c", "wire->flags & NBD_FLAG_REQ_ONE ? 1 : STATUS_EXTENTS", "STATUS_EXTENTS"),
        ("front/nbd_reply.c", "bool end = stop == length;", "bool end = true;"),
        ("front/nbd_request.c", "    c->discard = nbd_payload_of(wire);", "    c->discard = 0;"),
    ],
    "log": [
        ("vhdx/format/log.py", "or (offset < log_span[1] and offset + length > log_span[0])", "or False"),
        ("vhdx/format/log.py", "if high << 32 | low != sequence_number:", "if low != sequence_number & 0xFFFFFFFF:"),
        ("vhdx/format/log.py", "number != sequence_number\n            or offset % SECTOR", "offset % SECTOR"),
        ("vhdx/format/log.py", "    if not verify(data):\n        return None\n", ""),
        ("vhdx/format/log.py", "entry.sequence_number != run[-1].sequence_number + 1", "entry.sequence_number <= run[-1].sequence_number"),
        ("vhdx/format/log.py", "part if len(part) == length else part + log[: length - len(part)]", "part"),
        ("vhdx/format/log.py", "Sequence(tuple(run[offsets.index(head.tail) :]))", "Sequence(tuple(run))"),
        ("vhdx/format/log.py", "head.sequence_number > best.head.sequence_number", "False"),
        ("vhdx/format/log.py", "entry_guid != guid.bytes_le\n", "False\n"),
        ("vhdx/format/log.py", "content = leading + sector[8:4092] + trailing", "content = leading + sector[8:]"),
        ("vhdx/format/log.py", "for entry in sequence.entries for patch", "for entry in sequence.entries[:1] for patch"),
        ("vhdx/image/vhdx/overlay.py", "patch.data[start - patch.offset : end - patch.offset]", "patch.data[: end - start]"),
    ],
    "check": [
        ("vhdx/image/vhdx/checking.py", "if geometry.entries * bat.ENTRY_SIZE > table.length:", "if False:"),
        ("vhdx/image/vhdx/checking.py", "if not good:", "if False:"),
        ("vhdx/image/vhdx/checking.py", "_damage(report, error, repair=error.reason == \"log_empty\")", "pass"),
        ("vhdx/image/vhdx/checking.py", "return sum(f.severity == ERROR for f in self.findings)", "return sum(f.severity == WARNING for f in self.findings)"),
        ("vhdx/image/vhdx/checking.py", "header.log_length == 0 or header.log_offset + header.log_length > host.leaf.size", "False"),
        ("vhdx/image/vhdx/checking.py", "        _damage(report, error)\n        return None", "        return None"),
        ("vhdx/image/vhdx/checking.py", "return Overlay(leaf, log.patches_of(sequence), sequence.head.last_file_offset), sequence", "return Overlay(leaf, [], leaf.size), sequence"),
        ("vhdx/image/vhdx/checking.py", "if leaf.size < headers.HEADER_SECTION:", "if False:"),
        ("vhdx/image/vhdx/checking.py", "        if not item.is_user and item.guid in metadata.KNOWN\n", "        if item.guid in metadata.KNOWN and item.length < 8\n"),
        ("vhdx/image/vhdx/checking.py", "host = open_file(path, write=False)", "host = open_file(path, write=True)\n    host.leaf.write(b\"v\", 520)"),
    ],
    "repair": [
        ("vhdx/image/vhdx/repairing.py", "            undo_file.save(patch.offset, patch.length)\n", "            pass\n"),
        ("vhdx/image/vhdx/repairing.py", "        undo_file.save(at, headers.HEADER_SIZE)\n", "        pass\n"),
        ("vhdx/image/vhdx/repairing.py", "        undo_file.save(step.offset, len(memoryview(step.buffer or b\"\")))\n", "        pass\n"),
        ("vhdx/image/vhdx/repairing.py", "_entry_step(at, entry & 7)", "_entry_step(at, entry | BlockState.FULLY_PRESENT)"),
        ("vhdx/image/vhdx/repairing.py", "    if leaf.size > size:\n        leaf.resize(size)\n", ""),
        ("vhdx/image/vhdx/repairing.py", "flags & ~_LEAVE_ALLOCATED", "flags | 2"),
        ("vhdx/image/vhdx/journal.py", "for patch in patches), _BARRIER]", "for patch in patches[1:]), _BARRIER]"),
        ("vhdx/image/vhdx/repairing.py", "replace(r, required=True) if r.guid in {region.BAT, region.METADATA} else r", "replace(r, required=True)"),
        ("vhdx/image/vhdx/repairing.py", "if f.repair and f not in left]", "if f.repair]"),
        ("vhdx/image/vhdx/repairing.py", "        return False  # an unreadable log: nothing else may be touched", "        probe = header"),
    ],
}  # fmt: skip


def planted_trees(kind: str) -> Iterator[tuple[str, Path]]:
    """A copy of the sources for each planted bug."""
    for file, old, new in PLANTED[kind]:
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name)
            if kind == "nbd":
                shutil.copytree(ROOT / "csrc", tree / "csrc")
                path = tree / "csrc" / file
            else:
                for part in ("vhdx", "tests"):
                    shutil.copytree(ROOT / part, tree / part)
                path = tree / file
            text = path.read_text()
            if text.count(old) < 1:
                raise AssertionError(f"{file} has no {old!r} any more: renew the planted bugs")
            path.write_text(text.replace(old, new, 1))
            yield f"{file}: {old.splitlines()[0].strip()[:60]}", tree


def find_planted(kind: str, seconds: float) -> list[str]:
    """The planted bugs that were not found."""
    missed = []
    for what, tree in planted_trees(kind):
        began = time.monotonic()
        if kind == "nbd":
            program = build_nbd(tree / "csrc", tree)
            command = [str(program), str(int(seconds)), "1"]
        else:
            command = [sys.executable, "-m", "tests.fuzz", kind, "--seconds", str(seconds)]
        result = subprocess.run(
            command, cwd=tree, capture_output=True, env=os.environ | {"PYTHONPATH": str(tree)}
        )
        found = result.returncode != 0
        print(
            f"{'found' if found else 'MISSED'} in {time.monotonic() - began:5.1f} s  {what}",
            flush=True,
        )
        if not found:
            missed.append(what)
    return missed
