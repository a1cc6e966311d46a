/* SPDX-License-Identifier: MIT
 *
 * Declarations shared by the files of the layout. layout.c creates it and holds the functions that the
 * owner calls, layout_read.c reads, layout_write.c changes and flushes, layout_repair.c copies and
 * compares members.
 *
 * Lock order: ranges, then an epoch. Neither is held when a request returns.
 */
#ifndef VX_LAYOUT_INTERNAL_H
#define VX_LAYOUT_INTERNAL_H

#include <pthread.h>

#include "array/layout.h"
#include "core/epoch.h"
#include "core/ranges.h"

#define VX_PARTS 64u /* of a request at once */
#define VX_LOCK_SHIFT 16u /* range locks are for 64 KiB of a column */

typedef struct vx_layout_disk {
    _Alignas(64) _Atomic(vx_device *) device;
    _Atomic uint32_t under_way;
    _Atomic bool suspect;            /* it failed a change: read it only if nothing else is left */
    _Atomic uint64_t busy_until_ns;  /* by its latency model */
    _Atomic uint64_t reads, changes, failures, slowest_ns;
} vx_layout_disk;

typedef struct vx_layout {
    vx_device device;
    vx_layout_terms terms;
    uint32_t slots, members; /* of a column, of a row */
    uint32_t slab_shift, interleave_shift;
    uint64_t row_bytes, rows; /* rows: reserved */
    vx_table table;
    _Atomic uint8_t *marks; /* by row: enum vx_mark */
    vx_epochs epochs;
    vx_epochs flush_epochs; /* of flushes, which take long: entries change beside them */
    vx_ranges *ranges;
    _Atomic bool locks; /* changes take range locks */
    _Atomic bool closed; /* no access may begin; `state` may be POISONED instead */
    vx_pool *pool;
    pthread_mutex_t lock; /* replacing entries, setting disks */
    _Atomic uint32_t disk_limit; /* one more than the highest index that ever had a disk */
    vx_layout_disk disks[VX_LAYOUT_DISKS];
} vx_layout;

enum vx_mark { VX_MARKED = 1, VX_CHANGED = 2 };

/* A run of a request that lies on one column of one row. */
typedef struct vx_part {
    uint64_t row;
    uint32_t column;
    uint64_t within; /* bytes, in the slab */
    uint64_t length;
    uint64_t at; /* bytes, on the layout; of a ZERO or TRIM: not used */
} vx_part;

/* The part that begins at `at`, up to `end`. */
vx_part vx_layout_part(const vx_layout *layout, uint64_t at, uint64_t end);
/* The pieces of a part for the range locks. */
vx_span vx_layout_span(const vx_layout *layout, const vx_part *part);

static inline uint64_t vx_layout_entry(vx_layout *layout, uint64_t row, uint32_t member)
{
    return atomic_load(&layout->table.entries[row * layout->members + member]);
}

/* Inside an epoch. Whether the column of the row has no slabs. */
static inline bool vx_layout_is_hole(vx_layout *layout, uint64_t row, uint32_t column)
{
    for (uint32_t i = 0; i < layout->slots; i++) {
        enum vx_kind kind = vx_entry_kind(vx_layout_entry(layout, row, column * layout->slots + i));
        if (kind != VX_HOLE && kind != VX_ASK)
            return false;
    }
    return true;
}

static inline vx_layout_disk *vx_disk_of(vx_layout *layout, uint64_t entry)
{
    return &layout->disks[vx_entry_lower(entry) % VX_LAYOUT_DISKS];
}

/* Inside an epoch. False if the layout was closed since the request came; it has then failed. The close
 * waits for epochs, so nothing is done after it. */
static inline bool vx_layout_is_open(vx_layout *layout, vx_request *request)
{
    if (__builtin_expect(!atomic_load(&layout->closed), 1))
        return true;
    vx_fail(&layout->device, request, VX_E_CLOSED, 0, request->offset);
    return false;
}

/* Inside an epoch: the leaf of a member that is in one of these kinds, or NULL. */
vx_device *vx_layout_leaf(vx_layout *layout, uint64_t entry, bool stale_too);
/* The MEMBER fault of a child that failed on a disk. */
int vx_layout_fail_member(vx_layout *layout, vx_request *request, uint64_t row, uint32_t disk,
                          const vx_device *leaf, const vx_request *child);

/* Around one request to a disk: counts it, and now and then measures it. */
uint64_t vx_disk_begin(vx_layout_disk *disk, bool changes);
void vx_disk_end(vx_layout_disk *disk, const vx_request *child, uint64_t began);

int vx_layout_read(vx_layout *layout, vx_request *request);
int vx_layout_extents(vx_layout *layout, vx_request *request);
int vx_layout_change(vx_layout *layout, vx_request *request);
int vx_layout_flush(vx_layout *layout, vx_request *request);

#endif
