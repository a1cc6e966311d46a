/* SPDX-License-Identifier: MIT */
#include <stdlib.h>
#include <string.h>

#include "map/map_internal.h"
#include "core/run.h"

#define COPY_PIECE ((uint64_t)1 << 20)

/* Progress of a change with FUA, kept across a restart. BUFFERED: part of a FUA write went without
 * FUA, so only a flush can complete it. A flush may commit, so no epoch is held then. */
enum { STAGE_MOVING = 0, STAGE_FLUSH = 1, STAGE_BUFFERED = 2 };

typedef struct VX_FRAME_TYPE map_frame {
    uint32_t stage;
} map_frame;
VX_DEFINE_FRAME(map_frame_of, map_frame, VX_LAYER_MAP)

/* The result of a step, for the loop that runs it. */
enum step { STEP_DONE, STEP_RETRY, STEP_ANSWER };

int vx_map_lower(vx_map *map, vx_request *request, uint32_t operation, uint32_t flags,
                 uint32_t lower, uint64_t offset, uint64_t length, uint8_t *buffer)
{
    vx_request child;
    vx_request_child(&child, request, operation, offset, length, buffer);
    child.flags = flags;
    int answer = vx_call(vx_map_lower_device(map, lower), &child);
    if (answer == VX_FAULTED)
        request->fault = child.fault;
    if (answer == VX_DONE)
        vx_request_adopt(request, &child);
    return answer;
}

/* Fills the granted page with the content of the old entry: a copy of a shared page, else zeros. */
static int fill_page(vx_map *map, vx_request *request, uint64_t old, uint64_t fresh)
{
    uint64_t size = vx_page_size(map), piece = size < COPY_PIECE ? size : COPY_PIECE;
    uint32_t flags = request->flags & ~(uint32_t)(VX_FUA | VX_NO_HOLE | VX_FAST);
    uint32_t target = vx_entry_lower(fresh);
    uint64_t to = vx_entry_offset(fresh), room = vx_device_size(vx_map_lower_device(map, target));
    if (map->flags & VX_MAP_IDENTITY && size > room - to)
        size = room - to; /* the last page, of a device that is as large as the map */
    if (vx_entry_kind(old) != VX_SHARED)
        return vx_map_lower(map, request, VX_ZERO, flags, target, to, size, NULL);
    uint8_t *buffer = malloc(piece);
    if (buffer == NULL)
        return vx_fail(&map->device, request, VX_E_NOMEM, 0, request->offset);
    uint64_t from = vx_entry_offset(old);
    uint64_t end = vx_device_size(vx_map_lower_device(map, vx_entry_lower(old)));
    int answer = VX_DONE;
    for (uint64_t at = 0; at < size && answer == VX_DONE && request->result == 0; at += piece) {
        uint64_t n = from + at >= end ? 0 : end - from - at < piece ? end - from - at : piece;
        uint64_t written = size - at < piece ? size - at : piece;
        memset(buffer + n, 0, piece - n);
        if (n > 0)
            answer = vx_map_lower(map, request, VX_READ, flags, vx_entry_lower(old), from + at,
                                     n, buffer);
        vx_request_follow(request);
        if (answer == VX_DONE && request->result == 0)
            answer = vx_map_lower(map, request, VX_WRITE, flags, target, to + at, written,
                                  buffer);
        vx_request_follow(request);
    }
    free(buffer);
    return answer;
}

/* The space that `page` gets next. False: there is none. */
static bool next_grant_locked(const vx_map *map, uint64_t page, vx_grant_entry *grant)
{
    if (map->flags & VX_MAP_IDENTITY) {
        if (!vx_map_may_name_locked(map, vx_entry(VX_DATA, 0, 0, 0)))
            return false;
        *grant = (vx_grant_entry){vx_entry(VX_DATA, 0, page << map->page_shift, 0), true};
        return true;
    }
    if (map->grant_count > 0)
        *grant = map->grants[map->grant_head];
    return map->grant_count > 0;
}

static void take_grant_locked(vx_map *map)
{
    if (map->flags & VX_MAP_IDENTITY)
        return;
    map->grant_head = (map->grant_head + 1) % map->grant_capacity;
    map->grant_count--;
    vx_map_refill_locked(map);
}

