/* SPDX-License-Identifier: MIT */
#include "array/layout_internal.h"

#include <stdlib.h>
#include <string.h>

#include "core/run.h"

#define PIECE ((uint64_t)1 << 20)

/* A piece of a copy or comparison: ranges are held, and an epoch is entered, for a MiB at a time. */
typedef struct piece {
    vx_layout *layout;
    vx_span span;
    uint32_t slot;
} piece;

static void begin_piece(piece *p, vx_layout *layout, uint64_t row, uint32_t column,
                        uint64_t within, uint64_t length)
{
    vx_part part = {.row = row, .column = column, .within = within, .length = length};
    *p = (piece){.layout = layout, .span = vx_layout_span(layout, &part)};
    vx_ranges_enter(layout->ranges, &p->span, 1, true, false);
    p->slot = vx_epoch_enter(&layout->epochs, (uint32_t)(uintptr_t)p >> 12);
}

static void end_piece(piece *p)
{
    vx_epoch_leave(&p->layout->epochs, p->slot);
    vx_ranges_leave(p->layout->ranges, &p->span, 1, true);
}

static int refuse(vx_layout *layout, vx_failure *failure, int code)
{
    *failure = (vx_failure){.code = code, .device = layout->device.identity};
    return code;
}

static bool is_inside_slab(const vx_layout *layout, uint64_t row, uint64_t within, uint64_t length)
{
    return atomic_load(&layout->locks) && row < layout->rows && within <= layout->terms.slab &&
           length <= layout->terms.slab - within;
}

/* Whether the range has no data on the leaf, so that it reads zeros. */
static bool is_hole(vx_device *leaf, uint64_t offset, uint64_t length)
{
    vx_extent found;
    vx_failure failure;
    return vx_list_extents(leaf, offset, length, &found, 1, &failure) == 1 &&
           found.state != VX_EXTENT_DATA && found.offset <= offset &&
           found.offset + found.length >= offset + length;
}

static int copy_piece(vx_device *from, uint64_t source, vx_device *to, uint64_t target,
                      uint64_t length, bool compares, uint8_t *buffers, vx_failure *failure)
{
    bool zeros = is_hole(from, source, length);
    int code = VX_OK;
    if (zeros)
        memset(buffers, 0, length);
    else
        code = vx_transfer(from, VX_READ, 0, buffers, length, source, failure);
    if (code == VX_OK && compares) {
        code = vx_transfer(to, VX_READ, 0, buffers + PIECE, length, target, failure);
        if (code == VX_OK && memcmp(buffers, buffers + PIECE, length) == 0)
            return VX_OK;
    }
    if (code == VX_OK)
        code = zeros ? vx_transfer(to, VX_ZERO, 0, NULL, length, target, failure)
                     : vx_transfer(to, VX_WRITE, 0, buffers, length, target, failure);
    return code;
}

/* Inside a piece: a member's leaf, and where its slab begins. NULL: it is not of these kinds. */
static vx_device *leaf_of(vx_layout *layout, uint64_t row, uint32_t member, bool stale_too,
                          uint64_t *offset)
{
    uint64_t entry = vx_layout_entry(layout, row, member);
    *offset = vx_entry_offset(entry);
    return vx_layout_leaf(layout, entry, stale_too);
}

int vx_layout_copy(vx_device *device, uint64_t row, uint32_t from, uint32_t to, uint64_t within,
                   uint64_t length, bool compares, vx_failure *failure)
{
    vx_layout *layout = (vx_layout *)device;
    uint32_t slots = layout->slots;
    if (!is_inside_slab(layout, row, within, length) || from == to || from >= layout->members ||
        to >= layout->members || from / slots != to / slots)
        return refuse(layout, failure, VX_E_INVALID);
    uint8_t *buffers = malloc(2 * PIECE);
    if (buffers == NULL)
        return refuse(layout, failure, VX_E_NOMEM);
    int code = VX_OK;
    for (uint64_t at = 0; at < length && code == VX_OK; at += PIECE) {
        piece p;
        uint64_t n = length - at < PIECE ? length - at : PIECE, source, target;
        begin_piece(&p, layout, row, from / slots, within + at, n);
        vx_device *reads = leaf_of(layout, row, from, false, &source);
        vx_device *writes = leaf_of(layout, row, to, true, &target);
        if (atomic_load(&layout->closed)) /* the slabs may belong to another space soon */
            code = refuse(layout, failure, VX_E_CLOSED);
        else if (reads == NULL || writes == NULL)
            code = refuse(layout, failure, VX_E_INVALID);
        else
            code = copy_piece(reads, source + within + at, writes, target + within + at, n, compares,
                              buffers, failure);
        end_piece(&p);
    }
    free(buffers);
    return code;
}

