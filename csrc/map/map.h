/* SPDX-License-Identifier: MIT
 *
 * The map: a device whose pages live, page by page, on lower devices.
 *
 * C answers what the table can answer. What it cannot is a fault:
 *   LOAD    an entry asks: the owner installs entries (vx_map_install)
 *   GRANT   a write into a hole or a shared page finds no ready space: vx_map_grant
 *   GATE    the first change after an open: the owner prepares and opens the gate (vx_map_gate)
 *   RANGE   whole pages are zeroed or trimmed: the owner decides and calls vx_map_replace
 *   COMMIT  pages were published since the last commit: the owner makes them durable
 *
 * Publishing. A hole takes granted space that reads zeros, so its entry is published at once and
 * the write goes through it; a shared page, or one that takes stale space, is busy while the rest of
 * it is copied or zeroed, and published then. Every publication is listed for the next commit and
 * raises the dirty generation under the same lock, so a flush that comes after the write sees it.
 *
 * A write into a page that is the parent's makes it MIXED, at once and without a copy: the entry is
 * published with an empty bitmap, and bits are set after their data. The bitmaps that were changed
 * go to the commit with the publications.
 *
 * Flush. A round takes the list, makes the lower devices' data durable (one barrier), and then asks
 * the owner to commit the list, if there is one. A flush is covered only by a round that began after
 * the flush arrived. A commit that finds no space fails its flushes and is tried again by the next;
 * any other failure poisons the map. A round runs on the thread that brought the flush; further ones on the pool.
 *
 * Replace. vx_map_replace stores new entries where the expected ones stand and returns only when no
 * access that began under the old ones is under way; then the old space may be reused.
 *
 * Lock order: a page's mixed lock, held while sectors are filled, then map->lock, which is a leaf; no
 * upcall, I/O or wait other than on `changed` happens under that.
 */
#ifndef VX_MAP_H
#define VX_MAP_H

#include "core/device.h"
#include "core/pool.h"
#include "map/table.h"

enum vx_map_flag {
    VX_MAP_IN_PLACE = 1, /* zero writes zeros and keeps the space, trim does nothing: fixed images */
    VX_MAP_READ_ONLY = 2,
    VX_MAP_GATED = 4,      /* begin with the gate closed */
    VX_MAP_TRANSPARENT = 8 /* zero, trim and extents are the lower device's: raw images */
};

enum vx_grant_flag { VX_GRANT_FRESH = 0, VX_GRANT_STALE = 1 };

#define VX_MAP_NO_PARENT UINT32_MAX

typedef struct vx_map_statistics {
    uint64_t dirty_generation, committed_generation;
    uint64_t rounds;      /* flush rounds run */
    uint64_t commits;     /* rounds that had something to commit */
    uint64_t dirty_pages; /* published and not yet taken by a round */
    uint64_t granted;     /* pages of ready space in stock */
    uint64_t faults;      /* faults answered with VX_FAULTED */
} vx_map_statistics;

/* page_shift: 9 to 32; size and largest_size in bytes. NULL: no memory or bad arguments. */
vx_device *vx_map_create(uint64_t size, uint64_t largest_size, uint32_t page_shift,
                         uint32_t lower_count, uint32_t flags, vx_pool *pool, uint64_t identity,
                         const vx_upcalls *upcalls);
/* Before first use only. The map keeps a reference. */
int vx_map_set_lower(vx_device *device, uint32_t index, vx_device *lower);
/* Before first use only. Where MIXED pages find what their bitmap leaves out, at the same offset. A
 * write into a page that is SHARED with it makes the page MIXED (with mixed_tag), and DATA (with
 * full_tag) when every sector of 1 << sector_shift bytes (9 or 12) is stored here. */
int vx_map_set_parent(vx_device *device, uint32_t lower_index, uint32_t sector_shift,
                      uint32_t mixed_tag, uint32_t full_tag);

/* Fills pages that ask; others keep what they have. */
int vx_map_install(vx_device *device, uint64_t first, uint64_t count, const uint64_t *entries);
/* The sector bitmap of a page, one bit a sector, least significant first; set before its MIXED entry
 * is installed, copied, and freed with the map. One that is there already stays as it is. */
int vx_map_set_bitmap(vx_device *device, uint64_t page, const uint8_t *bits, uint64_t length);
void vx_map_read_entries(vx_device *device, uint64_t first, uint64_t count, uint64_t *entries);
/* Drops the clean chunks that lie inside the range; returns how many. */
uint64_t vx_map_drop(vx_device *device, uint64_t first_chunk, uint64_t count);
/* Replaces where expected[i] stands; mismatched[i] is set where it does not. Returns the number of
 * mismatches, or a vx_error. With `publish`, the changes are listed for the next commit. */
int64_t vx_map_replace(vx_device *device, uint64_t count, const uint64_t *pages,
                       const uint64_t *expected, const uint64_t *entries, bool publish,
                       uint8_t *mismatched);
/* Waits for every access that is under way now. */
void vx_map_quiesce(vx_device *device);

/* Offsets (bytes, on `lower`) of ready pages. FRESH reads zeros; STALE is overwritten whole. */
int vx_map_grant(vx_device *device, uint32_t lower, uint64_t count, const uint64_t *offsets,
                 uint32_t tag, int flag);
/* Takes back what is left of the stock: offsets; returns how many. */
uint64_t vx_map_revoke(vx_device *device, uint64_t capacity, uint64_t *offsets);
void vx_map_gate(vx_device *device, bool open);

/* Refuses new requests (CLOSED), waits until no access, round or refill is under way, and commits
 * what was published and is not durable yet. 0; POISONED when that could not be done; FORKED at once
 * in a child of fork. */
int vx_map_close(vx_device *device);
void vx_map_statistics_of(vx_device *device, vx_map_statistics *statistics);

#endif
