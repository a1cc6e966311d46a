/* SPDX-License-Identifier: MIT
 *
 * The transmission phase of one NBD connection. vx_nbd_serve runs on a thread of the caller until
 * the client disconnects, the client breaks the protocol, or vx_nbd_stop is called.
 *
 * The thread reads whatever has arrived, serves inline the requests that cannot block, and sends
 * their replies with one call. Requests that may block go to the pool; their replies are sent as
 * they complete. Only this thread sends and receives on the socket.
 *
 * Memory (service.h). A READ or WRITE of more than VX_SERVICE_PIECE bytes is carried out in pieces
 * of that size. A piece of a WRITE starts as soon as it has arrived; a piece of a READ starts when
 * there is room for its reply. VX_NBD_CONNECTION_BYTES covers the connection's own piece in each
 * direction and the fixed buffers. READs that find no room wait in a list, and requests behind them
 * are still taken. Only a READ that needs a single reply (simple replies, DF) and is larger than a
 * piece may have to wait for memory that other connections borrowed.
 *
 * vx_nbd_serve finishes every accepted request before it returns, even when the client is gone.
 * Requests that a throttle still holds back then fail, because the client cannot learn their
 * result.
 */
#ifndef VX_NBD_H
#define VX_NBD_H

#include "front/service.h"

#define VX_NBD_CONNECTION_BYTES ((uint64_t)4 << 20) /* of a connection, without borrowed memory */

typedef struct vx_nbd_connection vx_nbd_connection;

typedef struct vx_nbd_terms {
    uint32_t largest_payload; /* bytes of a READ or WRITE */
    uint32_t context_id;      /* of base:allocation, when block_status */
    uint32_t requests_limit;  /* in flight at once */
    uint32_t epoch_slot;            /* spreads connections over epoch slots */
    uint64_t bytes_limit;     /* bytes of payload in flight; the first piece of each direction always fits */
    bool read_only;
    bool structured;
    bool block_status;
} vx_nbd_terms;

typedef struct vx_nbd_counters {
    uint64_t requests[8]; /* by NBD command */
    uint64_t bytes_read, bytes_written; /* payload */
    uint64_t errors;
    uint64_t failed_writes; /* of those errors: writes, zeroes and flushes */
    uint64_t pooled;    /* tasks that went to the pool */
    uint64_t under_way; /* requests not answered yet */
} vx_nbd_counters;

/* Takes ownership of `fd` (a connected, blocking stream socket) and its own reference to `device`.
 * `early`: bytes that were already read from the socket. NULL: no memory or file descriptor, or too
 * many early bytes; `fd` is then closed. */
vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length);
/* Before vx_nbd_serve: sets the meter that counts requests and latencies. The caller still owns
 * it. */
void vx_nbd_set_meter(vx_nbd_connection *connection, vx_meter *meter);
/* Returns 0, VX_E_PROTOCOL, VX_E_IO or VX_E_CANCELLED (the client stalled while another connection
 * waited for memory that this one borrows). */
int vx_nbd_serve(vx_nbd_connection *connection);
/* Accepts no new requests; vx_nbd_serve finishes the accepted ones and returns. From any thread. */
void vx_nbd_stop(vx_nbd_connection *connection);
/* Cuts the connection: nothing more is sent or received. From any thread. */
void vx_nbd_abort(vx_nbd_connection *connection);
/* Each number is exact, but they are not read at one instant. From any thread. */
void vx_nbd_counters_of(vx_nbd_connection *connection, vx_nbd_counters *counters);
void vx_nbd_destroy(vx_nbd_connection *connection); /* after vx_nbd_serve returned */

#endif