static void return_grant_locked(vx_map *map, vx_grant_entry grant)
{
    if (map->flags & VX_MAP_IDENTITY)
        return;
    /* There is room: the grant came from this ring, and vx_map_grant leaves room for returned
     * grants. */
    map->grant_head = (map->grant_head + map->grant_capacity - 1) % map->grant_capacity;
    map->grants[map->grant_head] = grant;
    map->grant_count++;
}

static void clear_busy_locked(vx_map *map, uint64_t page)
{
    for (uint32_t i = 0; i < map->busy_count; i++)
        if (map->busy[i] == page) {
            map->busy[i] = map->busy[--map->busy_count];
            map->busy_lowers[i] = map->busy_lowers[map->busy_count];
            break;
        }
    pthread_cond_broadcast(&map->changed);
}

/* Fills and publishes while the page is busy. Entered and left with the lock held. */
static enum step fill_and_publish_locked(vx_map *map, vx_request *request, uint64_t page,
                                         uint64_t old, vx_grant_entry grant, int *answer)
{
    map->busy_lowers[map->busy_count] = vx_entry_lower(grant.entry);
    map->busy[map->busy_count++] = page;
    pthread_mutex_unlock(&map->lock);
    request->result = VX_OK;
    /* The page may have become shared just now. Wait for writes that began before that, because the
     * copy must include them. */
    if (vx_entry_kind(old) == VX_SHARED && !vx_mutated(map, VX_NO_QUIESCE_SHARED))
        vx_epoch_quiesce(&map->epochs);
    *answer = fill_page(map, request, old, grant.entry);
    bool filled = *answer == VX_DONE && request->result == VX_OK;
    pthread_mutex_lock(&map->lock);
    if (filled && !vx_published_reserve(&map->published, 1)) {
        vx_fail(&map->device, request, VX_E_NOMEM, 0, request->offset);
        filled = false;
    }
    if (filled) {
        vx_map_publish_locked(map, page, grant.entry);
    } else {
        grant.stale = true;
        return_grant_locked(map, grant);
    }
    clear_busy_locked(map, page);
    return filled ? STEP_RETRY : STEP_ANSWER;
}

/* Allocates space for a page that has none of its own. */
static enum step allocate(vx_map *map, vx_request *request, uint64_t page, int *answer)
{
    enum step step = STEP_RETRY;
    vx_grant_entry grant;
    *answer = VX_DONE;
    pthread_mutex_lock(&map->lock);
    bool nowait = request->flags & VX_NOWAIT;
    bool busy = (vx_map_is_busy_locked(map, page) && !vx_mutated(map, VX_NO_BUSY_WAIT)) ||
                map->busy_count == VX_BUSY_PAGES;
    uint64_t old = vx_map_entry(map, page);
    bool wanted = vx_entry_kind(old) == VX_HOLE || vx_entry_kind(old) == VX_SHARED;
    if (map->closing || vx_device_state(&map->device) != 0) {
        int state = vx_device_state(&map->device);
        vx_fail(&map->device, request, state == 0 ? VX_E_CLOSED : state, 0, request->offset);
        step = STEP_ANSWER;
    } else if (busy) {
        if (nowait) {
            *answer = VX_AGAIN;
            step = STEP_ANSWER;
        } else {
            pthread_cond_wait(&map->changed, &map->lock);
        }
    } else if (!wanted) {
        /* another thread changed the entry: read it again */
    } else if (!next_grant_locked(map, page, &grant)) {
        *answer = vx_map_fault(map, request, VX_FAULT_GRANT, page, 1);
        step = STEP_ANSWER;
    } else if (!vx_published_reserve(&map->published, 1)) {
        vx_fail(&map->device, request, VX_E_NOMEM, 0, request->offset);
        step = STEP_ANSWER;
    } else {
        bool mix = vx_entry_kind(old) == VX_SHARED && map->sector_shift != 0 &&
                   vx_entry_lower(old) == map->parent;
        bool fill = !mix && (grant.stale || vx_entry_kind(old) == VX_SHARED);
        uint64_t mixed = mix ? vx_map_mix_locked(map, page, grant.entry) : 0;
        if (mix && mixed == 0) {
            vx_fail(&map->device, request, VX_E_NOMEM, 0, request->offset);
            step = STEP_ANSWER;
        } else if (fill && nowait) {
            *answer = VX_AGAIN;
            step = STEP_ANSWER;
        } else {
            take_grant_locked(map);
            if (fill)
                step = fill_and_publish_locked(map, request, page, old, grant, answer);
            else
                vx_map_publish_locked(map, page, mix ? mixed : grant.entry);
            vx_map_commit_in_background_locked(map);
        }
    }
    pthread_mutex_unlock(&map->lock);
    return step;
}

