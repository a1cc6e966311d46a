/* SPDX-License-Identifier: MIT */
#include "core/extents.h"

#include <string.h>

void vx_read_hole(vx_request *request, uint64_t offset, uint64_t length)
{
    vx_extent *last = request->extent_count == 0 ? NULL
                                                 : &request->extents[request->extent_count - 1];
    if (last != NULL && last->offset + last->length == offset) {
        last->length += length;
    } else if (request->extents != NULL && request->extent_count < request->extent_capacity) {
        request->extents[request->extent_count++] =
            (vx_extent){offset, length, VX_EXTENT_HOLE, -1};
    } else {
        memset(request->buffer + (offset - request->offset), 0, length);
    }
}

void vx_forget_holes_after(vx_request *request, uint64_t offset)
{
    while (request->extent_count > 0) {
        vx_extent *last = &request->extents[request->extent_count - 1];
        if (last->offset + last->length <= offset)
            return;
        if (last->offset < offset) {
            last->length = offset - last->offset;
            return;
        }
        request->extent_count--;
    }
}

bool vx_add_extent(vx_request *request, uint64_t offset, uint64_t length, uint32_t state,
                   int32_t depth)
{
    if (request->extent_count > 0) {
        vx_extent *last = &request->extents[request->extent_count - 1];
        if (last->state == state && last->depth == depth &&
            last->offset + last->length == offset) {
            last->length += length;
            return true;
        }
    }
    if (request->extent_count == request->extent_capacity)
        return false;
    request->extents[request->extent_count++] = (vx_extent){offset, length, state, depth};
    return true;
}
