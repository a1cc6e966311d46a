/* SPDX-License-Identifier: MIT
 *
 * A device that is as slow as a model says: the lower one does the I/O at once, and not_before_ns goes
 * up to when the model would be done. Several delays may share a model; each lies in it at its own
 * `base`. With a virtual clock the times are that clock's, and whoever drives it waits for them.
 *
 * A request that fails, or comes back AGAIN or FAULTED, costs nothing. NOWAIT alone is answered AGAIN,
 * so that what is tried first and done later costs once; with MAY_PARK it is done here.
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
