/* SPDX-License-Identifier: MIT */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/units.h"
#include "map/map_internal.h"

void vx_map_unwatch(vx_map *map, uint64_t page, uint64_t entry)
{
    pthread_mutex_lock(&map->lock);
    if (vx_map_entry(map, page) == entry)
        atomic_store(&map->table.entries[page], entry & ~VX_ENTRY_WATCHED);
    pthread_mutex_unlock(&map->lock);
}

void vx_map_track(vx_device *device, uint64_t page)
{
    vx_map *map = (vx_map *)device;
    atomic_store(&map->tracked_changes, 0); /* before anybody notes a change of this page */
    atomic_store(&map->tracked, page);
    vx_epoch_quiesce(&map->epochs); /* changes that have not seen it */
}

uint64_t vx_map_take_changes(vx_device *device)
{
    vx_map *map = (vx_map *)device;
    uint64_t taken = atomic_exchange(&map->tracked_changes, 0);
    if (taken != 0)
        vx_epoch_quiesce(&map->epochs); /* they were noted before the data changed */
    return taken;
}

int vx_map_count_accesses(vx_device *device, bool on)
{
    vx_map *map = (vx_map *)device;
    int code = VX_OK;
    pthread_mutex_lock(&map->lock);
    if (on && map->counters == NULL) {
        uint64_t bytes = map->table.pages * sizeof *map->counters->pages;
        vx_counters *counters = calloc(1, sizeof *counters);
        void *pages = counters == NULL ? MAP_FAILED
                                       : mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) {
            free(counters);
            code = VX_E_NOMEM;
        } else {
            counters->pages = pages;
            counters->bytes = bytes;
            map->counters = counters;
        }
    }
    if (code == VX_OK) /* readers of `counting` see the counters */
        atomic_store_explicit(&map->counting, on, memory_order_release);
    pthread_mutex_unlock(&map->lock);
    return code;
}

void vx_map_count(vx_map *map, const vx_request *request)
{
    if (__builtin_expect(!atomic_load_explicit(&map->counting, memory_order_acquire), 1))
        return;
    vx_counters *counters = map->counters;
    uint64_t end = request->offset + request->length;
    _Atomic uint64_t *last = &counters->ends[request->epoch_slot % VX_EPOCH_SLOTS];
    bool sequential = request->length > VX_QUICK_BYTES ||
                      atomic_load_explicit(last, memory_order_relaxed) == request->offset;
    uint32_t kind = (sequential ? 2u : 0u) + (request->operation == VX_WRITE ? 1u : 0u);
    atomic_store_explicit(last, end, memory_order_relaxed);
    for (uint64_t page = request->offset >> map->page_shift; page << map->page_shift < end; page++) {
        _Atomic uint16_t *counter = &counters->pages[page][kind];
        uint16_t count = atomic_load_explicit(counter, memory_order_relaxed);
        if (count < UINT16_MAX)
            atomic_store_explicit(counter, (uint16_t)(count + 1), memory_order_relaxed);
    }
}

void vx_map_take_accesses(vx_device *device, uint64_t first, uint64_t count, vx_accesses *taken)
{
    vx_map *map = (vx_map *)device;
    memset(taken, 0, count * sizeof *taken);
    pthread_mutex_lock(&map->lock);
    vx_counters *counters = map->counters;
    pthread_mutex_unlock(&map->lock);
    for (uint64_t i = 0; counters != NULL && i < count && first + i < map->table.pages; i++) {
        uint16_t found[4];
        for (uint32_t kind = 0; kind < 4; kind++) {
            _Atomic uint16_t *counter = &counters->pages[first + i][kind];
            found[kind] = atomic_load_explicit(counter, memory_order_relaxed);
            if (found[kind] != 0)
                atomic_store_explicit(counter, 0, memory_order_relaxed);
        }
        taken[i] = (vx_accesses){found[0], found[1], found[2], found[3]};
    }
}

void vx_map_free_counters(vx_map *map)
{
    if (map->counters == NULL)
        return;
    munmap((void *)map->counters->pages, map->counters->bytes);
    free(map->counters);
}
