/* SPDX-License-Identifier: MIT
 *
 * Drivers: they carry a request to its end.
 *
 *   vx_run    submits, answers faults through the device's upcall and submits again, until the
 *             request is DONE or PARKED. Never with VX_NOWAIT. Must hold no lock or epoch.
 *   vx_wait   vx_run, then waits for a parked request; returns request->result.
 *   vx_call   for a device that calls a lower one: submits once and waits if it is parked; faults
 *             and AGAIN go to the caller, who must unwind.
 *
 * A fault whose handler changes nothing twice in a row fails the request with NO_PROGRESS.
 */
#ifndef VX_RUN_H
#define VX_RUN_H

#include "core/device.h"

int vx_run(vx_device *device, vx_request *request);
int vx_wait(vx_device *device, vx_request *request);
int vx_call_waiting(vx_device *device, vx_request *request); /* without VX_NOWAIT */
static inline int vx_call(vx_device *device, vx_request *request)
{
    return request->flags & VX_NOWAIT ? vx_submit(device, request) : vx_call_waiting(device, request);
}

/* One step of a batch; executed in order, the first failure ends it. */
typedef struct vx_step {
    uint32_t operation; /* READ, WRITE, ZERO, TRIM or FLUSH */
    uint32_t reserved;
    uint64_t offset;
    uint64_t length;
    uint8_t *buffer;
} vx_step;

/* Blocking entry points of Python; 0 or a vx_error, details in *failure. */
int vx_transfer(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                uint64_t length, uint64_t offset, vx_failure *failure);
int vx_batch(vx_device *device, vx_step *steps, size_t count, vx_failure *failure);
/* At most `capacity` extents from `offset` on; the count, or a vx_error. */
int64_t vx_list_extents(vx_device *device, uint64_t offset, uint64_t length, vx_extent *extents,
                        uint32_t capacity, vx_failure *failure);

#endif
