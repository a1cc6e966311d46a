/* SPDX-License-Identifier: MIT
 *
 * The map: a device that stores each of its pages on one of its lower devices.
 *
 * The map serves a request from its page table where it can. Otherwise it raises a fault:
 *   LOAD    an entry is unknown: the owner installs entries (vx_map_install)
 *   GRANT   a write into a hole or a shared page finds no ready space: vx_map_grant
 *   GATE    the first change after an open: the owner prepares and opens the gate (vx_map_gate)
 *   RANGE   whole pages are zeroed or trimmed: the owner decides and calls vx_map_replace
 *   COMMIT  pages were published since the last commit: the owner makes them durable
 *
 * Publishing. A write into a hole takes granted space that reads zeros. The map publishes the entry
 * at once, and the write goes to the new space. A shared page, or a page that takes stale space, is
 * busy while the map copies or zeroes all of it; then the entry is published. Every publication is
 * listed for the next commit and raises the dirty generation under the same lock, so a flush that
 * comes after the write sees it.
 *
 * A write into a page that is shared with the parent makes the page MIXED at once, without a copy.
 * The map publishes the entry with an empty bitmap, and sets each bit after its data are written. A
 * commit includes the changed bitmaps.
 *
 * Flush. A round takes the list, makes the data of the lower devices durable (the barrier), and
 * then asks the owner to commit the list and the bitmaps, if there are any. A flush is covered only
 * by a round that began after the flush arrived. If the commit finds no space, or the bitmaps
 * cannot be copied for lack of memory, the flushes of the round fail and the next flush tries
 * again. Any other failure poisons the map. The first round runs on the thread that submitted the
 * flush, or on the pool if that thread must not block (NOWAIT and MAY_PARK); further rounds run on the
 * pool.
 *
 * Moving a page while it is written: mark its entry watched (a replace that is not published, so it
 * waits for older writes), copy the page, and replace the watched entry by the new one. A write that
 * comes first clears the mark and changes the old place; the replace then finds another entry, and the
 * copy is thrown away. With vx_map_track the mover learns which parts it has to copy again.
 *
 * Replace. vx_map_replace stores a new entry if the page still has the expected one. It returns
 * only when all accesses that began under the old entries have ended; then the old space may be
 * reused.
 *
 * Lock order: a page's mixed lock, held while sectors are filled; then map->lock; then the pool's
 * lock. No upcall, no I/O and no wait other than on `changed` happens under map->lock.
 */
#ifndef VX_MAP_H
#define VX_MAP_H

#include "core/device.h"
#include "core/pool.h"
#include "core/table.h"

enum vx_map_flag {
    VX_MAP_IN_PLACE = 1, /* ZERO keeps the space, TRIM does nothing: fixed images */
    VX_MAP_READ_ONLY = 2,
    VX_MAP_GATED = 4,      /* begin with the gate closed */
    VX_MAP_TRANSPARENT = 8, /* ZERO, TRIM and EXTENTS go to the lower device: raw images */
    /* A commit writes to the one writable lower device and makes a barrier there, so the flush of the
     * data before it need only keep the order (VX_ORDER). */
    VX_MAP_COMMITS_BELOW = 16,
    /* A page that gets space gets the place on lower device 0 that has its own offset, with tag 0; there
     * are no grants. What the place holds is old, and is never shown. */
    VX_MAP_IDENTITY = 32
};

enum vx_grant_flag { VX_GRANT_FRESH = 0, VX_GRANT_STALE = 1 };

#define VX_MAP_NO_PARENT UINT32_MAX

typedef struct vx_map_statistics {
    uint64_t dirty_generation, committed_generation;
    uint64_t rounds;      /* flush rounds run */
    uint64_t commits;     /* rounds that committed something */
    uint64_t dirty_pages; /* published and not yet taken by a round */
    uint64_t granted;     /* pages of ready space in stock */
    uint64_t faults;      /* requests answered with VX_FAULTED */
} vx_map_statistics;

/* Accesses of a page since they were last taken; each stays at 65,535. A request is sequential if it
 * has more than 64 KiB or begins where an earlier one of the same client ended. */
typedef struct vx_accesses {
    uint16_t random_reads, random_writes, sequential_reads, sequential_writes;
} vx_accesses;

