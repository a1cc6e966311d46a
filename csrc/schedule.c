/* SPDX-License-Identifier: MIT */
#include "schedule.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bucket.h"
#include "dmclock.h"
#include "run.h"
#include "units.h"

#define NO_MEMORY_NS 1000000u /* after which it is tried again */
#define STARTS_HERE 16u     /* pieces that one thread starts in a row */

typedef struct scheduled scheduled;

struct vx_share {
    vx_dmclock_client client;
    vx_scheduler *scheduler;
    vx_share *next;
    vx_request *head, *tail;
    const vx_device *last_device; /* of its latest piece, */
    uint64_t last_end;            /* and where that ended */
    uint64_t facts[VX_SHARE_FACTS];
    _Atomic uint32_t waiting; /* requests; changed under the lock */
    _Atomic bool has_reservation;
};

enum share_fact { REQUESTS, UNITS, RESERVED_UNITS, WAITING, WAITING_UNITS, WAITED_NS, BELOW };

/* A piece of a request on its way below, or a turn of work that does its own I/O. */
typedef struct vx_turn place;

struct vx_turn {
    vx_request piece;
    vx_job job;
    vx_timer timer;
    vx_request *request; /* NULL: work that does its own I/O */
    vx_share *share;
    vx_scheduler *scheduler;
    place *next; /* free */
    /* under the lock */
    uint32_t submitters; /* threads that hand the piece down, and still look at this */
    bool ended;          /* the last of them frees it */
    bool counts;         /* as one of those below; what is parked there does not */
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
    place *free;
    bool dispatching, again; /* some thread starts pieces; another one found a reason to look again */
    bool handed_over;        /* the job is the pool's */
    bool stopping;
    uint64_t armed_for;      /* ns: when the timer runs; 0: it is not set */
    vx_timer timer;          /* looks again */
    vx_job job;              /* starts further pieces */
    uint64_t waiting;                        /* requests */
    uint64_t contended_since, contended_ns;  /* somebody waits for a place since; and did before */
    uint64_t contended_units;
};

struct scheduled {
    vx_device device;
    vx_device *lower;
    _Atomic(vx_share *) share;
};

static void dispatch(vx_scheduler *s);
static void run_piece(vx_job *job);
static void completed(vx_request *piece);
static void on_piece_time(vx_timer *timer);

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
    while (s->free != NULL) {
        place *p = s->free;
        s->free = p->next;
        free(p);
    }
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static vx_scheduler *keep(vx_scheduler *s)
{
    atomic_fetch_add(&s->references, 1);
    return s;
}

/* ---- queues, under the lock ---- */

static uint64_t units_left(const vx_scheduler *s, const vx_request *request)
{
    return vx_units_of(request->operation, request->length - request->done, s->unit);
}

static void note_contention(vx_scheduler *s, uint64_t now)
{
    if (s->contended_since != 0 && now > s->contended_since)
        s->contended_ns += now - s->contended_since;
    s->contended_since = s->waiting > 0 && s->below >= s->depth ? now : 0;
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
    atomic_fetch_add_explicit(&share->waiting, 1, memory_order_relaxed);
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
    atomic_fetch_sub_explicit(&share->waiting, 1, memory_order_relaxed);
    share->facts[WAITING_UNITS] -= units_left(s, request);
    uint64_t waited = now > request->held_since ? now - request->held_since : 0;
    share->facts[WAITED_NS] += waited;
    request->queued_ns += waited;
    s->waiting--;
    note_contention(s, now);
    return request;
}

static uint64_t piece_length(const vx_scheduler *s, const vx_request *request)
{
    uint64_t left = request->length - request->done;
    uint64_t most = vx_piece_of(request->operation, s->unit);
    return left <= most ? left : most;
}

/* A write with FUA that is cut goes without, and a flush follows its last piece. */
static bool is_flushed_after(const vx_scheduler *s, const vx_request *request)
{
    return request->flags & VX_FUA && request->length > vx_piece_of(request->operation, s->unit);
}

static uint64_t cost_of(const vx_scheduler *s, const vx_share *share, const vx_device *device,
                        const vx_request *piece, uint64_t units)
{
    if (s->model == NULL)
        return units << 4;
    bool in_a_row = device == share->last_device && piece->offset == share->last_end;
    return vx_model_cost(s->model, piece->operation, piece->length, in_a_row, s->below - 1) >> 6;
}

