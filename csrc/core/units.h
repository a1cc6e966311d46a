/* SPDX-License-Identifier: MIT
 *
 * Normalised units: what a request costs in limits and statistics. READ and WRITE cost one unit for
 * each `unit` bytes begun (8 KiB in Windows). ZERO and TRIM carry no payload and cost one unit for
 * each MiB begun. Every request costs at least one unit.
 */
#ifndef VX_UNITS_H
#define VX_UNITS_H

#include "core/device.h"

#define VX_PIECE 262144u
#define VX_ZERO_PIECE (32u << 20)
#define VX_QUICK_BYTES 65536u /* the most that a thread copies while requests wait for it */

/* The most bytes that are paid for, or passed on, at once. They are whole units, so that the pieces
 * of a request cost as much as the request. */
static inline uint64_t vx_piece_of(uint32_t operation, uint64_t unit)
{
    if (operation == VX_ZERO || operation == VX_TRIM)
        return VX_ZERO_PIECE;
    return unit > VX_PIECE ? unit : VX_PIECE / unit * unit;
}

static inline uint64_t vx_units_of(uint32_t operation, uint64_t length, uint64_t unit)
{
    uint64_t size = operation == VX_ZERO || operation == VX_TRIM ? (uint64_t)1 << 20 : unit;
    uint64_t units = length / size + (length % size != 0);
    return units == 0 ? 1 : units;
}

#endif
