/* SPDX-License-Identifier: MIT
 *
 * Declarations shared by the files of the map. map.c creates and closes a map, map_read.c
 * dispatches requests and reads, map_write.c and map_mixed.c change pages, map_change.c and
 * map_lowers.c hold the functions that the owner calls, map_watch.c serves those who move pages,
 * map_commit.c makes changes durable.
 */
#ifndef VX_MAP_INTERNAL_H
#define VX_MAP_INTERNAL_H

#include <pthread.h>

#include "core/epoch.h"
#include "map/map.h"

typedef struct vx_grant_entry {
    uint64_t entry; /* the DATA entry that the page gets */
    bool stale;
} vx_grant_entry;

typedef struct vx_published {
    uint64_t *pages;
    uint64_t *entries;
    uint64_t count, capacity;
} vx_published;

/* The sectors of a MIXED page that this device stores. Bits are set under the map's lock, after the
 * data are written, and are never cleared while the page is MIXED. Any thread may read them. */
typedef struct vx_bitmap {
    struct vx_bitmap *next;       /* in bitmap_list */
    struct vx_bitmap *next_dirty; /* under lock */
    uint64_t page;
    uint64_t sectors, set; /* set: under lock */
    bool dirty;            /* under lock: bits were set since the last round began */
    _Atomic uint8_t bits[];
} vx_bitmap;

/* The dirty bitmaps that a round took, and copies of their bits made before its barrier. */
typedef struct vx_taken_bitmaps {
    vx_bitmap **bitmaps;
    uint64_t *pages;
    uint8_t *bits;
    uint64_t count, bytes; /* bytes: of each */
} vx_taken_bitmaps;

/* Accesses by page. Loads and stores are relaxed, so counts may be lost. */
typedef struct vx_counters {
    _Atomic uint16_t (*pages)[4]; /* in the order of vx_accesses */
    uint64_t bytes;
    _Atomic uint64_t ends[VX_EPOCH_SLOTS]; /* by client: where its last request ended */
} vx_counters;

#define VX_MIXED_LOCKS 16u

#define VX_BUSY_PAGES 64u
#define VX_BACKGROUND_COMMIT 65536u /* published pages that start a commit without a flush */

typedef struct vx_map {
    vx_device device;
    vx_table table;
    vx_epochs epochs;
    uint32_t page_shift;
    uint32_t lower_count;
    _Atomic(vx_device *) *lowers;
    uint32_t leaving; /* under lock: the lower device that is being taken out; UINT32_MAX: none */
    bool leaving_is_named; /* under lock: an entry that names it was installed since */
    uint32_t parent;
    uint32_t flags;
    _Atomic bool gate_open;
    _Atomic bool closed; /* no access may begin; `state` may be POISONED instead */
    vx_pool *pool;
    vx_bitmap **bitmaps; /* by page; reserved when the first is set */
    vx_bitmap *bitmap_list;
    uint32_t sector_shift; /* of the bitmaps; 0: no MIXED pages */
    uint32_t mixed_tag, full_tag;
    pthread_mutex_t mixed_locks[VX_MIXED_LOCKS]; /* by page; taken before `lock` */
    _Atomic uint64_t tracked;         /* the page whose changes are noted; UINT64_MAX: none */
    _Atomic uint64_t tracked_changes; /* a bit for each 64th of it */
    vx_counters *counters;            /* set once, under lock */
    _Atomic bool counting;

    pthread_mutex_t lock;
    pthread_cond_t changed; /* a page is no longer busy, a job ended, or the map closes */

    /* under lock */
    uint64_t busy[VX_BUSY_PAGES];
    uint32_t busy_lowers[VX_BUSY_PAGES]; /* the lower device that each will be placed on */
    uint32_t busy_count;
    vx_grant_entry *grants; /* ring */
    uint64_t grant_head, grant_count, grant_capacity, grant_low;
    bool refilling;
    vx_published published; /* since the last round began */
    vx_published spare;     /* an empty list for the next round to swap in */
    vx_bitmap *dirty_bitmaps;
    uint64_t dirty_bitmap_count;
    uint64_t rounds_started, rounds_finished;
    bool closing; /* refuses new flushes, replacements and background commits */
    bool round_running;
    bool starved; /* the last round found no space or memory: only a flush starts another */
    vx_request *flush_head, *flush_tail;
    uint32_t jobs; /* rounds and refills queued or running */
    vx_job round_job, refill_job;
    uint64_t commits;

    _Atomic uint64_t dirty_generation, committed_generation;
    _Atomic uint64_t faults;
#ifdef VX_MUTATE
    uint32_t mutate;
#endif
} vx_map;

/* Guarantees that tests switch off one at a time (only in builds with VX_MUTATE). */
enum vx_mutation {
    VX_NO_QUIESCE_SHARED = 1, /* replace with a SHARED entry and copying do not wait */
    VX_NO_QUIESCE_DATA = 2,   /* replace with any other entry does not wait */
    VX_NO_COMMIT_WAIT = 4,    /* a flush does not wait for the commit generation */
    VX_NO_BUSY_WAIT = 8,      /* a busy page does not hold up other writers */
    VX_NO_MIXED_LOCK = 16,    /* two threads may fill sectors of a page at once */
    VX_BITS_FIRST = 32,       /* bits are set before the data are written */
    VX_LATE_BITMAPS = 64      /* a round copies bitmaps after its barrier */
};

