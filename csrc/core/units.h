/* SPDX-License-Identifier: MIT
 *
 * Normalised units: what a request counts for limits and figures. Reads and writes one for each
 * `unit` bytes begun (8 KiB in Windows), ZERO and TRIM, which carry no payload, one for each MiB.
 */
#ifndef VX_UNITS_H
#define VX_UNITS_H

#include "core/device.h"

#define VX_PIECE 262144u
#define VX_ZERO_PIECE (32u << 20)
#define VX_QUICK_BYTES 65536u /* what may be moved on a thread that others wait for */

/* The most that is paid for, or goes, at once, bytes: whole units, so that pieces cost what the whole
 * costs. */
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
