/* SPDX-License-Identifier: MIT */
#include "schedule.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bucket.h"
#include "dmclock.h"
#include "run.h"
#include "throttle.h"
#include "units.h"

#define LARGEST_HERE 65536u /* bytes of a piece that is moved on whatever thread found it due */
#define STARTS_HERE 16u     /* pieces that one thread starts in a row */

typedef struct scheduled scheduled;

struct vx_share {
    vx_dmclock_client client;
    vx_scheduler *scheduler;
    vx_share *next;
    vx_request *head, *tail;
    uint64_t last_end; /* of its latest piece */
    uint64_t facts[VX_SHARE_FACTS];
};

enum share_fact { REQUESTS, UNITS, RESERVED_UNITS, WAITING, WAITING_UNITS, WAITED_NS, BELOW };

/* A piece of a request on its way below. */
typedef struct vx_turn place;

struct vx_turn {
    vx_request piece;
    vx_job job;
    vx_timer timer;
    vx_request *request; /* NULL: work that does its own I/O */
    vx_share *share;
    vx_scheduler *scheduler;
    place *next; /* free */
};

struct vx_scheduler {
    pthread_mutex_t lock;
    _Atomic uint32_t references;
    vx_clock *clock;
    vx_pool *pool;
    vx_model *model;
    uint64_t unit;
    uint32_t depth, below;
    bool is_virtual;

    /* under the lock */
    vx_dmclock all;
    vx_share *shares;
    place *free, *places;
    bool dispatching, again; /* some thread starts pieces; another one found a reason to look again */
    vx_timer timer;          /* looks again */
    vx_job job;              /* starts further pieces */
    uint64_t waiting;                        /* requests */
    uint64_t contended_since, contended_ns;  /* somebody waits since; and waited before */
    uint64_t contended_units;
};

struct scheduled {
    vx_device device;
    vx_device *lower;
    _Atomic(vx_share *) share;
};

static void dispatch(vx_scheduler *s);

/* ---- life of a scheduler ---- */

void vx_scheduler_release(vx_scheduler *s)
{
    if (atomic_fetch_sub(&s->references, 1) != 1)
        return;
    while (s->shares != NULL) {
        vx_share *share = s->shares;
        s->shares = share->next;
        free(share);
    }
    pthread_mutex_destroy(&s->lock);
    free(s->places);
    free(s);
}

static vx_scheduler *keep(vx_scheduler *s)
{
    atomic_fetch_add(&s->references, 1);
    return s;
}

/* ---- queues, under the lock ---- */

static scheduled *device_of(const vx_request *request)
{
    return (scheduled *)request->held_by;
}

static uint64_t units_left(const vx_scheduler *s, const vx_request *request)
{
    return vx_units_of(request->operation, request->length - request->done, s->unit);
}

static void note_contention(vx_scheduler *s, uint64_t now)
{
    if (s->contended_since != 0 && now > s->contended_since)
        s->contended_ns += now - s->contended_since;
    s->contended_since = s->waiting > 0 ? now : 0;
}

static void enqueue(vx_scheduler *s, vx_share *share, vx_request *request, bool front, uint64_t now)
{
    bool was_idle = share->head == NULL;
    if (front) {
        request->next = share->head;
        share->head = request;
        if (share->tail == NULL)
            share->tail = request;
    } else {
        request->next = NULL;
        if (was_idle)
            share->head = request;
        else
            share->tail->next = request;
        share->tail = request;
    }
    share->facts[WAITING]++;
    share->facts[WAITING_UNITS] += units_left(s, request);
    request->held_since = now;
    s->waiting++;
    note_contention(s, now);
    if (was_idle)
        vx_dmclock_begin(&s->all, &share->client, vx_ticks(now));
}

static vx_request *take(vx_scheduler *s, vx_share *share, uint64_t now)
{
    vx_request *request = share->head;
    share->head = request->next;
    if (share->head == NULL) {
        share->tail = NULL;
        vx_dmclock_end(&share->client);
    }
    request->next = NULL;
    share->facts[WAITING]--;
    share->facts[WAITING_UNITS] -= units_left(s, request);
    uint64_t waited = now > request->held_since ? now - request->held_since : 0;
    share->facts[WAITED_NS] += waited;
    request->queued_ns += waited;
    s->waiting--;
    note_contention(s, now);
    return request;
}