/* The verdict on one block: which of the copies, by bits in `present`, differ from most of them. */
static uint8_t judge(const uint8_t *const *blocks, uint8_t present, uint64_t length)
{
    uint8_t best = 0;
    int most = 0, count = __builtin_popcount(present);
    for (uint32_t i = 0; i < VX_LAYOUT_SLOTS; i++) {
        uint8_t equal = 0;
        for (uint32_t k = 0; k < VX_LAYOUT_SLOTS && present >> i & 1; k++)
            if (present >> k & 1 && memcmp(blocks[i], blocks[k], length) == 0)
                equal |= (uint8_t)(1u << k);
        if (__builtin_popcount(equal) > most) {
            most = __builtin_popcount(equal);
            best = equal;
        }
    }
    if (most == count)
        return 0;
    return 2 * most > count ? present & (uint8_t)~best : (uint8_t)(VX_LAYOUT_TIE | present);
}

static int compare_piece(vx_layout *layout, uint64_t row, uint32_t column, uint64_t within,
                         uint64_t length, uint8_t *buffers, uint8_t *verdicts, vx_failure *failure)
{
    uint8_t present = 0;
    bool all_zero = true;
    for (uint32_t i = 0; i < layout->slots; i++) {
        uint64_t offset;
        vx_device *leaf = leaf_of(layout, row, column * layout->slots + i, false, &offset);
        uint8_t *buffer = buffers + i * PIECE;
        if (leaf == NULL)
            continue;
        present |= (uint8_t)(1u << i);
        if (is_hole(leaf, offset + within, length)) {
            memset(buffer, 0, length);
            continue;
        }
        all_zero = false;
        int code = vx_transfer(leaf, VX_READ, 0, buffer, length, offset + within, failure);
        if (code != VX_OK)
            return code;
    }
    for (uint64_t at = 0; at < length; at += VX_LAYOUT_BLOCK) {
        uint64_t n = length - at < VX_LAYOUT_BLOCK ? length - at : VX_LAYOUT_BLOCK;
        const uint8_t *blocks[VX_LAYOUT_SLOTS];
        for (uint32_t i = 0; i < VX_LAYOUT_SLOTS; i++)
            blocks[i] = buffers + i * PIECE + at;
        verdicts[at / VX_LAYOUT_BLOCK] = all_zero ? 0 : judge(blocks, present, n);
    }
    return VX_OK;
}

int vx_layout_compare(vx_device *device, uint64_t row, uint32_t column, uint64_t within,
                      uint64_t length, uint8_t *verdicts, vx_failure *failure)
{
    vx_layout *layout = (vx_layout *)device;
    if (!is_inside_slab(layout, row, within, length) || column >= layout->terms.columns ||
        within % VX_LAYOUT_BLOCK != 0)
        return refuse(layout, failure, VX_E_INVALID);
    uint8_t *buffers = malloc(VX_LAYOUT_SLOTS * PIECE);
    if (buffers == NULL)
        return refuse(layout, failure, VX_E_NOMEM);
    int code = VX_OK;
    for (uint64_t at = 0; at < length && code == VX_OK; at += PIECE) {
        piece p;
        uint64_t n = length - at < PIECE ? length - at : PIECE;
        begin_piece(&p, layout, row, column, within + at, n);
        code = atomic_load(&layout->closed)
                   ? refuse(layout, failure, VX_E_CLOSED)
                   : compare_piece(layout, row, column, within + at, n, buffers,
                                   verdicts + at / VX_LAYOUT_BLOCK, failure);
        end_piece(&p);
    }
    free(buffers);
    return code;
}
