/* SPDX-License-Identifier: MIT */
#include "map/map_internal.h"

#include <string.h>

#include "core/delegate.h"
#include "core/fan.h"
#include "core/run.h"

/* A round: what it took, the flushes that it covers, and what became of it. */
typedef struct round {
    vx_request request; /* a FLUSH that stands for all of them: flags, start, result, delay */
    vx_request *covered;
    vx_published taken;
    vx_taken_bitmaps bitmaps;
    uint64_t generation;
    bool has_memory; /* for the copies of the bitmaps */
    bool retries;    /* it failed and changed nothing, so the next flush tries again */
} round;

/* The writable lower devices: `only` if there is one, a fan of their flushes if there are more. */
typedef struct targets {
    vx_device *only;
    vx_fan *fan;
    uint32_t count;
} targets;

static bool choose_targets(vx_map *map, const vx_request *flush, targets *found)
{
    *found = (targets){0};
    pthread_mutex_lock(&map->lock);
    for (uint32_t i = 0; i < map->lower_count; i++) {
        vx_device *lower = vx_map_lower_device(map, i);
        if (lower == NULL || lower->read_only)
            continue;
        found->count++;
        found->only = lower;
    }
    if (found->count > 1) {
        found->only = NULL;
        found->fan = vx_fan_begin(found->count);
        for (uint32_t i = 0; found->fan != NULL && i < map->lower_count; i++) {
            vx_device *lower = vx_map_lower_device(map, i);
            if (lower != NULL && !lower->read_only)
                vx_fan_add(found->fan, flush, lower, VX_FLUSH, 0, 0, NULL);
        }
    }
    if (found->only != NULL)
        vx_device_reference(found->only);
    pthread_mutex_unlock(&map->lock);
    return found->count < 2 || found->fan != NULL;
}

/* Makes the data on the writable lower devices durable, whether or not metadata is dirty. A device that
 * has nothing to make durable costs nothing (leaf/file.h). */
static void flush_lowers(vx_map *map, round *r, bool commits)
{
    targets found;
    vx_request *flush = &r->request;
    uint32_t order = flush->flags & VX_ORDER;
    flush->flags &= ~(uint32_t)VX_ORDER; /* several devices keep no order among them */
    if (!choose_targets(map, flush, &found)) {
        vx_fail(&map->device, flush, VX_E_NOMEM, 0, 0);
        r->retries = true;
        return;
    }
    if (found.only != NULL) {
        vx_request child;
        vx_request_child(&child, flush, VX_FLUSH, 0, 0, NULL);
        /* The commit makes a barrier on the same device, after its own writes. */
        child.flags |= commits && (map->flags & VX_MAP_COMMITS_BELOW) ? (uint32_t)VX_ORDER : order;
        vx_finish(found.only, &child);
        vx_request_adopt(flush, &child);
        r->retries = flush->result == VX_E_NOSPACE && vx_device_state(found.only) == 0;
        vx_device_release(found.only);
    } else if (found.fan != NULL) {
        vx_fan_run(found.fan, map->pool, found.count - 1);
        vx_fan_adopt(found.fan, flush);
        r->retries = flush->result != VX_OK && vx_fan_lacks_only_space(found.fan);
        vx_fan_end(found.fan);
    }
}

