/* SPDX-License-Identifier: MIT */
#include "core/extents.h"
#include "core/run.h"
#include "map/map_internal.h"

/* Reads from a lower device; bytes past its end read as zeros. */
static int read_lower(vx_map *map, vx_request *request, uint32_t lower, uint64_t lower_offset,
                      uint64_t offset, uint64_t length)
{
    vx_device *device = vx_map_lower_device(map, lower);
    uint64_t size = vx_device_size(device);
    uint64_t present = lower_offset >= size             ? 0
                       : size - lower_offset < length ? size - lower_offset
                                                      : length;
    if (present > 0) {
        vx_request child;
        vx_request_child(&child, request, VX_READ, lower_offset, present,
                         request->buffer + (offset - request->offset));
        int answer = vx_call(device, &child);
        if (answer == VX_FAULTED)
            request->fault = child.fault;
        if (answer != VX_DONE)
            return answer;
        vx_request_adopt(request, &child);
        if (child.result != 0)
            return VX_DONE;
    }
    if (present < length)
        vx_read_hole(request, offset + present, length - present);
    return VX_DONE;
}

static int read_mixed(vx_map *map, vx_request *request, uint64_t page, uint64_t entry, uint64_t at,
                      uint64_t length)
{
    uint64_t base = page << map->page_shift, within = at - base, stop = within + length;
    while (within < stop) {
        bool stored;
        uint64_t end = vx_mixed_run(map, page, within, stop, &stored);
        if (!stored && map->parent == VX_MAP_NO_PARENT)
            return vx_fail(&map->device, request, VX_E_MISSING_PARENT, 0, base + within);
        int answer = stored ? read_lower(map, request, vx_entry_lower(entry),
                                         vx_entry_offset(entry) + within, base + within,
                                         end - within)
                            : read_lower(map, request, map->parent, base + within, base + within,
                                         end - within);
        if (answer != VX_DONE || request->result != 0)
            return answer;
        within = end;
    }
    return VX_DONE;
}

static int read_segment(vx_map *map, vx_request *request, uint64_t page, uint64_t at,
                        uint64_t length, bool *asks)
{
    uint64_t entry = vx_map_entry(map, page), within = at - (page << map->page_shift);
    if (!vx_map_open_inside(map, request))
        return VX_DONE;
    switch (vx_entry_kind(entry)) {
    case VX_HOLE:
        vx_read_hole(request, at, length);
        return VX_DONE;
    case VX_DATA:
    case VX_SHARED:
        return read_lower(map, request, vx_entry_lower(entry), vx_entry_offset(entry) + within, at,
                          length);
    case VX_MIXED:
        return read_mixed(map, request, page, entry, at, length);
    case VX_ASK:
    default:
        *asks = true;
        return VX_DONE;
    }
}

int vx_map_read(vx_map *map, vx_request *request)
{
    uint64_t end = request->offset + request->length;
    request->result = VX_OK;
    vx_forget_holes_after(request, request->offset + request->done);
    while (request->done < request->length) {
        uint64_t at = request->offset + request->done, page = at >> map->page_shift;
        uint64_t stop = (page + 1) << map->page_shift;
        uint64_t length = (stop < end ? stop : end) - at;
        bool asks = false;
        uint32_t slot = vx_epoch_enter(&map->epochs, request->epoch_slot);
        int answer = read_segment(map, request, page, at, length, &asks);
        vx_epoch_leave(&map->epochs, slot);
        if (asks)
            return vx_map_fault_load(map, request, at, end);
        if (answer != VX_DONE || request->result != 0)
            return answer;
        request->done += length;
    }
    vx_map_count(map, request);
    return VX_DONE;
}

/* The extents of a lower device's range, moved to this device's offsets. *full: no room for all. */
static int extents_of_lower(vx_map *map, vx_request *request, uint32_t lower, uint64_t from,
                            uint64_t offset, uint64_t length, int32_t depth, bool *full)
{
    uint64_t size = vx_device_size(vx_map_lower_device(map, lower));
    uint64_t present = from >= size ? 0 : size - from < length ? size - from : length;
    for (uint64_t at = 0; at < present && !*full;) {
        vx_extent found[64];
        vx_request child;
        vx_request_child(&child, request, VX_EXTENTS, from + at, present - at, NULL);
        child.extents = found;
        child.extent_capacity = 64;
        child.depth = depth;
        int answer = vx_call(vx_map_lower_device(map, lower), &child);
        if (answer == VX_FAULTED)
            request->fault = child.fault;
        if (answer != VX_DONE || child.result != 0) {
            vx_request_adopt(request, &child);
            return answer;
        }
        uint64_t before = at;
        for (uint32_t i = 0; i < child.extent_count && at < present && !*full; i++) {
            uint64_t n = found[i].length < present - at ? found[i].length : present - at;
            *full = !vx_add_extent(request, offset + at, n, found[i].state, found[i].depth);
            at += n;
        }
        if (at == before && !*full) /* the device reported no extent of its range */
            return vx_fail(&map->device, request, VX_E_INVALID, 0, offset + at);
    }
    if (!*full && present < length)
        *full = !vx_add_extent(request, offset + present, length - present, VX_EXTENT_HOLE, -1);
    return VX_DONE;
}