/* page_shift: 9 to 32; size and largest_size in bytes. NULL: no memory or bad arguments. */
vx_device *vx_map_create(uint64_t size, uint64_t largest_size, uint32_t page_shift,
                         uint32_t lower_count, uint32_t flags, vx_pool *pool, uint64_t identity,
                         const vx_upcalls *upcalls);
/* Sets the lower device of an index that has none; at any time. The map keeps a reference. */
int vx_map_set_lower(vx_device *device, uint32_t index, vx_device *lower);
/* Takes the lower device of `index` out of the map, in use: commits, waits for accesses, and releases
 * the device. INVALID if an entry of the table or a grant still names it, if it is the parent, or while
 * another one is being taken out. Meanwhile vx_map_replace and vx_map_grant refuse to name it. Pages
 * whose entries are not loaded (ASK) are the owner's concern. The caller holds no lock that a commit
 * needs. */
int vx_map_clear_lower(vx_device *device, uint32_t index);
/* Before first use only. Sets the lower device that supplies, at the same offset, the sectors of
 * MIXED pages that are not stored here. A write into a page that is SHARED with that device makes
 * the page MIXED (with mixed_tag). The page becomes DATA (with full_tag) when all of its sectors,
 * of 1 << sector_shift bytes (9 or 12), are stored here. */
int vx_map_set_parent(vx_device *device, uint32_t lower_index, uint32_t sector_shift,
                      uint32_t mixed_tag, uint32_t full_tag);

/* Sets entries that are ASK; other entries stay as they are. */
int vx_map_install(vx_device *device, uint64_t first, uint64_t count, const uint64_t *entries);
/* Sets the sector bitmap of a page: one bit per sector, least significant bit first. Must be called
 * before the page's MIXED entry is installed. The map copies the bits and keeps the copy until it
 * is destroyed. An existing bitmap stays as it is. */
int vx_map_set_bitmap(vx_device *device, uint64_t page, const uint8_t *bits, uint64_t length);
void vx_map_read_entries(vx_device *device, uint64_t first, uint64_t count, uint64_t *entries);
/* Drops the clean chunks that lie inside the range; returns how many. */
uint64_t vx_map_drop(vx_device *device, uint64_t first_chunk, uint64_t count);
/* Stores entries[i] if pages[i] still has expected[i]; else mismatched[i] becomes 1. Returns the
 * number of mismatches, or a vx_error. With `publish`, the changes are listed for the next
 * commit. */
int64_t vx_map_replace(vx_device *device, uint64_t count, const uint64_t *pages,
                       const uint64_t *expected, const uint64_t *entries, bool publish,
                       uint8_t *mismatched);
/* Waits for every access in flight. */
void vx_map_quiesce(vx_device *device);

/* Notes from now on which parts of `page` are changed; UINT64_MAX: of no page. One page at a time. */
void vx_map_track(vx_device *device, uint64_t page);
/* Returns the parts that were changed since the last call: bit i is the i-th 64th of the page. Waits for
 * the changes that it reports. */
uint64_t vx_map_take_changes(vx_device *device);

/* Switches the counting of accesses; off at first. NOMEM: there is no room for the counters. */
int vx_map_count_accesses(vx_device *device, bool on);
/* Copies the counters of pages [first, first + count) and resets them; zeros if they were never on.
 * Accesses meanwhile may be lost. */
void vx_map_take_accesses(vx_device *device, uint64_t first, uint64_t count, vx_accesses *taken);

/* Adds ready pages to the stock, as byte offsets on `lower`. FRESH pages read zeros. STALE pages
 * hold old data, which the map never exposes. */
int vx_map_grant(vx_device *device, uint32_t lower, uint64_t count, const uint64_t *offsets,
                 uint32_t tag, int flag);
/* Takes back up to `capacity` pages of the stock and stores their offsets; returns how many. For owners
 * that grant on one lower device: the offsets do not say on which. */
uint64_t vx_map_revoke(vx_device *device, uint64_t capacity, uint64_t *offsets);
void vx_map_gate(vx_device *device, bool open);

/* Refuses new requests (CLOSED), waits until no access, round or refill is in flight, and commits
 * every publication that is not yet durable. Returns 0, POISONED if that fails, or FORKED at once
 * in a forked child. */
int vx_map_close(vx_device *device);
void vx_map_statistics_of(vx_device *device, vx_map_statistics *statistics);

#endif