static void commit(vx_map *map, round *r)
{
    vx_fault fault = {.device = &map->device,
                      .kind = VX_FAULT_COMMIT,
                      .time = {r->request.starts_ns, r->request.virtual_time},
                      .count = r->taken.count,
                      .pages = r->taken.pages,
                      .entries = r->taken.entries,
                      .generation = r->generation,
                      .bitmap_count = r->bitmaps.count,
                      .bitmap_bytes = r->bitmaps.bytes,
                      .bitmap_pages = r->bitmaps.pages,
                      .bitmap_bits = r->bitmaps.bits};
    int code = map->device.upcalls == NULL ? VX_E_UNSUPPORTED
                                           : vx_upcall_fault(&map->device, &fault);
    if (code != VX_OK)
        vx_fail(&map->device, &r->request, code, 0, 0);
    r->request.not_before_ns = fault.time.ns;
    r->request.virtual_time |= fault.time.is_virtual;
    r->retries = code == VX_E_NOSPACE;
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

/* Takes what the next round makes durable, and the flushes that it covers. */
static void begin_round_locked(vx_map *map, round *r)
{
    memset(r, 0, sizeof *r);
    r->covered = map->flush_head;
    r->taken = map->published;
    r->generation = atomic_load(&map->dirty_generation);
    r->request.operation = VX_FLUSH;
    r->request.flags = r->covered == NULL ? 0 : VX_ORDER;
    for (vx_request *flush = r->covered; flush != NULL; flush = flush->next) {
        r->request.flags &= flush->flags;
        r->request.virtual_time |= flush->virtual_time;
        vx_request_follow(flush); /* a FUA write is flushed when it is written */
        if (flush->starts_ns > r->request.starts_ns)
            r->request.starts_ns = flush->starts_ns;
    }
    map->flush_head = map->flush_tail = NULL;
    map->published = map->spare;
    map->published.count = 0;
    map->spare = (vx_published){0};
    map->rounds_started++;
    r->has_memory = vx_map_take_bitmaps_locked(map, &r->bitmaps);
}

static void make_durable(vx_map *map, round *r)
{
    bool commits = r->taken.count > 0 || r->bitmaps.count > 0;
    int state = vx_device_state(&map->device);
    if (commits)
        r->request.flags &= ~(uint32_t)VX_ORDER;
    if (state != VX_OK && state != VX_E_CLOSED) { /* closed: the last round, or one before it */
        vx_fail(&map->device, &r->request, state, 0, 0);
        return;
    }
    flush_lowers(map, r, commits);
    if (vx_mutated(map, VX_LATE_BITMAPS))
        vx_map_copy_bitmaps(&r->bitmaps);
    if (r->request.result != VX_OK)
        return;
    if (!r->has_memory) {
        vx_fail(&map->device, &r->request, VX_E_NOMEM, 0, 0);
        r->retries = true;
        return;
    }
    vx_request_follow(&r->request);
    if (commits)
        commit(map, r);
    if (r->request.result == VX_OK)
        atomic_store(&map->committed_generation, r->generation);
}

static void end_round_locked(vx_map *map, round *r)
{
    bool succeeded = r->request.result == VX_OK;
    if (!succeeded && !(r->retries && put_back_locked(map, &r->taken)))
        vx_device_set_state(&map->device, VX_E_POISONED);
    for (uint64_t i = 0; i < r->taken.count && succeeded; i++)
        atomic_fetch_sub(&map->table.dirty[r->taken.pages[i] / VX_CHUNK_PAGES], 1);
    if (r->retries)
        vx_map_return_bitmaps_locked(map, &r->bitmaps);
    map->starved = r->retries;
    map->commits += (r->taken.count > 0 || r->bitmaps.count > 0) && succeeded;
    vx_map_free_bitmaps(&r->bitmaps);
    r->taken.count = 0;
    map->spare = r->taken;
    map->rounds_finished++;
}

/* Runs one round and completes the flushes that it covers. The lock is held on entry and return. */
static void run_round_locked(vx_map *map)
{
    round r;
    begin_round_locked(map, &r);
    /* Before the barrier, which then covers the data of every bit. Under the lock, because a page may
     * move: a bit that is set later belongs to a place that this round does not commit. */
    vx_map_copy_bitmaps(&r.bitmaps);
    pthread_mutex_unlock(&map->lock);
    make_durable(map, &r);
    pthread_mutex_lock(&map->lock);
    end_round_locked(map, &r);
    pthread_mutex_unlock(&map->lock);
    while (r.covered != NULL) {
        vx_request *next = r.covered->next;
        vx_request_adopt(r.covered, &r.request);
        r.covered->complete(r.covered);
        r.covered = next;
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
    bool nowait = request->flags & VX_NOWAIT;
    if (nowait && (!(request->flags & VX_MAY_PARK) || map->pool == NULL))
        return VX_AGAIN;
    if (map->device.read_only || vx_mutated(map, VX_NO_COMMIT_WAIT))
        return vx_succeed(request);
    pthread_mutex_lock(&map->lock);
    if (map->closing) {
        pthread_mutex_unlock(&map->lock);
        return vx_fail(&map->device, request, VX_E_CLOSED, 0, 0);
    }
    request->next = NULL;
    request->waits_for = map->pool == NULL ? 0 : vx_pool_level(map->pool);
    if (map->flush_tail != NULL)
        map->flush_tail->next = request;
    else
        map->flush_head = request;
    map->flush_tail = request;
    if (!map->round_running && nowait) {
        map->round_running = true;
        map->jobs++;
        vx_pool_push(map->pool, &map->round_job);
    } else if (!map->round_running) {
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
