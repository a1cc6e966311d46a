/* SPDX-License-Identifier: MIT
 *
 * What the parts of an NBD connection share: nbd.c has the socket and the life of a connection,
 * nbd_request.c takes requests from the input, nbd_reply.c answers them. Everything belongs to the
 * connection's thread but `stopping` and the counters.
 */
#ifndef VX_NBD_INTERNAL_H
#define VX_NBD_INTERNAL_H

#include "front/nbd.h"
#include "front/nbd_wire.h"
#include "front/output.h"

#define INPUT_BYTES ((size_t)512 << 10)
#define INLINE_READ 65536u      /* larger reads get a buffer of their own */
#define STATUS_EXTENTS 1024u    /* extents in one answer to BLOCK_STATUS */
#define READ_HOLES 32u          /* holes that a structured read tells apart */
#define STARVED_POLL_MS 5
#define STALL_POLL_MS 1000
/* While so much waits to be sent, no further READ is started. What comes from the page cache then goes
 * through the connection's own buffers, which the CPU's cache holds and which need no new pages. */
#define UNSENT_LIMIT ((uint64_t)VX_SERVICE_PIECE)
#define MOST_STATUSES 8u    /* BLOCK_STATUS under way, with their arrays of extents */
#define OUTPUT_LIMIT ((uint64_t)128 << 20)

/* HELD: there is no room for it now. SHORT: more of it must arrive. LOST: it, or the stream, is. */
enum outcome { TAKEN, HELD, SHORT, LOST };

/* A READ that was not answered inline, or a WRITE of more than a piece: done by one or more tasks.
 * It is a command under way from the moment it is made to the moment it is answered. */
typedef struct transfer {
    nbd_request wire;
    uint32_t begun; /* bytes whose tasks were started, or will not be */
    uint32_t tasks; /* started and not yet answered */
    enum nbd_error error; /* the first */
    bool abandoned;       /* a WRITE whose client left before all of it had arrived: no answer */
    bool flushed;         /* the flush of a WRITE with FUA has been started */
    bool error_sent;      /* the error of a READ was sent, with a piece */
    uint64_t began_ns;
    uint64_t queued_ns;
    struct transfer *next; /* READs that wait, in their order */
} transfer;

/* A request that has a life of its own, or a piece of one. */
typedef struct nbd_task {
    vx_task base; /* first */
    nbd_request wire;  /* of a piece: its range */
    transfer *command; /* or NULL: it is the request itself */
    vx_extent *status; /* BLOCK_STATUS */
    vx_extent extents[READ_HOLES];
} nbd_task;

/* Written by the connection's thread alone; read by anyone, at any time. */
typedef struct live_counters {
    _Atomic uint64_t requests[8], bytes_read, bytes_written, errors;
} live_counters;

struct vx_nbd_connection {
    int fd;
    vx_initiator initiator;
    vx_service service;
    nbd_terms rules;
    uint32_t context_id; /* of base:allocation */

    uint8_t *input;
    size_t begin, end;
    nbd_task *filling; /* a WRITE, or a piece of it, whose payload is still arriving */
    uint64_t filled;
    transfer *writing; /* a WRITE of which further pieces are to come */
    transfer *reads, **reads_end; /* that wait for room */
    uint64_t discard; /* payload of a refused WRITE, still to be thrown away */
    transfer *discarding; /* the WRITE that it is the rest of, because a piece failed */
    nbd_request refused;
    enum nbd_error refusal;

    vx_output output;
    uint32_t statuses;  /* BLOCK_STATUS under way */
    uint64_t moved_ns;  /* when the client last sent or took a byte */
    bool disconnecting; /* no further request is read */
    bool gone;          /* the peer takes no replies */
    bool ended;         /* the peer sends nothing more; what it sent is still answered */
    bool held;          /* the front request found no room when it was last tried */
    bool starved;       /* a READ that must be answered as a whole waits for what others borrowed */
    int result;
    _Atomic bool stopping;

    vx_extent holes[READ_HOLES];
    live_counters counters;
};

static inline void nbd_count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + by,
                          memory_order_relaxed);
}

/* ---- nbd_request.c ---- */

/* TAKEN, and *begun with a buffer of `length`; HELD: no room now (limits); LOST: no memory. `command` is
 * what it is a piece of, or NULL; `wire` is its own range. */
enum outcome nbd_begin_task(vx_nbd_connection *c, transfer *command, const nbd_request *wire,
                                 enum vx_direction direction, size_t length, nbd_task **begun);
/* What a command asks of the device; CACHE is no operation, and counts as a read. */
uint32_t nbd_operation_of(uint16_t command);
/* The request on the device that a request on the wire asks for. */
void nbd_prepare(const vx_nbd_connection *c, vx_request *request, const nbd_request *wire);
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

/* Room that the largest answer to a task may need. */
#define REPLY_ROOM ((size_t)(2 * READ_HOLES + 2) * 40 + 64 + STATUS_EXTENTS * 8)

/* Whether `staged` bytes and the pieces of an answer fit the output; sends to make room. */
bool nbd_room_for_reply(vx_nbd_connection *c, size_t staged);
/* Answers a request that has no data to send. */
void nbd_reply_status(vx_nbd_connection *c, enum nbd_error error, const nbd_request *wire);
/* A task is done: answers it, or its part of a transfer. Frees it when its data are sent. */
void nbd_reply_task(vx_nbd_connection *c, nbd_task *task);
/* Gives back what a task (`owner`) holds; `context` is its connection. For vx_output. */
void nbd_free_task(void *owner, void *context);
/* Answers a WRITE in pieces once all of it is done; with FUA after a flush. */
void nbd_reply_write(vx_nbd_connection *c, transfer *command);
/* Whether nothing more of it is to be started or answered. */
bool nbd_is_complete(const transfer *command);
/* The whole request is answered; frees it. */
void nbd_end_transfer(vx_nbd_connection *c, transfer *command);
/* Answers what completed, as far as there is room. True: some of it found none. */
bool nbd_take_completions(vx_nbd_connection *c);

#endif
