/* SPDX-License-Identifier: MIT
 *
 * A rate limit by the generic cell rate algorithm (GCRA, ITU-T I.371), in integers.
 *
 * A bucket is one number, the theoretical arrival time: the time at which all requests admitted so
 * far are paid for. Admitting n units advances this time by n / rate. A request may be admitted
 * while this time is no more than `tolerance` (burst / rate) ahead of now. So any window of length
 * d admits no more than rate * d + burst units plus one request, whatever the arrival pattern.
 *
 * Times are in ticks of 1/64 ns. Costs are rounded up, by less than one tick a request. So the
 * actual rate never exceeds the configured one, and falls short of it by less than 4 parts in a
 * million at 250,000 requests a second. Ticks wrap after nine years of uptime. Admission takes no
 * lock, only a compare-and-swap.
 */
#ifndef VX_BUCKET_H
#define VX_BUCKET_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define VX_TICKS_PER_NS 64u

typedef struct vx_bucket {
    _Atomic uint64_t paid;      /* ticks: when all admitted requests are paid for */
    _Atomic uint64_t rate;      /* units a second; 0: no limit */
    _Atomic uint64_t tolerance; /* ticks */
} vx_bucket;

static inline uint64_t vx_ticks(uint64_t ns)
{
    return ns * VX_TICKS_PER_NS;
}

/* Rounded up, so that nothing passes before its due time. */
static inline uint64_t vx_ns_of_ticks(uint64_t ticks)
{
    return (ticks + VX_TICKS_PER_NS - 1) / VX_TICKS_PER_NS;
}

/* The cost of `units`, in ticks; 0 without a limit. */
uint64_t vx_bucket_cost(const vx_bucket *bucket, uint64_t units);
/* Admits and charges `units` at `now` (ticks), or changes nothing and returns false. */
bool vx_bucket_admit(vx_bucket *bucket, uint64_t units, uint64_t now);
/* Takes back the charge for `units`. */
void vx_bucket_refund(vx_bucket *bucket, uint64_t units);
/* Moves the time at which everything is paid for back by `ticks`. */
void vx_bucket_postpone(vx_bucket *bucket, uint64_t ticks);
/* Discards the credit saved in the `lost` ticks up to `now`, in which the process was stalled. Call
 * it before anything else is admitted. */
void vx_bucket_skip_stall(vx_bucket *bucket, uint64_t lost, uint64_t now);
/* The earliest time (ticks) from `from` on at which a request could pass. Charges nothing. */
uint64_t vx_bucket_due(const vx_bucket *bucket, uint64_t from);
/* Charges `units` as of `from`. Returns the time (ticks) from `from` on at which they may pass. */
uint64_t vx_bucket_reserve(vx_bucket *bucket, uint64_t units, uint64_t from);
/* Sets the rate (units a second, 0: no limit) and the burst (units, a year's worth at most). Saved
 * units, up to the new burst, and owed units stay the same. A bucket that had no limit starts with
 * `saved` units. Only one thread at a time may call this. Concurrent admissions may be charged at
 * either rate. */
void vx_bucket_change(vx_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t saved, uint64_t now);
/* Converts a duration of `ticks` at rate `before` to rate `after`; rounded up, a year at most. */
uint64_t vx_bucket_rescale(uint64_t ticks, uint64_t before, uint64_t after);
/* Units that could be admitted at `now`; negative: units owed. 0 without a limit. */
int64_t vx_bucket_level(const vx_bucket *bucket, uint64_t now);

#endif