static void charge(vx_scheduler *s, vx_share *share, bool reserved, const vx_device *device,
                   const vx_request *piece, uint64_t now)
{
    uint64_t units = vx_units_of(piece->operation, piece->length, s->unit);
    uint64_t cost = cost_of(s, share, device, piece, units);
    share->last_device = device;
    share->last_end = piece->offset + piece->length;
    share->facts[UNITS] += units;
    share->facts[RESERVED_UNITS] += reserved ? units : 0;
    share->facts[BELOW]++;
    vx_dmclock_serve(&s->all, &share->client, reserved, units, cost, vx_ticks(now));
}

/* A timer that is set has a reference, and its run gives it back. */
static void look_again_at(vx_scheduler *s, uint64_t when)
{
    if (s->armed_for != 0 && s->armed_for <= when)
        return; /* it sets the next one then */
    bool was_set = vx_clock_cancel(s->clock, &s->timer);
    bool is_set = vx_clock_set(s->clock, &s->timer, when);
    s->armed_for = is_set ? when : 0;
    if (is_set && !was_set)
        keep(s);
    else if (was_set && !is_set)
        atomic_fetch_sub(&s->references, 1); /* never the last one: the caller has one */
    /* Without memory for it the next completion or request looks. */
}

static place *take_place(vx_scheduler *s)
{
    place *p = s->free;
    if (p != NULL) {
        s->free = p->next;
        return p;
    }
    p = calloc(1, sizeof *p);
    if (p != NULL) {
        p->scheduler = s;
        p->job.run = run_piece;
        p->timer.run = on_piece_time;
    }
    return p;
}

/* The next piece that may go, in its place; NULL: none now. */
static place *next_piece(vx_scheduler *s)
{
    bool reserved;
    uint64_t now = vx_clock_now(s->clock), when;
    if (s->below >= s->depth)
        return NULL;
    vx_dmclock_client *client = vx_dmclock_choose(&s->all, vx_ticks(now), &reserved, &when);
    if (client == NULL) {
        if (when != UINT64_MAX)
            look_again_at(s, vx_ns_of_ticks(when));
        return NULL;
    }
    place *p = take_place(s);
    if (p == NULL) {
        look_again_at(s, now + NO_MEMORY_NS);
        return NULL;
    }
    vx_share *share = (vx_share *)client;
    s->below++;
    vx_request *request = take(s, share, now);
    uint64_t length = piece_length(s, request);
    bool moves = request->operation <= VX_WRITE;
    vx_request_child(&p->piece, request, request->operation, request->offset + request->done, length,
                     moves ? request->buffer + request->done : NULL);
    if (is_flushed_after(s, request))
        p->piece.flags &= ~(uint32_t)VX_FUA;
    p->piece.memo = NULL; /* it belonged to whoever submitted the request */
    p->request = request;
    p->share = share;
    p->submitters = 1;
    p->counts = true;
    p->ended = false;
    charge(s, share, reserved, request->held_by, &p->piece, now);
    return p;
}

/* ---- pieces, without the lock ---- */

enum rest { NOTHING, MORE, A_FLUSH };

/* Takes what a piece brought into its request; what has yet to go. */
static enum rest adopt(place *p)
{
    vx_request *request = p->request;
    if (request == NULL)
        return NOTHING;
    p->piece.not_before_ns = 0; /* that has passed */
    vx_request_adopt(request, &p->piece);
    request->done += p->piece.length;
    if (request->result != 0 || p->piece.operation == VX_FLUSH)
        return NOTHING;
    if (request->done < request->length)
        return MORE;
    return is_flushed_after(p->scheduler, request) ? A_FLUSH : NOTHING;
}

static void give_back(vx_scheduler *s, place *p)
{
    p->next = s->free;
    s->free = p;
}

/* Frees its place for another one, once. Under the lock. */
static void leave(vx_scheduler *s, place *p, uint64_t now)
{
    if (!p->counts)
        return;
    if (s->waiting > 0 && s->below >= s->depth)
        s->contended_units += vx_units_of(p->piece.operation, p->piece.length, s->unit);
    p->counts = false;
    s->below--;
    note_contention(s, now);
}

