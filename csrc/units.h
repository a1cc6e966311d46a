/* SPDX-License-Identifier: MIT
 *
 * Normalised units: what a request counts for limits and figures. Reads and writes one for each
 * `unit` bytes begun (8 KiB in Windows), ZERO and TRIM, which carry no payload, one for each MiB.
 */
#ifndef VX_UNITS_H
#define VX_UNITS_H

#include "device.h"

static inline uint64_t vx_units_of(uint32_t operation, uint64_t length, uint64_t unit)
{
    uint64_t size = operation == VX_ZERO || operation == VX_TRIM ? (uint64_t)1 << 20 : unit;
    uint64_t units = length / size + (length % size != 0);
    return units == 0 ? 1 : units;
}

#endif
