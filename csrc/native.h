/* SPDX-License-Identifier: MIT
 *
 * Everything that native.cdef.h names.
 */
#ifndef VX_NATIVE_H
#define VX_NATIVE_H

#include "array/layout.h"
#include "core/clock.h"
#include "core/delegate.h"
#include "core/fan.h"
#include "core/meter.h"
#include "core/pool.h"
#include "core/run.h"
#include "core/units.h"
#include "front/nbd.h"
#include "leaf/callback.h"
#include "leaf/file.h"
#include "leaf/memory.h"
#include "map/map.h"
#include "map/switch.h"
#include "qos/dmclock.h"
#include "qos/schedule.h"
#include "qos/throttle.h"
#include "sim/delay.h"
#include "sim/injector.h"
#include "sim/load.h"
#include "sim/model.h"

#endif
