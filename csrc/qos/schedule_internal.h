/* SPDX-License-Identifier: MIT
 *
 * Shared by the files of the scheduler: schedule_queue.c keeps the queues and chooses from them,
 * schedule.c submits pieces to the lower device and completes them. Call every function except the
 * first two with the scheduler's lock held.
 */
#ifndef VX_SCHEDULE_INTERNAL_H
#define VX_SCHEDULE_INTERNAL_H

#include <pthread.h>

#include "qos/dmclock.h"
#include "qos/schedule.h"
#include "core/units.h"

struct vx_share {
    vx_dmclock_client client;
    vx_scheduler *scheduler;
    vx_share *next;
    vx_request *head, *tail;
    const vx_device *last_device; /* of its latest piece */
    uint64_t last_end;            /* where its latest piece ended */
    vx_share_facts facts; /* all except late_ns */
    uint64_t inside; /* its requests that are not answered yet, including flushes; under the lock */
    _Atomic bool has_reservation;
};

typedef struct scheduled {
    vx_device device;
    vx_device *lower;
    _Atomic(vx_share *) share;
    _Atomic uint32_t waiting; /* requests; changed under the lock */
} scheduled;

/* The frame of a request that waits here or whose pieces are below. */
typedef struct VX_FRAME_TYPE schedule_frame {
    vx_device *device; /* the one that parked it; holds a reference; NULL: work with its own I/O */
    uint64_t since_ns; /* when it began to wait, by the scheduler's clock */
} schedule_frame;
VX_DEFINE_FRAME(schedule_frame_of, schedule_frame, VX_LAYER_SCHEDULE)

/* A slot: holds a piece of a request, or work that does its own I/O. */
struct vx_slot {
    vx_request piece;
    vx_job job;
    vx_timer timer;
    vx_request *request; /* NULL: the slot is granted to work with its own I/O, or has ended */
    vx_share *share;
    vx_scheduler *scheduler;
    vx_slot *next; /* in the list of free slots */
    vx_slot *other; /* in the list of all slots of the scheduler */
    /* under the lock */
    bool dropped;        /* its client is gone: the rest of the request fails */
    uint32_t submitters; /* threads that submit the piece and still use this slot */
    bool ended;          /* the last submitter frees the slot */
    uint64_t units;      /* normalised, of the piece */
    uint64_t worst_ns;   /* the worst case of the piece by the model */
    bool counts;         /* included in `below`; false once the lower device has parked the piece */
};

struct vx_scheduler {
    pthread_mutex_t lock;
    _Atomic uint32_t references;
    vx_clock *clock;
    vx_pool *pool;
    vx_model *model;
    uint64_t unit;
    uint32_t depth, below;
    uint64_t most_below_ns, below_ns; /* worst-case time of the pieces below: bound, sum */
    bool is_virtual;

    /* under the lock */
    vx_dmclock all;
    vx_share *shares;
    vx_slot *free, *slots;
    uint32_t working; /* threads that wait for a slot, or have one */
    pthread_cond_t rested; /* signals that `working` is 0 */
    bool dispatching, again; /* a thread starts pieces; it must check the queues once more */
    bool handed_over;        /* the job is in the pool's queue */
    bool stopping;
    uint64_t armed_for;      /* ns: when the timer fires; 0: it is not set */
    vx_timer timer;          /* dispatches when a client may next be served */
    vx_job job;              /* dispatches on the pool */
    uint64_t waiting;                        /* requests */
    uint64_t contended_since, contended_ns;  /* start of the contended time; sum so far */
    uint64_t contended_units;
};

static inline vx_scheduler *schedule_reference(vx_scheduler *s)
{
    atomic_fetch_add(&s->references, 1);
    return s;
}

/* Whether a flush follows the last piece: the pieces of a cut write with FUA go without FUA. */
static inline bool schedule_flushes_after(const vx_scheduler *s, const vx_request *request)
{
    return request->flags & VX_FUA && request->length > vx_piece_of(request->operation, s->unit);
}

/* Adds a request at the tail of the share's queue; with `front` at its head, for the rest of a
 * request whose first pieces have been served. */
void schedule_enqueue(vx_scheduler *s, vx_share *share, vx_request *request, bool front,
                      uint64_t now);
/* Moves the requests that `is_meant` selects from a queue to the list `found`; returns the list. */
vx_request *schedule_take_out(vx_scheduler *s, vx_share *share,
                              bool (*is_meant)(vx_request *, const vx_initiator *),
                              const vx_initiator *initiator, vx_request *found);
/* The next piece that may start, in its slot. NULL: none can start now; the timer is set if one can
 * later. */
vx_slot *schedule_next(vx_scheduler *s);
/* Stops counting the slot as taken, so that another piece may start. A second call does nothing. */
void schedule_leave(vx_scheduler *s, vx_slot *p, uint64_t now);
void schedule_note_contention(vx_scheduler *s, uint64_t now);
/* Count a request of the share in when it arrives, and out when it is answered. */
void schedule_enters(vx_share *share);
void schedule_leaves(vx_share *share, uint64_t now);

#endif
