/* SPDX-License-Identifier: MIT
 *
 * Locks of ranges: who works on which pieces of a device.
 *
 * A piece is a number that the owner chooses (a stripe, a block). Pieces are spread over 1,024 buckets,
 * each with a lock for one writer or several readers, so two ranges may exclude each other without
 * having a piece in common. A range's buckets are taken in ascending order, so that no two threads wait
 * for each other. A thread enters once, with all the spans that it needs, and holds them across I/O of
 * leaves only: nothing that waits for another request, and no fault. Readers that arrive after a waiting writer wait behind
 * it.
 */
#ifndef VX_RANGES_H
#define VX_RANGES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct vx_ranges vx_ranges;

/* Pieces [first, first + count). */
typedef struct vx_span {
    uint64_t first, count;
} vx_span;

vx_ranges *vx_ranges_create(void); /* NULL: no memory */
void vx_ranges_destroy(vx_ranges *ranges);
/* Takes the pieces of `count` spans, `alone` or beside other readers. Waits; with `nowait` returns false
 * instead, and holds nothing. */
bool vx_ranges_enter(vx_ranges *ranges, const vx_span *spans, uint32_t count, bool alone, bool nowait);
/* Gives back what was entered with the same arguments. */
void vx_ranges_leave(vx_ranges *ranges, const vx_span *spans, uint32_t count, bool alone);
/* Whether a writer holds the bucket of `piece` now. Takes no lock; the answer may be old at once. */
bool vx_ranges_is_busy(const vx_ranges *ranges, uint64_t piece);

#endif
