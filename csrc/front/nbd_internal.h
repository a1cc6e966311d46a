/* SPDX-License-Identifier: MIT
 *
 * What the parts of an NBD connection share: nbd.c has the socket and the life of a connection,
 * nbd_request.c takes requests from the input, nbd_reply.c answers them, nbd_operation.c runs what is
 * not answered inline. Everything belongs to the connection's thread but `completed`, `signalled` (under
 * `lock`), `stopping` and the counters.
 */
#ifndef VX_NBD_INTERNAL_H
#define VX_NBD_INTERNAL_H

#include <pthread.h>

#include "front/nbd.h"
#include "front/nbd_output.h"
#include "front/nbd_wire.h"
#include "core/run.h"

#define INPUT_BYTES ((size_t)512 << 10)
#define INLINE_READ 65536u      /* larger reads get a buffer of their own */
#define STATUS_EXTENTS 1024u    /* extents in one answer to BLOCK_STATUS */
#define READ_HOLES 32u          /* holes that a structured read tells apart */
#define STARVED_POLL_MS 5
#define STALL_POLL_MS 1000
/* While so much waits to be sent, no further READ is started. What comes from the page cache then goes
 * through the connection's own buffers, which the CPU's cache holds and which need no new pages. */
#define UNSENT_LIMIT ((uint64_t)VX_NBD_PIECE)
#define SPARE_BUFFERS 2u    /* of VX_NBD_PIECE bytes each */
#define MOST_STATUSES 8u    /* BLOCK_STATUS under way, with their arrays of extents */
#define OUTPUT_LIMIT ((uint64_t)128 << 20)
#define HELD_BYTES ((uint64_t)4 << 20) /* payload under way while a throttle holds requests up */

/* HELD: there is no room for it now. SHORT: more of it must arrive. LOST: it, or the stream, is. */
enum outcome { TAKEN, HELD, SHORT, LOST };

/* Which way payload goes; each has a piece of memory of its own. OTHER has no payload. */
enum direction { READING, WRITING, OTHER };

/* A READ that was not answered inline, or a WRITE of more than a piece: done by one or more operations.
 * It is counted in under_way from the moment it is made to the moment it is answered. */
typedef struct transfer {
    nbd_request wire;
    uint32_t begun;      /* bytes whose operations were started, or will not be */
    uint32_t operations; /* started and not yet answered */
    enum nbd_error error; /* the first */
    bool abandoned;       /* a WRITE whose client left before all of it had arrived: no answer */
    bool flushed;         /* the flush of a WRITE with FUA has been started */
    bool said;            /* the error of a READ was sent, with a piece */
    uint64_t began_ns;    /* 0: not metered */
    uint64_t queued_ns;
    struct transfer *next; /* READs that wait, in their order */
} transfer;

/* A request that has a life of its own, or a piece of one. */
typedef struct operation {
    vx_job job;
    vx_request request;
    nbd_request wire; /* of a piece: its range */
    transfer *command; /* or NULL: it is the request itself */
    vx_nbd_connection *connection;
    struct operation *next;
    uint8_t *buffer;
    size_t capacity; /* of buffer */
    enum direction direction;
    bool is_own;      /* its buffer is the connection's own of that direction, and not charged */
    uint64_t charged; /* to the pool */
    uint64_t began_ns; /* 0: not metered */
    struct operation *later, **later_link; /* of the connection's list */
    vx_extent extents[READ_HOLES];
    vx_extent *status; /* BLOCK_STATUS */
} operation;

struct vx_nbd_connection {
    int fd, wake;
    vx_device *device;
    vx_pool *pool;
    vx_nbd_terms terms;
    nbd_terms rules;

    uint8_t *input;
    size_t begin, end;
    operation *filling; /* a WRITE, or a piece of it, whose payload is still arriving */
    uint64_t filled;
    transfer *writing; /* a WRITE of which further pieces are to come */
    transfer *reads, **reads_end; /* that wait for room */
    uint64_t discard; /* payload of a refused WRITE, still to be thrown away */
    transfer *discarding; /* the WRITE that it is the rest of, because a piece failed */
    nbd_request refused;
    enum nbd_error refusal;

