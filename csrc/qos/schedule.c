/* SPDX-License-Identifier: MIT */
#include "qos/schedule.h"

#include <stdlib.h>
#include <string.h>

#include "qos/bucket.h"
#include "core/run.h"
#include "qos/schedule_internal.h"

#define STARTS_HERE 16u /* pieces that a thread starts before it hands over to the pool */

static void dispatch(vx_scheduler *s);
static void run_piece(vx_job *job);
static void completed(vx_request *piece);

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
    while (s->slots != NULL) {
        vx_slot *p = s->slots;
        s->slots = p->other;
        free(p);
    }
    pthread_cond_destroy(&s->rested);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* ---- pieces, without the lock ---- */

enum rest { NOTHING, MORE, A_FLUSH };

/* Merges the result of a piece into its request; returns what remains to be done. */
static enum rest adopt(vx_slot *p)
{
    vx_request *request = p->request;
    if (request == NULL)
        return NOTHING;
    p->piece.not_before_ns = 0; /* that time has passed */
    vx_request_adopt(request, &p->piece);
    request->done += p->piece.length;
    if (request->result != 0 || p->piece.operation == VX_FLUSH)
        return NOTHING;
    if (request->done < request->length)
        return MORE;
    return schedule_flushes_after(p->scheduler, request) ? A_FLUSH : NOTHING;
}

static void give_back(vx_scheduler *s, vx_slot *p)
{
    p->next = s->free;
    s->free = p;
}

/* Makes the data of the pieces durable; runs on the pool, or here with a virtual clock. */
static void flush_after(vx_slot *p)
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

/* Ends a piece and frees its slot. The rest of its request is queued, or the request completes. */
static void end(vx_slot *p)
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
    p->share->facts.below--;
    schedule_leave(s, p, now);
    p->request = NULL;
    if (rest == MORE && p->dropped) {
        vx_fail(schedule_frame_of(request)->device, request, VX_E_CANCELLED, 0,
                request->offset + request->done);
        rest = NOTHING;
    }
    if (rest == MORE)
        schedule_enqueue(s, p->share, request, true, now);
    else
        p->share->facts.requests++;
    if (rest != MORE)
        schedule_leaves(p->share, now);
    if (p->submitters > 0)
        p->ended = true;
    else
        give_back(s, p);
    pthread_mutex_unlock(&s->lock);
    if (rest != MORE && request != NULL) {
        vx_device *device = schedule_frame_of(request)->device;
        request->complete(request);
        vx_device_release(device);
    }
    dispatch(s);
    vx_scheduler_release(s);
}

static void on_piece_time(vx_timer *timer)
{
    end((vx_slot *)((char *)timer - offsetof(vx_slot, timer)));
}

static void answered(vx_slot *p)
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

/* The thread has submitted the piece. A parked piece waits for its own disk (a pause, a commit), so
 * it gives up its slot and does not hold up other disks. */
