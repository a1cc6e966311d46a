# SPDX-License-Identifier: MIT
"""Generates VHDX images that are valid and unlike any tool's, and says what they hold.

Regions in any order, regions and items that nobody knows, gaps, tables larger than needed, soft
anchors, a file that ends inside its last block, headers of any age; and a log that wraps, with
entries that are stale, torn or another's, in which pages of any kind may be found that the file
itself does not hold yet. Shares no code with the package.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from uuid import UUID

import google_crc32c

from tests.reference import BAT, ITEMS, METADATA, MIB

KIB = 1 << 10
SECTOR = 4096


def guid(rng: random.Random) -> bytes:
    return UUID(int=rng.getrandbits(128), version=4).bytes_le


def seal(data: bytearray) -> bytes:
    data[4:8] = bytes(4)
    data[4:8] = struct.pack("<I", google_crc32c.value(bytes(data)))
    return bytes(data)


@dataclass
class Unusual:
    """An image.

    Attributes:
        data: the file.
        content: of the disk.
        dirty: whether the log is to be replayed.
        unknown: items and regions that a writer must keep: offset and content in the file.
    """

    data: bytearray
    content: bytearray = field(default_factory=bytearray)
    logical: int = 512
    block_size: int = MIB
    dirty: bool = False
    unknown: dict[int, bytes] = field(default_factory=dict)


def generate(seed: int) -> Unusual:
    """The image of this number."""
    rng = random.Random(seed)
    logical = rng.choice([512, 4096])
    block = rng.choice([MIB, MIB, 2 * MIB, 4 * MIB])
    size = rng.randrange(1, 6 * MIB // logical) * logical
    ratio = (1 << 23) * logical // block
    blocks = -(-size // block)
    entries = blocks + (blocks - 1) // ratio
    image = Unusual(bytearray(MIB), bytearray(size), logical, block)
    table_length = max(MIB, -(-8 * entries // MIB) * MIB) + rng.choice([0, 0, MIB])
    pieces = {"log": rng.choice([1, 1, 2]) * MIB, "bat": table_length}
    pieces["metadata"] = rng.choice([1, 2]) * MIB
    for number in range(rng.randrange(3)):
        pieces[f"unknown{number}"] = MIB
    for number in range(rng.randrange(3)):
        pieces[f"gap{number}"] = rng.choice([1, 2]) * MIB
    states = [rng.choice([0, 1, 2, 3, 6, 6, 6]) for _ in range(blocks)]
    for number, state in enumerate(states):
        if state == 6:
            pieces[f"block{number}"] = block
    order = list(pieces)
    rng.shuffle(order)
    last = blocks - 1
    cut = rng.random() < 0.3 and states[last] == 6
    if cut:  # the file ends where the disk does
        order.remove(f"block{last}")
        order.append(f"block{last}")
    places, at = {}, MIB
    for name in order:
        places[name] = at
        at += pieces[name]
    image.data.extend(bytes(at - MIB))
    if cut:
        del image.data[places[f"block{last}"] + size - last * block :]
    table = _blocks(rng, image, states, places, pieces, ratio)
    _regions(rng, image, places, pieces)
    _items(rng, image, places["metadata"], pieces["metadata"], size)
    image.data[places["bat"] : places["bat"] + 8 * len(table)] = struct.pack(
        f"<{len(table)}Q", *table
    )
    log_guid = bytes(16)
    if rng.random() < 0.7:
        log_guid, image.dirty = guid(rng), True
        _log(rng, image, log_guid, places, pieces)
    _headers(rng, image, log_guid, places["log"], pieces["log"])
    return image


def _blocks(rng, image, states, places, pieces, ratio):
    """Fills the blocks; the block allocation table."""
    size, block = len(image.content), image.block_size
    table = []
    for number, state in enumerate(states):
        if number and number % ratio == 0:
            table.append(0)
        start = number * block
        stored = min(block, size - start)
        if state == 6:
            data = rng.randbytes(64) * (stored // 64 + 1)
            image.content[start : start + stored] = data[:stored]
            place = places[f"block{number}"]
            image.data[place : place + stored] = data[:stored]
            table.append(place | 6)
        elif state in {1, 3} and rng.random() < 0.5:
            # A soft anchor, into a gap or past the end: it claims nothing that others have.
            gaps = [places[n] for n in places if n.startswith("gap") and pieces[n] >= block]
            where = rng.choice(
                [*gaps, (len(image.data) // MIB + block // MIB + rng.randrange(1, 9)) * MIB]
            )
            table.append(where | state)
        else:
            table.append(state)
    seen: set[int] = set()  # two anchors never name the same place
    for i, entry in enumerate(table):
        mine = set(range(entry >> 20, (entry >> 20) + block // MIB))
        if entry & 7 in {1, 3} and entry >> 20:
            if seen & mine:
                table[i] = entry & 7
            seen |= mine
    return table


def _regions(rng, image, places, pieces):
    """Both region tables; one of them may be bad."""
    regions = [(BAT, places["bat"], pieces["bat"], 1)]
    regions.append((METADATA, places["metadata"], pieces["metadata"], 1))
    for name in pieces:
        if name.startswith("unknown"):
            regions.append((guid(rng), places[name], MIB, 0))
            junk = rng.randbytes(100)
            image.data[places[name] : places[name] + 100] = junk
            image.unknown[places[name]] = junk
    rng.shuffle(regions)
    table = bytearray(64 * KIB)
    struct.pack_into("<4sII", table, 0, b"regi", 0, len(regions))
    for i, each in enumerate(regions):
        struct.pack_into("<16sQII", table, 16 + 32 * i, *each)
    good = seal(table)
    second_bad = rng.random() < 0.2
    image.data[192 * KIB : 256 * KIB] = good
    image.data[256 * KIB : 320 * KIB] = rng.randbytes(64 * KIB) if second_bad else good


def _items(rng, image, start, length, size):
    """The metadata table, its items anywhere in the region."""
    disk = struct.pack("<Q", size)
    values = {
        "file": struct.pack("<II", image.block_size, 0),
        "size": disk,
        "disk": guid(rng),
        "logical": struct.pack("<I", image.logical),
        "physical": struct.pack("<I", rng.choice([512, 4096])),
    }
    flags = {"file": 4, "size": 6, "disk": 6, "logical": 6, "physical": 6}
    items = [(ITEMS[name][0], value, flags[name]) for name, value in values.items()]
    items += [
        (guid(rng), rng.randbytes(rng.randrange(1, 3000)), rng.choice([0, 1, 2]))
        for _ in range(rng.randrange(4))
    ]
    if rng.random() < 0.3:
        items.append((guid(rng), b"", 1))
    rng.shuffle(items)
    places, at = [], 64 * KIB
    for _, value, _ in rng.sample(items, len(items)):
        at += rng.randrange(0, 4000)
        places.append((value, at))
        at += len(value)
    assert at <= length
    table = bytearray(64 * KIB)
    struct.pack_into("<8sHH", table, 0, b"metadata", 0, len(items))
    for i, (name, value, flag) in enumerate(items):
        where = next(at for other, at in places if other is value) if value else 0
        struct.pack_into("<16sIII", table, 32 + 32 * i, name, where, len(value), flag)
        image.data[start + where : start + where + len(value)] = value
        if not flag & 4:
            image.unknown[start + where] = value
    image.data[start : start + 64 * KIB] = table


def _entry(rng, owner, number, tail, pages, zeros, size):
    """One log entry: pages by offset, and runs of zeros."""
    count = len(pages) + len(zeros)
    first = -(-(64 + 32 * count) // SECTOR) * SECTOR
    entry = bytearray(first + SECTOR * len(pages))
    head = (b"loge", 0, len(entry), tail, number, count, 0, owner, size, size)
    struct.pack_into("<4sIIIQII16sQQ", entry, 0, *head)
    changes = [*pages.items(), *zeros.items()]
    rng.shuffle(changes)
    at = first
    for i, (target, what) in enumerate(changes):
        where = 64 + 32 * i
        if isinstance(what, int):
            struct.pack_into("<4sIQQQ", entry, where, b"zero", 0, what, target, number)
            continue
        struct.pack_into("<4s4s8sQQ", entry, where, b"desc", what[4092:], what[:8], target, number)
        struct.pack_into("<4sI", entry, at, b"data", number >> 32)
        entry[at + 8 : at + 4092] = what[8:4092]
        struct.pack_into("<I", entry, at + 4092, number & 0xFFFFFFFF)
        at += SECTOR
    return seal(entry)


def _log(rng, image, owner, places, pieces):
    """Moves pages of metadata and data into the log, and leaves stale ones in their places."""
    data, base, length = image.data, places["log"], pieces["log"]
    file_size = len(data) // MIB * MIB
    candidates = [places["bat"]] * 2 + [places["metadata"], places["metadata"] + 64 * KIB]
    candidates += [p + rng.randrange(MIB // SECTOR) * SECTOR for p in places.values() if p != base]
    targets = {
        t
        for t in rng.sample(candidates, rng.randrange(1, len(candidates)))
        if t + SECTOR <= file_size
    }
    final = {at: bytes(data[at : at + SECTOR]) for at in targets}
    zeros = {at: SECTOR for at, page in final.items() if not any(page)}
    steps: list[tuple[dict, dict]] = []
    for at in rng.sample(sorted(targets), len(targets)):
        for old in range(rng.choice([0, 0, 1])):  # an earlier version of the page, logged before
            steps.append(({at: rng.randbytes(SECTOR)}, {}))
            del old
        if at in zeros and rng.random() < 0.5:
            steps.append(({}, {at: zeros[at]}))
        else:
            steps.append(({at: final[at]}, {}))
    while len(steps) > 1 and rng.random() < 0.6:  # several changes in one entry
        i = rng.randrange(len(steps) - 1)
        one, two = steps[i], steps[i + 1]
        if set(one[0]) | set(one[1]) & set(two[0]) | set(two[1]):
            merged = {**one[0], **two[0]}, {**one[1], **two[1]}
            if not set(one[0] | one[1]) & set(two[0] | two[1]):
                steps[i : i + 2] = [merged]
                continue
        break
    if not steps:
        steps = [({}, {})]
    number = rng.choice([1, 7, (1 << 32) - 2, rng.getrandbits(60)]) + 1
    at = tail = rng.randrange(length // SECTOR) * SECTOR
    log = bytearray(length)
    if rng.random() < 0.5:
        log[:] = rng.randbytes(SECTOR) * (length // SECTOR)

    def put(where, entry):
        for i in range(0, len(entry), SECTOR):
            spot = (where + i) % length
            log[spot : spot + SECTOR] = entry[i : i + SECTOR]

    stale = _entry(rng, owner, max(1, number - 1), 0, {places["bat"]: rng.randbytes(SECTOR)}, {}, 0)
    if rng.random() < 0.5:  # the one before the tail, with its own past
        put((tail - len(stale)) % length, stale)
    if rng.random() < 0.5:  # another open's
        put((tail + length // 2) % length, _entry(rng, guid(rng), number + 50, 0, {}, {}, 0))
    if rng.random() < 0.5:  # a sequence of its own, older, whole, and of the same open
        where = (tail + rng.choice([length // 2, length // 4]) + 8 * SECTOR) % length
        older = {places["metadata"]: rng.randbytes(SECTOR)}
        put(where, _entry(rng, owner, max(1, number - 1000), where, older, {}, 0))
    used = 0
    for pages, blanks in steps:
        entry = _entry(rng, owner, number, tail, pages, blanks, file_size)
        assert used + len(entry) <= length // 4
        put(at, entry)
        at, used, number = (at + len(entry)) % length, used + len(entry), number + 1
    if rng.random() < 0.5:  # torn when the power failed
        torn = bytearray(
            _entry(rng, owner, number, tail, {places["bat"]: rng.randbytes(SECTOR)}, {}, 0)
        )
        torn[-100] ^= 1
        put(at, bytes(torn))
    data[base : base + length] = log
    for where in targets:
        data[where : where + SECTOR] = rng.choice([bytes(SECTOR), rng.randbytes(SECTOR)])


def _headers(rng, image, log_guid, log_offset, log_length):
    """The identifier and both headers: equal, one newer, or one bad."""
    image.data[:8] = b"vhdxfile"
    creator = rng.choice(["", "x" * 256, "Microsoft Windows 6.2.9200.0", "\u30c7"])
    image.data[8:520] = creator.encode("utf-16-le").ljust(512, b"\0")[:512]
    number = rng.randrange(1, 1 << 40)

    def header(sequence):
        found = bytearray(SECTOR)
        struct.pack_into("<4sIQ", found, 0, b"head", 0, sequence)
        found[16:48] = identity
        found[48:64] = log_guid
        struct.pack_into("<HHIQ", found, 64, 0, 1, log_length, log_offset)
        return seal(found)

    identity = guid(rng) + guid(rng)
    copies = [header(number), header(number + rng.choice([0, 1, 1, 5]))]
    if copies[0] != copies[1] and rng.random() < 0.5:
        copies.reverse()
    if rng.random() < 0.2:
        older = 0 if copies[0][8:16] <= copies[1][8:16] else 1
        if copies[0][8:16] != copies[1][8:16]:
            older = min((0, 1), key=lambda i: struct.unpack_from("<Q", copies[i], 8)[0])
        copies[older] = rng.randbytes(SECTOR)
    for at, copy in zip((64 * KIB, 128 * KIB), copies, strict=True):
        image.data[at : at + SECTOR] = copy