static int extents_of_mixed(vx_map *map, vx_request *request, uint64_t page, uint64_t at,
                            uint64_t length, bool *full)
{
    uint64_t base = page << map->page_shift, within = at - base, stop = within + length;
    while (within < stop && !*full) {
        bool stored;
        uint64_t end = vx_mixed_run(map, page, within, stop, &stored);
        int answer = VX_DONE;
        if (stored)
            *full = !vx_add_extent(request, base + within, end - within, VX_EXTENT_DATA,
                                request->depth);
        else if (map->parent == VX_MAP_NO_PARENT)
            *full = !vx_add_extent(request, base + within, end - within, VX_EXTENT_HOLE, -1);
        else
            answer = extents_of_lower(map, request, map->parent, base + within, base + within,
                                      end - within, request->depth + 1, full);
        if (answer != VX_DONE || request->result != 0)
            return answer;
        within = end;
    }
    return VX_DONE;
}

static int extents_of_page(vx_map *map, vx_request *request, uint64_t page, uint64_t at,
                           uint64_t length, bool *asks, bool *full)
{
    uint64_t entry = vx_map_entry(map, page);
    if (!vx_map_open_inside(map, request))
        return VX_DONE;
    bool zero = vx_entry_tag(entry) & VX_TAG_ZERO;
    switch (vx_entry_kind(entry)) {
    case VX_HOLE:
        *full = !vx_add_extent(request, at, length, zero ? VX_EXTENT_ZERO : VX_EXTENT_HOLE,
                            zero ? request->depth : -1);
        return VX_DONE;
    case VX_DATA:
        if (map->flags & VX_MAP_TRANSPARENT)
            return extents_of_lower(map, request, vx_entry_lower(entry),
                                    vx_entry_offset(entry) + (at - (page << map->page_shift)), at,
                                    length, request->depth, full);
        *full = !vx_add_extent(request, at, length, VX_EXTENT_DATA, request->depth);
        return VX_DONE;
    case VX_SHARED:
        return extents_of_lower(map, request, vx_entry_lower(entry),
                                vx_entry_offset(entry) + (at - (page << map->page_shift)), at,
                                length, request->depth + 1, full);
    case VX_MIXED:
        return extents_of_mixed(map, request, page, at, length, full);
    case VX_ASK:
    default:
        *asks = true;
        return VX_DONE;
    }
}

int vx_map_extents(vx_map *map, vx_request *request)
{
    uint64_t end = request->offset + request->length;
    bool full = false;
    request->result = VX_OK;
    request->extent_count = 0;
    for (uint64_t at = request->offset; at < end && !full;) {
        uint64_t page = at >> map->page_shift, stop = (page + 1) << map->page_shift;
        uint64_t length = (stop < end ? stop : end) - at;
        bool asks = false;
        uint32_t slot = vx_epoch_enter(&map->epochs, request->epoch_slot);
        int answer = extents_of_page(map, request, page, at, length, &asks, &full);
        vx_epoch_leave(&map->epochs, slot);
        if (asks && request->extent_count > 0)
            break; /* a partial answer is valid; the caller asks for the rest */
        if (asks)
            return vx_map_fault_load(map, request, at, end);
        if (answer != VX_DONE || request->result != 0)
            return answer;
        at += length;
    }
    return VX_DONE;
}

int vx_map_submit(vx_device *device, vx_request *request)
{
    vx_map *map = (vx_map *)device;
    switch (request->operation) {
    case VX_READ:
        return vx_map_read(map, request);
    case VX_WRITE:
        return vx_map_write(map, request);
    case VX_ZERO:
    case VX_TRIM:
        return vx_map_zero_or_trim(map, request);
    case VX_FLUSH:
        return vx_map_flush(map, request);
    case VX_EXTENTS:
        return vx_map_extents(map, request);
    default:
        return vx_fail(device, request, VX_E_INVALID, 0, request->offset);
    }
}
