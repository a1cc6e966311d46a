/* SPDX-License-Identifier: MIT
 *
 * A device for tests that passes requests on and misbehaves on demand: parks them for a time, hands
 * up a delay, answers AGAIN, or fails the n-th request of an operation. All settings may change
 * while it is used. A parked request is resumed by the pool, which must not be the one whose threads
 * wait for it. Operations are chosen by a mask of 1 << vx_operation.
 */
#ifndef VX_INJECTOR_H
#define VX_INJECTOR_H

#include "core/device.h"
#include "core/pool.h"

typedef struct vx_injector_settings {
    uint32_t park_mask;
    uint64_t park_ns;
    uint32_t delay_mask;
    uint64_t delay_ns; /* handed up as not_before_ns */
    uint32_t again_mask; /* NOWAIT requests answer AGAIN */
    uint32_t fail_mask;
    uint64_t fail_after; /* so many matching requests succeed first */
    int32_t fail_code;
} vx_injector_settings;

vx_device *vx_injector_create(vx_device *lower, vx_pool *pool, uint64_t identity);
void vx_injector_set(vx_device *device, const vx_injector_settings *settings);

#endif
