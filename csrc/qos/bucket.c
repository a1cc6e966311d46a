/* SPDX-License-Identifier: MIT */
#include "qos/bucket.h"

#define TICKS_PER_SECOND ((uint64_t)1000000000u * VX_TICKS_PER_NS)
#define LONGEST_TOLERANCE (TICKS_PER_SECOND * 86400u * 365u)

typedef unsigned __int128 wide;

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* The ticks that `units` take at `rate`, rounded up, a year at most. */
static uint64_t ticks_of(uint64_t units, uint64_t rate)
{
    wide ticks = ((wide)units * TICKS_PER_SECOND + rate - 1) / rate;
    return ticks > LONGEST_TOLERANCE ? LONGEST_TOLERANCE : (uint64_t)ticks;
}

uint64_t vx_bucket_cost(const vx_bucket *bucket, uint64_t units)
{
    uint64_t rate = atomic_load_explicit(&bucket->rate, memory_order_relaxed);
    return rate == 0 ? 0 : ticks_of(units, rate);
}

bool vx_bucket_admit(vx_bucket *bucket, uint64_t units, uint64_t now)
{
    uint64_t cost = vx_bucket_cost(bucket, units);
    uint64_t latest = now + atomic_load_explicit(&bucket->tolerance, memory_order_relaxed);
    uint64_t paid = atomic_load(&bucket->paid);
    do {
        if (paid > latest)
            return false;
    } while (!atomic_compare_exchange_weak(&bucket->paid, &paid, later(paid, now) + cost));
    return true;
}

void vx_bucket_refund(vx_bucket *bucket, uint64_t units)
{
    uint64_t cost = vx_bucket_cost(bucket, units), paid = atomic_load(&bucket->paid);
    /* The limit may have changed since the charge, so `paid` may be less than `cost`. */
    while (!atomic_compare_exchange_weak(&bucket->paid, &paid, paid > cost ? paid - cost : 0))
        ;
}

void vx_bucket_postpone(vx_bucket *bucket, uint64_t ticks)
{
    atomic_fetch_add(&bucket->paid, ticks);
}

void vx_bucket_skip_stall(vx_bucket *bucket, uint64_t lost, uint64_t now)
{
    uint64_t paid = atomic_load(&bucket->paid);
    while (!atomic_compare_exchange_weak(&bucket->paid, &paid, later(paid + lost, now)))
        ;
}

uint64_t vx_bucket_reserve(vx_bucket *bucket, uint64_t units, uint64_t from)
{
    uint64_t cost = vx_bucket_cost(bucket, units);
    uint64_t tolerance = atomic_load_explicit(&bucket->tolerance, memory_order_relaxed);
    uint64_t paid = atomic_load(&bucket->paid);
    while (!atomic_compare_exchange_weak(&bucket->paid, &paid, later(paid, from) + cost))
        ;
    return paid > from + tolerance ? paid - tolerance : from;
}

uint64_t vx_bucket_due(const vx_bucket *bucket, uint64_t from)
{
    uint64_t tolerance = atomic_load_explicit(&bucket->tolerance, memory_order_relaxed);
    uint64_t paid = atomic_load(&bucket->paid);
    return paid > from + tolerance ? paid - tolerance : from;
}

int64_t vx_bucket_level(const vx_bucket *bucket, uint64_t now)
{
    uint64_t rate = atomic_load(&bucket->rate), paid = atomic_load(&bucket->paid);
    uint64_t tolerance = atomic_load(&bucket->tolerance);
    if (rate == 0)
        return 0;
    if (paid <= now + tolerance) {
        uint64_t saved = now + tolerance - paid;
        saved = saved < tolerance ? saved : tolerance;
        return (int64_t)((wide)saved * rate / TICKS_PER_SECOND);
    }
    return -(int64_t)((wide)(paid - now - tolerance) * rate / TICKS_PER_SECOND);
}

uint64_t vx_bucket_rescale(uint64_t ticks, uint64_t before, uint64_t after)
{
    wide scaled = ((wide)ticks * before + after - 1) / after;
    return scaled > LONGEST_TOLERANCE ? LONGEST_TOLERANCE : (uint64_t)scaled;
}

void vx_bucket_change(vx_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t saved, uint64_t now)
{
    uint64_t before = atomic_load(&bucket->rate);
    uint64_t old_tolerance = atomic_load(&bucket->tolerance);
    uint64_t tolerance = rate == 0 ? 0 : ticks_of(burst, rate);
    uint64_t paid = atomic_load(&bucket->paid), wanted;
    do {
        if (rate == 0) {
            wanted = 0;
        } else if (before == 0) {
            uint64_t mine = ticks_of(saved, rate);
            wanted = now + tolerance - (mine < tolerance ? mine : tolerance);
        } else if (paid > now + old_tolerance) { /* keep the owed units */
            wanted = now + tolerance + vx_bucket_rescale(paid - now - old_tolerance, before, rate);
        } else {
            uint64_t spare = now + old_tolerance - paid;
            wide units = (wide)(spare < old_tolerance ? spare : old_tolerance) * before / rate;
            wanted = now + tolerance - (units < tolerance ? (uint64_t)units : tolerance);
        }
    } while (!atomic_compare_exchange_weak(&bucket->paid, &paid, wanted));
    atomic_store(&bucket->tolerance, tolerance);
    atomic_store(&bucket->rate, rate);
}
