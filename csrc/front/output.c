/* SPDX-License-Identifier: MIT */
#include "front/output.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

bool vx_output_initialise(vx_output *output, void (*sent)(void *, void *), void *context)
{
    memset(output, 0, sizeof *output);
    output->staging = malloc(VX_OUTPUT_STAGING);
    output->sent = sent;
    output->context = context;
    return output->staging != NULL;
}

static void empty(vx_output *output)
{
    output->first = output->count = 0;
    output->used = 0;
    output->bytes = 0;
}

void vx_output_release(vx_output *output)
{
    for (uint32_t i = output->first; i < output->count; i++)
        if (output->pieces[i].owner != NULL)
            output->sent(output->pieces[i].owner, output->context);
    empty(output);
    free(output->staging);
    output->staging = NULL;
}

bool vx_output_fits(const vx_output *output, size_t length, uint32_t pieces)
{
    return VX_OUTPUT_STAGING - output->used >= length && VX_OUTPUT_PIECES - output->count >= pieces;
}

uint8_t *vx_output_stage(vx_output *output)
{
    return output->staging + output->used;
}

void vx_output_staged(vx_output *output, size_t length)
{
    const uint8_t *bytes = output->staging + output->used;
    vx_output_piece *last = output->count > output->first ? &output->pieces[output->count - 1] : NULL;
    if (last != NULL && last->owner == NULL && last->bytes + last->length == bytes)
        last->length += length;
    else
        output->pieces[output->count++] = (vx_output_piece){bytes, length, NULL};
    output->used += length;
    output->bytes += length;
}

void vx_output_refer(vx_output *output, const uint8_t *bytes, size_t length, void *owner)
{
    output->pieces[output->count++] = (vx_output_piece){bytes, length, owner};
    output->bytes += length;
}

static void consume(vx_output *output, size_t n)
{
    output->bytes -= n;
    while (n > 0 || (output->first < output->count && output->pieces[output->first].length == 0)) {
        vx_output_piece *piece = &output->pieces[output->first];
        size_t part = n < piece->length ? n : piece->length;
        piece->bytes += part;
        piece->length -= part;
        n -= part;
        if (piece->length > 0)
            return;
        output->first++;
        if (piece->owner != NULL)
            output->sent(piece->owner, output->context);
    }
}

int vx_output_send(vx_output *output, int fd)
{
    while (output->first < output->count) {
        struct iovec vector[VX_OUTPUT_PIECES];
        struct msghdr message = {.msg_iov = vector};
        for (uint32_t i = output->first; i < output->count; i++)
            vector[message.msg_iovlen++] =
                (struct iovec){(void *)(uintptr_t)output->pieces[i].bytes,
                               output->pieces[i].length};
        ssize_t n = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0)
            consume(output, (size_t)n);
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return 0;
        else if (errno != EINTR)
            return -1;
    }
    empty(output);
    return 1;
}
