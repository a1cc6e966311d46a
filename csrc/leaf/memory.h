/* SPDX-License-Identifier: MIT
 *
 * A device in memory, for tests. It copies with plain memcpy, so that a sanitizer detects a race
 * between two requests on the same bytes. The size can change up to `capacity`.
 */
#ifndef VX_MEMORY_H
#define VX_MEMORY_H

#include "core/device.h"

vx_device *vx_memory_create(uint64_t size, uint64_t capacity, uint64_t identity);
uint8_t *vx_memory_bytes(vx_device *device);
uint64_t vx_memory_barriers(vx_device *device);

#endif
