/* SPDX-License-Identifier: MIT */
/* Keeps the queues of the scheduler and chooses the next request. All of it runs under its lock. */
#include <stdlib.h>

#include "qos/bucket.h"
#include "qos/schedule_internal.h"

#define NO_MEMORY_NS 1000000u /* delay before a failed allocation is tried again */

static uint64_t piece_length(const vx_scheduler *s, const vx_request *request)
{
    uint64_t left = request->length - request->done;
    uint64_t most = vx_piece_of(request->operation, s->unit);
    return left <= most ? left : most;
}

static uint64_t units_left(const vx_scheduler *s, const vx_request *request)
{
    return vx_units_of(request->operation, request->length - request->done, s->unit);
}

/* The units of the request's next piece. */
static uint64_t head_units(const vx_scheduler *s, const vx_request *request)
{
    return vx_units_of(request->operation, piece_length(s, request), s->unit);
}

void schedule_note_contention(vx_scheduler *s, uint64_t now)
{
    if (s->contended_since != 0 && now > s->contended_since)
        s->contended_ns += now - s->contended_since;
    s->contended_since = s->waiting > 0 && s->below >= s->depth ? now : 0;
}

void schedule_enters(vx_share *share)
{
    share->inside++;
    share->client.active = true;
}

void schedule_leaves(vx_share *share, uint64_t now)
{
    if (--share->inside == 0) {
        share->client.active = false;
        share->client.rested_at = vx_ticks(now);
    }
}

void schedule_enqueue(vx_scheduler *s, vx_share *share, vx_request *request, bool front, uint64_t now)
{
    bool was_idle = share->head == NULL;
    if (front || was_idle)
        share->client.units = head_units(s, request);
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
    share->facts.waiting++;
    schedule_frame *frame = schedule_frame_of(request);
    if (frame->device != NULL)
        atomic_fetch_add(&((scheduled *)frame->device)->waiting, 1);
    share->facts.waiting_units += units_left(s, request);
    frame->since_ns = now;
    s->waiting++;
    schedule_note_contention(s, now);
    if (was_idle)
        vx_dmclock_begin(&s->all, &share->client, vx_ticks(now));
    if (!front)
        schedule_enters(share);
}

/* Updates the figures of a request that was taken out of its queue. */
static void waits_no_more(vx_scheduler *s, vx_share *share, vx_request *request, uint64_t now)
{
    if (share->head == NULL) {
        share->tail = NULL;
        vx_dmclock_end(&share->client);
    } else {
        share->client.units = head_units(s, share->head);
    }
    request->next = NULL;
    share->facts.waiting--;
    const schedule_frame *frame = schedule_frame_of(request);
    if (frame->device != NULL)
        atomic_fetch_sub(&((scheduled *)frame->device)->waiting, 1);
    share->facts.waiting_units -= units_left(s, request);
    uint64_t waited = now > frame->since_ns ? now - frame->since_ns : 0;
    share->facts.waited_ns += waited;
    request->queued_ns += waited;
    s->waiting--;
    schedule_note_contention(s, now);
}

static vx_request *take(vx_scheduler *s, vx_share *share, uint64_t now)
{
    vx_request *request = share->head;
    share->head = request->next;
    waits_no_more(s, share, request, now);
    return request;
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
                   vx_slot *p, uint64_t now)
{
    const vx_request *piece = &p->piece;
    uint64_t units = vx_units_of(piece->operation, piece->length, s->unit);
    p->units = units;
    uint64_t cost = cost_of(s, share, device, piece, units);
    share->last_device = device;
    share->last_end = piece->offset + piece->length;
    share->facts.units += units;
    share->facts.reserved_units += reserved ? units : 0;
    share->facts.below++;
    vx_dmclock_serve(&s->all, &share->client, reserved, units, cost, vx_ticks(now));
}

/* Sets the timer to dispatch at `when`. A set timer holds a reference; its callback releases it. */
static void look_again_at(vx_scheduler *s, uint64_t when)
{
    if (s->armed_for != 0 && s->armed_for <= when)
        return; /* the dispatch at that time sets the timer again */
    bool was_set = vx_clock_cancel(s->clock, &s->timer);
    bool is_set = vx_clock_set(s->clock, &s->timer, when);
    s->armed_for = is_set ? when : 0;
    if (is_set && !was_set)
        schedule_reference(s);
    else if (was_set && !is_set)
        atomic_fetch_sub(&s->references, 1); /* never the last one: the caller has one */
    /* If no memory was left for the timer, the next completion or request dispatches. */
}

static vx_slot *take_place(vx_scheduler *s)
{
    vx_slot *p = s->free;
    if (p != NULL) {
        s->free = p->next;
        return p;
    }
    p = calloc(1, sizeof *p);
    if (p == NULL)
        return NULL;
    p->scheduler = s;
    p->other = s->slots;
    s->slots = p;
    return p;
}

vx_slot *schedule_next(vx_scheduler *s)
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
    vx_share *share = (vx_share *)client;
    uint64_t worst = s->model == NULL ? 0 : vx_model_worst(s->model, share->head->operation,
                                                           piece_length(s, share->head), s->below);
    if (s->below > 0 && s->below_ns + worst > s->most_below_ns)
        return NULL; /* the next completion dispatches again */
    vx_slot *p = take_place(s);
    if (p == NULL) {
        look_again_at(s, now + NO_MEMORY_NS);
        return NULL;
    }
    s->below++;
    s->below_ns += worst;
    p->worst_ns = worst;
    vx_request *request = take(s, share, now);
    uint64_t length = piece_length(s, request);
    bool moves = request->operation <= VX_WRITE;
    vx_request_child(&p->piece, request, request->operation, request->offset + request->done, length,
                     moves ? request->buffer + request->done : NULL);
    if (schedule_flushes_after(s, request))
        p->piece.flags &= ~(uint32_t)VX_FUA;
    p->piece.memo = NULL; /* it belongs to the stack of the request's submitter */
    p->request = request;
    p->share = share;
    p->submitters = 1;
    p->counts = true;
    p->ended = false;
    p->dropped = false;
    charge(s, share, reserved, schedule_frame_of(request)->device, p, now);
    return p;
}

vx_request *schedule_take_out(vx_scheduler *s, vx_share *share,
                              bool (*is_meant)(vx_request *, const vx_initiator *),
                              const vx_initiator *initiator, vx_request *found)
{
    uint64_t now = vx_clock_now(s->clock);
    vx_request **link = &share->head, *last = NULL;
    while (*link != NULL) {
        vx_request *request = *link;
        if (!is_meant(request, initiator)) {
            last = request;
            link = &request->next;
            continue;
        }
        *link = request->next;
        waits_no_more(s, share, request, now);
        schedule_leaves(share, now);
        request->next = found;
        found = request;
    }
    share->tail = last;
    return found;
}

void schedule_leave(vx_scheduler *s, vx_slot *p, uint64_t now)
{
    if (!p->counts)
        return;
    if (s->waiting > 0 && s->below >= s->depth)
        s->contended_units += p->units;
    p->counts = false;
    s->below--;
    s->below_ns -= p->worst_ns;
    schedule_note_contention(s, now);
}

