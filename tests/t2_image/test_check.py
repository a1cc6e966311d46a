# SPDX-License-Identifier: MIT
"""Check finds what is wrong, repair mends it without guessing, and undo takes it back."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from uuid import uuid4

import pytest
from click.testing import CliRunner

import vhdx
from tests.images import BAT_OFFSET, add_log, edit, edit_headers, make_child, read, set_entry
from vhdx.cli.commands import main
from vhdx.format import header, region
from vhdx.format.bat import BlockState
from vhdx.image.vhdx.repairing import undo_path
from vhdx.units import MIB

SIZE = 8 * MIB


@pytest.fixture
def image(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, SIZE, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * 8192, 3 * MIB)
        disk.pwrite(b"y" * 8192, 5 * MIB)
    return path


def codes(report):
    return {finding.code for finding in report.findings}


def test_good_images_are_clean(image, fast_path):
    assert vhdx.check(image).findings == []
    vhdx.create(fast_path / "fixed.vhdx", SIZE, type="fixed")
    assert vhdx.check(fast_path / "fixed.vhdx").findings == []
    vhdx.snapshot(image)
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"z" * 4096, 3 * MIB)
    report = vhdx.check(image)
    assert codes(report) <= {"leaked"}
    assert report.leaked < 2 * MIB  # the rest of a block that a sector bitmap took


def break_header(path):
    edit(path, header.HEADER_OFFSETS[0] + 8, b"\xff\xff")


def break_region_table(path):
    edit(path, region.TABLE_OFFSETS[0] + 8, b"\x07")


def forget_required(path):
    table = read(path, region.TABLE_OFFSETS[0], region.TABLE_SIZE)
    regions = [replace(r, required=False) for r in region.parse_table(table)]
    for at in region.TABLE_OFFSETS:
        edit(path, at, region.pack_table(regions))


def differ_tables(path):
    table = region.parse_table(read(path, region.TABLE_OFFSETS[0], region.TABLE_SIZE))
    extra = region.Region(uuid4(), 64 * MIB, MIB, False)
    edit(path, region.TABLE_OFFSETS[1], region.pack_table([*table, extra]))


def log_without_entries(path):
    edit_headers(path, lambda h: replace(h, log_guid=uuid4()))


def differ_guids(path):
    slot = 0 if sequence(path, 0) < sequence(path, 1) else 1
    at = header.HEADER_OFFSETS[slot]
    found = header.parse_header(read(path, at, header.HEADER_SIZE), slot)
    edit(path, at, replace(found, data_write_guid=uuid4()).pack())


def sequence(path, slot):
    data = read(path, header.HEADER_OFFSETS[slot], header.HEADER_SIZE)
    return header.parse_header(data, slot).sequence_number


def stray_offset(path):
    set_entry(path, 7, BlockState.ZERO | 9 * MIB)


def partial_block(path):
    entry = struct.unpack("<Q", read(path, BAT_OFFSET + 8 * 3, 8))[0]
    set_entry(path, 3, entry | 7)


def fixed_flag(path):
    edit(path, 2 * MIB + 65536 + 4, b"\x01")


def dirty_log(path):
    add_log(path, {BAT_OFFSET: read(path, BAT_OFFSET, 4096)})


REPAIRABLE = {
    "header_copy": break_header,
    "region_table_copy": break_region_table,
    "region_not_required": forget_required,
    "region_tables_differ": differ_tables,
    "log_empty": log_without_entries,
    "header_guids": differ_guids,
    "bat_stray_offset": stray_offset,
    "partial_without_parent": partial_block,
    "fixed_not_allocated": fixed_flag,
    "log_dirty": dirty_log,
}


def content(path):
    with vhdx.open(path) as disk:
        return disk.pread(disk.size, 0)


@pytest.mark.parametrize("code", REPAIRABLE)
def test_repairs_and_takes_them_back(code, image):
    wanted = content(image)
    REPAIRABLE[code](image)
    damaged = image.read_bytes()
    report = vhdx.check(image)
    assert codes(report) == {code}
    assert all(finding.repair for finding in report.findings)
    assert image.read_bytes() == damaged
    repaired = vhdx.repair(image)
    assert repaired.findings == []
    assert {finding.code for finding in repaired.repaired} == {code}
    assert vhdx.check(image).findings == []
    assert content(image) == wanted
    with vhdx.open(image, "r+") as disk:  # and it can be written
        disk.pwrite(b"new", 7 * MIB)
    with pytest.raises(vhdx.InvalidArgumentError, match="changed since"):
        vhdx.undo(image)
    break_header(image)
    with pytest.raises(vhdx.ExistsError):
        vhdx.repair(image)
    undo_path(image).unlink()
    assert vhdx.repair(image).findings == []


def test_undo_gives_back_every_byte(image):
    for break_it in (forget_required, stray_offset, partial_block, dirty_log, break_header):
        break_it(image)
    damaged = image.read_bytes()
    assert vhdx.repair(image).findings == []
    assert image.read_bytes() != damaged
    vhdx.undo(image)
    assert image.read_bytes() == damaged
    with pytest.raises(vhdx.NotFoundError):
        vhdx.undo(image)


def test_undo_of_a_damaged_file_changes_nothing(image):
    break_header(image)
    vhdx.repair(image)
    repaired, kept = image.read_bytes(), bytearray(undo_path(image).read_bytes())
    for at in (0, 9, 20, 40, len(kept) - 1):
        broken = bytearray(kept)
        broken[at] ^= 1
        undo_path(image).write_bytes(broken)
        with pytest.raises(vhdx.DamagedError):
            vhdx.undo(image)
    undo_path(image).write_bytes(kept[:-3])
    with pytest.raises(vhdx.DamagedError):
        vhdx.undo(image)
    assert image.read_bytes() == repaired


def test_undo_of_an_image_that_cannot_be_told_is_refused(image):
    break_header(image)
    vhdx.repair(image)
    for at in header.HEADER_OFFSETS:
        edit(image, at + 8, b"\xff\xff")
    damaged = image.read_bytes()
    with pytest.raises(vhdx.InvalidArgumentError):
        vhdx.undo(image)
    assert image.read_bytes() == damaged
    undo_path(image).rename(f"{undo_path(image)}.active")  # but one that was under way goes on
    vhdx.undo(image)
    assert vhdx.check(image).errors == 0


def test_an_interrupted_undo_is_not_forgotten(image):
    """What was written after it stays, and no second repair comes between."""
    break_header(image)
    vhdx.repair(image)
    active = undo_path(image).with_name(undo_path(image).name + ".active")
    undo_path(image).rename(active)
    break_header(image)
    with pytest.raises(vhdx.ExistsError, match="was interrupted"):
        vhdx.repair(image)
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"new", 0)
    written = image.read_bytes()
    with pytest.raises(vhdx.InvalidArgumentError, match="changed since"):
        vhdx.undo(image)
    assert image.read_bytes() == written
    active.unlink()
    assert vhdx.check(image).errors == 0


def test_a_repair_that_was_killed_early_is_done_again(image):
    break_header(image)
    damaged = image.read_bytes()
    vhdx.repair(image)
    kept = undo_path(image).read_bytes()
    for length in (0, 10, 60, len(kept) - 1, len(kept)):
        image.write_bytes(damaged)
        undo_path(image).unlink()
        left = image.with_name(f".{image.name}.undo.0123abcd.partial")
        left.write_bytes(kept[:length])  # it was not renamed yet
        assert vhdx.repair(image).findings == []
        assert not left.exists()
    image.write_bytes(damaged)
    undo_path(image).write_bytes(kept)  # it was renamed, and nothing was changed yet
    assert vhdx.repair(image).findings == []


@pytest.mark.parametrize("content", [b"", b"notes", bytes(4096)])
def test_a_file_that_has_the_name_of_the_undo_file_is_kept(image, content):
    break_header(image)
    damaged = image.read_bytes()
    undo_path(image).write_bytes(content)
    with pytest.raises(vhdx.ExistsError):
        vhdx.repair(image)
    assert undo_path(image).read_bytes() == content
    assert image.read_bytes() == damaged


def overlap(path):
    entry = struct.unpack("<Q", read(path, BAT_OFFSET + 8 * 3, 8))[0]
    set_entry(path, 6, entry)


def outside(path):
    set_entry(path, 6, BlockState.FULLY_PRESENT | 999 * MIB)


def bad_state(path):
    set_entry(path, 6, 4)


def reserved_bits(path):
    set_entry(path, 6, 8)


def both_headers(path):
    for at in header.HEADER_OFFSETS:
        edit(path, at + 8, b"\xff\xff")


def both_tables(path):
    for at in region.TABLE_OFFSETS:
        edit(path, at + 8, b"\x07")


def no_metadata(path):
    edit(path, 2 * MIB, bytes(64))


HOPELESS = {
    "bat_overlap": overlap,
    "bat_offset": outside,
    "bat_state": bad_state,
    "bat_reserved": reserved_bits,
    "headers": both_headers,
    "region_table": both_tables,
    "metadata_table": no_metadata,
}


@pytest.mark.parametrize("code", HOPELESS)
def test_what_would_be_a_guess_is_left(code, image):
    HOPELESS[code](image)
    damaged = image.read_bytes()
    report = vhdx.check(image)
    assert code in codes(report)
    assert report.errors >= 1
    assert vhdx.repair(image).errors >= 1
    assert image.read_bytes() == damaged
    assert not undo_path(image).exists()


def test_a_log_without_entries_hides_nothing(image):
    log_without_entries(image)
    set_entry(image, 1, BlockState.UNMAPPED | 4 * MIB)  # an anchor in the middle of another's place
    damaged = image.read_bytes()
    assert codes(vhdx.check(image)) >= {"log_empty", "bat_overlap"}
    assert vhdx.repair(image).errors == 2
    assert image.read_bytes() == damaged


def test_every_damaged_entry_is_found(image):
    bad_state(image)
    set_entry(image, 2, BlockState.FULLY_PRESENT | 999 * MIB)
    set_entry(image, 1, 8)
    assert codes(vhdx.check(image)) == {"bat_state", "bat_offset", "bat_reserved"}


def test_partial_block_without_a_bitmap(image, fast_path):
    child = fast_path / "child.vhdx"
    make_child(child, image, SIZE, sectors={5: b"s" * 512})
    assert vhdx.check(child).findings == []
    set_entry(child, 2048, 0)
    assert codes(vhdx.check(child)) == {"sector_bitmap"} or "leaked" in codes(vhdx.check(child))
    assert vhdx.check(child).errors == 1


def test_leaked_space_is_found(image):
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size + 3 * MIB)
    report = vhdx.check(image)
    assert report.leaked == 3 * MIB
    assert report.errors == 0


def test_qemu_damage_is_known(fast_path):
    import subprocess

    from tests.conftest import absent

    if not shutil.which("qemu-img"):
        absent("qemu-img")
    path = fast_path / "fixed.vhdx"
    command = ["qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=fixed", path, "64M"]
    subprocess.run(command, check=True)
    assert codes(vhdx.check(path)) >= {"region_not_required", "fixed_not_allocated"}
    assert not codes(vhdx.repair(path)) & {"region_not_required", "fixed_not_allocated"}
    with vhdx.open(path) as disk:
        assert disk.describe()["type"] == "dynamic"


def test_command_line(image):
    run = CliRunner()
    result = run.invoke(main, ["check", str(image)])
    assert (result.exit_code, result.output) == (0, "no errors\n")
    break_header(image)
    result = run.invoke(main, ["check", str(image), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["findings"][0]["code"] == "header_copy"
    result = run.invoke(main, ["check", str(image), "--repair"])
    assert result.exit_code == 0
    assert "repaired: one of the two headers is not valid" in result.output
    overlap(image)
    result = run.invoke(main, ["check", str(image)])
    assert result.exit_code == 3
    assert "[bat_overlap]" in result.output
    assert run.invoke(main, ["check", str(image), "--undo", "--repair"]).exit_code == 2


def test_what_is_saved_for_a_change_that_never_came_does_not_count(image):
    """As a full disk, or a crash, leaves it between two syncs of one repair."""
    break_header(image)
    damaged = image.read_bytes()
    vhdx.repair(image)
    kept, repaired = undo_path(image).read_bytes(), image.read_bytes()
    for tail in (b"\0", kept[-16:-4], kept[64:4000]):
        image.write_bytes(repaired)
        undo_path(image).write_bytes(kept + tail)
        vhdx.undo(image)
        assert image.read_bytes() == damaged
    image.write_bytes(repaired)
    undo_path(image).write_bytes(
        kept + b"\0" * 20 + kept[-16:]
    )  # the second sync ended, and is damaged
    with pytest.raises(vhdx.DamagedError):
        vhdx.undo(image)
    assert image.read_bytes() == repaired


def test_an_undo_goes_on_where_only_the_header_is_torn(image):
    stray_offset(image)
    damaged = image.read_bytes()
    vhdx.repair(image)
    active = undo_path(image).with_name(undo_path(image).name + ".active")
    undo_path(image).rename(active)
    for at in header.HEADER_OFFSETS:
        edit(image, at + 8, b"\xff\xff")
    with pytest.raises(vhdx.InvalidArgumentError):  # the BAT is not as the undo leaves it before
        vhdx.undo(image)
    torn = bytearray(damaged)
    for at in header.HEADER_OFFSETS:
        torn[at + 8] ^= 1
    image.write_bytes(torn)
    vhdx.undo(image)
    assert image.read_bytes() == damaged
