/* SPDX-License-Identifier: MIT
 *
 * The switch: a device that passes requests to one lower device. The lower device can be replaced
 * at a consistent point, for snapshots of an open disk.
 *
 * While the switch is paused, no request reaches the lower device. NOWAIT requests are answered
 * AGAIN; other requests are parked and, after the resume, submitted in order on the pool.
 * vx_switch_pause returns when every request that passed has left the lower device or is parked
 * there. It does not wait for requests that an earlier resume has not submitted yet; they stay
 * parked. A map parks a request only when its data are written and it waits for a commit, so the
 * content of a paused map does not change. A request that faulted passes through the switch again.
 */
#ifndef VX_SWITCH_H
#define VX_SWITCH_H

#include "core/device.h"
#include "core/pool.h"

/* Keeps a reference to `lower` and takes over its size and read-only state. */
vx_device *vx_switch_create(vx_device *lower, vx_pool *pool, uint64_t identity);
/* From one thread at a time: pause, maybe set, resume. */
void vx_switch_pause(vx_device *device);
/* While paused. The old lower device is released. */
void vx_switch_set(vx_device *device, vx_device *lower);
void vx_switch_resume(vx_device *device);
/* Takes over the size of the lower device after it was resized. */
void vx_switch_follow(vx_device *device);

#endif