    nbd_output output;
    uint64_t under_way;     /* requests that are not answered yet */
    uint64_t operations;    /* that hold memory: under way, or their data on their way out */
    uint64_t bytes[2];      /* of payload in operations, by direction */
    uint64_t borrowed;      /* of those, charged to the pool */
    uint64_t freed;         /* operations so far */
    uint32_t statuses;      /* BLOCK_STATUS under way */
    bool own_used[2];       /* by direction */
    uint64_t moved_ns;      /* when the client last sent or took a byte */
    bool disconnecting; /* no further request is read */
    bool gone;          /* the peer takes no replies */
    bool ended;         /* the peer sends nothing more; what it sent is still answered */
    bool held;          /* the front request found no room when it was last tried */
    bool starved;       /* a READ that must be answered as a whole waits for what others borrowed */
    int result;

    pthread_mutex_t lock;
    operation *completed; /* under lock, newest first */
    operation *later;     /* under lock: done, and kept until a device's time for them has come */
    bool signalled;       /* under lock: a byte is in `wake` */
    _Atomic bool stopping;

    uint8_t *spare[SPARE_BUFFERS];
    uint32_t spare_count;
    vx_extent holes[READ_HOLES];
    vx_nbd_counters counters;
    vx_meter *meter; /* or NULL */
    bool hurried;    /* the device was told to hold up nothing */
    bool dropped;    /* and to forget what waits */
};

static inline void nbd_count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

/* ---- nbd_operation.c ---- */

/* One request less is under way. */
void nbd_answered(vx_nbd_connection *c);
/* Whether the limits allow one more request. */
bool nbd_may_take(const vx_nbd_connection *c);
/* TAKEN, and *started with a buffer of `length`; HELD: no room now (limits); LOST: no memory. `command`
 * is what it is a piece of, or NULL; `wire` is its own range. */
enum outcome nbd_start_operation(vx_nbd_connection *c, transfer *command, const nbd_request *wire,
                                 enum direction direction, size_t length, operation **started);
/* Gives back what an operation holds; `context` is its connection (for nbd_output). */
void nbd_free_operation(void *owner, void *context);
/* What a command asks of the device; CACHE is no operation, and counts as a read. */
uint32_t nbd_operation_of(uint16_t command);
/* The request on the device that a request on the wire asks for. */
void nbd_prepare(const vx_nbd_connection *c, vx_request *request, const nbd_request *wire);
/* Runs it on the pool; it comes back through `completed`, with the connection woken. */
void nbd_send_to_pool(vx_nbd_connection *c, operation *op);
/* Runs it here if it does not block: true, and it is done. False: request as it was. */
bool nbd_try_operation(vx_nbd_connection *c, operation *op);
/* Whether the device may hold requests up (a throttle), and whether it does. */
bool nbd_is_paced(const vx_nbd_connection *c);
bool nbd_is_holding(const vx_nbd_connection *c);
/* Nobody takes answers any more: what waits in queues, or for its time, comes back at once. */
void nbd_drop(vx_nbd_connection *c);

/* ---- nbd_request.c ---- */

/* Takes everything that can be taken from the input. False: the stream is lost. */
bool nbd_take_input(vx_nbd_connection *c);
/* The payload of c->filling is here: runs it. */
void nbd_filled(vx_nbd_connection *c);
/* Starts READs that wait, as far as there is room for them. */
void nbd_start_reads(vx_nbd_connection *c);
/* The client sends nothing more: what it has not sent whole is forgotten. */
void nbd_abandon_input(vx_nbd_connection *c);
/* The client takes no answers: READs that wait are forgotten. */
void nbd_forget_reads(vx_nbd_connection *c);

/* ---- nbd_reply.c ---- */

/* Room that the largest answer to an operation may need. */
#define REPLY_ROOM ((size_t)(2 * READ_HOLES + 2) * 40 + 64 + STATUS_EXTENTS * 8)

/* Whether `staged` bytes and the pieces of an answer fit the output; sends to make room. */
bool nbd_room_for_reply(vx_nbd_connection *c, size_t staged);
/* Answers a request that has no data to send. */
void nbd_reply_status(vx_nbd_connection *c, enum nbd_error error, const nbd_request *wire);
/* An operation is done: answers it, or its part of a transfer. Frees it when its data are sent. */
void nbd_reply_operation(vx_nbd_connection *c, operation *op);
/* Answers a WRITE in pieces once all of it is done; with FUA after a flush. */
void nbd_reply_write(vx_nbd_connection *c, transfer *command);
/* Whether nothing more of it is to be started or answered. */
bool nbd_is_complete(const transfer *command);
/* The whole request is answered; frees it. */
void nbd_end_transfer(vx_nbd_connection *c, transfer *command);
/* Answers what completed, as far as there is room. True: some of it found none. */
bool nbd_take_completions(vx_nbd_connection *c);

#endif
