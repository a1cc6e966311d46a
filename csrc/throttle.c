/* SPDX-License-Identifier: MIT */
#include "throttle.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bucket.h"
#include "run.h"
#include "units.h"

#define BUCKETS (2u * VX_LIMIT_KINDS) /* for each kind its rate, and the rate of spending credit */
#define SETS 2u

typedef struct flow flow;

struct vx_qos {
    pthread_mutex_t lock;
    vx_clock *clock;
    vx_pool *pool;
    vx_limits *limits; /* all of them */
    flow *flows;       /* under lock: those with a request that waits */
};

struct vx_limits {
    vx_qos *qos;
    vx_limits *next;
    uint64_t unit;
    _Atomic uint32_t active[2]; /* of reads and of writes: which buckets limit */
    vx_bucket buckets[BUCKETS];
};

struct flow {
    vx_device device;
    vx_device *lower;
    vx_qos *qos;
    _Atomic(vx_limits *) sets[SETS];
    _Atomic uint32_t waiting; /* requests; changed under the lock */
    _Atomic bool hurried;

    /* under the lock of the domain */
    vx_request *head, *tail;
    uint64_t paid_bytes;  /* of the head: so much of it is paid for */
    uint64_t due;         /* ticks: when what is paid for may pass */
    uint64_t due_by[SETS][BUCKETS];
    uint64_t waiting_units;
    vx_timer timer; /* set, or running, as long as something waits */
    flow *next, **link;
};

typedef struct released {
    vx_job job;
    flow *flow;
    vx_request *request;
} released;

/* ---- what a request costs ---- */

static unsigned direction_of(uint32_t operation)
{
    return operation == VX_READ ? 0 : 1;
}

static bool is_free(uint32_t operation)
{
    return operation == VX_FLUSH || operation == VX_EXTENTS;
}

/* What `length` bytes of an operation take out of a bucket. */
static uint64_t amount(const vx_limits *limits, unsigned bucket, uint32_t operation,
                       uint64_t length)
{
    if (bucket % VX_LIMIT_KINDS < VX_LIMIT_BYTES)
        return vx_units_of(operation, length, limits->unit);
    return operation == VX_ZERO || operation == VX_TRIM ? 0 : length;
}

static uint32_t active_of(const vx_limits *limits, uint32_t operation)
{
    return limits == NULL ? 0
                          : atomic_load_explicit(&limits->active[direction_of(operation)],
                                                 memory_order_relaxed);
}

/* ---- without a lock ---- */

static void refund(vx_limits *limits, uint32_t charged, const vx_request *request)
{
    for (unsigned b = 0; charged >> b != 0; b++)
        if (charged >> b & 1)
            vx_bucket_refund(&limits->buckets[b],
                             amount(limits, b, request->operation, request->length));
}

/* Charges all buckets of both sets, or none. */
static bool admit(vx_limits *sets[SETS], const uint32_t active[SETS], const vx_request *request,
                  uint64_t now)
{
    for (unsigned s = 0; s < SETS; s++) {
        uint32_t charged = 0;
        for (unsigned b = 0; active[s] >> b != 0; b++) {
            if (!(active[s] >> b & 1))
                continue;
            uint64_t units = amount(sets[s], b, request->operation, request->length);
            if (!vx_bucket_admit(&sets[s]->buckets[b], units, now)) {
                refund(sets[s], charged, request);
                if (s == 1)
                    refund(sets[0], active[0], request);
                return false;
            }
            charged |= 1u << b;
        }
    }
    return true;
}

static void park(flow *f, vx_request *request);