static uint64_t piece_length(const vx_request *request)
{
    uint64_t left = request->length - request->done;
    bool empties = request->operation == VX_ZERO || request->operation == VX_TRIM;
    uint64_t most = empties ? VX_ZERO_PIECE : VX_PIECE;
    return left <= most || request->flags & VX_FUA ? left : most;
}

static void charge(vx_scheduler *s, vx_share *share, bool reserved, const vx_request *piece,
                   uint64_t now)
{
    uint64_t units = vx_units_of(piece->operation, piece->length, s->unit);
    bool in_a_row = piece->offset == share->last_end;
    uint64_t cost = s->model == NULL ? units << 16
                                     : vx_model_cost(s->model, piece->operation, piece->length,
                                                     in_a_row, s->below);
    share->last_end = piece->offset + piece->length;
    share->facts[UNITS] += units;
    share->facts[RESERVED_UNITS] += reserved ? units : 0;
    share->facts[BELOW]++;
    if (s->waiting > 0)
        s->contended_units += units;
    vx_dmclock_serve(&s->all, &share->client, reserved, units, cost, vx_ticks(now));
}

/* A timer that is set has a reference, and its run gives it back. */
static void look_again_at(vx_scheduler *s, uint64_t when)
{
    bool was_set = vx_clock_cancel(s->clock, &s->timer);
    bool is_set = vx_clock_set(s->clock, &s->timer, when);
    if (is_set && !was_set)
        keep(s);
    /* Without memory for it: the next completion or request looks. There is one below, or comes. */
}

/* The next piece that may go, in its place; NULL: none now. */
static place *next_piece(vx_scheduler *s)
{
    bool reserved;
    uint64_t now = vx_clock_now(s->clock), when;
    if (s->below == s->depth)
        return NULL;
    vx_dmclock_client *client = vx_dmclock_choose(&s->all, vx_ticks(now), &reserved, &when);
    if (client == NULL) {
        if (when != UINT64_MAX)
            look_again_at(s, vx_ns_of_ticks(when));
        return NULL;
    }
    vx_share *share = (vx_share *)client;
    vx_request *request = take(s, share, now);
    place *p = s->free;
    s->free = p->next;
    s->below++;
    uint64_t length = piece_length(request);
    bool moves = request->operation <= VX_WRITE;
    vx_request_child(&p->piece, request, request->operation, request->offset + request->done, length,
                     moves ? request->buffer + request->done : NULL);
    p->piece.memo = NULL; /* it belonged to whoever submitted the request */
    p->request = request;
    p->share = share;
    charge(s, share, reserved, &p->piece, now);
    return p;
}

/* ---- pieces, without the lock ---- */

/* Takes what a piece brought into its request. True: the rest of it has yet to go. */
static bool adopt(place *p)
{
    vx_request *request = p->request;
    if (request == NULL)
        return false;
    p->piece.not_before_ns = 0; /* that has passed */
    vx_request_adopt(request, &p->piece);
    request->done += p->piece.length;
    return request->result == 0 && request->done < request->length;
}

/* Its place is free; the rest of its request waits again, or the request is done. */
static void end(place *p)
{
    vx_scheduler *s = p->scheduler;
    vx_request *request = p->request;
    pthread_mutex_lock(&s->lock);
    bool more = adopt(p);
    p->share->facts[BELOW]--;
    if (more)
        enqueue(s, p->share, request, true, vx_clock_now(s->clock));
    else
        p->share->facts[REQUESTS]++;
    p->next = s->free;
    s->free = p;
    s->below--;
    pthread_mutex_unlock(&s->lock);
    if (!more && request != NULL) {
        vx_device *device = request->held_by;
        request->complete(request);
        vx_device_release(device);
    }
    dispatch(s);
    vx_scheduler_release(s);
}

static void on_piece_time(vx_timer *timer)
{
    end((place *)((char *)timer - offsetof(place, timer)));
}

static void answered(place *p)
{
    vx_scheduler *s = p->scheduler;
    uint64_t until = p->piece.not_before_ns;
    if (until <= vx_clock_now(s->clock) || !vx_clock_set(s->clock, &p->timer, until))
        end(p);
}

