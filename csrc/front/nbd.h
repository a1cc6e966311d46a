/* SPDX-License-Identifier: MIT
 *
 * The transmission phase of one NBD connection: vx_nbd_serve runs on a thread of the caller's until
 * the client disconnects, breaks the protocol, or vx_nbd_stop is called.
 *
 * The thread reads whatever has arrived, serves inline what cannot block, and answers with one send.
 * What may block goes to the pool; replies leave as requests complete. Only this thread touches the
 * socket.
 *
 * Memory (service.h). A READ or WRITE of more than VX_SERVICE_PIECE bytes is carried out in pieces of that size: of a
 * WRITE each piece as soon as it has arrived, of a READ each piece when there is room for its answer.
 * VX_NBD_CONNECTION_BYTES holds the connection's own piece of each direction and the fixed buffers. READs
 * that find no room wait in a list, and requests behind them are taken. Only a READ that must be answered
 * as a whole (simple replies, DF) and is larger than a piece may have to wait for what others borrowed.
 *
 * A request that was accepted is finished before vx_nbd_serve returns, even when the client is gone. What
 * a throttle still holds back then fails, because nobody can be told that it was done.
 */
#ifndef VX_NBD_H
#define VX_NBD_H

#include "front/service.h"

#define VX_NBD_CONNECTION_BYTES ((uint64_t)4 << 20) /* what a connection may take without asking */

typedef struct vx_nbd_connection vx_nbd_connection;

typedef struct vx_nbd_terms {
    uint32_t largest_payload; /* bytes of a READ or WRITE */
    uint32_t context_id;      /* of base:allocation, when block_status */
    uint32_t requests_limit;  /* under way at once */
    uint32_t epoch_slot;            /* spreads connections over epoch slots */
    uint64_t bytes_limit;     /* payload under way at once, but for one piece a direction */
    bool read_only;
    bool structured;
    bool block_status;
} vx_nbd_terms;

typedef struct vx_nbd_counters {
    uint64_t requests[8]; /* by NBD command */
    uint64_t bytes_read, bytes_written; /* payload */
    uint64_t errors;
    uint64_t pooled;    /* operations that were not answered inline */
    uint64_t under_way; /* requests that are not answered yet */
} vx_nbd_counters;

/* Takes over `fd` (a connected stream socket, blocking) and a reference to `device`. `early`: bytes
 * that were already read from the socket. NULL: no memory; fd is then closed. */
vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length);
/* Before vx_nbd_serve: where it counts what it does, with latencies; it is not the connection's. */
void vx_nbd_set_meter(vx_nbd_connection *connection, vx_meter *meter);
/* 0, or VX_E_PROTOCOL, VX_E_IO, VX_E_CANCELLED (its client stalled while another connection waited for the
 * memory that it borrows). */
int vx_nbd_serve(vx_nbd_connection *connection);
/* No new requests; vx_nbd_serve finishes what it has and returns. From any thread. */
void vx_nbd_stop(vx_nbd_connection *connection);
/* Cuts the connection: nothing more is sent or received. From any thread. */
void vx_nbd_abort(vx_nbd_connection *connection);
/* Each number is exact, their relation is not. From any thread. */
void vx_nbd_counters_of(vx_nbd_connection *connection, vx_nbd_counters *counters);
void vx_nbd_destroy(vx_nbd_connection *connection); /* after vx_nbd_serve returned */

#endif
