/* SPDX-License-Identifier: MIT */
#include "array/layout_internal.h"

#include <stdlib.h>
#include <string.h>

#include "core/fan.h"
#include "core/run.h"
#include "core/units.h"

/* A change of one member: a child of the request. */
typedef struct target {
    uint16_t part;
    bool in_step; /* DATA; else STALE */
    uint32_t disk;
    vx_device *leaf;
    uint64_t place;
    int32_t result;
} target;

/* What is done at once, under range locks and inside an epoch. */
typedef struct change {
    vx_layout *layout;
    vx_request *request;
    uint32_t operation, flags; /* of the children */
    vx_part parts[VX_PARTS];
    uint32_t part_count;
    uint32_t target_count;
    target targets[VX_PARTS * VX_LAYOUT_SLOTS];
} change;

static int fault_row(vx_layout *layout, vx_request *request, uint64_t row)
{
    request->fault = (vx_fault){.device = &layout->device,
                                .kind = VX_FAULT_ROW,
                                .operation = request->operation,
                                .first = row,
                                .count = 1};
    return VX_FAULTED;
}

/* Whether changes of a row with slabs are allowed; notes that it is changed. Simple rows need no mark. */
static bool is_marked(vx_layout *layout, uint64_t row)
{
    uint8_t mark = atomic_load(&layout->marks[row]);
    if (layout->terms.copies > 1 && !(mark & VX_MARKED))
        return false;
    if (!(mark & VX_CHANGED))
        atomic_fetch_or(&layout->marks[row], VX_CHANGED);
    return true;
}

/* Lists the members that a part changes. False: no copy is left, and the request has failed. */
static bool add_targets(change *c, uint16_t index)
{
    vx_layout *layout = c->layout;
    const vx_part *part = &c->parts[index];
    bool is_stored = false;
    for (uint32_t i = 0; i < layout->slots; i++) {
        uint64_t entry = vx_layout_entry(layout, part->row, part->column * layout->slots + i);
        vx_device *leaf = vx_layout_leaf(layout, entry, true);
        if (leaf == NULL)
            continue;
        bool in_step = vx_entry_kind(entry) == VX_DATA;
        is_stored |= in_step;
        c->targets[c->target_count++] =
            (target){.part = index,
                     .in_step = in_step,
                     .disk = vx_entry_lower(entry),
                     .leaf = leaf,
                     .place = vx_entry_offset(entry) + part->within};
    }
    if (!is_stored)
        vx_fail(&layout->device, c->request, VX_E_IO, 0, c->request->offset);
    return is_stored;
}

static uint8_t *data_of(const change *c, const target *t)
{
    const vx_part *part = &c->parts[t->part];
    return c->operation == VX_WRITE ? c->request->buffer + (part->at - c->request->offset) : NULL;
}

/* One member after the other, on this thread. With NOWAIT only the first may answer AGAIN: nothing has
 * changed then. The copies must not differ when the range locks are given back. */
static int change_in_turn(change *c)
{
    for (uint32_t i = 0; i < c->target_count; i++) {
        target *t = &c->targets[i];
        vx_layout_disk *disk = &c->layout->disks[t->disk];
        vx_request child;
        vx_request_child(&child, c->request, c->operation, t->place, c->parts[t->part].length,
                         data_of(c, t));
        child.flags = i == 0 ? c->flags : c->flags & ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
        uint64_t began = vx_disk_begin(disk, true);
        int answer = vx_call(t->leaf, &child);
        vx_disk_end(disk, &child, began);
        if (answer != VX_DONE)
            return answer;
        t->result = child.result;
        vx_request_adopt(c->request, &child);
    }
    return VX_DONE;
}

static int change_at_once(change *c)
{
    vx_fan *fan = vx_fan_begin(c->target_count);
    vx_request *children[VX_PARTS * VX_LAYOUT_SLOTS];
    uint64_t began[VX_PARTS * VX_LAYOUT_SLOTS];
    if (fan == NULL)
        return vx_fail(&c->layout->device, c->request, VX_E_NOMEM, 0, c->request->offset);
    for (uint32_t i = 0; i < c->target_count; i++) {
        const target *t = &c->targets[i];
        began[i] = vx_disk_begin(&c->layout->disks[t->disk], true);
        children[i] = vx_fan_add(fan, c->request, t->leaf, c->operation, t->place,
                                 c->parts[t->part].length, data_of(c, t));
        children[i]->flags = c->flags & ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    }
    vx_fan_run(fan, c->layout->pool, c->target_count);
    vx_fan_adopt(fan, c->request);
    for (uint32_t i = 0; i < c->target_count; i++) {
        target *t = &c->targets[i];
        vx_disk_end(&c->layout->disks[t->disk], children[i], began[i]);
        t->result = children[i]->result;
        if (t->result != 0)
            c->request->failure = children[i]->failure;
    }
    vx_fan_end(fan);
    return VX_DONE;
}

