/* SPDX-License-Identifier: MIT */
#include "array/layout_internal.h"

#include "core/extents.h"
#include "core/fan.h"
#include "core/run.h"
#include "core/units.h"

/* What a read of a part uses. */
typedef struct source {
    bool is_hole;
    uint32_t disk;
    vx_device *leaf; /* NULL: no copy is left */
    uint64_t place;  /* bytes, on the leaf */
} source;

/* Inside an epoch. Prefers disks that have not failed, then the one that is free first by its model, then
 * that with the fewest requests under way; else copies take turns, a MiB each. */
static source choose(vx_layout *layout, const vx_part *part)
{
    uint32_t slots = layout->slots, member = part->column * slots;
    uint32_t turn = layout->terms.copies == 1 ? 0 : (uint32_t)((part->within >> 20) % slots);
    uint64_t best[3] = {UINT64_MAX, UINT64_MAX, UINT64_MAX};
    source found = {.is_hole = true};
    for (uint32_t i = 0; i < slots; i++) {
        uint64_t entry = vx_layout_entry(layout, part->row, member + (turn + i) % slots);
        enum vx_kind kind = vx_entry_kind(entry);
        found.is_hole &= kind == VX_HOLE || kind == VX_ASK;
        vx_device *leaf = vx_layout_leaf(layout, entry, false);
        if (leaf == NULL)
            continue;
        vx_layout_disk *disk = vx_disk_of(layout, entry);
        uint64_t cost[3] = {atomic_load_explicit(&disk->suspect, memory_order_acquire),
                            atomic_load_explicit(&disk->busy_until_ns, memory_order_relaxed),
                            atomic_load_explicit(&disk->under_way, memory_order_relaxed)};
        uint32_t k = 0;
        while (k < 2 && cost[k] == best[k])
            k++;
        if (found.leaf != NULL && cost[k] >= best[k])
            continue;
        found = (source){.disk = vx_entry_lower(entry),
                         .leaf = leaf,
                         .place = vx_entry_offset(entry) + part->within};
        best[0] = cost[0];
        best[1] = cost[1];
        best[2] = cost[2];
    }
    return found;
}

static int fail_without_copy(vx_layout *layout, vx_request *request, const vx_part *part)
{
    return vx_fail(&layout->device, request, VX_E_IO, 0, part->at);
}

/* Reads one part from one copy. */
static int read_part(vx_layout *layout, vx_request *request, const vx_part *part)
{
    source from = choose(layout, part);
    uint8_t *buffer = request->buffer + (part->at - request->offset);
    if (from.is_hole) {
        vx_read_hole(request, part->at, part->length);
        return VX_DONE;
    }
    if (from.leaf == NULL)
        return fail_without_copy(layout, request, part);
    vx_request child;
    vx_request_child(&child, request, VX_READ, from.place, part->length, buffer);
    vx_layout_disk *disk = &layout->disks[from.disk];
    uint64_t began = vx_disk_begin(disk, false);
    int answer = vx_call(from.leaf, &child);
    vx_disk_end(disk, &child, began);
    if (answer != VX_DONE)
        return answer;
    if (child.result != 0)
        return vx_layout_fail_member(layout, request, part->row, from.disk, from.leaf,
                                     &child);
    vx_request_adopt(request, &child);
    return VX_DONE;
}

/* Reads several parts at once. */
static int read_parts(vx_layout *layout, vx_request *request, const vx_part *parts, uint32_t count)
{
    vx_fan *fan = vx_fan_begin(count);
    uint32_t disks[VX_PARTS], added = 0;
    uint64_t rows[VX_PARTS], began[VX_PARTS];
    vx_request *children[VX_PARTS];
    vx_device *leaves[VX_PARTS];
    int answer = VX_DONE;
    if (fan == NULL)
        return vx_fail(&layout->device, request, VX_E_NOMEM, 0, request->offset);
    for (uint32_t i = 0; i < count && answer == VX_DONE && request->result == 0; i++) {
        source from = choose(layout, &parts[i]);
        if (from.is_hole) {
            vx_read_hole(request, parts[i].at, parts[i].length);
            continue;
        }
        if (from.leaf == NULL) {
            answer = fail_without_copy(layout, request, &parts[i]);
            continue;
        }
        disks[added] = from.disk;
        leaves[added] = from.leaf;
        rows[added] = parts[i].row;
        began[added] = vx_disk_begin(&layout->disks[from.disk], false);
        children[added++] = vx_fan_add(fan, request, from.leaf, VX_READ, from.place, parts[i].length,
                                       request->buffer + (parts[i].at - request->offset));
    }
    bool runs = answer == VX_DONE && request->result == 0;
    if (runs)
        vx_fan_run(fan, layout->pool, added);
    for (uint32_t i = 0; i < added; i++)
        vx_disk_end(&layout->disks[disks[i]], children[i], began[i]);
    for (uint32_t i = 0; i < added && runs && answer == VX_DONE; i++)
        if (children[i]->result != 0)
            answer = vx_layout_fail_member(layout, request, rows[i], disks[i], leaves[i],
                                           children[i]);
    if (runs && answer == VX_DONE)
        vx_fan_adopt(fan, request);
    vx_fan_end(fan);
    return answer;
}