/* Changes a page that is stored here, inside the epoch in which `entry` was loaded. */
static int change_placed(vx_map *map, vx_request *request, uint64_t page, uint64_t entry, uint64_t at,
                         uint64_t length)
{
    uint64_t within = at - (page << map->page_shift);
    uint32_t flags = request->flags;
    bool writes = request->operation == VX_WRITE;
    if (request->operation == VX_ZERO && (map->flags & VX_MAP_IN_PLACE))
        flags |= VX_NO_HOLE;
    if ((flags & VX_FUA) && !vx_can_fua(vx_map_lower_device(map, vx_entry_lower(entry)))) {
        flags &= ~(uint32_t)VX_FUA;
        map_frame_of(request)->stage = STAGE_BUFFERED;
    }
    vx_map_note_change(map, page, within, length);
    if (vx_entry_kind(entry) == VX_MIXED)
        return vx_map_change_mixed(map, request, page, entry, at, length, flags);
    return vx_map_lower(map, request, request->operation, flags, vx_entry_lower(entry),
                        vx_entry_offset(entry) + within, length,
                        writes ? request->buffer + (at - request->offset) : NULL);
}

/* One page's part of a change. The entry is loaded and used inside one epoch. */
static enum step change_segment(vx_map *map, vx_request *request, uint64_t page, uint64_t at,
                                uint64_t length, uint64_t end, int *answer)
{
    bool trims = request->operation == VX_TRIM;
    bool stores = request->operation == VX_WRITE ||
                  (request->operation == VX_ZERO && (request->flags & VX_NO_HOLE));
    uint32_t slot = vx_epoch_enter(&map->epochs, request->epoch_slot);
    uint64_t entry = vx_map_entry(map, page);
    enum vx_kind kind = vx_entry_kind(entry);
    bool watched = entry & VX_ENTRY_WATCHED;
    /* A trim may leave the data of a partly stored page. */
    bool placed = kind == VX_DATA || (kind == VX_MIXED && !trims);
    bool is_open = vx_map_open_inside(map, request);
    if (is_open && placed && !watched)
        *answer = change_placed(map, request, page, entry, at, length);
    vx_epoch_leave(&map->epochs, slot);
    if (!is_open)
        return STEP_ANSWER;
    if (watched && placed) { /* whoever copies the page must know before it changes */
        vx_map_unwatch(map, page, entry);
        return STEP_RETRY;
    }
    switch (kind) {
    case VX_DATA:
    case VX_MIXED:
        return *answer != VX_DONE || request->result != 0 ? STEP_ANSWER : STEP_DONE;
    case VX_HOLE:
        return stores ? allocate(map, request, page, answer) : STEP_DONE;
    case VX_SHARED:
        /* A trim may leave the data; any other change needs space of its own. */
        return trims ? STEP_DONE : allocate(map, request, page, answer);
    case VX_ASK:
    default:
        *answer = vx_map_fault_load(map, request, at, end);
        return STEP_ANSWER;
    }
}

static int finish_change(vx_map *map, vx_request *request, bool direct)
{
    if (!(request->flags & VX_FUA))
        return VX_DONE;
    if (direct && map_frame_of(request)->stage != STAGE_BUFFERED &&
        atomic_load(&map->dirty_generation) == atomic_load(&map->committed_generation))
        return VX_DONE;
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    map_frame_of(request)->stage = STAGE_FLUSH;
    return vx_map_flush(map, request);
}

