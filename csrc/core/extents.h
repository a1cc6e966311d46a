/* SPDX-License-Identifier: MIT
 *
 * What a device above others needs to report holes and extents in its own offsets.
 */
#ifndef VX_EXTENTS_H
#define VX_EXTENTS_H

#include "core/device.h"

/* Returns zeros for [offset, offset + length) of the request's device: as a hole if the reader asked for
 * holes and there is room, else in the buffer. */
void vx_read_hole(vx_request *request, uint64_t offset, uint64_t length);
/* Drops the holes behind `offset`: a restart reads again from there and would record them twice. */
void vx_forget_holes_after(vx_request *request, uint64_t offset);
/* Adds an extent, merged with the one before; false when there is no room. */
bool vx_add_extent(vx_request *request, uint64_t offset, uint64_t length, uint32_t state,
                   int32_t depth);

#endif