/* Whether a failure says nothing about the disk: it has no space, or the host no memory. */
static bool is_soft(const target *t)
{
    bool usable = vx_device_state(t->leaf) == 0;
    return t->result == VX_E_NOMEM || t->result == VX_E_UNSUPPORTED ||
           (t->result == VX_E_NOSPACE && usable && t->in_step);
}

static bool failed_hard(const target *t)
{
    return t->result != 0 && !is_soft(t);
}

static int move_block(const target *from, const target *to, uint64_t at, uint64_t length,
                      uint8_t *buffers)
{
    vx_failure failure;
    int result = vx_transfer(from->leaf, VX_READ, 0, buffers, length, from->place + at, &failure);
    if (result == VX_OK)
        result = vx_transfer(to->leaf, VX_READ, 0, buffers + VX_LAYOUT_BLOCK, length,
                             to->place + at, &failure);
    if (result != VX_OK || memcmp(buffers, buffers + VX_LAYOUT_BLOCK, length) == 0)
        return result; /* it needs no space */
    return vx_transfer(to->leaf, VX_WRITE, 0, buffers, length, to->place + at, &failure);
}

/* Makes one block of the copies of a part equal, to whichever content has room on all of them. */
static target *equalise_block(change *c, uint16_t part, uint64_t at, uint64_t length)
{
    uint8_t buffers[2 * VX_LAYOUT_BLOCK];
    target *lacking = NULL;
    for (uint32_t i = 0; i < c->target_count; i++) {
        const target *from = &c->targets[i];
        bool all = from->part == part && from->in_step && !failed_hard(from);
        for (uint32_t k = 0; all && k < c->target_count; k++) {
            target *to = &c->targets[k];
            if (to->part != part || to == from || failed_hard(to))
                continue;
            int result = move_block(from, to, at, length, buffers);
            if (result != VX_OK) {
                all = false;
                lacking = to;
            }
        }
        if (all)
            return NULL;
    }
    return lacking;
}

/* A copy that found no space has the old content, or a part of the new. NULL: all are equal again. */
static target *equalise(change *c, uint16_t part)
{
    uint64_t length = c->parts[part].length;
    for (uint64_t at = 0; at < length; at += VX_LAYOUT_BLOCK) {
        uint64_t n = length - at < VX_LAYOUT_BLOCK ? length - at : VX_LAYOUT_BLOCK;
        target *lacking = equalise_block(c, part, at, n);
        if (lacking != NULL)
            return lacking;
    }
    return NULL;
}

/* Nobody reads it before the owner has taken it out: another copy may have the new content. */
static void suspect(change *c, const target *t)
{
    if (t->result != VX_E_NOSPACE) /* a slab that is being filled found no space */
        atomic_store(&c->layout->disks[t->disk].suspect, true);
}

static int fail_target(change *c, const target *t)
{
    vx_request child = {.operation = c->operation, .result = t->result};
    if (c->request->failure.code == t->result)
        child.failure = c->request->failure;
    return vx_layout_fail_member(c->layout, c->request, c->parts[t->part].row, t->disk,
                                 t->leaf, &child);
}

/* Makes copies equal that a soft failure left different; what fails meanwhile has failed hard. */
static int32_t settle(change *c)
{
    int32_t code = VX_OK;
    uint16_t settled = UINT16_MAX;
    for (uint32_t i = 0; i < c->target_count; i++) {
        const target *t = &c->targets[i];
        target *lacking;
        if (t->result == 0 || !is_soft(t))
            continue;
        code = t->result;
        if (t->part == settled)
            continue;
        settled = t->part;
        while ((lacking = equalise(c, t->part)) != NULL)
            lacking->result = VX_E_IO; /* it has neither the one content nor the other */
    }
    return code;
}

/* Answers the request when its children have ended. */
static int conclude(change *c)
{
    const target *hard = NULL;
    vx_failure failure = c->request->failure;
    int32_t soft = settle(c);
    for (uint32_t i = 0; i < c->target_count; i++) {
        const target *t = &c->targets[i];
        if (!failed_hard(t))
            continue;
        suspect(c, t);
        if (hard == NULL)
            hard = t;
    }
    c->request->failure = failure;
    if (hard != NULL)
        return fail_target(c, hard);
    if (soft == VX_OK)
        return vx_succeed(c->request);
    if (failure.code != soft)
        return vx_fail(&c->layout->device, c->request, soft, 0, c->request->offset);
    c->request->result = soft;
    return VX_DONE;
}

