/* SPDX-License-Identifier: MIT */
#include "core/run.h"
#include "map/map_internal.h"

bool vx_map_knows_lower_locked(const vx_map *map, uint64_t entry)
{
    uint32_t lower = vx_entry_lower(entry);
    return !vx_entry_is_placed(entry) ||
           (lower < map->lower_count && vx_map_lower_device(map, lower) != NULL);
}

bool vx_map_may_name_locked(const vx_map *map, uint64_t entry)
{
    return vx_map_knows_lower_locked(map, entry) &&
           !(vx_entry_is_placed(entry) && vx_entry_lower(entry) == map->leaving);
}

int vx_map_set_lower(vx_device *device, uint32_t index, vx_device *lower)
{
    vx_map *map = (vx_map *)device;
    if (index >= map->lower_count)
        return VX_E_INVALID;
    pthread_mutex_lock(&map->lock);
    bool is_free = vx_map_lower_device(map, index) == NULL;
    if (is_free)
        atomic_store(&map->lowers[index], vx_device_reference(lower));
    pthread_mutex_unlock(&map->lock);
    return is_free ? VX_OK : VX_E_INVALID;
}

static bool is_granted_locked(const vx_map *map, uint32_t index)
{
    for (uint64_t i = 0; i < map->grant_count; i++) {
        uint64_t at = (map->grant_head + i) % map->grant_capacity;
        if (vx_entry_lower(map->grants[at].entry) == index)
            return true;
    }
    return false;
}

static bool is_named(vx_map *map, uint32_t index)
{
    for (uint64_t page = 0; page < map->table.pages; page++) {
        uint64_t entry = atomic_load_explicit(&map->table.entries[page], memory_order_relaxed);
        if (vx_entry_is_placed(entry) && vx_entry_lower(entry) == index)
            return true;
    }
    return false;
}

/* Whether a page is about to be published on the device. */
static bool is_awaited_locked(const vx_map *map, uint32_t index)
{
    for (uint32_t i = 0; i < map->busy_count; i++)
        if (map->busy_lowers[i] == index)
            return true;
    return false;
}

/* Lets no new entry name the device, and waits for pages that are about to get one that does. */
static bool begin_leaving(vx_map *map, uint32_t index)
{
    pthread_mutex_lock(&map->lock);
    bool may = map->leaving == UINT32_MAX && index < map->lower_count && index != map->parent &&
               !((map->flags & VX_MAP_IDENTITY) && index == 0) && !map->closing &&
               vx_map_lower_device(map, index) != NULL;
    if (may) {
        map->leaving = index;
        map->leaving_is_named = false;
    }
    while (may && is_awaited_locked(map, index))
        pthread_cond_wait(&map->changed, &map->lock);
    if (may && is_granted_locked(map, index)) {
        map->leaving = UINT32_MAX;
        may = false;
    }
    pthread_mutex_unlock(&map->lock);
    return may;
}

int vx_map_clear_lower(vx_device *device, uint32_t index)
{
    vx_map *map = (vx_map *)device;
    vx_device *left = NULL;
    vx_failure failure;
    if (!begin_leaving(map, index))
        return VX_E_INVALID;
    int code = is_named(map, index) ? VX_E_INVALID : VX_OK;
    /* Entries on disk may name the device until the last change away from it is committed. */
    if (code == VX_OK && !map->device.read_only)
        code = vx_transfer(device, VX_FLUSH, 0, NULL, 0, 0, &failure);
    if (code == VX_OK)
        vx_epoch_quiesce(&map->epochs); /* accesses that began under entries of before */
    pthread_mutex_lock(&map->lock);
    if (code == VX_OK && map->leaving_is_named) /* an entry was loaded meanwhile */
        code = VX_E_INVALID;
    if (code == VX_OK)
        left = atomic_exchange(&map->lowers[index], NULL);
    map->leaving = UINT32_MAX;
    pthread_mutex_unlock(&map->lock);
    vx_device_release(left);
    return code;
}
