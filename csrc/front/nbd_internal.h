/* SPDX-License-Identifier: MIT
 *
 * Declarations shared by the files of an NBD connection. nbd.c has the socket and the lifetime of a
 * connection, nbd_request.c takes requests from the input, nbd_reply.c answers them. Everything
 * except `stopping` and the counters belongs to the connection's thread.
 */
#ifndef VX_NBD_INTERNAL_H
#define VX_NBD_INTERNAL_H

#include "front/nbd.h"
#include "front/nbd_wire.h"
#include "front/output.h"

#define INPUT_BYTES ((size_t)512 << 10)
#define INLINE_READ 65536u      /* larger reads get a buffer of their own */
#define STATUS_EXTENTS 1024u    /* extents in one answer to BLOCK_STATUS */
#define READ_HOLES 32u          /* holes that one structured read reports */
#define STARVED_POLL_MS 5
#define STALL_POLL_MS 1000
/* No further READ is started while this many bytes wait to be sent. Data from the page cache then
 * pass through the connection's own buffers, which stay in the CPU cache and need no new pages. */
#define UNSENT_LIMIT ((uint64_t)VX_SERVICE_PIECE)
#define MOST_STATUSES 8u    /* BLOCK_STATUS in flight, each with its array of extents */
#define OUTPUT_LIMIT ((uint64_t)128 << 20)

/* HELD: there is no room for the request now. SHORT: more of it must arrive. LOST: there is no
 * memory for it, or the stream is lost. */
enum outcome { TAKEN, HELD, SHORT, LOST };

/* A READ that was not answered inline, or a WRITE of more than one piece. One or more tasks carry
 * it out. It counts as a command in flight from its creation until its answer. */
typedef struct transfer {
    nbd_request wire;
    uint32_t begun; /* bytes whose tasks were started or never will be */
    uint32_t tasks; /* started and not yet answered */
    enum nbd_error error; /* of the first piece that failed */
    bool abandoned;       /* a WRITE whose client left before all of it had arrived: no answer */
    bool flushed;         /* the flush of a WRITE with FUA has been started */
    bool error_sent;      /* an error chunk of a READ was sent */
    uint64_t began_ns;
    uint64_t queued_ns;
    struct transfer *next; /* in the list of waiting READs, oldest first */
} transfer;

/* A request that is carried out as a task, or a piece of a request. */
typedef struct nbd_task {
    vx_task base; /* first */
    nbd_request wire;  /* of a piece: its range */
    transfer *command; /* NULL: the task is the whole request */
    vx_extent *status; /* BLOCK_STATUS */
    vx_extent extents[READ_HOLES];
} nbd_task;

/* Written by the connection's thread alone; read by anyone, at any time. */
typedef struct live_counters {
    _Atomic uint64_t requests[8], bytes_read, bytes_written, errors, failed_writes;
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
    transfer *writing; /* a WRITE with further pieces to come */
    transfer *reads, **reads_end; /* READs that wait for room */
    uint64_t discard; /* payload bytes of a failed WRITE, still to be discarded */
    transfer *discarding; /* the WRITE with the discarded bytes, if a piece of it failed */
    nbd_request refused;
    enum nbd_error refusal;

    vx_output output;
    uint32_t statuses;  /* BLOCK_STATUS under way */
    uint64_t moved_ns;  /* when the client last sent or took a byte */
    bool disconnecting; /* no further request is read */
    bool gone;          /* the peer takes no replies */
    bool ended;         /* the peer sends nothing more; its earlier requests are answered */
    bool held;          /* the front request found no room when it was last tried */
    bool starved;       /* a READ waits for memory that other connections borrowed */
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

/* TAKEN: *begun has a buffer of `length` bytes. HELD: the limits leave no room now. LOST: no
 * memory. `command`: the request of which the task is a piece, or NULL. `wire`: the task's own
 * range. */
enum outcome nbd_begin_task(vx_nbd_connection *c, transfer *command, const nbd_request *wire,
                                 enum vx_direction direction, size_t length, nbd_task **begun);
/* The device operation of a command. CACHE has none and counts as a read. */
uint32_t nbd_operation_of(uint16_t command);
/* Fills in the device request for a request on the wire. */
void nbd_prepare(const vx_nbd_connection *c, vx_request *request, const nbd_request *wire);
/* Takes as many requests from the input as it can. False: the stream is lost. */
bool nbd_take_input(vx_nbd_connection *c);
/* The payload of c->filling has arrived: runs the task. */
void nbd_filled(vx_nbd_connection *c);
/* Starts waiting READs while there is room for them. */
void nbd_start_reads(vx_nbd_connection *c);
/* The client sends nothing more: drops WRITEs whose payload is incomplete. */
void nbd_abandon_input(vx_nbd_connection *c);
/* The client takes no replies: drops waiting READs. */
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
/* Frees a task (`owner`) and its memory; `context` is its connection. Callback of vx_output. */
void nbd_free_task(void *owner, void *context);
/* Answers a WRITE in pieces once all pieces are done; with FUA, after a flush. */
void nbd_reply_write(vx_nbd_connection *c, transfer *command);
/* Whether no piece of it remains to be started or answered. */
bool nbd_is_complete(const transfer *command);
/* The whole request is answered; frees it. */
void nbd_end_transfer(vx_nbd_connection *c, transfer *command);
/* Answers completed tasks while there is room. True: some tasks found no room. */
bool nbd_take_completions(vx_nbd_connection *c);

#endif
