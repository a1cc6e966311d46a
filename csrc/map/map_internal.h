/* SPDX-License-Identifier: MIT
 *
 * What the files of a map share: map.c has its life, map_read.c takes requests and reads, map_write.c and
 * map_mixed.c change pages, map_change.c answers the owner, map_commit.c makes changes durable.
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

/* Which sectors of a MIXED page this device stores. Bits are set under the map's lock, after the
 * data, and are never cleared while the page is MIXED; anybody may read them. */
typedef struct vx_bitmap {
    struct vx_bitmap *next;       /* of the map's */
    struct vx_bitmap *next_dirty; /* under lock */
    uint64_t page;
    uint64_t sectors, set; /* set: under lock */
    bool dirty;            /* under lock: bits were set since the last round began */
    _Atomic uint8_t bits[];
} vx_bitmap;

/* What a round took of the dirty bitmaps, and their bits before its barrier. */
typedef struct vx_taken_bitmaps {
    vx_bitmap **bitmaps;
    uint64_t *pages;
    uint8_t *bits;
    uint64_t count, bytes; /* bytes: of each */
} vx_taken_bitmaps;

#define VX_MIXED_LOCKS 16u

#define VX_BUSY_PAGES 64u
#define VX_BACKGROUND_COMMIT 65536u /* published pages that start a commit by themselves */

typedef struct vx_map {
    vx_device device;
    vx_table table;
    vx_epochs epochs;
    uint32_t page_shift;
    uint32_t lower_count;
    vx_device **lowers;
    uint32_t parent;
    uint32_t flags;
    _Atomic bool gate_open;
    _Atomic bool closed; /* no access may begin; the state may say POISONED instead */
    vx_pool *pool;
    vx_bitmap **bitmaps; /* by page; reserved when the first is set */
    vx_bitmap *bitmap_list;
    uint32_t sector_shift; /* of the bitmaps; 0: no MIXED pages */
    uint32_t mixed_tag, full_tag;
    pthread_mutex_t mixed_locks[VX_MIXED_LOCKS]; /* by page: before `lock` */

    pthread_mutex_t lock;
    pthread_cond_t changed; /* a page stopped being busy, jobs fell to zero */

    /* under lock */
    uint64_t busy[VX_BUSY_PAGES];
    uint32_t busy_count;
    vx_grant_entry *grants; /* ring */
    uint64_t grant_head, grant_count, grant_capacity, grant_low;
    bool refilling;
    vx_published published; /* since the last round began */
    vx_published spare;     /* the other half of the swap */
    vx_bitmap *dirty_bitmaps;
    uint64_t dirty_bitmap_count;
    uint64_t rounds_started, rounds_finished;
    bool closing; /* no further round begins, but the last one of vx_map_close */
    bool round_running;
    bool starved; /* the last commit found no space: none is tried until a flush asks */
    vx_request *flush_head, *flush_tail;
    uint32_t jobs; /* rounds and refills under way */
    vx_job round_job, refill_job;
    uint64_t commits;

    _Atomic uint64_t dirty_generation, committed_generation;
    _Atomic uint64_t faults;
#ifdef VX_MUTATE
    uint32_t mutate;
#endif
} vx_map;

/* Guarantees that the tests take away one at a time (only in builds with VX_MUTATE). */
enum vx_mutation {
    VX_NO_QUIESCE_SHARED = 1, /* replace with a SHARED entry does not wait */
    VX_NO_QUIESCE_DATA = 2,   /* replace with any other entry does not wait */
    VX_NO_COMMIT_WAIT = 4,    /* a flush does not wait for the commit generation */
    VX_NO_BUSY_WAIT = 8,      /* a busy page does not hold up other writers */
    VX_NO_MIXED_LOCK = 16,    /* two may fill sectors of a page at the same time */
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

static inline uint64_t vx_page_size(const vx_map *map)
{
    return (uint64_t)1 << map->page_shift;
}

/* Inside an epoch: false, and the request failed, when the map was closed. The close waits for
 * every epoch, so what passes here may use the lower devices until it leaves. */
bool vx_map_open_inside(vx_map *map, vx_request *request);
int vx_map_fault(vx_map *map, vx_request *request, enum vx_fault_kind kind, uint64_t first,
                 uint64_t count);
int vx_map_fault_load(vx_map *map, vx_request *request, uint64_t at, uint64_t end);

int vx_map_submit(vx_device *device, vx_request *request);
int vx_map_read(vx_map *map, vx_request *request);
int vx_map_extents(vx_map *map, vx_request *request);
int vx_map_write(vx_map *map, vx_request *request);
int vx_map_zero_or_trim(vx_map *map, vx_request *request);

/* map_change.c. Under lock: room for more publications; publication itself. */
bool vx_published_reserve(vx_published *list, uint64_t more);
void vx_map_publish_locked(vx_map *map, uint64_t page, uint64_t entry);
bool vx_map_is_busy_locked(const vx_map *map, uint64_t page);
void vx_map_refill_locked(vx_map *map);
void vx_map_refill(vx_job *job);

/* One operation on a lower device; its outcome and fault become the request's. */
int vx_map_lower(vx_map *map, vx_request *request, uint32_t operation, uint32_t flags,
                 uint32_t lower, uint64_t offset, uint64_t length, uint8_t *buffer);

/* map_mixed.c. Inside an epoch: the end of the run of sectors from `within` on that are all stored
 * here, or all not, when each was looked at; above `within`, at most `stop`; in bytes of the page. */
uint64_t vx_mixed_run(const vx_map *map, uint64_t page, uint64_t within, uint64_t stop,
                      bool *stored);
/* Inside the epoch in which `entry` was loaded: writes or zeroes a part of a MIXED page. */
int vx_map_change_mixed(vx_map *map, vx_request *request, uint64_t page, uint64_t entry,
                        uint64_t at, uint64_t length, uint32_t flags);
/* The MIXED entry with which a SHARED page takes the place of `fresh`, its bitmap empty; 0: no
 * memory. The caller publishes it. */
uint64_t vx_map_mix_locked(vx_map *map, uint64_t page, uint64_t fresh);
void vx_map_mark_dirty_locked(vx_map *map, vx_bitmap *bitmap);
/* A round: takes the dirty bitmaps (false: no memory), copies them before its barrier, and gives
 * them back when it failed and is to be tried again. */
bool vx_map_take_bitmaps_locked(vx_map *map, vx_taken_bitmaps *taken);
void vx_map_copy_bitmaps(vx_taken_bitmaps *taken);
void vx_map_return_bitmaps_locked(vx_map *map, const vx_taken_bitmaps *taken);
void vx_map_free_bitmaps(vx_taken_bitmaps *taken);

/* map_commit.c */
int vx_map_flush(vx_map *map, vx_request *request);
/* Waits for rounds and refills; then, with `commit`, commits what is left. */
int vx_map_last_round(vx_map *map, bool commit);
void vx_map_commit_in_background_locked(vx_map *map);
void vx_map_round(vx_job *job);

#endif
