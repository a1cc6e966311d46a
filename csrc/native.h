/* SPDX-License-Identifier: MIT
 *
 * Everything that native.cdef.h names.
 */
#ifndef VX_NATIVE_H
#define VX_NATIVE_H

#include "callback.h"
#include "clock.h"
#include "delay.h"
#include "delegate.h"
#include "file.h"
#include "hold.h"
#include "load.h"
#include "map.h"
#include "memory.h"
#include "meter.h"
#include "model.h"
#include "nbd.h"
#include "pool.h"
#include "run.h"
#include "schedule.h"
#include "switch.h"
#include "throttle.h"

#endif