/* Inside an epoch and under range locks. */
static int change_inside(change *c)
{
    vx_request *request = c->request;
    bool stores = c->operation == VX_WRITE ||
                  (c->operation == VX_ZERO && (request->flags & VX_NO_HOLE));
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < c->part_count; i++) {
        const vx_part *part = &c->parts[i];
        if (vx_layout_is_hole(c->layout, part->row, part->column)) {
            if (stores)
                return fault_row(c->layout, request, part->row);
            continue; /* it reads zeros */
        }
        if (!is_marked(c->layout, part->row))
            return fault_row(c->layout, request, part->row);
        if (!add_targets(c, (uint16_t)i))
            return VX_DONE;
        bytes += part->length;
    }
    bool quick = c->operation == VX_WRITE && bytes <= VX_QUICK_BYTES && !(c->flags & VX_FUA);
    int answer = c->target_count <= 1 || quick || (request->flags & VX_NOWAIT)
                     ? change_in_turn(c)
                     : change_at_once(c);
    return answer != VX_DONE ? answer : conclude(c);
}

static int change_parts(change *c)
{
    vx_layout *layout = c->layout;
    vx_span spans[VX_PARTS];
    bool nowait = c->request->flags & VX_NOWAIT;
    for (;;) {
        bool locks = atomic_load(&layout->locks);
        for (uint32_t i = 0; locks && i < c->part_count; i++)
            spans[i] = vx_layout_span(layout, &c->parts[i]);
        if (locks && !vx_ranges_enter(layout->ranges, spans, c->part_count, true, nowait))
            return VX_AGAIN;
        c->target_count = 0;
        uint32_t slot = vx_epoch_enter(&layout->epochs, c->request->epoch_slot);
        bool is_current = locks || !atomic_load(&layout->locks);
        int answer = VX_DONE;
        if (is_current && vx_layout_is_open(layout, c->request))
            answer = change_inside(c);
        vx_epoch_leave(&layout->epochs, slot);
        if (locks)
            vx_ranges_leave(layout->ranges, spans, c->part_count, true);
        if (is_current)
            return answer;
    }
}

static int write_all(change *c)
{
    vx_request *request = c->request;
    uint64_t end = request->offset + request->length;
    while (request->done < request->length) {
        uint64_t at = request->offset + request->done;
        c->part_count = 0;
        while (at < end && c->part_count < VX_PARTS) {
            c->parts[c->part_count] = vx_layout_part(c->layout, at, end);
            at += c->parts[c->part_count++].length;
        }
        int answer = change_parts(c);
        if (answer != VX_DONE || request->result != 0)
            return answer;
        request->done = at - request->offset;
    }
    return vx_succeed(request);
}

/* Where in the slab of a column its first byte at or after `in_row` lies. */
static uint64_t first_within(const vx_layout *layout, uint32_t column, uint64_t in_row)
{
    uint64_t unit = in_row >> layout->interleave_shift, stripe = unit / layout->terms.columns;
    uint64_t at = unit - stripe * layout->terms.columns;
    uint64_t base = stripe << layout->interleave_shift;
    if (column == at)
        return base + (in_row & (layout->terms.interleave - 1));
    return column < at ? base + layout->terms.interleave : base;
}

/* A range is one run on each column, so a zero or trim is one child for each member of a row. */
static int change_range(change *c, uint64_t at, uint64_t end)
{
    const vx_layout *layout = c->layout;
    while (at < end) {
        uint64_t row = at / layout->row_bytes, base = row * layout->row_bytes;
        uint64_t stop = end - base < layout->row_bytes ? end - base : layout->row_bytes;
        c->part_count = 0;
        for (uint32_t column = 0; column < layout->terms.columns; column++) {
            uint64_t from = first_within(layout, column, at - base);
            uint64_t to = first_within(layout, column, stop);
            if (to > from)
                c->parts[c->part_count++] = (vx_part){row, column, from, to - from, 0};
        }
        int answer = change_parts(c);
        if (answer != VX_DONE || c->request->result != 0)
            return answer;
        at = base + stop;
    }
    return vx_succeed(c->request);
}

static bool in_memo(const vx_layout *layout, const vx_request *request, uint64_t first)
{
    const vx_memo *memo = request->memo;
    for (uint32_t i = 0; memo != NULL && i < memo->count; i++)
        if (memo->ranges[i].device == &layout->device && memo->ranges[i].first == first)
            return true;
    return false;
}

