/* SPDX-License-Identifier: MIT
 *
 * Replies on their way to a socket: a staging buffer for headers and small payloads, and large
 * buffers by reference, sent in order with one sendmsg for as much as the kernel takes.
 *
 * Owned by one connection's thread. A piece with an owner is given back through `sent` when its last
 * byte has been handed to the kernel.
 */
#ifndef VX_NBD_OUTPUT_H
#define VX_NBD_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NBD_STAGING_BYTES ((size_t)1 << 20)
#define NBD_PIECES 512u

typedef struct nbd_piece {
    const uint8_t *bytes;
    size_t length;
    void *owner; /* NULL: staging, or more of the same owner follows */
} nbd_piece;

typedef struct nbd_output {
    uint8_t *staging;
    size_t used;
    nbd_piece pieces[NBD_PIECES]; /* [first, count) wait */
    uint32_t first, count;
    uint64_t bytes; /* waiting */
    void (*sent)(void *owner, void *context);
    void *context;
} nbd_output;

bool nbd_output_initialise(nbd_output *output, void (*sent)(void *, void *), void *context);
void nbd_output_release(nbd_output *output); /* gives every owner back */
/* Room for `length` staged bytes and `pieces` more pieces? */
bool nbd_output_fits(const nbd_output *output, size_t length, uint32_t pieces);
/* Where the next staged bytes go; then commits them. */
uint8_t *nbd_output_stage(nbd_output *output);
void nbd_output_staged(nbd_output *output, size_t length);
void nbd_output_refer(nbd_output *output, const uint8_t *bytes, size_t length, void *owner);
/* Sends what it can without blocking: 1 all gone, 0 the socket is full, -1 the peer is gone. */
int nbd_output_send(nbd_output *output, int fd);

#endif
