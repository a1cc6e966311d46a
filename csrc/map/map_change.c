/* SPDX-License-Identifier: MIT */
#include <stdlib.h>

#include "map/map_internal.h"
#include "core/delegate.h"

static void progressed(vx_map *map)
{
    atomic_fetch_add(&map->device.progress, 1);
}

bool vx_published_reserve(vx_published *list, uint64_t more)
{
    if (list->capacity - list->count >= more)
        return true;
    uint64_t capacity = 2 * list->capacity + 256 + more;
    uint64_t *pages = realloc(list->pages, capacity * sizeof *pages);
    if (pages != NULL)
        list->pages = pages;
    uint64_t *entries = realloc(list->entries, capacity * sizeof *entries);
    if (entries != NULL)
        list->entries = entries;
    if (pages == NULL || entries == NULL)
        return false;
    list->capacity = capacity;
    return true;
}

void vx_map_publish_locked(vx_map *map, uint64_t page, uint64_t entry)
{
    /* This comes first: an access that uses the new entry must see the raised generation. */
    atomic_fetch_add(&map->dirty_generation, 1);
    atomic_fetch_add(&map->table.dirty[page / VX_CHUNK_PAGES], 1);
    map->published.pages[map->published.count] = page;
    map->published.entries[map->published.count++] = entry;
    atomic_store(&map->table.entries[page], entry);
}

bool vx_map_is_busy_locked(const vx_map *map, uint64_t page)
{
    for (uint32_t i = 0; i < map->busy_count; i++)
        if (map->busy[i] == page)
            return true;
    return false;
}

static void install_locked(vx_map *map, uint64_t page, uint64_t entry)
{
    if (vx_entry_is_placed(entry) && vx_entry_lower(entry) == map->leaving)
        map->leaving_is_named = true; /* so it cannot leave */
    atomic_store(&map->table.entries[page], entry);
}

int vx_map_install(vx_device *device, uint64_t first, uint64_t count, const uint64_t *entries)
{
    vx_map *map = (vx_map *)device;
    if (first > map->table.pages || count > map->table.pages - first)
        return VX_E_RANGE;
    pthread_mutex_lock(&map->lock);
    for (uint64_t i = 0; i < count; i++)
        if (!vx_map_knows_lower_locked(map, entries[i])) {
            pthread_mutex_unlock(&map->lock);
            return VX_E_INVALID;
        }
    for (uint64_t i = 0; i < count; i++)
        if (vx_entry_kind(vx_map_entry(map, first + i)) == VX_ASK)
            install_locked(map, first + i, entries[i]);
    progressed(map);
    pthread_mutex_unlock(&map->lock);
    return VX_OK;
}

void vx_map_read_entries(vx_device *device, uint64_t first, uint64_t count, uint64_t *entries)
{
    vx_map *map = (vx_map *)device;
    for (uint64_t i = 0; i < count; i++)
        entries[i] = first + i < map->table.pages ? vx_map_entry(map, first + i) : 0;
}

static bool droppable_locked(vx_map *map, uint64_t chunk)
{
    if (atomic_load(&map->table.dirty[chunk]) != 0)
        return false;
    for (uint32_t i = 0; i < map->busy_count; i++)
        if (map->busy[i] / VX_CHUNK_PAGES == chunk)
            return false;
    return true;
}

uint64_t vx_map_drop(vx_device *device, uint64_t first_chunk, uint64_t count)
{
    vx_map *map = (vx_map *)device;
    uint64_t dropped = 0;
    pthread_mutex_lock(&map->lock);
    for (uint64_t chunk = first_chunk;
         chunk - first_chunk < count && chunk < map->table.pages / VX_CHUNK_PAGES; chunk++) {
        if (!droppable_locked(map, chunk))
            continue;
        vx_table_drop_chunk(&map->table, chunk);
        dropped++;
    }
    pthread_mutex_unlock(&map->lock);
    return dropped;
}

void vx_map_quiesce(vx_device *device)
{
    vx_epoch_quiesce(&((vx_map *)device)->epochs);
}

static bool skips_quiesce(const vx_map *map, uint64_t entry)
{
    return vx_mutated(map, vx_entry_kind(entry) == VX_SHARED ? VX_NO_QUIESCE_SHARED
                                                             : VX_NO_QUIESCE_DATA);
}