static int change_segments(vx_map *map, vx_request *request, uint64_t from, uint64_t end)
{
    for (uint64_t at = from; at < end;) {
        uint64_t page = at >> map->page_shift, stop = (page + 1) << map->page_shift;
        uint64_t length = (stop < end ? stop : end) - at;
        int answer = VX_DONE;
        enum step step = change_segment(map, request, page, at, length, end, &answer);
        if (step == STEP_ANSWER)
            return answer;
        if (step == STEP_RETRY)
            continue;
        at += length;
        if (request->operation == VX_WRITE)
            request->done += length;
    }
    return VX_DONE;
}

static bool gate_closed(vx_map *map)
{
    return !atomic_load_explicit(&map->gate_open, memory_order_acquire);
}

int vx_map_write(vx_map *map, vx_request *request)
{
    if (map_frame_of(request)->stage == STAGE_FLUSH)
        return vx_map_flush(map, request);
    if (gate_closed(map))
        return vx_map_fault(map, request, VX_FAULT_GATE, 0, 0);
    uint32_t flags = request->flags;
    if ((flags & VX_FUA) && (flags & VX_NOWAIT))
        return VX_AGAIN;
    bool direct = (flags & VX_FUA) && map_frame_of(request)->stage != STAGE_BUFFERED &&
                  atomic_load(&map->dirty_generation) == atomic_load(&map->committed_generation);
    if ((flags & VX_FUA) && !direct)
        map_frame_of(request)->stage = STAGE_BUFFERED;
    request->result = VX_OK;
    if (!direct)
        request->flags &= ~(uint32_t)VX_FUA; /* the flush at the end covers the data */
    int answer = change_segments(map, request, request->offset + request->done,
                                 request->offset + request->length);
    request->flags = flags;
    if (answer != VX_DONE || request->result != 0)
        return answer;
    vx_map_count(map, request);
    return finish_change(map, request, direct);
}

static bool in_memo(const vx_map *map, const vx_request *request, uint64_t first, uint64_t count)
{
    const vx_memo *memo = request->memo;
    for (uint32_t i = 0; memo != NULL && i < memo->count; i++)
        if (memo->ranges[i].device == &map->device && memo->ranges[i].first == first &&
            memo->ranges[i].count == count)
            return true;
    return false;
}

int vx_map_zero_or_trim(vx_map *map, vx_request *request)
{
    uint64_t start = request->offset, end = start + request->length;
    uint64_t mask = vx_page_size(map) - 1, size = vx_device_size(&map->device);
    bool keeps = (map->flags & (VX_MAP_IN_PLACE | VX_MAP_TRANSPARENT)) ||
                 (request->flags & VX_NO_HOLE);
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    if (map_frame_of(request)->stage == STAGE_FLUSH)
        return vx_map_flush(map, request);
    request->result = VX_OK;
    if (request->operation == VX_TRIM && (map->flags & VX_MAP_IN_PLACE))
        return finish_change(map, request, false);
    if (gate_closed(map))
        return vx_map_fault(map, request, VX_FAULT_GATE, 0, 0);
    /* The owner handles whole pages, including the last page of the device if it is shorter. */
    uint64_t first = (start + mask) >> map->page_shift;
    uint64_t past = (end == size ? end + mask : end) >> map->page_shift;
    if (keeps || past <= first)
        past = first = 0;
    else if (!in_memo(map, request, first, past - first)) {
        vx_map_fault(map, request, VX_FAULT_RANGE, first, past - first);
        request->fault.size = size;
        return VX_FAULTED;
    }
    uint32_t flags = request->flags;
    request->flags &= ~(uint32_t)VX_FUA;
    uint64_t head_end = past > 0 ? first << map->page_shift : end;
    int answer = change_segments(map, request, start, head_end);
    if (answer == VX_DONE && request->result == 0 && past > 0 && past << map->page_shift < end)
        answer = change_segments(map, request, past << map->page_shift, end);
    request->flags = flags;
    if (answer != VX_DONE || request->result != 0)
        return answer;
    return finish_change(map, request, false);
}