static int throttle_submit(vx_device *device, vx_request *request)
{
    flow *f = (flow *)device;
    if (is_free(request->operation) || request->admitted || request->length == 0)
        return vx_submit(f->lower, request);
    vx_limits *sets[SETS] = {atomic_load_explicit(&f->sets[0], memory_order_acquire),
                             atomic_load_explicit(&f->sets[1], memory_order_acquire)};
    const uint32_t active[SETS] = {active_of(sets[0], request->operation),
                                   active_of(sets[1], request->operation)};
    if (((active[0] | active[1]) == 0 && atomic_load(&f->waiting) == 0) ||
        atomic_load_explicit(&f->hurried, memory_order_relaxed))
        return vx_submit(f->lower, request);
    if (request->length <= VX_PIECE && atomic_load(&f->waiting) == 0 &&
        admit(sets, active, request, vx_ticks(vx_clock_now(f->qos->clock)))) {
        int answer = vx_submit(f->lower, request);
        if (answer != VX_AGAIN && answer != VX_FAULTED) /* parked: it may be gone */
            return answer;
        if (request->flags & VX_NOWAIT) { /* it comes again as another request, and pays then */
            refund(sets[0], active[0], request);
            refund(sets[1], active[1], request);
        } else {
            request->admitted = true;
        }
        return answer;
    }
    if (request->flags & VX_NOWAIT && !(request->flags & VX_MAY_PARK))
        return VX_AGAIN;
    park(f, request);
    return VX_PARKED;
}

/* ---- under the lock: what waits ---- */

/* Pays for `length` bytes as of `from`; ticks at which they may pass. */
static uint64_t reserve(flow *f, uint32_t operation, uint64_t length, uint64_t from)
{
    uint64_t due = from;
    memset(f->due_by, 0, sizeof f->due_by);
    for (unsigned s = 0; s < SETS; s++) {
        vx_limits *limits = atomic_load(&f->sets[s]);
        uint32_t active = active_of(limits, operation);
        for (unsigned b = 0; active >> b != 0; b++) {
            if (!(active >> b & 1))
                continue;
            uint64_t units = amount(limits, b, operation, length);
            f->due_by[s][b] = vx_bucket_reserve(&limits->buckets[b], units, from);
            if (f->due_by[s][b] > due)
                due = f->due_by[s][b];
        }
    }
    /* A bucket that would have let it pass sooner has not been idle until then. */
    for (unsigned s = 0; s < SETS; s++) {
        vx_limits *limits = atomic_load(&f->sets[s]);
        for (unsigned b = 0; b < BUCKETS; b++)
            if (f->due_by[s][b] != 0 && f->due_by[s][b] < due)
                vx_bucket_postpone(&limits->buckets[b], amount(limits, b, operation, length), due);
    }
    return due;
}

static void unlink_flow(flow *f)
{
    if (f->link == NULL)
        return;
    *f->link = f->next;
    if (f->next != NULL)
        f->next->link = f->link;
    f->link = NULL;
}

static void link_flow(flow *f)
{
    if (f->link != NULL)
        return;
    f->next = f->qos->flows;
    f->link = &f->qos->flows;
    if (f->next != NULL)
        f->next->link = &f->next;
    f->qos->flows = f;
}

/* Takes out what may pass at `now`, oldest first, and sets the timer for the rest. */
static vx_request *take_due(flow *f, uint64_t now)
{
    vx_request *first = NULL, **last = &first;
    bool hurried = atomic_load(&f->hurried);
    while (f->head != NULL) {
        vx_request *request = f->head;
        while (f->due <= now || hurried) {
            if (f->paid_bytes == request->length)
                break;
            uint64_t piece = request->length - f->paid_bytes;
            bool whole = request->operation == VX_ZERO || request->operation == VX_TRIM;
            if (piece > VX_PIECE && !whole)
                piece = VX_PIECE;
            uint64_t arrived = vx_ticks(request->arrived_ns);
            f->due = reserve(f, request->operation, piece, arrived > f->due ? arrived : f->due);
            f->paid_bytes += piece;
        }
        if (f->due > now && !hurried)
            break;
        f->head = request->next;
        f->paid_bytes = 0;
        f->waiting_units -= vx_units_of(request->operation, request->length,
                                     atomic_load(&f->sets[0])->unit);
        uint64_t now_ns = vx_ns_of_ticks(now);
        request->queued_ns = now_ns > request->arrived_ns ? now_ns - request->arrived_ns : 0;
        request->next = NULL;
        *last = request;
        last = &request->next;
        atomic_fetch_sub(&f->waiting, 1);
    }
    if (f->head == NULL) {
        f->tail = NULL;
        unlink_flow(f);
        vx_clock_cancel(f->qos->clock, &f->timer);
    } else if (!vx_clock_set(f->qos->clock, &f->timer, vx_ns_of_ticks(f->due))) {
        atomic_store(&f->hurried, true); /* no memory for a timer: late beats never */
        *last = take_due(f, now);
    }
    return first;
}

