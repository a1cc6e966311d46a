/* SPDX-License-Identifier: MIT
 *
 * Everything that native.cdef.h names.
 */
#ifndef VX_NATIVE_H
#define VX_NATIVE_H

#include "leaf/callback.h"
#include "core/clock.h"
#include "sim/delay.h"
#include "core/delegate.h"
#include "leaf/file.h"
#include "sim/hold.h"
#include "sim/load.h"
#include "map/map.h"
#include "leaf/memory.h"
#include "core/meter.h"
#include "sim/model.h"
#include "front/nbd.h"
#include "core/pool.h"
#include "core/run.h"
#include "qos/schedule.h"
#include "map/switch.h"
#include "qos/throttle.h"

#endif