static void let_go(vx_slot *p, bool parked)
{
    vx_scheduler *s = p->scheduler;
    pthread_mutex_lock(&s->lock);
    p->submitters--;
    if (p->ended && p->submitters == 0)
        give_back(s, p);
    else if (parked && !p->ended)
        schedule_leave(s, p, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
}

static void run_piece(vx_job *job)
{
    vx_slot *p = (vx_slot *)((char *)job - offsetof(vx_slot, job));
    vx_scheduler *s = schedule_reference(p->scheduler);
    vx_device *device = vx_device_reference(schedule_frame_of(p->request)->device);
    p->piece.flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    bool parked = vx_run(((scheduled *)device)->lower, &p->piece) == VX_PARKED;
    let_go(p, parked);
    if (parked)
        dispatch(s); /* a slot may be free now */
    else
        answered(p);
    vx_device_release(device);
    vx_scheduler_release(s);
}

/* Gives the slot to work that waited for one. The work does its own I/O, and then ends the slot. */
static void grant_slot(vx_slot *p)
{
    vx_request *waiting = p->request;
    pthread_mutex_lock(&p->scheduler->lock); /* schedule_drop reads it */
    p->request = NULL;
    pthread_mutex_unlock(&p->scheduler->lock);
    waiting->context = p;
    waiting->complete(waiting);
    let_go(p, false);
}

static void start(vx_slot *p)
{
    vx_scheduler *s = p->scheduler;
    if (schedule_frame_of(p->request)->device == NULL) {
        grant_slot(p);
        return;
    }
    vx_device *device = vx_device_reference(schedule_frame_of(p->request)->device);
    p->job.run = run_piece;
    p->timer.run = on_piece_time;
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
    } else if (answer != VX_PARKED) { /* this thread's count in `submitters` passes to run_piece */
        vx_request_again(&p->piece, 0);
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

/* Starts the pieces that may start. Only one thread at a time does this. After STARTS_HERE pieces
 * it stops, because it has other work. The pool continues, unless another thread comes first. */
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
        vx_slot *p;
        s->again = false;
        while (!hands_over && (p = schedule_next(s)) != NULL) {
            schedule_reference(s); /* until the piece ends */
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
        schedule_reference(s);
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

static bool is_of(vx_request *request, const vx_initiator *initiator)
{
    return request->initiator == initiator && schedule_frame_of(request)->device != NULL;
}

static bool is_waiter(vx_request *request, const vx_initiator *unused)
{
    (void)unused;
    return schedule_frame_of(request)->device == NULL;
}

static void schedule_drop(vx_device *device, const vx_initiator *initiator)
{
    vx_share *share = atomic_load(&((scheduled *)device)->share);
    vx_scheduler *s = share->scheduler;
    pthread_mutex_lock(&s->lock);
    vx_request *found = NULL;
    for (share = s->shares; share != NULL; share = share->next) /* the share may have changed */
        found = schedule_take_out(s, share, is_of, initiator, found);
    for (vx_slot *p = s->slots; p != NULL; p = p->other)
        if (p->request != NULL && is_of(p->request, initiator))
            p->dropped = true;
    pthread_mutex_unlock(&s->lock);
    while (found != NULL) {
        vx_request *request = found;
        vx_device *parked_by = schedule_frame_of(request)->device;
        found = request->next; /* read first: completion may free the request */
        vx_fail(parked_by, request, VX_E_CANCELLED, 0, request->offset);
        request->complete(request);
        vx_device_release(parked_by);
    }
}

/* A flush in flight. It takes no slot, but its client counts as active until it is answered. */
typedef struct passing {
    vx_share *share;
    void (*complete)(vx_request *request);
    void *context;
} passing;

static void enters(vx_share *share)
{
    pthread_mutex_lock(&share->scheduler->lock);
    schedule_enters(share);
    pthread_mutex_unlock(&share->scheduler->lock);
}

static void leaves(vx_share *share, uint64_t not_before)
{
    vx_scheduler *s = share->scheduler;
    uint64_t now = vx_clock_now(s->clock);
    pthread_mutex_lock(&s->lock);
    schedule_leaves(share, now > not_before ? now : not_before);
    pthread_mutex_unlock(&s->lock);
}

static void passed(vx_request *request)
{
    passing *p = request->context;
    vx_scheduler *s = p->share->scheduler;
    leaves(p->share, request->not_before_ns);
    request->complete = p->complete;
    request->context = p->context;
    free(p);
    request->complete(request);
    vx_scheduler_release(s);
}

static int pass(scheduled *d, vx_request *request)
{
    passing *p = malloc(sizeof *p);
    if (p == NULL)
        return vx_submit(d->lower, request);
    *p = (passing){atomic_load(&d->share), request->complete, request->context};
    vx_scheduler *s = schedule_reference(p->share->scheduler);
    enters(p->share);
    request->complete = passed;
    request->context = p;
    int answer = vx_submit(d->lower, request);
    if (answer == VX_PARKED)
        return VX_PARKED;
    leaves(p->share, request->not_before_ns);
    request->complete = p->complete;
    request->context = p->context;
    free(p);
    vx_scheduler_release(s);
    return answer;
}

static int schedule_submit(vx_device *device, vx_request *request)
{
    scheduled *d = (scheduled *)device;
    if (request->operation == VX_FLUSH)
        return pass(d, request);
    if (request->operation == VX_EXTENTS || request->length == 0)
        return vx_submit(d->lower, request);
    if (request->flags & VX_NOWAIT && !(request->flags & VX_MAY_PARK))
        return VX_AGAIN;
    request->flags &= ~(uint32_t)(VX_NOWAIT | VX_MAY_PARK);
    schedule_frame_of(request)->device = vx_device_reference(device);
    request->done = 0;
    request->extent_count = 0;
    vx_share *share = atomic_load(&d->share);
    vx_scheduler *s = schedule_reference(share->scheduler);
    pthread_mutex_lock(&s->lock);
    schedule_enqueue(s, share, request, false, vx_clock_now(s->clock));
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
    vx_scheduler_release(s);
    return VX_PARKED;
}

static bool schedule_is_holding(vx_device *device)
{
    return vx_schedule_waiting(device) > 0;
}

/* Without a reservation requests may wait for long, so they may use less buffer memory. */
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
    schedule_reference(share->scheduler);
    atomic_init(&d->share, share);
    return &d->device;
}

uint64_t vx_schedule_waiting(vx_device *device)
{
    return atomic_load_explicit(&((scheduled *)device)->waiting, memory_order_relaxed);
}

void vx_schedule_set_share(vx_device *device, vx_share *share)
{
    atomic_store(&((scheduled *)device)->share, share);
}

/* ---- slots for work that does its own I/O ---- */

typedef struct waiter {
    vx_request request;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool came;
} waiter;

static void slot_granted(vx_request *request)
{
    waiter *t = (waiter *)request;
    pthread_mutex_lock(&t->lock);
    t->came = true;
    pthread_cond_signal(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

/* A thread has given its slot back, or got none, and no longer uses the clock or the pool. */
static void rest_now(vx_scheduler *s)
{
    pthread_mutex_lock(&s->lock);
    if (--s->working == 0)
        pthread_cond_broadcast(&s->rested);
    pthread_mutex_unlock(&s->lock);
}

vx_slot *vx_share_take_slot(vx_share *share, uint64_t bytes)
{
    vx_scheduler *s = share->scheduler;
    waiter t = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    uint64_t most = vx_piece_of(VX_READ, s->unit);
    t.request.operation = VX_READ;
    t.request.length = bytes == 0 ? 1 : bytes < most ? bytes : most;
    t.request.complete = slot_granted;
    pthread_mutex_lock(&s->lock);
    bool stopping = s->stopping;
    if (!stopping) {
        s->working++;
        schedule_enqueue(s, share, &t.request, false, vx_clock_now(s->clock));
    }
    pthread_mutex_unlock(&s->lock);
    if (!stopping) {
        dispatch(s);
        pthread_mutex_lock(&t.lock);
        while (!t.came)
            pthread_cond_wait(&t.changed, &t.lock);
        pthread_mutex_unlock(&t.lock);
        if (t.request.context == NULL)
            rest_now(s);
    }
    pthread_mutex_destroy(&t.lock);
    pthread_cond_destroy(&t.changed);
    return t.request.context;
}

void vx_slot_end(vx_slot *taken)
{
    vx_scheduler *s = schedule_reference(taken->scheduler);
    end(taken);
    rest_now(s);
    vx_scheduler_release(s);
}

void vx_scheduler_stop(vx_scheduler *s)
{
    vx_request *found = NULL;
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    for (vx_share *share = s->shares; share != NULL; share = share->next)
        found = schedule_take_out(s, share, is_waiter, NULL, found);
    pthread_mutex_unlock(&s->lock);
    while (found != NULL) {
        vx_request *request = found;
        found = request->next; /* read first: completion may free the request */
        request->complete(request);
    }
    pthread_mutex_lock(&s->lock);
    while (s->working > 0)
        pthread_cond_wait(&s->rested, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

/* ---- shares and facts ---- */

void vx_scheduler_set_most_below(vx_scheduler *s, uint64_t ns)
{
    pthread_mutex_lock(&s->lock);
    s->most_below_ns = ns;
    pthread_mutex_unlock(&s->lock);
    dispatch(s);
}

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
    dispatch(s); /* requests may pass a changed limit now */
}

void vx_share_read(vx_share *share, vx_share_facts *facts)
{
    pthread_mutex_lock(&share->scheduler->lock);
    uint64_t late = vx_dmclock_late(&share->client, vx_ticks(vx_clock_now(share->scheduler->clock)));
    *facts = share->facts;
    facts->late_ns = vx_ns_of_ticks(late);
    pthread_mutex_unlock(&share->scheduler->lock);
}

void vx_scheduler_read(vx_scheduler *s, vx_scheduler_facts *facts)
{
    pthread_mutex_lock(&s->lock);
    schedule_note_contention(s, vx_clock_now(s->clock));
    *facts = (vx_scheduler_facts){.contended_ns = s->contended_ns,
                                  .contended_units = s->contended_units,
                                  .waiting = s->waiting,
                                  .below = s->below};
    pthread_mutex_unlock(&s->lock);
}

vx_scheduler *vx_scheduler_create(vx_clock *clock, vx_pool *pool, uint32_t unit, uint32_t depth,
                                  vx_model *model)
{
    vx_scheduler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->rested, NULL);
    atomic_init(&s->references, 1);
    s->clock = clock;
    s->pool = pool;
    s->unit = unit;
    s->depth = depth;
    s->most_below_ns = UINT64_MAX;
    s->model = model;
    s->is_virtual = vx_clock_is_virtual(clock);
    s->timer.run = on_time;
    s->job.run = on_dispatch_job;
    return s;
}
