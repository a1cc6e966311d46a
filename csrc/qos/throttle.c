/* SPDX-License-Identifier: MIT */
#include <stdlib.h>

#include "core/run.h"
#include "qos/throttle_internal.h"
#include "core/units.h"

/* The most time at a limit's rate that one charge takes, or one unit if that takes longer.
 * SHARED_QUANTUM applies when other flows wait for the limit, LONE_QUANTUM when none do. */
#define SHARED_QUANTUM ((uint64_t)50000u * VX_TICKS_PER_NS)
#define LONE_QUANTUM ((uint64_t)100000000u * VX_TICKS_PER_NS)

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

/* The amount that `length` bytes of an operation are charged to a bucket: units or bytes. */
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

static uint64_t piece_of(const flow *f, uint32_t operation)
{
    return vx_piece_of(operation, atomic_load_explicit(&f->sets[0], memory_order_relaxed)->unit);
}

/* ---- without a lock ---- */

static void refund(vx_limits *limits, uint32_t charged, uint32_t operation, uint64_t length)
{
    for (unsigned b = 0; charged >> b != 0; b++)
        if (charged >> b & 1)
            vx_bucket_refund(&limits->buckets[b], amount(limits, b, operation, length));
}

/* Charges all active buckets of both sets, or none of them. */
static bool admit(vx_limits *sets[SETS], const uint32_t active[SETS], vx_request *request,
                  uint64_t now)
{
    for (unsigned s = 0; s < SETS; s++) {
        uint32_t charged = 0;
        for (unsigned b = 0; active[s] >> b != 0; b++) {
            if (!(active[s] >> b & 1))
                continue;
            uint64_t units = amount(sets[s], b, request->operation, request->length);
            if (!vx_bucket_admit(&sets[s]->buckets[b], units, now)) {
                refund(sets[s], charged, request->operation, request->length);
                if (s == 1)
                    refund(sets[0], active[0], request->operation, request->length);
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
    if (is_free(request->operation) || throttle_frame_of(request)->admitted || request->length == 0)
        return vx_submit(f->lower, request);
    vx_limits *sets[SETS] = {atomic_load_explicit(&f->sets[0], memory_order_acquire),
                             atomic_load_explicit(&f->sets[1], memory_order_acquire)};
    const uint32_t active[SETS] = {active_of(sets[0], request->operation),
                                   active_of(sets[1], request->operation)};
    if (((active[0] | active[1]) == 0 && atomic_load(&f->waiting) == 0) ||
        atomic_load_explicit(&f->draining, memory_order_relaxed) == PASS)
        return vx_submit(f->lower, request);
    uint64_t now = vx_ticks(vx_clock_now(f->qos->clock));
    throttle_notice(f->qos, now);
    if (request->length <= piece_of(f, request->operation) && atomic_load(&f->waiting) == 0 &&
        admit(sets, active, request, now)) {
        int answer = vx_submit(f->lower, request);
        if (answer != VX_AGAIN && answer != VX_FAULTED) /* a parked request may be gone already */
            return answer;
        if (request->flags & VX_NOWAIT) { /* it is submitted again later, and pays then */
            for (unsigned s = 0; s < SETS; s++)
                refund(sets[s], active[s], request->operation, request->length);
        } else {
            throttle_frame_of(request)->admitted = true;
        }
        return answer;
    }
    if (request->flags & VX_NOWAIT && !(request->flags & VX_MAY_PARK))
        return VX_AGAIN;
    park(f, request);
    return VX_PARKED;
}

/* ---- under the lock: waiting requests ---- */

/* Charges the piece, as of `from`, to the unpaid bucket that would release it last. If that bucket
 * releases it later than `from`, returns the time (ticks); else goes on with the next bucket. Returns
 * `from` when every bucket is paid. */
static uint64_t pay(flow *f, uint32_t operation, uint64_t from)
{
    for (;;) {
        vx_limits *set = NULL;
        unsigned bucket = 0, where = 0;
        uint64_t last = 0;
        for (unsigned s = 0; s < SETS; s++) {
            vx_limits *limits = atomic_load(&f->sets[s]);
            for (unsigned b = 0; f->unpaid[s] >> b != 0; b++) {
                if (!(f->unpaid[s] >> b & 1))
                    continue;
                uint64_t due = vx_bucket_due(&limits->buckets[b], from);
                if (set == NULL || due > last) {
                    set = limits;
                    bucket = b;
                    where = s;
                    last = due;
                }
            }
        }
        if (set == NULL)
            return from;
        uint64_t due = vx_bucket_reserve(&set->buckets[bucket],
                                         amount(set, bucket, operation, f->piece), from);
        f->unpaid[where] &= ~(1u << bucket);
        f->paid[where] |= 1u << bucket;
        f->due_set = set;
        f->due_bucket = bucket;
        if (due > from)
            return due;
    }
}

/* Counts the flow as waiting for set `s` of its limits, or as no longer waiting. */
static void count_flow(const flow *f, unsigned s, bool waits)
{
    vx_limits *limits = atomic_load(&f->sets[s]);
    if (limits != NULL)
        limits->waiting += waits ? 1 : (uint32_t)-1;
}

static void unlink_flow(flow *f)
{
    if (f->link == NULL)
        return;
    for (unsigned s = 0; s < SETS; s++)
        count_flow(f, s, false);
    *f->link = f->next;
    if (f->next != NULL)
        f->next->link = f->link;
    f->link = NULL;
}

static void link_flow(flow *f)
{
    if (f->link != NULL)
        return;
    for (unsigned s = 0; s < SETS; s++)
        count_flow(f, s, true);
    f->next = f->qos->flows;
    f->link = &f->qos->flows;
    if (f->next != NULL)
        f->next->link = &f->next;
    f->qos->flows = f;
}

static vx_request *take_head(flow *f, uint64_t now)
{
    vx_request *request = f->head;
    uint64_t now_ns = vx_ns_of_ticks(now);
    f->head = request->next;
    f->paid_bytes = 0;
    f->waiting_units -= vx_units_of(request->operation, request->length,
                                    atomic_load(&f->sets[0])->unit);
    uint64_t arrived_ns = throttle_frame_of(request)->arrived_ns;
    request->queued_ns = now_ns > arrived_ns ? now_ns - arrived_ns : 0;
    request->next = NULL;
    atomic_fetch_sub(&f->waiting, 1);
    return request;
}

static bool is_shared(const flow *f)
{
    for (unsigned s = 0; s < SETS; s++)
        if (atomic_load(&f->sets[s]) != NULL && atomic_load(&f->sets[s])->waiting > 1)
            return true;
    return false;
}

static bool takes_longer(const flow *f, uint32_t operation, uint64_t length, uint64_t ticks)
{
    for (unsigned s = 0; s < SETS; s++) {
        const vx_limits *limits = atomic_load(&f->sets[s]);
        for (unsigned b = 0; active_of(limits, operation) >> b != 0; b++)
            if (active_of(limits, operation) >> b & 1 &&
                vx_bucket_cost(&limits->buckets[b], amount(limits, b, operation, length)) > ticks)
                return true;
    }
    return false;
}

/* The most bytes that the head pays for at a time; no more than a piece. */
static uint64_t quantum_of(const flow *f, uint32_t operation)
{
    uint64_t piece = piece_of(f, operation);
    uint64_t most = is_shared(f) ? SHARED_QUANTUM : LONE_QUANTUM;
    uint64_t quantum = operation <= VX_WRITE ? atomic_load(&f->sets[0])->unit : (uint64_t)1 << 20;
    while (2 * quantum <= piece && !takes_longer(f, operation, 2 * quantum, most))
        quantum *= 2;
    return quantum;
}

/* Refunds what the head has paid and not used; flows that wait behind it move up. */
static void unpay(flow *f, unsigned s, uint64_t now)
{
    vx_limits *limits = atomic_load(&f->sets[s]);
    if (f->paid[s] == 0 || f->due <= now)
        return;
    for (flow *g = f->qos->flows; g != NULL && f->due_set == limits; g = g->next) {
        if (g == f || g->due_set != limits || g->due_bucket != f->due_bucket || g->due <= f->due)
            continue;
        uint64_t cost = vx_bucket_cost(&limits->buckets[f->due_bucket],
                                       amount(limits, f->due_bucket, f->head->operation, f->piece));
        throttle_retime(g, g->due - f->due > cost ? g->due - cost : f->due);
    }
    refund(limits, f->paid[s], f->head->operation, f->piece);
    f->paid[s] = 0;
}

/* Pays for as much of the head as `now` allows; returns whether the whole request may pass. */
static bool pay_head(flow *f, uint64_t now)
{
    vx_request *request = f->head;
    while (f->due <= now) {
        if ((f->unpaid[0] | f->unpaid[1]) == 0) {
            uint64_t rest = request->length - f->paid_bytes;
            uint64_t most = quantum_of(f, request->operation);
            if (rest == 0)
                return true;
            f->piece = rest < most ? rest : most;
            f->paid_bytes += f->piece;
            for (unsigned s = 0; s < SETS; s++)
                f->unpaid[s] = active_of(atomic_load(&f->sets[s]), request->operation);
            f->paid[0] = f->paid[1] = 0;
        }
        uint64_t arrived = vx_ticks(throttle_frame_of(request)->arrived_ns);
        f->due = pay(f, request->operation, arrived > f->due ? arrived : f->due);
    }
    return false;
}

/* Takes out the requests that may pass at `now`, oldest first, and sets the timer for the rest. */
static vx_request *take_due(flow *f, uint64_t now)
{
    vx_request *first = NULL, **last = &first;
    bool all = atomic_load(&f->draining) != HOLD;
    for (;;) {
        while (f->head != NULL && (all || pay_head(f, now))) {
            *last = take_head(f, now);
            last = &(*last)->next;
        }
        if (f->head == NULL || vx_clock_set(f->qos->clock, &f->timer, vx_ns_of_ticks(f->due)))
            break;
        all = true; /* no memory for a timer: waiting requests pass early rather than never */
    }
    if (f->head == NULL) {
        f->tail = NULL;
        f->unpaid[0] = f->unpaid[1] = 0;
        unlink_flow(f);
        vx_clock_cancel(f->qos->clock, &f->timer);
    }
    return first;
}

static void finish(flow *f, vx_request *request)
{
    request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    /* Fail it here: a lower device that has already dropped this client could park it. */
    bool drops = atomic_load(&f->draining) == DROP;
    int answer = drops ? vx_fail(&f->device, request, VX_E_CANCELLED, 0, request->offset)
                       : vx_run(&f->device, request);
    if (answer == VX_DONE)
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

/* Submits the request if it is small enough to run on this thread; it must not block. */
static int try_now(flow *f, vx_request *request)
{
    bool large = request->operation <= VX_WRITE && request->length > f->qos->largest_on_clock;
    if (atomic_load(&f->draining) == DROP)
        return vx_fail(&f->device, request, VX_E_CANCELLED, 0, request->offset);
    request->flags |= VX_NOWAIT;
    return large ? VX_AGAIN : vx_submit(f->lower, request);
}

/* Passes requests on from a thread that must not block; those that would block go to the pool. */
static void pass_on(flow *f, vx_request *request)
{
    while (request != NULL) {
        vx_request *next = request->next;
        request->next = NULL;
        request->memo = NULL;
        throttle_frame_of(request)->admitted = true;
        uint64_t done = request->done;
        int answer = try_now(f, request);
        if (answer == VX_DONE) {
            request->complete(request);
        } else if (answer != VX_PARKED) {
            vx_request_again(request, done);
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

/* Handles a stall: the timer fired `lost` ticks after the head was due. If the piece costs more
 * than that, its payment stands, and the bucket and the flows behind it are postponed by `lost`.
 * Otherwise the payment is lost and the piece pays again. The stall detector has already taken the
 * lost time from buckets that save credit. */
static void pay_again(flow *f, uint64_t now)
{
    uint64_t lost = now - f->due;
    for (unsigned s = 0; s < SETS; s++) {
        vx_limits *limits = atomic_load(&f->sets[s]);
        if (limits == NULL || f->due_set != limits ||
            !(active_of(limits, f->head->operation) >> f->due_bucket & 1))
            continue;
        vx_bucket *bucket = &limits->buckets[f->due_bucket];
        if (throttle_saves(bucket) && limits->saves_since[f->due_bucket] <= f->due)
            continue;
        uint64_t units = amount(limits, f->due_bucket, f->head->operation, f->piece);
        if (lost >= vx_bucket_cost(bucket, units)) {
            f->unpaid[s] |= 1u << f->due_bucket;
            f->paid[s] &= ~(1u << f->due_bucket); /* not refunded */
            continue;
        }
        vx_bucket_postpone(bucket, lost);
        for (flow *g = f->qos->flows; g != NULL; g = g->next)
            if (g != f && g->due_set == limits && g->due_bucket == f->due_bucket && g->due > f->due)
                throttle_retime(g, g->due + lost);
    }
    f->due = now;
}

static void on_time(vx_timer *timer)
{
    flow *f = (flow *)((char *)timer - offsetof(flow, timer));
    uint64_t now = throttle_lock(f->qos);
    bool had = f->head != NULL;
    if (had && now > f->due + LATE)
        pay_again(f, now);
    vx_request *due = take_due(f, now);
    bool idle = had && f->head == NULL;
    pthread_mutex_unlock(&f->qos->lock);
    pass_on(f, due);
    if (idle)
        vx_device_release(&f->device);
}

static void park(flow *f, vx_request *request)
{
    request->next = NULL;
    uint64_t now = throttle_lock(f->qos);
    throttle_frame_of(request)->arrived_ns = vx_ns_of_ticks(now);
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
        vx_device_reference(&f->device); /* until no request waits any more */
        link_flow(f);
        f->due = now;
        due = take_due(f, now);
    }
    bool idle = f->head == NULL;
    pthread_mutex_unlock(&f->qos->lock);
    pass_on(f, due);
    if (idle)
        vx_device_release(&f->device);
}

static void throttle_drain(vx_device *device, bool drop)
{
    flow *f = (flow *)device;
    uint64_t now = throttle_lock(f->qos);
    atomic_store(&f->draining, drop ? DROP : PASS);
    for (unsigned s = 0; s < SETS && f->head != NULL; s++)
        unpay(f, s, now);
    if (f->head != NULL)
        throttle_retime(f, 0);
    pthread_mutex_unlock(&f->qos->lock);
}

static void throttle_drop(vx_device *device, const vx_initiator *initiator)
{
    vx_device *lower = ((flow *)device)->lower;
    if (lower->operations->drop != NULL)
        lower->operations->drop(lower, initiator);
}

static bool throttle_is_holding(vx_device *device)
{
    const flow *f = (flow *)device;
    if (atomic_load_explicit(&f->waiting, memory_order_relaxed) > 0)
        return true;
    return f->lower->operations->is_holding != NULL && f->lower->operations->is_holding(f->lower);
}

static bool throttle_is_limited(vx_device *device)
{
    flow *f = (flow *)device;
    uint32_t active = 0;
    for (unsigned s = 0; s < SETS; s++) {
        const vx_limits *limits = atomic_load(&f->sets[s]);
        active |= active_of(limits, VX_READ) | active_of(limits, VX_WRITE);
    }
    if (active != 0)
        return true;
    return f->lower->operations->is_limited != NULL && f->lower->operations->is_limited(f->lower);
}

void vx_throttle_waiting(vx_device *device, uint64_t *requests, uint64_t *units)
{
    flow *f = (flow *)device;
    pthread_mutex_lock(&f->qos->lock);
    *requests = atomic_load(&f->waiting);
    *units = f->waiting_units;
    pthread_mutex_unlock(&f->qos->lock);
}

/* ---- life ---- */

static void throttle_destroy(vx_device *device)
{
    flow *f = (flow *)device;
    vx_device_release(f->lower);
    free(f);
}

static const vx_operations throttle_operations = {.kind = "throttle",
                                                  .forwards = true,
                                                  .paces = true,
                                                  .submit = throttle_submit,
                                                  .destroy = throttle_destroy,
                                                  .drain = throttle_drain,
                                                  .drop = throttle_drop,
                                                  .is_holding = throttle_is_holding,
                                                  .is_limited = throttle_is_limited};

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
    uint64_t now = throttle_lock(f->qos);
    vx_limits *before = atomic_load(&f->sets[1]);
    if (before != group && f->head != NULL)
        unpay(f, 1, now);
    if (f->link != NULL)
        count_flow(f, 1, false);
    atomic_store(&f->sets[1], group);
    if (f->link != NULL)
        count_flow(f, 1, true);
    if (before != group && f->head != NULL) {
        f->paid[1] = 0;
        f->unpaid[1] = active_of(group, f->head->operation);
        if (f->due_set == before) {
            f->due_set = NULL;
            throttle_retime(f, now);
        }
    }
    pthread_mutex_unlock(&f->qos->lock);
}
