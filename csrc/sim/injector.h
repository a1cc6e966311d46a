/* SPDX-License-Identifier: MIT
 *
 * A device for tests that passes requests on and misbehaves on demand. It parks requests for a
 * time, reports a delay, answers AGAIN, or fails all requests of an operation after a given number.
 * Settings may change at any time. The pool resumes a parked request, so no thread of that pool may
 * wait for it. Masks choose operations by bits of 1 << vx_operation.
 */
#ifndef VX_INJECTOR_H
#define VX_INJECTOR_H

#include "core/device.h"
#include "core/pool.h"

typedef struct vx_injector_settings {
    uint32_t park_mask;
    uint64_t park_ns;
    uint32_t delay_mask;
    uint64_t delay_ns; /* reported as not_before_ns */
    uint32_t again_mask; /* NOWAIT requests get AGAIN; park_mask and fail_mask imply this */
    uint32_t fail_mask; /* a failed FLUSH also poisons the device */
    uint64_t fail_after; /* matching requests that succeed first */
    int32_t fail_code;
} vx_injector_settings;

vx_device *vx_injector_create(vx_device *lower, vx_pool *pool, uint64_t identity);
void vx_injector_set(vx_device *device, const vx_injector_settings *settings);

#endif
