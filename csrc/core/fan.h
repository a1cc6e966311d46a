/* SPDX-License-Identifier: MIT
 *
 * A fan: several requests to lower devices at once, from straight-line code.
 *
 * The caller adds its requests, the children, and runs them. Helpers are jobs of a pool. The caller's
 * thread works too, so a fan ends even if the pool has no free thread. A helper is queued only when a
 * thread is free. A child
 * is carried to its end by the thread that takes it: that thread answers its faults, and waits if it is
 * parked. So the caller must hold no lock or epoch that a fault handler or a parked child may need, and
 * `pool` must be of a higher level than the pools of the lower devices (pool.h). Nobody waits until a
 * child's not_before_ns; the caller takes the latest one.
 *
 * Children are not on the caller's stack, so they keep no memo of their parent, and lose NOWAIT and
 * MAY_PARK. Their buffers are the caller's. vx_fan_run returns when every child has ended.
 */
#ifndef VX_FAN_H
#define VX_FAN_H

#include "core/device.h"
#include "core/pool.h"

typedef struct vx_fan vx_fan;

/* A fan of at most `capacity` children. NULL: no memory. */
vx_fan *vx_fan_begin(uint32_t capacity);
/* Adds a child as vx_request_child does; the caller may change its flags before the run. The fan keeps
 * a reference to `lower` until vx_fan_end. NULL: the fan is full. */
vx_request *vx_fan_add(vx_fan *fan, const vx_request *parent, vx_device *lower, uint32_t operation,
                       uint64_t offset, uint64_t length, uint8_t *buffer);
/* Runs all children, with at most `helpers` threads of `pool` (NULL: none) beside the caller's. Each
 * child then has its result. Once only. */
void vx_fan_run(vx_fan *fan, vx_pool *pool, uint32_t helpers);
/* Adopts the outcome of every child into `parent`: the result of the first that failed, and the latest
 * delay. */
void vx_fan_adopt(const vx_fan *fan, vx_request *parent);
/* Whether all that failed found no space and left their lower device usable. */
bool vx_fan_lacks_only_space(const vx_fan *fan);
void vx_fan_end(vx_fan *fan);

/* For Python: one operation on `count` devices at once, at an offset of each. failures[i].code is the
 * outcome on device i. `time` as in vx_transfer_at; it may not be NULL. Returns NOMEM if nothing was
 * done, else 0. */
int vx_transfer_together(vx_pool *pool, uint32_t count, vx_device *const *devices,
                         uint32_t operation, uint8_t *buffer, uint64_t length,
                         const uint64_t *offsets, vx_time *time, vx_failure *failures);

#endif
