/* SPDX-License-Identifier: MIT */
#include <string.h>

#include "check.h"
#include "core/error.h"
#include "front/nbd_wire.h"

static const uint8_t write_request[NBD_REQUEST_BYTES] = {
    0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
    0,    0,    2,    0};

static void parses(void)
{
    nbd_request request;
    CHECK(nbd_parse_request(write_request, &request));
    CHECK_EQ(request.flags, NBD_FLAG_FUA);
    CHECK_EQ(request.command, NBD_WRITE);
    CHECK_EQ(request.cookie, 0x0102030405060708u);
    CHECK_EQ(request.offset, 4096);
    CHECK_EQ(request.length, 512);
    CHECK_EQ(nbd_payload_of(&request), 512);
    uint8_t bad[NBD_REQUEST_BYTES];
    memcpy(bad, write_request, sizeof bad);
    bad[0] ^= 1;
    CHECK(!nbd_parse_request(bad, &request));
}

static enum nbd_error validated(uint16_t command, uint16_t flags, uint64_t offset, uint32_t length,
                                bool read_only, bool structured)
{
    nbd_request request = {.flags = flags, .command = command, .offset = offset, .length = length};
    nbd_terms terms = {.size = 1 << 20,
                       .largest_payload = 65536,
                       .read_only = read_only,
                       .structured = structured,
                       .block_status = structured};
    return nbd_validate(&request, &terms);
}

static void validates(void)
{
    CHECK_EQ(validated(NBD_READ, 0, 0, 65536, false, true), NBD_OK);
    CHECK_EQ(validated(NBD_READ, 0, 0, 65537, false, true), NBD_EINVAL);
    CHECK_EQ(validated(NBD_READ, 0, 1 << 20, 1, false, true), NBD_EINVAL);
    CHECK_EQ(validated(NBD_READ, 0, UINT64_MAX, 2, false, true), NBD_EINVAL);
    CHECK_EQ(validated(NBD_READ, NBD_FLAG_DF, 0, 1, false, true), NBD_OK);
    CHECK_EQ(validated(NBD_READ, NBD_FLAG_DF, 0, 1, false, false), NBD_EINVAL);
    CHECK_EQ(validated(NBD_WRITE, 0, (1 << 20) - 1, 2, false, true), NBD_ENOSPC);
    CHECK_EQ(validated(NBD_WRITE, 0, 0, 1, true, true), NBD_EPERM);
    CHECK_EQ(validated(NBD_WRITE_ZEROES, NBD_FLAG_NO_HOLE | NBD_FLAG_FAST_ZERO, 0, 1 << 20,
             false, true), NBD_OK);
    CHECK_EQ(validated(NBD_TRIM, NBD_FLAG_NO_HOLE, 0, 1, false, true), NBD_EINVAL);
    CHECK_EQ(validated(NBD_TRIM, 0, 0, (1 << 20) + 1, false, true), NBD_EINVAL);
    CHECK_EQ(validated(NBD_BLOCK_STATUS, NBD_FLAG_REQ_ONE, 0, 1, false, true), NBD_OK);
    CHECK_EQ(validated(NBD_BLOCK_STATUS, 0, 0, 1, false, false), NBD_EINVAL);
    CHECK_EQ(validated(77, 0, 0, 1, false, true), NBD_EINVAL);
    for (uint16_t command = NBD_READ; command <= NBD_BLOCK_STATUS; command++)
        if (command != NBD_DISCONNECT)
            CHECK_EQ(validated(command, NBD_FLAG_FUA, 0, 1, false, true), NBD_OK);
}

static void maps_errors(void)
{
    nbd_request write = {.command = NBD_WRITE}, read = {.command = NBD_READ};
    nbd_request fast = {.command = NBD_WRITE_ZEROES, .flags = NBD_FLAG_FAST_ZERO};
    CHECK_EQ(nbd_error_of(VX_E_NOSPACE, &write), NBD_ENOSPC);
    CHECK_EQ(nbd_error_of(VX_E_RANGE, &write), NBD_ENOSPC);
    CHECK_EQ(nbd_error_of(VX_E_RANGE, &read), NBD_EINVAL);
    CHECK_EQ(nbd_error_of(VX_E_READONLY, &write), NBD_EPERM);
    CHECK_EQ(nbd_error_of(VX_E_UNSUPPORTED, &fast), NBD_ENOTSUP);
    CHECK_EQ(nbd_error_of(VX_E_UNSUPPORTED, &write), NBD_EINVAL);
    CHECK_EQ(nbd_error_of(VX_E_POISONED, &read), NBD_EIO);
}

static void encodes(void)
{
    uint8_t out[64];
    static const uint8_t hole[] = {0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9,
                                   0,    0,    0,    12,   0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0};
    CHECK_EQ(nbd_put_hole(out, true, 9, 512, 256), sizeof hole);
    CHECK_EQ(memcmp(out, hole, sizeof hole), 0);
    static const uint8_t simple[] = {0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5,
                                     0,    0,    0,    0,    0, 0, 0, 9};
    CHECK_EQ(nbd_put_simple(out, NBD_EIO, 9), sizeof simple);
    CHECK_EQ(memcmp(out, simple, sizeof simple), 0);
    CHECK_EQ(nbd_put_error(out, true, 9, NBD_EIO), 26);
    CHECK_EQ(nbd_put_data(out, false, 9, 0, 100), 28);
    CHECK_EQ(out[5], 0);
    CHECK_EQ(out[19], 108);
}

int main(void)
{
    RUN(parses);
    RUN(validates);
    RUN(maps_errors);
    RUN(encodes);
    return CHECK_REPORT();
}
