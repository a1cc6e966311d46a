/* SPDX-License-Identifier: MIT
 *
 * A device behind an object of the language above: every request is one upcall, on the thread that
 * submitted it. With NOWAIT it answers AGAIN, so that a connection's thread never enters it.
 */
#ifndef VX_CALLBACK_H
#define VX_CALLBACK_H

#include "core/device.h"

vx_device *vx_callback_create(uint64_t size, bool read_only, uint64_t identity,
                              const vx_upcalls *upcalls);

#endif
