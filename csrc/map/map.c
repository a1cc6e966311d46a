/* SPDX-License-Identifier: MIT */
#include "map/map_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

bool vx_map_open_inside(vx_map *map, vx_request *request)
{
    if (!atomic_load(&map->closed))
        return true;
    vx_fail(&map->device, request, VX_E_CLOSED, 0, request->offset);
    return false;
}

int vx_map_fault(vx_map *map, vx_request *request, enum vx_fault_kind kind, uint64_t first,
                 uint64_t count)
{
    atomic_fetch_add_explicit(&map->faults, 1, memory_order_relaxed);
    request->fault = (vx_fault){.device = &map->device,
                                .kind = kind,
                                .operation = request->operation,
                                .first = first,
                                .count = count};
    return VX_FAULTED;
}

int vx_map_fault_load(vx_map *map, vx_request *request, uint64_t at, uint64_t end)
{
    uint64_t first = at >> map->page_shift;
    uint64_t count = ((end - 1) >> map->page_shift) - first + 1;
    return vx_map_fault(map, request, VX_FAULT_LOAD, first, count > 65536 ? 65536 : count);
}

static int map_resize(vx_device *device, uint64_t size)
{
    vx_map *map = (vx_map *)device;
    if (size > map->table.pages << map->page_shift)
        return VX_E_RANGE;
    atomic_store(&device->size, size);
    return VX_OK;
}

/* Refuses new accesses and waits for those in flight; false in a forked child. */
static bool shut(vx_map *map)
{
    if (vx_device_state(&map->device) == VX_E_FORKED)
        return false; /* its locks and epochs belong to threads of the parent process */
    vx_device_set_state(&map->device, VX_E_CLOSED);
    atomic_store(&map->closed, true);
    pthread_mutex_lock(&map->lock);
    map->closing = true;
    pthread_cond_broadcast(&map->changed);
    pthread_mutex_unlock(&map->lock);
    /* Accesses in flight finish and may still publish; no access begins after this. */
    vx_epoch_quiesce(&map->epochs);
    return true;
}

int vx_map_close(vx_device *device)
{
    vx_map *map = (vx_map *)device;
    return shut(map) ? vx_map_last_round(map, true) : VX_E_FORKED;
}

static void map_destroy(vx_device *device)
{
    vx_map *map = (vx_map *)device;
    if (!shut(map))
        return; /* not freed before the process ends */
    /* A map that was never closed leaves on disk what was flushed: a finaliser commits nothing. */
    vx_map_last_round(map, false);
    for (uint32_t i = 0; i < map->lower_count; i++)
        vx_device_release(vx_map_lower_device(map, i));
    vx_map_free_counters(map);
    for (vx_bitmap *next, *bitmap = map->bitmap_list; bitmap != NULL; bitmap = next) {
        next = bitmap->next;
        free(bitmap);
    }
    if (map->bitmaps != NULL)
        munmap(map->bitmaps, map->table.pages * sizeof *map->bitmaps);
    vx_table_release(&map->table);
    free(map->lowers);
    free(map->grants);
    free(map->published.pages);
    free(map->published.entries);
    free(map->spare.pages);
    free(map->spare.entries);
    for (uint32_t i = 0; i < VX_MIXED_LOCKS; i++)
        pthread_mutex_destroy(&map->mixed_locks[i]);
    pthread_mutex_destroy(&map->lock);
    pthread_cond_destroy(&map->changed);
    free(map);
}

static const vx_operations map_operations = {
    .kind = "map", .submit = vx_map_submit, .resize = map_resize, .destroy = map_destroy};

vx_device *vx_map_create(uint64_t size, uint64_t largest_size, uint32_t page_shift,
                         uint32_t lower_count, uint32_t flags, vx_pool *pool, uint64_t identity,
                         const vx_upcalls *upcalls)
{
    if (page_shift < 9 || page_shift > 32 || size > largest_size || largest_size > INT64_MAX ||
        lower_count == 0 || lower_count > 4096)
        return NULL;
    vx_map *map = aligned_alloc(64, (sizeof *map + 63) / 64 * 64);
    if (map == NULL)
        return NULL;
    memset(map, 0, sizeof *map);
    uint64_t page_size = (uint64_t)1 << page_shift;
    map->lowers = calloc(lower_count, sizeof *map->lowers);
    if (map->lowers == NULL ||
        !vx_table_reserve(&map->table, largest_size / page_size + (largest_size % page_size != 0))) {
        free(map->lowers);
        free(map);
        return NULL;
    }
    vx_device_initialise(&map->device, &map_operations, identity, upcalls, size);
    map->device.read_only = flags & VX_MAP_READ_ONLY;
    vx_epoch_initialise(&map->epochs);
    map->page_shift = page_shift;
    map->lower_count = lower_count;
    map->parent = VX_MAP_NO_PARENT;
    map->leaving = UINT32_MAX;
    atomic_init(&map->tracked, UINT64_MAX);
    map->flags = flags;
    atomic_init(&map->gate_open, !(flags & VX_MAP_GATED));
    map->pool = pool;
    map->round_job.run = vx_map_round;
    map->refill_job.run = vx_map_refill;
    for (uint32_t i = 0; i < VX_MIXED_LOCKS; i++)
        pthread_mutex_init(&map->mixed_locks[i], NULL);
    pthread_mutex_init(&map->lock, NULL);
    pthread_cond_init(&map->changed, NULL);
    return &map->device;
}

int vx_map_set_parent(vx_device *device, uint32_t lower_index, uint32_t sector_shift,
                      uint32_t mixed_tag, uint32_t full_tag)
{
    vx_map *map = (vx_map *)device;
    if (lower_index >= map->lower_count || vx_map_lower_device(map, lower_index) == NULL ||
        (sector_shift != 9 && sector_shift != 12) || map->page_shift < sector_shift + 3)
        return VX_E_INVALID;
    map->parent = lower_index;
    map->sector_shift = sector_shift;
    map->mixed_tag = mixed_tag;
    map->full_tag = full_tag;
    return VX_OK;
}

void vx_map_statistics_of(vx_device *device, vx_map_statistics *statistics)
{
    vx_map *map = (vx_map *)device;
    pthread_mutex_lock(&map->lock);
    *statistics = (vx_map_statistics){
        .dirty_generation = atomic_load(&map->dirty_generation),
        .committed_generation = atomic_load(&map->committed_generation),
        .rounds = map->rounds_finished,
        .commits = map->commits,
        .dirty_pages = map->published.count,
        .granted = map->grant_count,
        .faults = atomic_load(&map->faults)};
    pthread_mutex_unlock(&map->lock);
}
