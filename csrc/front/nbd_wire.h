/* SPDX-License-Identifier: MIT
 *
 * The bytes of the NBD transmission phase (NetworkBlockDevice proto.md, "Transmission phase"). This
 * file only parses and encodes, without sockets, so that it can be tested and fuzzed alone.
 */
#ifndef VX_NBD_WIRE_H
#define VX_NBD_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NBD_REQUEST_BYTES 28u
#define NBD_SIMPLE_REPLY_BYTES 16u
#define NBD_CHUNK_BYTES 20u

enum nbd_command {
    NBD_READ = 0,
    NBD_WRITE = 1,
    NBD_DISCONNECT = 2,
    NBD_FLUSH = 3,
    NBD_TRIM = 4,
    NBD_CACHE = 5,
    NBD_WRITE_ZEROES = 6,
    NBD_BLOCK_STATUS = 7
};

enum nbd_command_flag {
    NBD_FLAG_FUA = 1,
    NBD_FLAG_NO_HOLE = 2,
    NBD_FLAG_DF = 4,
    NBD_FLAG_REQ_ONE = 8,
    NBD_FLAG_FAST_ZERO = 16
};

enum nbd_error {
    NBD_OK = 0,
    NBD_EPERM = 1,
    NBD_EIO = 5,
    NBD_ENOMEM = 12,
    NBD_EINVAL = 22,
    NBD_ENOSPC = 28,
    NBD_EOVERFLOW = 75,
    NBD_ENOTSUP = 95,
    NBD_ESHUTDOWN = 108
};

enum nbd_chunk_type {
    NBD_CHUNK_NONE = 0,
    NBD_CHUNK_DATA = 1,
    NBD_CHUNK_HOLE = 2,
    NBD_CHUNK_STATUS = 5,
    NBD_CHUNK_ERROR = 0x8001
};

enum nbd_allocation { NBD_STATE_HOLE = 1, NBD_STATE_ZERO = 2 };

typedef struct nbd_request {
    uint16_t flags;
    uint16_t command;
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
} nbd_request;

/* The properties of an export that nbd_validate checks. */
typedef struct nbd_terms {
    uint64_t size;
    uint32_t largest_payload;
    bool read_only;
    bool structured;
    bool block_status; /* base:allocation was selected */
} nbd_terms;

/* False: the magic number is wrong, so the stream is lost. */
bool nbd_parse_request(const uint8_t bytes[NBD_REQUEST_BYTES], nbd_request *request);
/* The payload bytes that follow the request on the wire, even if the request is invalid. */
uint64_t nbd_payload_of(const nbd_request *request);
/* NBD_OK, or the error that answers the request. */
enum nbd_error nbd_validate(const nbd_request *request, const nbd_terms *terms);
/* The error on the wire for a vx_error; ENOTSUP only for a request with FAST_ZERO. */
enum nbd_error nbd_error_of(int code, const nbd_request *request);

/* Each returns the bytes written. */
size_t nbd_put_simple(uint8_t *out, enum nbd_error error, uint64_t cookie);
size_t nbd_put_chunk(uint8_t *out, bool last, enum nbd_chunk_type type, uint64_t cookie,
                     uint32_t length);
size_t nbd_put_data(uint8_t *out, bool last, uint64_t cookie, uint64_t offset, uint32_t length);
size_t nbd_put_hole(uint8_t *out, bool last, uint64_t cookie, uint64_t offset, uint32_t length);
size_t nbd_put_error(uint8_t *out, bool last, uint64_t cookie, enum nbd_error error);
void nbd_put_u32(uint8_t *out, uint32_t value);

#endif