/* Makes durable what was written by pieces; on the pool. */
static void flush_after(place *p)
{
    vx_request_child(&p->piece, p->request, VX_FLUSH, 0, 0, NULL);
    p->piece.memo = NULL;
    p->piece.complete = completed;
    p->piece.context = p;
    if (p->scheduler->is_virtual)
        run_piece(&p->job);
    else
        vx_pool_push(p->scheduler->pool, &p->job);
}

/* Its place is free; the rest of its request waits again, or the request is done. */
static void end(place *p)
{
    vx_scheduler *s = p->scheduler;
    vx_request *request = p->request;
    pthread_mutex_lock(&s->lock);
    enum rest rest = adopt(p);
    if (rest == A_FLUSH) {
        p->submitters++;
        pthread_mutex_unlock(&s->lock);
        flush_after(p);
        return;
    }
    uint64_t now = vx_clock_now(s->clock);
    p->share->facts[BELOW]--;
    leave(s, p, now);
    if (rest == MORE)
        enqueue(s, p->share, request, true, now);
    else
        p->share->facts[REQUESTS]++;
    if (p->submitters > 0)
        p->ended = true;
    else
        give_back(s, p);
    pthread_mutex_unlock(&s->lock);
    if (rest != MORE && request != NULL) {
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

/* The thread has handed the piece down. What is parked there waits for its own disk (a pause, a
 * commit), and holds up no other one meanwhile. */
static void let_go(place *p, bool parked)
{
    vx_scheduler *s = p->scheduler;
    pthread_mutex_lock(&s->lock);
    p->submitters--;
    if (p->ended && p->submitters == 0)
        give_back(s, p);
    else if (parked && !p->ended)
        leave(s, p, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
}

static void run_piece(vx_job *job)
{
    place *p = (place *)((char *)job - offsetof(place, job));
    vx_scheduler *s = keep(p->scheduler);
    vx_device *device = vx_device_reference(p->request->held_by);
    p->piece.flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    bool parked = vx_run(((scheduled *)device)->lower, &p->piece) == VX_PARKED;
    let_go(p, parked);
    if (parked)
        dispatch(s); /* there may be a place now */
    else
        answered(p);
    vx_device_release(device);
    vx_scheduler_release(s);
}

/* A turn has come: its owner does the I/O, and ends it. */
static void start_turn(place *p)
{
    vx_request *waiting = p->request;
    p->request = NULL;
    waiting->context = p;
    waiting->complete(waiting);
    let_go(p, false);
}

static void start(place *p)
{
    vx_scheduler *s = p->scheduler;
    if (p->request->held_by == NULL) {
        start_turn(p);
        return;
    }
    vx_device *device = vx_device_reference(p->request->held_by);
    p->piece.complete = completed;
    p->piece.context = p;
    p->piece.flags |= VX_NOWAIT | VX_MAY_PARK;
    bool large = p->piece.operation <= VX_WRITE && p->piece.length > VX_QUICK_BYTES;
    int answer = large && !s->is_virtual ? VX_AGAIN
                                         : vx_submit(((scheduled *)device)->lower, &p->piece);
    if (answer == VX_DONE || answer == VX_PARKED)
        let_go(p, answer == VX_PARKED);
    if (answer == VX_DONE) {
        answered(p);
    } else if (answer != VX_PARKED) { /* this thread's hand on it goes to the pool's */
        p->piece.done = 0;
        p->piece.not_before_ns = 0;
        if (s->is_virtual)
            run_piece(&p->job);
        else
            vx_pool_push(s->pool, &p->job);
    }
    vx_device_release(device);
}

static void on_dispatch_job(vx_job *job)
{
    vx_scheduler *s = (vx_scheduler *)((char *)job - offsetof(vx_scheduler, job));
    pthread_mutex_lock(&s->lock);
    s->handed_over = false;
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    vx_scheduler_release(s);
}

/* Starts what may go. One thread at a time does; after a while it lets go, because it has other work,
 * and the pool goes on, or whoever comes before it gets there. */
static void dispatch(vx_scheduler *s)
{
    unsigned started = 0;
    bool hands_over = false;
    pthread_mutex_lock(&s->lock);
    s->again = true;
    if (s->dispatching) {
        pthread_mutex_unlock(&s->lock);
        return;
    }
    s->dispatching = true;
    while (s->again && !hands_over) {
        place *p;
        s->again = false;
        while (!hands_over && (p = next_piece(s)) != NULL) {
            keep(s); /* until the piece ends */
            pthread_mutex_unlock(&s->lock);
            start(p);
            pthread_mutex_lock(&s->lock);
            hands_over = ++started >= STARTS_HERE && !s->is_virtual;
        }
    }
    s->dispatching = false;
    bool push = hands_over && !s->handed_over;
    s->handed_over |= push;
    pthread_mutex_unlock(&s->lock);
    if (push) {
        keep(s);
        vx_pool_push(s->pool, &s->job);
    }
}

static void on_time(vx_timer *timer)
{
    vx_scheduler *s = (vx_scheduler *)((char *)timer - offsetof(vx_scheduler, timer));
    pthread_mutex_lock(&s->lock);
    s->armed_for = 0;
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    vx_scheduler_release(s);
}

/* ---- devices ---- */

/* Takes what is meant out of a queue, and puts it before `found`. Under the lock. */
static vx_request *take_out(vx_scheduler *s, vx_share *share,
                            bool (*is_meant)(const vx_request *, const void *), const void *owner,
                            vx_request *found)
{
    vx_request *kept = NULL, **last = &kept;
    uint64_t now = vx_clock_now(s->clock);
    while (share->head != NULL) {
        vx_request *request = take(s, share, now);
        if (is_meant(request, owner)) {
            request->next = found;
            found = request;
        } else {
            *last = request;
            last = &request->next;
        }
    }
    while (kept != NULL) {
        vx_request *request = kept;
        kept = request->next;
        enqueue(s, share, request, false, now);
    }
    return found;
}

static bool is_of(const vx_request *request, const void *owner)
{
    return request->owner == owner && request->held_by != NULL;
}

static bool is_turn(const vx_request *request, const void *unused)
{
    (void)unused;
    return request->held_by == NULL;
}

static void schedule_drop(vx_device *device, const void *owner)
{
    vx_share *share = atomic_load(&((scheduled *)device)->share);
    vx_scheduler *s = share->scheduler;
    pthread_mutex_lock(&s->lock);
    vx_request *found = NULL;
    for (share = s->shares; share != NULL; share = share->next) /* it may have changed meanwhile */
        found = take_out(s, share, is_of, owner, found);
    pthread_mutex_unlock(&s->lock);
    while (found != NULL) {
        vx_request *request = found;
        vx_device *held_by = request->held_by;
        found = request->next; /* it is gone when it has completed */
        vx_fail(held_by, request, VX_E_CANCELLED, 0, request->offset);
        request->complete(request);
        vx_device_release(held_by);
    }
}

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
    return atomic_load_explicit(&share->waiting, memory_order_relaxed) > 0;
}

/* Memory is kept for those who are owed something. */
static bool schedule_is_limited(vx_device *device)
{
    return !atomic_load(&atomic_load(&((scheduled *)device)->share)->has_reservation);
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
                                                  .drop = schedule_drop,
                                                  .is_holding = schedule_is_holding,
                                                  .is_limited = schedule_is_limited};

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
    uint64_t most = vx_piece_of(VX_READ, s->unit);
    t.request.operation = VX_READ;
    t.request.length = bytes == 0 ? 1 : bytes < most ? bytes : most;
    t.request.complete = turn_came;
    pthread_mutex_lock(&s->lock);
    bool stopping = s->stopping;
    if (!stopping)
        enqueue(s, share, &t.request, false, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
    if (!stopping) {
        dispatch(s);
        pthread_mutex_lock(&t.lock);
        while (!t.came)
            pthread_cond_wait(&t.changed, &t.lock);
        pthread_mutex_unlock(&t.lock);
    }
    pthread_mutex_destroy(&t.lock);
    pthread_cond_destroy(&t.changed);
    return t.request.context;
}

void vx_turn_end(vx_turn *taken)
{
    end(taken);
}

void vx_scheduler_stop(vx_scheduler *s)
{
    vx_request *found = NULL;
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    for (vx_share *share = s->shares; share != NULL; share = share->next)
        found = take_out(s, share, is_turn, NULL, found);
    pthread_mutex_unlock(&s->lock);
    while (found != NULL) {
        vx_request *request = found;
        found = request->next; /* it is gone when it has completed */
        request->complete(request);
    }
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
    atomic_store(&share->has_reservation, reservation != 0);
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
    if (s == NULL)
        return NULL;
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
    return s;
}
