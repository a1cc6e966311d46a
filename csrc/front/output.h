/* SPDX-License-Identifier: MIT
 *
 * Replies on their way to a socket: a staging buffer for headers and small payloads, and large
 * buffers by reference, sent in order with one sendmsg for as much as the kernel takes.
 *
 * Owned by one connection's thread. A piece with an owner is given back through `sent` when its last
 * byte has been handed to the kernel.
 */
#ifndef VX_OUTPUT_H
#define VX_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VX_OUTPUT_STAGING ((size_t)1 << 20)
#define VX_OUTPUT_PIECES 512u

typedef struct vx_output_piece {
    const uint8_t *bytes;
    size_t length;
    void *owner; /* NULL: staging, or more of the same owner follows */
} vx_output_piece;

typedef struct vx_output {
    uint8_t *staging;
    size_t used;
    vx_output_piece pieces[VX_OUTPUT_PIECES]; /* [first, count) wait */
    uint32_t first, count;
    uint64_t bytes; /* waiting */
    void (*sent)(void *owner, void *context);
    void *context;
} vx_output;

bool vx_output_initialise(vx_output *output, void (*sent)(void *, void *), void *context);
void vx_output_release(vx_output *output); /* gives every owner back */
/* Room for `length` staged bytes and `pieces` more pieces? */
bool vx_output_fits(const vx_output *output, size_t length, uint32_t pieces);
/* Where the next staged bytes go; then commits them. */
uint8_t *vx_output_stage(vx_output *output);
void vx_output_staged(vx_output *output, size_t length);
void vx_output_refer(vx_output *output, const uint8_t *bytes, size_t length, void *owner);
/* Sends what it can without blocking: 1 all gone, 0 the socket is full, -1 the peer is gone. */
int vx_output_send(vx_output *output, int fd);

#endif
