/* SPDX-License-Identifier: MIT */
#include <stdlib.h>

#include "qos/throttle_internal.h"
#include "core/units.h"

vx_limits *vx_limits_create(vx_qos *qos, uint32_t unit)
{
    vx_limits *limits = calloc(1, sizeof *limits);
    if (limits == NULL)
        return NULL;
    limits->qos = qos;
    limits->unit = unit;
    pthread_mutex_lock(&qos->lock);
    limits->next = qos->limits;
    qos->limits = limits;
    pthread_mutex_unlock(&qos->lock);
    return limits;
}

/* Retimes the flows that wait for `bucket` of `limits`: each waits for as many units as before. */
static void retime_all(vx_limits *limits, unsigned bucket, uint64_t before, uint64_t after,
                       uint64_t now)
{
    for (flow *f = limits->qos->flows; f != NULL; f = f->next) {
        if (f->due_set != limits || f->due_bucket != bucket || f->due <= now)
            continue;
        throttle_retime(f, after == 0 ? now : now + vx_bucket_rescale(f->due - now, before, after));
    }
}

static void change(vx_limits *limits, unsigned bucket, uint64_t rate, uint64_t burst, bool fresh,
                   uint64_t now)
{
    vx_bucket *mine = &limits->buckets[bucket];
    uint64_t before = atomic_load(&mine->rate);
    bool saved = throttle_saves(mine);
    vx_bucket_change(mine, rate, burst, fresh ? burst : 0, now);
    if (!saved)
        limits->saves_since[bucket] = now;
    if (before != 0 && before != rate)
        retime_all(limits, bucket, before, rate, now);
}

void vx_limits_set(vx_limits *limits, const vx_limit *wanted, bool fresh)
{
    static const unsigned directions[VX_LIMIT_KINDS] = {3, 1, 2, 3, 1, 2}; /* 1 reads, 2 writes */
    vx_qos *qos = limits->qos;
    uint64_t now = throttle_lock(qos);
    uint32_t active[2] = {0, 0};
    for (unsigned kind = 0; kind < VX_LIMIT_KINDS; kind++) {
        const vx_limit *limit = &wanted[kind];
        bool spends = limit->rate != 0 && limit->credit != 0 && limit->credit_rate != 0;
        uint64_t most = UINT64_MAX - limit->burst;
        uint64_t saved = limit->burst + (limit->credit < most ? limit->credit : most);
        change(limits, kind, limit->rate, saved, fresh, now);
        change(limits, kind + VX_LIMIT_KINDS, spends ? limit->credit_rate : 0, limit->burst, true,
               now);
        uint32_t bits = (limit->rate != 0 ? 1u << kind : 0) |
                        (spends ? 1u << (kind + VX_LIMIT_KINDS) : 0);
        for (unsigned d = 0; d < 2; d++)
            if (directions[kind] >> d & 1)
                active[d] |= bits;
    }
    for (unsigned d = 0; d < 2; d++)
        atomic_store(&limits->active[d], active[d]);
    pthread_mutex_unlock(&qos->lock);
    throttle_stall_detector_begin(qos->stalls);
}

void vx_limits_levels(vx_limits *limits, int64_t *levels)
{
    uint64_t now = throttle_lock(limits->qos);
    for (unsigned kind = 0; kind < VX_LIMIT_KINDS; kind++)
        levels[kind] = vx_bucket_level(&limits->buckets[kind], now);
    pthread_mutex_unlock(&limits->qos->lock);
}

vx_qos *vx_qos_create(vx_clock *clock, vx_pool *pool)
{
    vx_qos *qos = calloc(1, sizeof *qos);
    if (qos == NULL)
        return NULL;
    qos->clock = clock;
    qos->pool = pool;
    /* In virtual time everything runs on the thread that advances the clock. */
    qos->largest_on_clock = vx_clock_is_virtual(clock) ? UINT64_MAX : VX_QUICK_BYTES;
    pthread_mutex_init(&qos->lock, NULL);
    qos->stalls = throttle_stall_detector_create(qos);
    if (qos->stalls == NULL) {
        vx_qos_destroy(qos);
        return NULL;
    }
    return qos;
}

void vx_qos_destroy(vx_qos *qos)
{
    if (qos->stalls != NULL)
        throttle_stall_detector_end(qos->stalls);
    while (qos->limits != NULL) {
        vx_limits *limits = qos->limits;
        qos->limits = limits->next;
        free(limits);
    }
    pthread_mutex_destroy(&qos->lock);
    free(qos);
}
