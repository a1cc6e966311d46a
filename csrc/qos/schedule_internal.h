/* SPDX-License-Identifier: MIT
 *
 * What the files of the scheduler share: schedule_queue.c has the queues and chooses from them,
 * schedule.c carries pieces down and back. The functions want the lock of the scheduler, but for the
 * first two.
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
    const vx_device *last_device; /* of its latest piece, */
    uint64_t last_end;            /* and where that ended */
    vx_share_facts facts; /* but for late_ns */
    uint64_t inside; /* requests of it that are not answered, flushes too; under the lock */
    _Atomic bool has_reservation;
};

typedef struct scheduled {
    vx_device device;
    vx_device *lower;
    _Atomic(vx_share *) share;
    _Atomic uint32_t waiting; /* requests; changed under the lock */
} scheduled;

/* Of a request that waits here, or whose pieces are below. */
typedef struct VX_FRAME_TYPE schedule_frame {
    vx_device *device; /* that parked it, with a reference; NULL: work that does its own I/O */
    uint64_t since_ns; /* it waits; of the scheduler's clock */
} schedule_frame;
VX_DEFINE_FRAME(schedule_frame_of, schedule_frame, VX_LAYER_SCHEDULE)

/* A place below: of a piece of a request, or of work that does its own I/O. */
struct vx_slot {
    vx_request piece;
    vx_job job;
    vx_timer timer;
    vx_request *request; /* NULL: work that does its own I/O, or it has ended */
    vx_share *share;
    vx_scheduler *scheduler;
    vx_slot *next; /* free */
    vx_slot *other; /* all of the scheduler */
    /* under the lock */
    bool dropped;        /* the rest of the request fails: its client is gone */
    uint32_t submitters; /* threads that hand the piece down, and still look at this */
    bool ended;          /* the last of them frees it */
    uint64_t worst_ns;   /* what the model takes for it at most */
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
    uint64_t most_below_ns, below_ns; /* what the model takes for them at most */
    bool is_virtual;

    /* under the lock */
    vx_dmclock all;
    vx_share *shares;
    vx_slot *free, *slots;
    uint32_t working; /* threads that wait for a slot, or have one */
    pthread_cond_t rested; /* none does */
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

static inline vx_scheduler *schedule_reference(vx_scheduler *s)
{
    atomic_fetch_add(&s->references, 1);
    return s;
}

/* A write with FUA that is cut goes without, and a flush follows its last piece. */
static inline bool schedule_flushes_after(const vx_scheduler *s, const vx_request *request)
{
    return request->flags & VX_FUA && request->length > vx_piece_of(request->operation, s->unit);
}

/* Its tail, or its front for the rest of what was begun. */
void schedule_enqueue(vx_scheduler *s, vx_share *share, vx_request *request, bool front,
                      uint64_t now);
/* Takes what is meant out of a queue, and puts it before `found`. */
vx_request *schedule_take_out(vx_scheduler *s, vx_share *share,
                              bool (*is_meant)(vx_request *, const vx_initiator *),
                              const vx_initiator *initiator, vx_request *found);
/* The next piece that may go, in its place; NULL: none now. The timer is set where one may later. */
vx_slot *schedule_next(vx_scheduler *s);
/* Frees a place for another piece, once. */
void schedule_leave(vx_scheduler *s, vx_slot *p, uint64_t now);
void schedule_note_contention(vx_scheduler *s, uint64_t now);
/* A request of it has come; one is answered. */
void schedule_enters(vx_share *share);
void schedule_leaves(vx_share *share, uint64_t now);

#endif