static void finish(flow *f, vx_request *request)
{
    request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    if (vx_run(&f->device, request) == VX_DONE)
        request->complete(request);
}

static void run_released(vx_job *job)
{
    released *work = (released *)job;
    flow *f = work->flow;
    finish(f, work->request);
    free(work);
    vx_device_release(&f->device);
}

/* Lets requests pass on a thread that must not block: what would is the pool's. */
static void pass_on(flow *f, vx_request *request)
{
    while (request != NULL) {
        vx_request *next = request->next;
        request->next = NULL;
        request->memo = NULL;
        request->admitted = true;
        uint64_t done = request->done;
        request->flags |= VX_NOWAIT;
        int answer = vx_submit(f->lower, request);
        if (answer == VX_DONE) {
            request->complete(request);
        } else if (answer != VX_PARKED) {
            request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
            request->done = done;
            request->extent_count = 0;
            request->not_before_ns = 0;
            released *work = malloc(sizeof *work);
            if (work != NULL) {
                *work = (released){.job.run = run_released, .flow = f, .request = request};
                vx_device_reference(&f->device);
                vx_pool_push(f->qos->pool, &work->job);
            } else {
                finish(f, request);
            }
        }
        request = next;
    }
}

static void on_time(vx_timer *timer)
{
    flow *f = (flow *)((char *)timer - offsetof(flow, timer));
    pthread_mutex_lock(&f->qos->lock);
    bool had = f->head != NULL;
    vx_request *due = take_due(f, vx_ticks(vx_clock_now(f->qos->clock)));
    bool idle = had && f->head == NULL;
    pthread_mutex_unlock(&f->qos->lock);
    pass_on(f, due);
    if (idle)
        vx_device_release(&f->device);
}

static void park(flow *f, vx_request *request)
{
    request->arrived_ns = vx_clock_now(f->qos->clock);
    request->next = NULL;
    pthread_mutex_lock(&f->qos->lock);
    bool first = f->head == NULL;
    if (first)
        f->head = request;
    else
        f->tail->next = request;
    f->tail = request;
    f->waiting_units += vx_units_of(request->operation, request->length,
                                 atomic_load(&f->sets[0])->unit);
    atomic_fetch_add(&f->waiting, 1);
    vx_request *due = NULL;
    if (first) {
        vx_device_reference(&f->device); /* until nothing waits any more */
        link_flow(f);
        f->due = vx_ticks(request->arrived_ns);
        due = take_due(f, f->due);
    }
    bool idle = f->head == NULL;
    pthread_mutex_unlock(&f->qos->lock);
    pass_on(f, due);
    if (idle)
        vx_device_release(&f->device);
}

static void throttle_hurry(vx_device *device)
{
    flow *f = (flow *)device;
    pthread_mutex_lock(&f->qos->lock);
    atomic_store(&f->hurried, true);
    if (f->head != NULL)
        vx_clock_set(f->qos->clock, &f->timer, vx_clock_now(f->qos->clock));
    pthread_mutex_unlock(&f->qos->lock);
}

void vx_throttle_waiting(vx_device *device, uint64_t *requests, uint64_t *units)
{
    flow *f = (flow *)device;
    pthread_mutex_lock(&f->qos->lock);
    *requests = atomic_load(&f->waiting);
    *units = f->waiting_units;
    pthread_mutex_unlock(&f->qos->lock);
}

/* ---- limits ---- */

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

/* What waits at `bucket` of `limits` waits for as many units as before. */
static void retime(vx_limits *limits, unsigned bucket, uint64_t before, uint64_t after,
                   uint64_t now)
{
    for (flow *f = limits->qos->flows; f != NULL; f = f->next) {
        for (unsigned s = 0; s < SETS; s++) {
            uint64_t *due = &f->due_by[s][bucket];
            if (atomic_load(&f->sets[s]) != limits || *due <= now)
                continue;
            unsigned __int128 rest = (unsigned __int128)(*due - now) * before;
            *due = after == 0 ? now : now + (uint64_t)((rest + after - 1) / after);
        }
    }
}

