/* SPDX-License-Identifier: MIT
 *
 * A rate limit by the generic cell rate algorithm (GCRA, ITU-T I.371), in integers.
 *
 * A bucket is one number: the theoretical arrival time, at which all that was admitted so far is paid
 * for. What costs n units moves it n / rate further; something may be admitted as long as it is no
 * more than `tolerance` (burst / rate) ahead of now. So in any time t..t+d no more than
 * rate * d + burst units and one request are admitted, whatever the pattern.
 *
 * Times are in ticks of 1/64 ns, so that a cost is rounded up by less than 1/64 ns a request: never
 * above the rate, and below it by less than 4 parts in a million at 250,000 requests a second. They
 * wrap after nine years of uptime. Admitting needs no lock: one compare-and-swap.
 */
#ifndef VX_BUCKET_H
#define VX_BUCKET_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define VX_TICKS_PER_NS 64u

typedef struct vx_bucket {
    _Atomic uint64_t paid;      /* ticks: when all that was admitted is paid for */
    _Atomic uint64_t rate;      /* units a second; 0: no limit */
    _Atomic uint64_t tolerance; /* ticks */
} vx_bucket;

static inline uint64_t vx_ticks(uint64_t ns)
{
    return ns * VX_TICKS_PER_NS;
}

/* Rounded up: what is due then is not early. */
static inline uint64_t vx_ns_of_ticks(uint64_t ticks)
{
    return (ticks + VX_TICKS_PER_NS - 1) / VX_TICKS_PER_NS;
}

/* What `units` cost, ticks. */
uint64_t vx_bucket_cost(const vx_bucket *bucket, uint64_t units);
/* Admits `units` at `now` (ticks) and pays for them, or does nothing and returns false. */
bool vx_bucket_admit(vx_bucket *bucket, uint64_t units, uint64_t now);
/* Takes back what was paid for `units`. */
void vx_bucket_refund(vx_bucket *bucket, uint64_t units);
/* Everything that is paid for comes later by so many ticks. */
void vx_bucket_postpone(vx_bucket *bucket, uint64_t ticks);
/* Of `lost` ticks that end at `now` nothing is saved: the process was stalled. Before anything else is
 * admitted. */
void vx_bucket_skip_stall(vx_bucket *bucket, uint64_t lost, uint64_t now);
/* When, at `from` or later, something could be admitted. Ticks; nothing is paid. */
uint64_t vx_bucket_due(const vx_bucket *bucket, uint64_t from);
/* When, at `from` or later, `units` may be admitted; pays for them as of `from`. Ticks. */
uint64_t vx_bucket_reserve(vx_bucket *bucket, uint64_t units, uint64_t from);
/* Another rate (units a second, 0: none) and burst (units, a year's worth at most). What was saved, up
 * to the new burst, and what is owed stay the same in units; a limit that is new has saved `saved`
 * units. One thread at a time; requests that are admitted meanwhile may be charged at either rate. */
void vx_bucket_change(vx_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t saved, uint64_t now);
/* Ticks that what takes `ticks` at rate `before` takes at rate `after`; rounded up, a year at most. */
uint64_t vx_bucket_rescale(uint64_t ticks, uint64_t before, uint64_t after);
/* Units that could be admitted at `now`; negative: what is owed. */
int64_t vx_bucket_level(const vx_bucket *bucket, uint64_t now);

#endif
