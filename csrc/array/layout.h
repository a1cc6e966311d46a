/* SPDX-License-Identifier: MIT
 *
 * A layout: a space whose bytes lie in rows of slabs on several disks, striped and mirrored.
 *
 * A slab is a run of a disk. The bytes of a row go to its columns in turn, `interleave` bytes at a time,
 * and every copy of a column is a slab. A column has one member more than copies: a slab that will
 * replace another one is filled there. So member m belongs to column m / (copies + 1). The table has one
 * entry for each member of each row (table.h):
 *
 *   HOLE   there is no slab (ASK is the same). A column without slabs reads zeros, and a write raises ROW
 *   DATA   the member is in step: it takes every change and may be read
 *   STALE  it takes every change and is never read: it is being rebuilt
 *   AWAY   neither: its disk is away
 *
 * Faults (upcalls.fault):
 *   ROW     the first write to a row without slabs, or of a mirror to a row that is not marked. The
 *           owner gives the row slabs (vx_layout_replace), and makes durable that its copies may differ
 *           after a crash (vx_layout_mark)
 *   MEMBER  a disk failed a request. The owner makes durable that it is out, takes it out of the rows, and
 *           the request starts again without it; or it refuses, and the request fails
 *   RANGE   whole rows of a thin layout are zeroed or trimmed: the owner may give their slabs back
 *
 * Reads go to the copy with the fewest requests under way. While a range of a mirror is changed, reads of
 * it wait: else one could return the new content from one copy, and a later one the old content from
 * another. Disks that failed a change are not read any more, even before the owner answers the fault. A
 * change that finds no space or memory on some copies fails, and the copies are made equal again.
 *
 * Changes go to all members that are DATA or STALE, or to none: where no DATA member of a column is left,
 * the request fails. A trim of a mirror zeroes, so that its copies stay equal.
 *
 * Requirements. The disks are leaves, or delays over leaves: they neither fault nor park, so range locks and
 * epochs are held across their I/O. Rows that are written first are marked first, so the rows whose copies
 * may differ are always known.
 */
#ifndef VX_LAYOUT_H
#define VX_LAYOUT_H

#include "core/device.h"
#include "core/pool.h"
#include "core/table.h"

#define VX_LAYOUT_DISKS 256u  /* indexes of disks */
#define VX_LAYOUT_COLUMNS 64u /* the most columns */
#define VX_LAYOUT_COPIES 3u   /* the most copies */
#define VX_LAYOUT_SLOTS (VX_LAYOUT_COPIES + 1) /* the most members of a column */
#define VX_LAYOUT_BLOCK 4096u /* bytes for each verdict of vx_layout_compare */
#define VX_LAYOUT_TIE 128u    /* a verdict: the copies differ, and no content has a majority */

typedef struct vx_layout_terms {
    uint32_t columns;    /* 1 to VX_LAYOUT_COLUMNS */
    uint32_t copies;     /* 1 to VX_LAYOUT_COPIES */
    uint64_t interleave; /* bytes, a power of two from 4 KiB to the slab */
    uint64_t slab;       /* bytes, a power of two from 64 KiB to 1 TiB */
    uint64_t size, largest_size; /* bytes */
    bool thin;     /* raise RANGE for whole rows */
    bool delayed;  /* a disk has a latency model, so nothing is answered at once */
} vx_layout_terms;

typedef struct vx_disk_facts {
    uint64_t reads, changes; /* requests */
    uint64_t failures;
    uint64_t under_way;
    uint64_t slowest_ns; /* of those measured (one in sixteen) since vx_layout_forget_slowest */
} vx_disk_facts;

/* Its size may grow up to largest_size. NULL: no memory, or bad terms. Every entry is HOLE, and no row is marked. `pool` lends threads. */
vx_device *vx_layout_create(const vx_layout_terms *terms, vx_pool *pool, uint64_t identity,
                            const vx_upcalls *upcalls);
/* Sets the disk of an index that has none; at any time. The layout keeps a reference. */
int vx_layout_set_disk(vx_device *device, uint32_t disk, vx_device *leaf);
/* Takes a disk out; waits for its requests. Entries that name it then count as AWAY. */
int vx_layout_clear_disk(vx_device *device, uint32_t disk);

/* Stores entries[i] as that of members[i] of rows[i], if it still is expected[i]; else mismatched[i] becomes
 * 1. Waits for all accesses under the old entries. Returns the number of mismatches, or a vx_error. */
int64_t vx_layout_replace(vx_device *device, uint64_t count, const uint64_t *rows,
                          const uint32_t *members, const uint64_t *expected,
                          const uint64_t *entries, uint8_t *mismatched);
void vx_layout_read_entries(vx_device *device, uint64_t first_row, uint64_t count,
                            uint64_t *entries);
/* Allows changes of these rows, or no longer: then it waits for the changes under way. */
int vx_layout_mark(vx_device *device, uint64_t first_row, uint64_t count, bool marked);
/* Stores 1 for each of the rows that was changed since the last call, else 0. A change that is under way
 * may be reported before it has ended: only vx_layout_mark waits for it. */
int vx_layout_take_changed(vx_device *device, uint64_t first_row, uint64_t count,
                           uint8_t *changed);

/* Before a slab moves in a layout with one copy, and after it: meanwhile requests wait for each other as
 * with several copies, where this is always on. The vx_layout_replace that adds the second slab waits for
 * those that began before. */
void vx_layout_set_moving(vx_device *device, bool moving);
/* Copies a range of a slab, bytes within it, from member `from` (DATA) of a row to member `to` of the same
 * column. With `compares` it writes only where they differ. Changes of the range wait, a MiB at a time.
 * INVALID: the members are not of these kinds, or nothing makes changes wait. */
int vx_layout_copy(vx_device *device, uint64_t row, uint32_t from, uint32_t to, uint64_t within,
                   uint64_t length, bool compares, vx_failure *failure);
/* Compares the DATA members of a column. Stores a verdict for each block of the range: 0 if they are equal;
 * bit i if member i of the column differs from the content that most have; VX_LAYOUT_TIE and the bits of
 * all if no content has a majority. */
int vx_layout_compare(vx_device *device, uint64_t row, uint32_t column, uint64_t within,
                      uint64_t length, uint8_t *verdicts, vx_failure *failure);
/* Fails every further request with CLOSED; after it nothing is read or written on the disks. */
void vx_layout_close(vx_device *device);
void vx_layout_facts(vx_device *device, uint32_t disk, vx_disk_facts *facts);
void vx_layout_forget_slowest(vx_device *device, uint32_t disk);

#endif