/* Whole rows of a thin layout are offered to the owner once. */
static bool offers_rows(vx_layout *layout, vx_request *request)
{
    uint64_t start = request->offset, end = start + request->length;
    uint64_t row_bytes = layout->row_bytes, size = vx_device_size(&layout->device);
    uint64_t first = start / row_bytes + (start % row_bytes != 0);
    uint64_t past = end / row_bytes + (end == size && end % row_bytes != 0);
    if (!layout->terms.thin || (request->flags & VX_NO_HOLE) || past <= first ||
        in_memo(layout, request, first))
        return false;
    request->fault = (vx_fault){.device = &layout->device,
                                .kind = VX_FAULT_RANGE,
                                .operation = request->operation,
                                .first = first,
                                .count = past - first,
                                .size = size};
    return true;
}

static int zero_or_trim(change *c)
{
    vx_request *request = c->request;
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    if (c->layout->terms.copies > 1) {
        if (request->flags & VX_FAST)
            return vx_fail(&c->layout->device, request, VX_E_UNSUPPORTED, 0, request->offset);
        c->operation = VX_ZERO;
    }
    if (offers_rows(c->layout, request))
        return VX_FAULTED;
    return change_range(c, request->offset, request->offset + request->length);
}

/* Whether every disk makes a write with FUA durable by itself. */
static bool all_can_fua(vx_layout *layout)
{
    for (uint32_t i = 0; i < atomic_load(&layout->disk_limit); i++) {
        const vx_device *leaf = atomic_load_explicit(&layout->disks[i].device, memory_order_acquire);
        if (leaf != NULL && !vx_can_fua(leaf))
            return false;
    }
    return true;
}

int vx_layout_change(vx_layout *layout, vx_request *request)
{
    bool fua = request->flags & VX_FUA, nowait = request->flags & VX_NOWAIT;
    if (nowait && (fua || layout->terms.delayed))
        return VX_AGAIN;
    bool passes_fua = false;
    if (fua) {
        uint32_t slot = vx_epoch_enter(&layout->epochs, request->epoch_slot);
        passes_fua = all_can_fua(layout);
        vx_epoch_leave(&layout->epochs, slot);
    }
    change c; /* 10 KiB */
    c.layout = layout;
    c.request = request;
    c.operation = request->operation;
    c.flags = passes_fua ? request->flags : request->flags & ~(uint32_t)VX_FUA;
    request->result = VX_OK;
    request->failure.code = VX_OK;
    int answer = request->operation == VX_WRITE ? write_all(&c) : zero_or_trim(&c);
    if (answer != VX_DONE || request->result != 0 || !fua || passes_fua)
        return answer;
    vx_request_follow(request);
    return vx_layout_flush(layout, request);
}

/* All disks at once; one to which nothing was written costs nothing. */
int vx_layout_flush(vx_layout *layout, vx_request *request)
{
    if (request->flags & VX_NOWAIT)
        return VX_AGAIN;
    vx_request *children[VX_LAYOUT_DISKS];
    vx_device *leaves[VX_LAYOUT_DISKS];
    uint32_t disks[VX_LAYOUT_DISKS], count = 0, limit = atomic_load(&layout->disk_limit);
    vx_fan *fan = vx_fan_begin(limit);
    if (fan == NULL)
        return vx_fail(&layout->device, request, VX_E_NOMEM, 0, 0);
    int answer = vx_succeed(request);
    uint32_t slot = vx_epoch_enter(&layout->flush_epochs, request->epoch_slot);
    if (!vx_layout_is_open(layout, request))
        limit = 0;
    for (uint32_t i = 0; i < limit; i++) {
        vx_device *leaf = atomic_load(&layout->disks[i].device);
        if (leaf == NULL || leaf->read_only)
            continue;
        disks[count] = i;
        leaves[count] = leaf;
        children[count++] = vx_fan_add(fan, request, leaf, VX_FLUSH, 0, 0, NULL);
    }
    vx_fan_run(fan, layout->pool, count);
    vx_epoch_leave(&layout->flush_epochs, slot);
    for (uint32_t i = 0; i < count && answer == VX_DONE; i++)
        if (children[i]->result != 0 && children[i]->result != VX_E_NOMEM)
            answer = vx_layout_fail_member(layout, request, UINT64_MAX, disks[i], leaves[i],
                                           children[i]);
    if (answer == VX_DONE)
        vx_fan_adopt(fan, request);
    vx_fan_end(fan);
    return answer;
}