static void completed(vx_request *piece)
{
    answered(piece->context);
}

static void run_piece(vx_job *job)
{
    place *p = (place *)((char *)job - offsetof(place, job));
    p->piece.flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    if (vx_run(device_of(p->request)->lower, &p->piece) == VX_DONE)
        answered(p);
}

static void start(place *p)
{
    vx_scheduler *s = p->scheduler;
    scheduled *device = device_of(p->request);
    if (device == NULL) {
        vx_request *waiting = p->request;
        waiting->context = p;
        p->request = NULL;
        waiting->complete(waiting);
        return;
    }
    p->piece.complete = completed;
    p->piece.context = p;
    p->piece.flags |= VX_NOWAIT | VX_MAY_PARK;
    bool large = p->piece.operation <= VX_WRITE && p->piece.length > LARGEST_HERE;
    int answer = large && !s->is_virtual ? VX_AGAIN : vx_submit(device->lower, &p->piece);
    if (answer == VX_DONE) {
        answered(p);
    } else if (answer != VX_PARKED) {
        p->piece.done = 0;
        p->piece.not_before_ns = 0;
        if (s->is_virtual)
            run_piece(&p->job);
        else
            vx_pool_push(s->pool, &p->job);
    }
}

static void on_dispatch_job(vx_job *job)
{
    vx_scheduler *s = (vx_scheduler *)((char *)job - offsetof(vx_scheduler, job));
    pthread_mutex_lock(&s->lock);
    s->dispatching = false;
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    vx_scheduler_release(s);
}

/* Starts what may go. One thread at a time does, and hands over after a while: it has other work. */
static void dispatch(vx_scheduler *s)
{
    unsigned started = 0;
    pthread_mutex_lock(&s->lock);
    s->again = true;
    if (s->dispatching) {
        pthread_mutex_unlock(&s->lock);
        return;
    }
    s->dispatching = true;
    while (s->again) {
        place *p;
        s->again = false;
        while ((p = next_piece(s)) != NULL) {
            keep(s); /* until the piece ends */
            pthread_mutex_unlock(&s->lock);
            start(p);
            pthread_mutex_lock(&s->lock);
            if (++started >= STARTS_HERE && !s->is_virtual) {
                keep(s);
                pthread_mutex_unlock(&s->lock);
                vx_pool_push(s->pool, &s->job);
                return;
            }
        }
    }
    s->dispatching = false;
    pthread_mutex_unlock(&s->lock);
}

static void on_time(vx_timer *timer)
{
    vx_scheduler *s = (vx_scheduler *)((char *)timer - offsetof(vx_scheduler, timer));
    dispatch(s);
    vx_scheduler_release(s);
}

/* ---- devices ---- */

