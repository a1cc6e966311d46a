/* SPDX-License-Identifier: MIT
 *
 * The transmission phase of one NBD connection: vx_nbd_serve runs on a thread of the caller's until
 * the client disconnects, breaks the protocol, or vx_nbd_stop is called.
 *
 * The thread reads whatever has arrived, serves inline what cannot block, and answers with one send.
 * What may block goes to the pool; replies leave as requests complete. Only this thread touches the
 * socket. It stops reading while too much is under way or the client does not read its replies.
 *
 * A request that was accepted is finished before vx_nbd_serve returns, also when the client is gone;
 * but what a throttle still holds up then fails, because nobody can be told that it was done.
 */
#ifndef VX_NBD_H
#define VX_NBD_H

#include "device.h"
#include "meter.h"
#include "pool.h"

typedef struct vx_nbd_connection vx_nbd_connection;

typedef struct vx_nbd_terms {
    uint32_t largest_payload; /* bytes of a READ or WRITE */
    uint32_t context_id;      /* of base:allocation, when block_status */
    uint32_t requests_limit;  /* under way at once */
    uint32_t slot;            /* spreads connections over epoch slots */
    uint64_t bytes_limit;     /* payload under way at once */
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
int vx_nbd_serve(vx_nbd_connection *connection); /* 0, or VX_E_PROTOCOL, VX_E_IO */
/* No new requests; vx_nbd_serve finishes what it has and returns. From any thread. */
void vx_nbd_stop(vx_nbd_connection *connection);
/* Cuts the connection: nothing more is sent or received. From any thread. */
void vx_nbd_abort(vx_nbd_connection *connection);
/* 13 numbers: requests by command (8), bytes read, bytes written, errors, pooled, under way. */
void vx_nbd_counters_of(vx_nbd_connection *connection, uint64_t *counters);
void vx_nbd_destroy(vx_nbd_connection *connection); /* after vx_nbd_serve returned */

#endif