/* The parts of a read from `at` on, at most VX_PARTS; their total length in *length. */
static uint32_t parts_of(vx_layout *layout, uint64_t at, uint64_t end, vx_part *parts,
                         uint64_t *length)
{
    uint32_t count = 0;
    *length = 0;
    for (; at < end && count < VX_PARTS; at += parts[count++].length) {
        parts[count] = vx_layout_part(layout, at, end);
        *length += parts[count].length;
    }
    return count;
}

static bool is_busy(vx_layout *layout, const vx_span *spans, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        for (uint64_t k = 0; k < spans[i].count; k++)
            if (vx_ranges_is_busy(layout->ranges, spans[i].first + k))
                return true;
    return false;
}

/* Reads parts while nobody changes them. A change that begins during the read does no harm: a read that
 * begins after this one waits for it. */
static int read_settled(vx_layout *layout, vx_request *request, const vx_part *parts,
                        uint32_t count)
{
    vx_span spans[VX_PARTS];
    bool held = false;
    bool waits = atomic_load(&layout->locks); /* there may be several copies */
    for (uint32_t i = 0; waits && i < count; i++)
        spans[i] = vx_layout_span(layout, &parts[i]);
    if (waits && is_busy(layout, spans, count)) {
        if (request->flags & VX_NOWAIT)
            return VX_AGAIN;
        held = vx_ranges_enter(layout->ranges, spans, count, false, false);
    }
    uint32_t slot = vx_epoch_enter(&layout->epochs, request->epoch_slot);
    int answer = VX_AGAIN;
    if (!vx_layout_is_open(layout, request))
        answer = VX_DONE;
    else if (waits || !atomic_load(&layout->locks))
        answer = count == 1 ? read_part(layout, request, &parts[0])
                            : read_parts(layout, request, parts, count);
    vx_epoch_leave(&layout->epochs, slot);
    if (held)
        vx_ranges_leave(layout->ranges, spans, count, false);
    return answer;
}

int vx_layout_read(vx_layout *layout, vx_request *request)
{
    uint64_t end = request->offset + request->length;
    bool nowait = request->flags & VX_NOWAIT;
    request->result = VX_OK;
    vx_forget_holes_after(request, request->offset + request->done);
    if (nowait && layout->terms.delayed)
        return VX_AGAIN;
    while (request->done < request->length) {
        vx_part parts[VX_PARTS];
        uint64_t length, at = request->offset + request->done;
        uint32_t count = parts_of(layout, at, end, parts, &length);
        if (count > 1 && (nowait || length <= VX_QUICK_BYTES)) { /* not worth another thread */
            count = 1;
            length = parts[0].length;
        }
        int answer = read_settled(layout, request, parts, count);
        if (answer == VX_AGAIN && !nowait)
            continue;
        if (answer != VX_DONE || request->result != 0)
            return answer;
        request->done += length;
    }
    return VX_DONE;
}

/* The extents of one part, from one copy. *full: no room for all. */
static int extents_of_part(vx_layout *layout, vx_request *request, const vx_part *part, bool *full)
{
    source from = choose(layout, part);
    if (from.is_hole) {
        *full = !vx_add_extent(request, part->at, part->length, VX_EXTENT_HOLE, -1);
        return VX_DONE;
    }
    if (from.leaf == NULL) { /* no copy can say; the read will */
        *full = !vx_add_extent(request, part->at, part->length, VX_EXTENT_DATA, request->depth);
        return VX_DONE;
    }
    for (uint64_t at = 0; at < part->length && !*full;) {
        vx_extent found[16];
        vx_request child;
        vx_request_child(&child, request, VX_EXTENTS, from.place + at, part->length - at, NULL);
        child.extents = found;
        child.extent_capacity = 16;
        int answer = vx_call(from.leaf, &child);
        if (answer != VX_DONE || child.result != 0 || child.extent_count == 0) {
            if (answer == VX_DONE)
                *full = !vx_add_extent(request, part->at + at, part->length - at, VX_EXTENT_DATA,
                                       request->depth);
            return answer;
        }
        for (uint32_t i = 0; i < child.extent_count && at < part->length && !*full; i++) {
            uint64_t rest = part->length - at;
            uint64_t n = found[i].length < rest ? found[i].length : rest;
            *full = !vx_add_extent(request, part->at + at, n, found[i].state, found[i].depth);
            at += n;
        }
    }
    return VX_DONE;
}

int vx_layout_extents(vx_layout *layout, vx_request *request)
{
    uint64_t end = request->offset + request->length;
    bool full = false;
    request->result = VX_OK;
    request->extent_count = 0;
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    for (uint64_t at = request->offset; at < end && !full;) {
        vx_part part = vx_layout_part(layout, at, end);
        uint32_t slot = vx_epoch_enter(&layout->epochs, request->epoch_slot);
        int answer = extents_of_part(layout, request, &part, &full);
        vx_epoch_leave(&layout->epochs, slot);
        if (answer != VX_DONE)
            return answer;
        at += part.length;
    }
    return VX_DONE;
}