int64_t vx_map_replace(vx_device *device, uint64_t count, const uint64_t *pages,
                       const uint64_t *expected, const uint64_t *entries, bool publish,
                       uint8_t *mismatched)
{
    vx_map *map = (vx_map *)device;
    int64_t mismatches = 0, code = VX_OK;
    bool quiesce = false;
    for (uint64_t i = 0; i < count; i++)
        if (pages[i] >= map->table.pages)
            return VX_E_RANGE;
    pthread_mutex_lock(&map->lock);
    for (uint64_t i = 0; i < count; i++) {
        while (vx_map_is_busy_locked(map, pages[i]))
            pthread_cond_wait(&map->changed, &map->lock);
        if (map->closing) { /* nothing would commit the change */
            code = VX_E_CLOSED;
            break;
        }
        if (!vx_map_may_name_locked(map, entries[i])) {
            code = VX_E_INVALID;
            break;
        }
        if (publish && !vx_published_reserve(&map->published, 1)) {
            code = VX_E_NOMEM; /* what was replaced so far still needs the quiesce */
            break;
        }
        mismatched[i] = vx_map_entry(map, pages[i]) != expected[i];
        if (mismatched[i])
            mismatches++;
        else if (publish)
            vx_map_publish_locked(map, pages[i], entries[i]);
        else
            atomic_store(&map->table.entries[pages[i]], entries[i]);
        quiesce |= !mismatched[i] && !skips_quiesce(map, entries[i]);
    }
    progressed(map);
    if (publish)
        vx_map_commit_in_background_locked(map);
    pthread_mutex_unlock(&map->lock);
    if (quiesce)
        vx_epoch_quiesce(&map->epochs);
    return code == VX_OK ? mismatches : code;
}

static bool reserve_grants_locked(vx_map *map, uint64_t more)
{
    uint64_t wanted = map->grant_count + more + VX_BUSY_PAGES; /* room for returned grants */
    if (wanted <= map->grant_capacity)
        return true;
    vx_grant_entry *ring = malloc(2 * wanted * sizeof *ring);
    if (ring == NULL)
        return false;
    for (uint64_t i = 0; i < map->grant_count; i++)
        ring[i] = map->grants[(map->grant_head + i) % map->grant_capacity];
    free(map->grants);
    map->grants = ring;
    map->grant_head = 0;
    map->grant_capacity = 2 * wanted;
    return true;
}

int vx_map_grant(vx_device *device, uint32_t lower, uint64_t count, const uint64_t *offsets,
                 uint32_t tag, int flag)
{
    vx_map *map = (vx_map *)device;
    pthread_mutex_lock(&map->lock);
    if ((map->flags & VX_MAP_IDENTITY) ||
        !vx_map_may_name_locked(map, vx_entry(VX_DATA, lower, 0, 0))) {
        pthread_mutex_unlock(&map->lock);
        return VX_E_INVALID;
    }
    if (!reserve_grants_locked(map, count)) {
        pthread_mutex_unlock(&map->lock);
        return VX_E_NOMEM;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = (map->grant_head + map->grant_count) % map->grant_capacity;
        map->grants[at] = (vx_grant_entry){.entry = vx_entry(VX_DATA, lower, offsets[i], tag),
                                           .stale = flag == VX_GRANT_STALE};
        map->grant_count++;
    }
    map->grant_low = map->grant_count / 2;
    progressed(map);
    pthread_mutex_unlock(&map->lock);
    return VX_OK;
}

uint64_t vx_map_revoke(vx_device *device, uint64_t capacity, uint64_t *offsets)
{
    vx_map *map = (vx_map *)device;
    uint64_t taken = 0;
    pthread_mutex_lock(&map->lock);
    while (taken < capacity && map->grant_count > 0) {
        map->grant_count--;
        uint64_t at = (map->grant_head + map->grant_count) % map->grant_capacity;
        offsets[taken++] = vx_entry_offset(map->grants[at].entry);
    }
    pthread_mutex_unlock(&map->lock);
    return taken;
}

void vx_map_gate(vx_device *device, bool open)
{
    vx_map *map = (vx_map *)device;
    atomic_store_explicit(&map->gate_open, open, memory_order_release);
    progressed(map);
}

/* Requests more space in the background before the stock is used up. */
void vx_map_refill_locked(vx_map *map)
{
    if (map->refilling || map->grant_count > map->grant_low || map->pool == NULL ||
        vx_device_state(&map->device) != 0)
        return;
    map->refilling = true;
    map->jobs++;
    vx_pool_push(map->pool, &map->refill_job);
}

void vx_map_refill(vx_job *job)
{
    vx_map *map = (vx_map *)((char *)job - offsetof(vx_map, refill_job));
    vx_fault fault = {.device = &map->device, .kind = VX_FAULT_GRANT, .count = 0};
    if (vx_device_state(&map->device) == 0 &&
        vx_upcall_fault(&map->device, &fault) == VX_E_UPCALL)
        vx_device_set_state(&map->device, VX_E_POISONED);
    pthread_mutex_lock(&map->lock);
    map->refilling = false;
    map->jobs--;
    pthread_cond_broadcast(&map->changed);
    pthread_mutex_unlock(&map->lock);
}
