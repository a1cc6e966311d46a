/* SPDX-License-Identifier: MIT */
#include "core/ranges.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 1024u
#define STRIPES 32u /* locks; bucket b belongs to stripe b % STRIPES */

typedef struct bucket {
    uint32_t readers;         /* under the stripe's lock */
    uint32_t waiting_writers; /* under the stripe's lock */
    _Atomic bool written;     /* a writer holds it; changed under the stripe's lock */
} bucket;

typedef struct stripe {
    _Alignas(64) pthread_mutex_t lock;
    pthread_cond_t changed;
} stripe;

struct vx_ranges {
    stripe stripes[STRIPES];
    bucket buckets[BUCKETS];
};

/* The buckets of a range, one bit each. */
typedef struct set {
    uint64_t words[BUCKETS / 64];
} set;

vx_ranges *vx_ranges_create(void)
{
    vx_ranges *ranges = aligned_alloc(64, (sizeof *ranges + 63) / 64 * 64);
    if (ranges == NULL)
        return NULL;
    memset(ranges, 0, sizeof *ranges);
    for (uint32_t i = 0; i < STRIPES; i++) {
        pthread_mutex_init(&ranges->stripes[i].lock, NULL);
        pthread_cond_init(&ranges->stripes[i].changed, NULL);
    }
    return ranges;
}

void vx_ranges_destroy(vx_ranges *ranges)
{
    if (ranges == NULL)
        return;
    for (uint32_t i = 0; i < STRIPES; i++) {
        pthread_mutex_destroy(&ranges->stripes[i].lock);
        pthread_cond_destroy(&ranges->stripes[i].changed);
    }
    free(ranges);
}

static uint32_t bucket_of(uint64_t piece)
{
    return (uint32_t)(piece * 0x9e3779b97f4a7c15u >> 54);
}

static void buckets_of(set *found, const vx_span *spans, uint32_t count)
{
    memset(found, 0, sizeof *found);
    for (uint32_t i = 0; i < count; i++) {
        if (spans[i].count >= BUCKETS)
            memset(found, 0xff, sizeof *found);
        for (uint64_t k = 0; spans[i].count < BUCKETS && k < spans[i].count; k++) {
            uint32_t at = bucket_of(spans[i].first + k);
            found->words[at / 64] |= (uint64_t)1 << (at % 64);
        }
    }
}

static bool is_free_locked(const bucket *b, bool alone)
{
    return !atomic_load(&b->written) && (alone ? b->readers : b->waiting_writers) == 0;
}

static bool take(vx_ranges *ranges, uint32_t at, bool alone, bool nowait)
{
    bucket *b = &ranges->buckets[at];
    stripe *s = &ranges->stripes[at % STRIPES];
    pthread_mutex_lock(&s->lock);
    b->waiting_writers += alone;
    while (!nowait && !is_free_locked(b, alone))
        pthread_cond_wait(&s->changed, &s->lock);
    b->waiting_writers -= alone;
    bool taken = is_free_locked(b, alone);
    if (taken && alone)
        atomic_store(&b->written, true);
    else if (taken)
        b->readers++;
    pthread_mutex_unlock(&s->lock);
    return taken;
}

static void give_back(vx_ranges *ranges, uint32_t at, bool alone)
{
    bucket *b = &ranges->buckets[at];
    stripe *s = &ranges->stripes[at % STRIPES];
    pthread_mutex_lock(&s->lock);
    if (alone)
        atomic_store(&b->written, false);
    else
        b->readers--;
    if (alone || b->readers == 0)
        pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

/* Gives back the buckets of `held` below `end`. */
static void give_back_all(vx_ranges *ranges, const set *held, uint32_t end, bool alone)
{
    for (uint32_t word = 0; word < BUCKETS / 64; word++)
        for (uint64_t bits = held->words[word]; bits != 0; bits &= bits - 1) {
            uint32_t at = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (at < end)
                give_back(ranges, at, alone);
        }
}

bool vx_ranges_enter(vx_ranges *ranges, const vx_span *spans, uint32_t count, bool alone, bool nowait)
{
    set wanted;
    buckets_of(&wanted, spans, count);
    for (uint32_t word = 0; word < BUCKETS / 64; word++)
        for (uint64_t bits = wanted.words[word]; bits != 0; bits &= bits - 1) {
            uint32_t at = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (take(ranges, at, alone, nowait))
                continue;
            give_back_all(ranges, &wanted, at, alone);
            return false;
        }
    return true;
}

void vx_ranges_leave(vx_ranges *ranges, const vx_span *spans, uint32_t count, bool alone)
{
    set held;
    buckets_of(&held, spans, count);
    give_back_all(ranges, &held, BUCKETS, alone);
}

bool vx_ranges_is_busy(const vx_ranges *ranges, uint64_t piece)
{
    return atomic_load_explicit(&ranges->buckets[bucket_of(piece)].written, memory_order_acquire);
}
