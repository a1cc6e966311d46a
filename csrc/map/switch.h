/* SPDX-License-Identifier: MIT
 *
 * The switch: a device that lives on one lower device and can be moved to another at a consistent
 * point: snapshots and compaction of an open disk.
 *
 * While it is paused no request reaches the lower device: NOWAIT requests are answered AGAIN, others
 * are parked and go on, in order, on the pool when it is resumed. vx_switch_pause returns when every
 * request that got through has left the lower device, or is parked there; it does not wait for those
 * that go on after an earlier pause, which are held up like any other. A map parks requests only
 * when their data is written and they wait for a commit, so a paused map's content does not change.
 * A request that faulted goes through the switch again.
 */
#ifndef VX_SWITCH_H
#define VX_SWITCH_H

#include "core/device.h"
#include "core/pool.h"

/* Keeps a reference to `lower`, whose size and read-only state it has. */
vx_device *vx_switch_create(vx_device *lower, vx_pool *pool, uint64_t identity);
/* From one thread at a time: pause, maybe set, resume. */
void vx_switch_pause(vx_device *device);
/* While paused. The old lower device is released. */
void vx_switch_set(vx_device *device, vx_device *lower);
void vx_switch_resume(vx_device *device);
/* Follows the size of the lower device, after it was resized. */
void vx_switch_follow(vx_device *device);

#endif
