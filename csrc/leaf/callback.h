/* SPDX-License-Identifier: MIT
 *
 * A device implemented by a Python object. Every request is one upcall (core/delegate.h says on
 * which thread). With NOWAIT the device answers AGAIN, so a connection's thread never makes the
 * upcall.
 */
#ifndef VX_CALLBACK_H
#define VX_CALLBACK_H

#include "core/device.h"

vx_device *vx_callback_create(uint64_t size, bool read_only, uint64_t identity,
                              const vx_upcalls *upcalls);

#endif