static void set_timers(vx_qos *qos, uint64_t now)
{
    for (flow *f = qos->flows; f != NULL; f = f->next) {
        uint64_t due = now;
        for (unsigned s = 0; s < SETS; s++)
            for (unsigned b = 0; b < BUCKETS; b++)
                if (f->due_by[s][b] > due)
                    due = f->due_by[s][b];
        if (f->due > now && f->due != due) {
            f->due = due;
            vx_clock_set(qos->clock, &f->timer, vx_ns_of_ticks(due));
        }
    }
}

static void change(vx_limits *limits, unsigned bucket, uint64_t rate, uint64_t burst, bool fresh,
                   uint64_t now)
{
    vx_bucket *mine = &limits->buckets[bucket];
    uint64_t before = atomic_load(&mine->rate);
    vx_bucket_change(mine, rate, burst, fresh ? burst : 0, now);
    if (before != 0 && before != rate)
        retime(limits, bucket, before, rate, now);
}

void vx_limits_set(vx_limits *limits, const vx_limit *wanted, bool fresh)
{
    static const unsigned directions[VX_LIMIT_KINDS] = {3, 1, 2, 3, 1, 2}; /* 1 reads, 2 writes */
    vx_qos *qos = limits->qos;
    pthread_mutex_lock(&qos->lock);
    uint64_t now = vx_ticks(vx_clock_now(qos->clock));
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
    set_timers(qos, now);
    pthread_mutex_unlock(&qos->lock);
}

void vx_limits_levels(vx_limits *limits, int64_t *levels)
{
    uint64_t now = vx_ticks(vx_clock_now(limits->qos->clock));
    for (unsigned kind = 0; kind < VX_LIMIT_KINDS; kind++)
        levels[kind] = vx_bucket_level(&limits->buckets[kind], now);
}

/* ---- life ---- */

static void throttle_destroy(vx_device *device)
{
    flow *f = (flow *)device;
    vx_device_release(f->lower);
    free(f);
}

static const vx_operations throttle_operations = {.kind = "throttle",
                                                  .submit = throttle_submit,
                                                  .destroy = throttle_destroy,
                                                  .hurry = throttle_hurry};

vx_device *vx_throttle_create(vx_device *lower, vx_qos *qos, vx_limits *own, uint64_t identity)
{
    flow *f = calloc(1, sizeof *f);
    if (f == NULL)
        return NULL;
    vx_device_initialise(&f->device, &throttle_operations, identity, NULL, 0);
    f->device.sized_by = lower;
    f->lower = vx_device_reference(lower);
    f->qos = qos;
    f->timer.run = on_time;
    atomic_init(&f->sets[0], own);
    return &f->device;
}

void vx_throttle_set_group(vx_device *device, vx_limits *group)
{
    flow *f = (flow *)device;
    pthread_mutex_lock(&f->qos->lock);
    uint64_t now = vx_ticks(vx_clock_now(f->qos->clock));
    atomic_store(&f->sets[1], group);
    memset(f->due_by[1], 0, sizeof f->due_by[1]); /* what was paid to the old one is paid */
    set_timers(f->qos, now);
    pthread_mutex_unlock(&f->qos->lock);
}

vx_qos *vx_qos_create(vx_clock *clock, vx_pool *pool)
{
    vx_qos *qos = calloc(1, sizeof *qos);
    if (qos == NULL)
        return NULL;
    qos->clock = clock;
    qos->pool = pool;
    pthread_mutex_init(&qos->lock, NULL);
    return qos;
}

void vx_qos_destroy(vx_qos *qos)
{
    while (qos->limits != NULL) {
        vx_limits *limits = qos->limits;
        qos->limits = limits->next;
        free(limits);
    }
    pthread_mutex_destroy(&qos->lock);
    free(qos);
}