static inline bool vx_mutated(const vx_map *map, enum vx_mutation what)
{
#ifdef VX_MUTATE
    return map->mutate & (uint32_t)what;
#else
    (void)map;
    (void)what;
    return false;
#endif
}

static inline uint64_t vx_map_entry(vx_map *map, uint64_t page)
{
    return atomic_load(&map->table.entries[page]);
}

static inline vx_device *vx_map_lower_device(const vx_map *map, uint32_t index)
{
    return atomic_load_explicit(&map->lowers[index], memory_order_acquire);
}

static inline uint64_t vx_page_size(const vx_map *map)
{
    return (uint64_t)1 << map->page_shift;
}

/* Under lock. Whether an entry may be installed: it is not placed, or its lower device exists; and
 * whether it may be stored anew: that device does not leave, either. */
bool vx_map_knows_lower_locked(const vx_map *map, uint64_t entry);
bool vx_map_may_name_locked(const vx_map *map, uint64_t entry);
/* Must be called inside an epoch. False if the map is closed; the request has then failed. The
 * close waits for every epoch, so a request that passes may use the lower devices until it leaves
 * its epoch. */
bool vx_map_open_inside(vx_map *map, vx_request *request);
int vx_map_fault(vx_map *map, vx_request *request, enum vx_fault_kind kind, uint64_t first,
                 uint64_t count);
int vx_map_fault_load(vx_map *map, vx_request *request, uint64_t at, uint64_t end);

int vx_map_submit(vx_device *device, vx_request *request);
int vx_map_read(vx_map *map, vx_request *request);
int vx_map_extents(vx_map *map, vx_request *request);
int vx_map_write(vx_map *map, vx_request *request);
int vx_map_zero_or_trim(vx_map *map, vx_request *request);

/* map_change.c. Under lock: vx_published_reserve makes room, then vx_map_publish_locked
 * publishes. */
bool vx_published_reserve(vx_published *list, uint64_t more);
void vx_map_publish_locked(vx_map *map, uint64_t page, uint64_t entry);
bool vx_map_is_busy_locked(const vx_map *map, uint64_t page);
void vx_map_refill_locked(vx_map *map);
void vx_map_refill(vx_job *job);

/* One operation on a lower device; its outcome and fault become the request's. */
int vx_map_lower(vx_map *map, vx_request *request, uint32_t operation, uint32_t flags,
                 uint32_t lower, uint64_t offset, uint64_t length, uint8_t *buffer);

/* map_mixed.c. Inside an epoch: returns the end of the run of sectors from `within` on that are all
 * stored here, or all not, each at the time its bit is read. The end is above `within` and at most
 * `stop`, in bytes from the start of the page. */
uint64_t vx_mixed_run(const vx_map *map, uint64_t page, uint64_t within, uint64_t stop,
                      bool *stored);
/* Inside the epoch in which `entry` was loaded: writes or zeroes a part of a MIXED page. */
int vx_map_change_mixed(vx_map *map, vx_request *request, uint64_t page, uint64_t entry,
                        uint64_t at, uint64_t length, uint32_t flags);
/* Returns the MIXED entry, with an empty bitmap, for a SHARED page that gets the space of `fresh`;
 * 0: no memory. The caller publishes it. */
uint64_t vx_map_mix_locked(vx_map *map, uint64_t page, uint64_t fresh);
void vx_map_mark_dirty_locked(vx_map *map, vx_bitmap *bitmap);
/* A round takes the dirty bitmaps (false: no memory) and copies them before its barrier. It returns
 * them if it fails and will be tried again. */
bool vx_map_take_bitmaps_locked(vx_map *map, vx_taken_bitmaps *taken);
void vx_map_copy_bitmaps(vx_taken_bitmaps *taken);
void vx_map_return_bitmaps_locked(vx_map *map, const vx_taken_bitmaps *taken);
void vx_map_free_bitmaps(vx_taken_bitmaps *taken);

/* map_watch.c. Inside the epoch in which a change found its page's entry, before the data change. */
static inline void vx_map_note_change(vx_map *map, uint64_t page, uint64_t within, uint64_t length)
{
    if (__builtin_expect(atomic_load(&map->tracked) != page, 1))
        return;
    uint32_t shift = map->page_shift - 6;
    uint64_t first = within >> shift, last = (within + length - 1) >> shift;
    uint64_t upto_last = last >= 63 ? UINT64_MAX : ((uint64_t)1 << (last + 1)) - 1;
    atomic_fetch_or(&map->tracked_changes, upto_last & (UINT64_MAX << first));
}
/* Clears the watched mark of the page, if its entry is still `entry`. */
void vx_map_unwatch(vx_map *map, uint64_t page, uint64_t entry);
void vx_map_count(vx_map *map, const vx_request *request);
void vx_map_free_counters(vx_map *map);

/* map_commit.c */
int vx_map_flush(vx_map *map, vx_request *request);
/* Waits for rounds and refills; then, with `commit`, commits what is left. */
int vx_map_last_round(vx_map *map, bool commit);
void vx_map_commit_in_background_locked(vx_map *map);
void vx_map_round(vx_job *job);

#endif
