/* SPDX-License-Identifier: MIT
 *
 * Drivers: functions that carry a request to completion.
 *
 *   vx_run    submits, answers faults through the device's upcall and submits again, until the
 *             request is DONE or PARKED. The request must not have VX_NOWAIT, and the caller must
 *             hold no lock or epoch.
 *   vx_finish vx_run, then waits for a parked request; returns request->result.
 *   vx_wait   vx_finish, then waits until not_before_ns, unless that is a virtual time.
 *   vx_call   for a device that calls a lower one: submits once, and waits if the request is
 *             parked. FAULTED and AGAIN go to the caller, which must unwind. A request with NOWAIT
 *             loses MAY_PARK: it is on the caller's stack, and nobody would wait for it.
 *
 * Times. A fault that an owner answers takes the modelled time that vx_fault.time says; the request
 * starts again after it.
 *
 * If a handler answers the same fault twice in a row without any change, the request fails with
 * NO_PROGRESS.
 */
#ifndef VX_RUN_H
#define VX_RUN_H

#include "core/device.h"

int vx_run(vx_device *device, vx_request *request);
int vx_finish(vx_device *device, vx_request *request);
int vx_wait(vx_device *device, vx_request *request);
int vx_call_waiting(vx_device *device, vx_request *request); /* without VX_NOWAIT */
static inline int vx_call(vx_device *device, vx_request *request)
{
    if (!(request->flags & VX_NOWAIT))
        return vx_call_waiting(device, request);
    request->flags &= ~(uint32_t)VX_MAY_PARK;
    return vx_submit(device, request);
}

/* One step of a batch. Steps run in order; the first failure ends the batch. */
typedef struct vx_step {
    uint32_t operation; /* READ, WRITE, ZERO, TRIM or FLUSH */
    uint32_t reserved;
    uint64_t offset;
    uint64_t length;
    uint8_t *buffer;
} vx_step;

/* Blocking entry points for Python: 0 or a vx_error, with details in *failure. */
int vx_transfer(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                uint64_t length, uint64_t offset, vx_failure *failure);
/* As vx_transfer. With `time` (else NULL) nobody sleeps until the request is done by the clock of a
 * delay: it starts at *time, which is raised to when it is done. */
int vx_transfer_at(vx_device *device, uint32_t operation, uint32_t flags, uint8_t *buffer,
                   uint64_t length, uint64_t offset, vx_time *time, vx_failure *failure);
int vx_batch(vx_device *device, vx_step *steps, size_t count, vx_time *time, vx_failure *failure);
/* Stores at most `capacity` extents from `offset` on. Returns their number, or a vx_error. */
int64_t vx_list_extents(vx_device *device, uint64_t offset, uint64_t length, vx_extent *extents,
                        uint32_t capacity, vx_failure *failure);

#endif
