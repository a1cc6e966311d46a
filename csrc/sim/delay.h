/* SPDX-License-Identifier: MIT
 *
 * A device that is as slow as a model says. The lower device does the I/O at once, and
 * not_before_ns is raised to the time at which the modelled disk would be done. Several delays may
 * share a model; each occupies the model from its own `base` on. Times are those of `clock`, which
 * may be virtual. A request arrives at the model when it is submitted, or at its starts_ns if that is
 * later.
 *
 * A request that fails, or comes back AGAIN or FAULTED, costs nothing. NOWAIT alone is answered
 * AGAIN, so that a request that is first tried and later repeated costs once. With MAY_PARK as
 * well, the request is carried out.
 */
#ifndef VX_DELAY_H
#define VX_DELAY_H

#include "core/clock.h"
#include "core/device.h"
#include "sim/model.h"

/* Keeps a reference to `lower`; model and clock must outlive it. NULL: no memory. */
vx_device *vx_delay_create(vx_device *lower, vx_model *model, vx_clock *clock, uint64_t base,
                           uint64_t identity);

#endif