static int schedule_submit(vx_device *device, vx_request *request)
{
    scheduled *d = (scheduled *)device;
    if (request->operation == VX_FLUSH || request->operation == VX_EXTENTS || request->length == 0)
        return vx_submit(d->lower, request);
    if (request->flags & VX_NOWAIT && !(request->flags & VX_MAY_PARK))
        return VX_AGAIN;
    request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    request->held_by = vx_device_reference(device);
    request->done = 0;
    request->extent_count = 0;
    vx_share *share = atomic_load(&d->share);
    vx_scheduler *s = keep(share->scheduler);
    pthread_mutex_lock(&s->lock);
    enqueue(s, share, request, false, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    vx_scheduler_release(s);
    return VX_PARKED;
}

static bool schedule_is_holding(vx_device *device)
{
    const vx_share *share = atomic_load(&((scheduled *)device)->share);
    pthread_mutex_lock(&share->scheduler->lock);
    bool holding = share->head != NULL;
    pthread_mutex_unlock(&share->scheduler->lock);
    return holding;
}

static void schedule_destroy(vx_device *device)
{
    scheduled *d = (scheduled *)device;
    vx_scheduler_release(atomic_load(&d->share)->scheduler);
    vx_device_release(d->lower);
    free(d);
}

static const vx_operations schedule_operations = {.kind = "schedule",
                                                  .submit = schedule_submit,
                                                  .destroy = schedule_destroy,
                                                  .is_holding = schedule_is_holding};

vx_device *vx_schedule_create(vx_device *lower, vx_share *share, uint64_t identity)
{
    scheduled *d = calloc(1, sizeof *d);
    if (d == NULL)
        return NULL;
    vx_device_initialise(&d->device, &schedule_operations, identity, NULL, 0);
    d->device.sized_by = lower;
    d->lower = vx_device_reference(lower);
    keep(share->scheduler);
    atomic_init(&d->share, share);
    return &d->device;
}

void vx_schedule_set_share(vx_device *device, vx_share *share)
{
    atomic_store(&((scheduled *)device)->share, share);
}

/* ---- turns ---- */

typedef struct turn {
    vx_request request;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool came;
} turn;

static void turn_came(vx_request *request)
{
    turn *t = (turn *)request;
    pthread_mutex_lock(&t->lock);
    t->came = true;
    pthread_cond_signal(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

vx_turn *vx_share_take_turn(vx_share *share, uint64_t bytes)
{
    vx_scheduler *s = share->scheduler;
    turn t = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    t.request.operation = VX_READ;
    t.request.length = bytes == 0 ? 1 : bytes < VX_PIECE ? bytes : VX_PIECE;
    t.request.complete = turn_came;
    pthread_mutex_lock(&s->lock);
    enqueue(s, share, &t.request, false, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    pthread_mutex_lock(&t.lock);
    while (!t.came)
        pthread_cond_wait(&t.changed, &t.lock);
    pthread_mutex_unlock(&t.lock);
    pthread_mutex_destroy(&t.lock);
    pthread_cond_destroy(&t.changed);
    return t.request.context;
}

void vx_turn_end(vx_turn *taken)
{
    end(taken);
}

/* ---- shares and facts ---- */

vx_share *vx_share_create(vx_scheduler *s)
{
    vx_share *share = calloc(1, sizeof *share);
    if (share == NULL)
        return NULL;
    share->scheduler = s;
    pthread_mutex_lock(&s->lock);
    vx_dmclock_set(&s->all, &share->client, 0, 0, 1, vx_ticks(vx_clock_now(s->clock)));
    share->next = s->shares;
    s->shares = share;
    pthread_mutex_unlock(&s->lock);
    return share;
}

void vx_share_set(vx_share *share, uint64_t reservation, uint64_t limit, uint64_t weight)
{
    vx_scheduler *s = share->scheduler;
    pthread_mutex_lock(&s->lock);
    vx_dmclock_set(&s->all, &share->client, reservation, limit, weight,
                   vx_ticks(vx_clock_now(s->clock)));
    pthread_mutex_unlock(&s->lock);
    dispatch(s); /* a limit may be gone */
}

void vx_share_read(vx_share *share, uint64_t *facts)
{
    pthread_mutex_lock(&share->scheduler->lock);
    memcpy(facts, share->facts, sizeof share->facts);
    pthread_mutex_unlock(&share->scheduler->lock);
}

void vx_scheduler_read(vx_scheduler *s, uint64_t *facts)
{
    pthread_mutex_lock(&s->lock);
    note_contention(s, vx_clock_now(s->clock));
    facts[0] = s->contended_ns;
    facts[1] = s->contended_units;
    facts[2] = s->waiting;
    facts[3] = s->below;
    pthread_mutex_unlock(&s->lock);
}

vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model)
{
    vx_scheduler *s = calloc(1, sizeof *s);
    if (s == NULL || (s->places = calloc(depth, sizeof *s->places)) == NULL) {
        free(s);
        return NULL;
    }
    pthread_mutex_init(&s->lock, NULL);
    atomic_init(&s->references, 1);
    s->clock = clock;
    s->pool = pool;
    s->unit = unit;
    s->depth = depth;
    s->model = model;
    s->is_virtual = vx_clock_is_virtual(clock);
    s->timer.run = on_time;
    s->job.run = on_dispatch_job;
    for (uint32_t i = 0; i < depth; i++) {
        s->places[i].scheduler = s;
        s->places[i].job.run = run_piece;
        s->places[i].timer.run = on_piece_time;
        s->places[i].next = s->free;
        s->free = &s->places[i];
    }
    return s;
}
