/* SPDX-License-Identifier: MIT */
#include "front/nbd_wire.h"

#include "core/error.h"

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu

static uint16_t get_u16(const uint8_t *in)
{
    return (uint16_t)(in[0] << 8 | in[1]);
}

static uint32_t get_u32(const uint8_t *in)
{
    return (uint32_t)get_u16(in) << 16 | get_u16(in + 2);
}

static uint64_t get_u64(const uint8_t *in)
{
    return (uint64_t)get_u32(in) << 32 | get_u32(in + 4);
}

static void put_u16(uint8_t *out, uint16_t value)
{
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
}

void nbd_put_u32(uint8_t *out, uint32_t value)
{
    put_u16(out, (uint16_t)(value >> 16));
    put_u16(out + 2, (uint16_t)value);
}

static void put_u64(uint8_t *out, uint64_t value)
{
    nbd_put_u32(out, (uint32_t)(value >> 32));
    nbd_put_u32(out + 4, (uint32_t)value);
}

bool nbd_parse_request(const uint8_t bytes[NBD_REQUEST_BYTES], nbd_request *request)
{
    *request = (nbd_request){.flags = get_u16(bytes + 4),
                             .command = get_u16(bytes + 6),
                             .cookie = get_u64(bytes + 8),
                             .offset = get_u64(bytes + 16),
                             .length = get_u32(bytes + 24)};
    return get_u32(bytes) == REQUEST_MAGIC;
}

uint64_t nbd_payload_of(const nbd_request *request)
{
    return request->command == NBD_WRITE ? request->length : 0;
}

static uint16_t allowed_flags(const nbd_request *request, const nbd_terms *terms)
{
    switch (request->command) {
    case NBD_READ:
        return terms->structured ? NBD_FLAG_FUA | NBD_FLAG_DF : NBD_FLAG_FUA;
    case NBD_WRITE_ZEROES:
        return NBD_FLAG_FUA | NBD_FLAG_NO_HOLE | NBD_FLAG_FAST_ZERO;
    case NBD_BLOCK_STATUS:
        return NBD_FLAG_FUA | NBD_FLAG_REQ_ONE;
    default:
        return NBD_FLAG_FUA;
    }
}

enum nbd_error nbd_validate(const nbd_request *request, const nbd_terms *terms)
{
    bool outside = request->offset > terms->size || request->length > terms->size - request->offset;
    if (request->flags & ~allowed_flags(request, terms))
        return NBD_EINVAL;
    switch (request->command) {
    case NBD_READ:
        if (request->length > terms->largest_payload)
            return NBD_EINVAL;
        return outside ? NBD_EINVAL : NBD_OK;
    case NBD_WRITE:
        if (terms->read_only)
            return NBD_EPERM;
        if (request->length > terms->largest_payload)
            return NBD_EINVAL;
        return outside ? NBD_ENOSPC : NBD_OK;
    case NBD_WRITE_ZEROES:
        if (terms->read_only)
            return NBD_EPERM;
        return outside ? NBD_ENOSPC : NBD_OK;
    case NBD_TRIM:
        if (terms->read_only)
            return NBD_EPERM;
        return outside ? NBD_EINVAL : NBD_OK;
    case NBD_CACHE:
        return outside ? NBD_EINVAL : NBD_OK;
    case NBD_BLOCK_STATUS:
        return outside || !terms->block_status || request->length == 0 ? NBD_EINVAL : NBD_OK;
    case NBD_FLUSH:
        return NBD_OK;
    default:
        return NBD_EINVAL;
    }
}

enum nbd_error nbd_error_of(int code, const nbd_request *request)
{
    switch (code) {
    case VX_OK:
        return NBD_OK;
    case VX_E_RANGE:
        return request->command == NBD_WRITE || request->command == NBD_WRITE_ZEROES ? NBD_ENOSPC
                                                                                     : NBD_EINVAL;
    case VX_E_NOSPACE:
        return NBD_ENOSPC;
    case VX_E_READONLY:
        return NBD_EPERM;
    case VX_E_NOMEM:
        return NBD_ENOMEM;
    case VX_E_CLOSED:
    case VX_E_CANCELLED:
        return NBD_ESHUTDOWN;
    case VX_E_UNSUPPORTED:
        return request->flags & NBD_FLAG_FAST_ZERO ? NBD_ENOTSUP : NBD_EINVAL;
    default:
        return NBD_EIO;
    }
}

size_t nbd_put_simple(uint8_t *out, enum nbd_error error, uint64_t cookie)
{
    nbd_put_u32(out, SIMPLE_MAGIC);
    nbd_put_u32(out + 4, (uint32_t)error);
    put_u64(out + 8, cookie);
    return NBD_SIMPLE_REPLY_BYTES;
}

size_t nbd_put_chunk(uint8_t *out, bool last, enum nbd_chunk_type type, uint64_t cookie,
                     uint32_t length)
{
    nbd_put_u32(out, CHUNK_MAGIC);
    put_u16(out + 4, last ? 1 : 0);
    put_u16(out + 6, (uint16_t)type);
    put_u64(out + 8, cookie);
    nbd_put_u32(out + 16, length);
    return NBD_CHUNK_BYTES;
}

size_t nbd_put_data(uint8_t *out, bool last, uint64_t cookie, uint64_t offset, uint32_t length)
{
    size_t at = nbd_put_chunk(out, last, NBD_CHUNK_DATA, cookie, length + 8);
    put_u64(out + at, offset);
    return at + 8;
}

size_t nbd_put_hole(uint8_t *out, bool last, uint64_t cookie, uint64_t offset, uint32_t length)
{
    size_t at = nbd_put_chunk(out, last, NBD_CHUNK_HOLE, cookie, 12);
    put_u64(out + at, offset);
    nbd_put_u32(out + at + 8, length);
    return at + 12;
}

size_t nbd_put_error(uint8_t *out, bool last, uint64_t cookie, enum nbd_error error)
{
    size_t at = nbd_put_chunk(out, last, NBD_CHUNK_ERROR, cookie, 6);
    nbd_put_u32(out + at, (uint32_t)error);
    put_u16(out + at + 4, 0); /* no message: clients act on the number */
    return at + 6;
}
