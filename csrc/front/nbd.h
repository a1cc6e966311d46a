/* SPDX-License-Identifier: MIT
 *
 * The transmission phase of one NBD connection: vx_nbd_serve runs on a thread of the caller's until
 * the client disconnects, breaks the protocol, or vx_nbd_stop is called.
 *
 * The thread reads whatever has arrived, serves inline what cannot block, and answers with one send.
 * What may block goes to the pool; replies leave as requests complete. Only this thread touches the
 * socket.
 *
 * Memory. A READ or WRITE of more than VX_NBD_PIECE bytes is carried out in pieces of that size: of a
 * WRITE each piece as soon as it has arrived, of a READ each piece when there is room for its answer.
 * One piece a direction always has room: it is the connection's own (VX_NBD_CONNECTION_BYTES holds it
 * and the fixed buffers). Further ones are charged to the pool that all connections share. So a client
 * that stalls, whatever it does, keeps its own memory and what it borrowed, and nobody waits for it:
 * READs that find no room wait in a list, and requests behind them are taken. Only a READ that must be
 * answered as a whole (simple replies, DF) and is larger than a piece may have to wait for what others
 * borrowed. While one waits, a connection whose client has not moved for VX_NBD_STALL_NS while it
 * borrows is cut off.
 *
 * A request that was accepted is finished before vx_nbd_serve returns, also when the client is gone;
 * but what a throttle still holds up then fails, because nobody can be told that it was done.
 */
#ifndef VX_NBD_H
#define VX_NBD_H

#include "core/device.h"
#include "core/meter.h"
#include "core/pool.h"

#ifndef VX_NBD_PIECE /* smaller in the fuzzer, whose disk is small */
#define VX_NBD_PIECE ((size_t)1 << 20)
#endif
#define VX_NBD_CONNECTION_BYTES ((uint64_t)4 << 20) /* what a connection may take without asking */
#define VX_NBD_STALL_NS ((uint64_t)5000000000)

typedef struct vx_nbd_connection vx_nbd_connection;

typedef struct vx_nbd_terms {
    uint32_t largest_payload; /* bytes of a READ or WRITE */
    uint32_t context_id;      /* of base:allocation, when block_status */
    uint32_t requests_limit;  /* under way at once */
    uint32_t slot;            /* spreads connections over epoch slots */
    uint64_t bytes_limit;     /* payload under way at once, but for one piece a direction */
    bool read_only;
    bool structured;
    bool block_status;
} vx_nbd_terms;

/* Written by the connection's thread alone; read by anyone, at any time. */
typedef struct vx_nbd_counters {
    _Atomic uint64_t requests[8]; /* by NBD command */
    _Atomic uint64_t bytes_read, bytes_written;
    _Atomic uint64_t errors;
    _Atomic uint64_t pooled; /* requests that were not answered inline */
    _Atomic uint64_t under_way;
} vx_nbd_counters;

/* Takes over `fd` (a connected stream socket, blocking) and a reference to `device`. `early`: bytes
 * that were already read from the socket. NULL: no memory; fd is then closed. */
vx_nbd_connection *vx_nbd_create(int fd, vx_device *device, vx_pool *pool,
                                 const vx_nbd_terms *terms, const uint8_t *early,
                                 size_t early_length);
/* Before vx_nbd_serve: where it counts what it does, with latencies; it is not the connection's. */
void vx_nbd_set_meter(vx_nbd_connection *connection, vx_meter *meter);
/* 0, or VX_E_PROTOCOL, VX_E_IO, VX_E_CANCELLED (it stood in the way of another connection). */
int vx_nbd_serve(vx_nbd_connection *connection);
/* No new requests; vx_nbd_serve finishes what it has and returns. From any thread. */
void vx_nbd_stop(vx_nbd_connection *connection);
/* Cuts the connection: nothing more is sent or received. From any thread. */
void vx_nbd_abort(vx_nbd_connection *connection);
/* 13 numbers: requests by command (8), bytes read, bytes written, errors, pooled, under way. */
void vx_nbd_counters_of(vx_nbd_connection *connection, uint64_t *counters);
void vx_nbd_destroy(vx_nbd_connection *connection); /* after vx_nbd_serve returned */

#endif
