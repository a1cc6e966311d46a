/* SPDX-License-Identifier: MIT
 *
 * The replies that wait to be sent to a socket. Headers and small payloads are copied into a
 * staging buffer; large buffers are referenced. They are sent in order, with one sendmsg for as
 * much as the kernel takes.
 *
 * One connection's thread owns the output. If a piece has an owner, `sent` is called with that
 * owner when the kernel has taken the last byte of the piece.
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
    void *owner; /* NULL: staging, or a later piece has the owner */
} vx_output_piece;

typedef struct vx_output {
    uint8_t *staging;
    size_t used;
    vx_output_piece pieces[VX_OUTPUT_PIECES]; /* [first, count) are unsent */
    uint32_t first, count;
    uint64_t bytes; /* unsent */
    void (*sent)(void *owner, void *context);
    void *context;
} vx_output;

bool vx_output_initialise(vx_output *output, void (*sent)(void *, void *), void *context);
void vx_output_release(vx_output *output); /* calls `sent` for every owner left */
/* Whether there is room for `length` staged bytes and `pieces` more pieces. */
bool vx_output_fits(const vx_output *output, size_t length, uint32_t pieces);
/* Returns where to write staged bytes; vx_output_staged then appends them. */
uint8_t *vx_output_stage(vx_output *output);
void vx_output_staged(vx_output *output, size_t length);
void vx_output_refer(vx_output *output, const uint8_t *bytes, size_t length, void *owner);
/* Sends as much as it can without blocking. 1: all sent; 0: the socket is full; -1: the peer is
 * gone. */
int vx_output_send(vx_output *output, int fd);

#endif
