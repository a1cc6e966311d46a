/* SPDX-License-Identifier: MIT */
#include "map/map_internal.h"
#include "core/run.h"
#include "core/delegate.h"

/* Flushes every writable lower device, whether or not metadata is dirty. */
static int flush_lowers(vx_map *map, vx_failure *failure)
{
    for (uint32_t i = 0; i < map->lower_count; i++) {
        vx_device *lower = map->lowers[i];
        if (lower == NULL || lower->read_only)
            continue;
        int code = vx_transfer(lower, VX_FLUSH, 0, NULL, 0, 0, failure);
        if (code != VX_OK)
            return code;
    }
    return VX_OK;
}

static int commit(vx_map *map, const vx_published *taken, const vx_taken_bitmaps *bitmaps,
                  uint64_t generation)
{
    vx_fault fault = {.device = &map->device,
                      .kind = VX_FAULT_COMMIT,
                      .count = taken->count,
                      .pages = taken->pages,
                      .entries = taken->entries,
                      .generation = generation,
                      .bitmap_count = bitmaps->count,
                      .bitmap_bytes = bitmaps->bytes,
                      .bitmap_pages = bitmaps->pages,
                      .bitmap_bits = bitmaps->bits};
    if (map->device.upcalls == NULL)
        return VX_E_UNSUPPORTED;
    return vx_upcall_fault(&map->device, &fault);
}

/* Puts the list that was not committed back, ahead of the pages published since. */
static bool put_back_locked(vx_map *map, vx_published *taken)
{
    for (uint64_t i = 0; i < map->published.count; i++) {
        if (!vx_published_reserve(taken, 1))
            return false;
        taken->pages[taken->count] = map->published.pages[i];
        taken->entries[taken->count++] = map->published.entries[i];
    }
    vx_published empty = map->published;
    empty.count = 0;
    map->published = *taken;
    *taken = empty;
    return true;
}

/* Runs one round and completes the flushes that it covers. The lock is held on entry and return. */
static void run_round_locked(vx_map *map)
{
    vx_request *covered = map->flush_head;
    vx_published taken = map->published;
    uint64_t generation = atomic_load(&map->dirty_generation);
    map->flush_head = map->flush_tail = NULL;
    map->published = map->spare;
    map->published.count = 0;
    map->spare = (vx_published){0};
    map->rounds_started++;
    vx_taken_bitmaps bitmaps;
    bool memory = vx_map_take_bitmaps_locked(map, &bitmaps);
    pthread_mutex_unlock(&map->lock);
    vx_map_copy_bitmaps(&bitmaps); /* before the barrier, which then covers the data of every bit */

    vx_failure failure = {0};
    bool retry = false;
    int code = vx_device_state(&map->device);
    if (code == VX_E_CLOSED)
        code = VX_OK; /* the last round of a close, or one that began before it */
    if (code == VX_OK)
        code = flush_lowers(map, &failure);
    if (vx_mutated(map, VX_LATE_BITMAPS))
        vx_map_copy_bitmaps(&bitmaps);
    if (code == VX_OK && !memory) {
        code = VX_E_NOMEM;
        retry = true;
    } else if (code == VX_OK && (taken.count > 0 || bitmaps.count > 0)) {
        code = commit(map, &taken, &bitmaps, generation);
        failure = (vx_failure){.code = code, .operation = VX_FLUSH,
                               .device = map->device.identity};
        retry = code == VX_E_NOSPACE;
    }
    if (code == VX_OK)
        atomic_store(&map->committed_generation, generation);

    pthread_mutex_lock(&map->lock);
    if (code != VX_OK && !(retry && put_back_locked(map, &taken)))
        vx_device_set_state(&map->device, VX_E_POISONED);
    for (uint64_t i = 0; i < taken.count && code == VX_OK; i++)
        atomic_fetch_sub(&map->table.dirty[taken.pages[i] / VX_CHUNK_PAGES], 1);
    if (retry)
        vx_map_return_bitmaps_locked(map, &bitmaps);
    map->starved = retry;
    map->commits += (taken.count > 0 || bitmaps.count > 0) && code == VX_OK;
    vx_map_free_bitmaps(&bitmaps);
    taken.count = 0;
    map->spare = taken;
    map->rounds_finished++;
    pthread_mutex_unlock(&map->lock);
    while (covered != NULL) {
        vx_request *next = covered->next;
        covered->result = code;
        if (code != VX_OK)
            covered->failure = failure.code != 0 ? failure
                                                 : (vx_failure){.code = code,
                                                                .operation = VX_FLUSH,
                                                                .device = map->device.identity};
        covered->complete(covered);
        covered = next;
    }
    pthread_mutex_lock(&map->lock);
}

static bool more_to_do_locked(const vx_map *map)
{
    return map->flush_head != NULL ||
           (map->published.count >= VX_BACKGROUND_COMMIT && !map->starved &&
            atomic_load(&map->device.state) == 0);
}

static void end_rounds_locked(vx_map *map)
{
    map->round_running = false;
    map->jobs--;
    pthread_cond_broadcast(&map->changed);
}

void vx_map_round(vx_job *job)
{
    vx_map *map = (vx_map *)((char *)job - offsetof(vx_map, round_job));
    pthread_mutex_lock(&map->lock);
    do
        run_round_locked(map);
    while (more_to_do_locked(map));
    end_rounds_locked(map);
    pthread_mutex_unlock(&map->lock);
}

void vx_map_commit_in_background_locked(vx_map *map)
{
    if (map->round_running || map->closing || map->starved || map->pool == NULL ||
        map->published.count < VX_BACKGROUND_COMMIT)
        return;
    map->round_running = true;
    map->jobs++;
    vx_pool_push(map->pool, &map->round_job);
}

int vx_map_last_round(vx_map *map, bool commit_rest)
{
    int code = VX_OK;
    pthread_mutex_lock(&map->lock);
    while (map->jobs > 0)
        pthread_cond_wait(&map->changed, &map->lock);
    if (commit_rest && (map->published.count > 0 || map->dirty_bitmap_count > 0)) {
        map->jobs++;
        run_round_locked(map);
        end_rounds_locked(map);
        if (map->published.count > 0 || map->dirty_bitmap_count > 0 ||
            atomic_load(&map->committed_generation) != atomic_load(&map->dirty_generation))
            code = VX_E_POISONED;
    }
    pthread_mutex_unlock(&map->lock);
    return code;
}

int vx_map_flush(vx_map *map, vx_request *request)
{
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    if (map->device.read_only || vx_mutated(map, VX_NO_COMMIT_WAIT))
        return vx_succeed(request);
    pthread_mutex_lock(&map->lock);
    if (map->closing) {
        pthread_mutex_unlock(&map->lock);
        return vx_fail(&map->device, request, VX_E_CLOSED, 0, 0);
    }
    request->next = NULL;
    if (map->flush_tail != NULL)
        map->flush_tail->next = request;
    else
        map->flush_head = request;
    map->flush_tail = request;
    if (!map->round_running) {
        map->round_running = true;
        map->jobs++;
        run_round_locked(map);
        while (map->pool == NULL && more_to_do_locked(map))
            run_round_locked(map);
        if (more_to_do_locked(map)) /* other flushes must not delay this one */
            vx_pool_push(map->pool, &map->round_job);
        else
            end_rounds_locked(map);
    }
    pthread_mutex_unlock(&map->lock);
    return VX_PARKED;
}
