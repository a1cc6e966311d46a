/* SPDX-License-Identifier: MIT
 *
 * What map.c, map_read.c, map_write.c, map_change.c and map_commit.c share.
 */
#ifndef VX_MAP_INTERNAL_H
#define VX_MAP_INTERNAL_H

#include <pthread.h>

#include "epoch.h"
#include "map.h"

typedef struct vx_grant_entry {
    uint64_t entry; /* the DATA entry that the page gets */
    bool stale;
} vx_grant_entry;

typedef struct vx_published {
    uint64_t *pages;
    uint64_t *entries;
    uint64_t count, capacity;
} vx_published;

typedef struct vx_bitmap {
    struct vx_bitmap *next; /* of the map's */
    uint32_t sector_shift;
    uint64_t bytes;
    uint8_t bits[];
} vx_bitmap;

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
    VX_NO_BUSY_WAIT = 8       /* a busy page does not hold up other writers */
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

/* map_commit.c */
int vx_map_flush(vx_map *map, vx_request *request);
/* Waits for rounds and refills; then, with `commit`, commits what is left. */
int vx_map_last_round(vx_map *map, bool commit);
void vx_map_commit_in_background_locked(vx_map *map);
void vx_map_round(vx_job *job);

#endif
