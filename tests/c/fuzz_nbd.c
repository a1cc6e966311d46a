/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the transmission phase: streams of requests, mutated, against a map over memory, under
 * sanitizers. What comes back must be a stream of well-formed replies to requests that were sent.
 * Usage: fuzz_nbd SECONDS SEED
 */
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "map.h"
#include "memory.h"
#include "nbd.h"
#include "nbd_wire.h"

#define SIZE ((uint64_t)1 << 20)
#define PAGE_SHIFT 14u
#define STREAM 400000u

static vx_device *map;
static uint64_t next_place, seed;
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;

static uint64_t any(uint64_t limit)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % limit;
}

static int fault(uint64_t identity, vx_fault *what)
{
    uint64_t hole = vx_entry(VX_HOLE, 0, 0, 0);
    (void)identity;
    pthread_mutex_lock(&owner);
    if (what->kind == VX_FAULT_LOAD)
        for (uint64_t i = 0; i < what->count; i++)
            vx_map_install(map, what->first + i, 1, &hole);
    if (what->kind == VX_FAULT_GRANT) {
        vx_map_grant(map, 0, 1, &next_place, 0, VX_GRANT_STALE);
        next_place = (next_place + (1u << PAGE_SHIFT)) % (8 * SIZE);
    }
    pthread_mutex_unlock(&owner);
    return VX_OK;
}

static const vx_upcalls upcalls = {.fault = fault};

typedef struct reader {
    int fd;
    bool structured;
    uint64_t replies;
} reader;

static bool take(int fd, uint8_t *out, size_t length)
{
    while (length > 0) {
        ssize_t n = read(fd, out, length);
        if (n <= 0)
            return false;
        out += n;
        length -= (size_t)n;
    }
    return true;
}

static uint32_t u32(const uint8_t *in)
{
    return (uint32_t)in[0] << 24 | (uint32_t)in[1] << 16 | (uint32_t)in[2] << 8 | in[3];
}

/* Structured replies only: their framing can be checked without knowing the request. */
static void *read_replies(void *argument)
{
    reader *r = argument;
    static uint8_t body[1 << 26];
    uint8_t head[20];
    while (take(r->fd, head, 16)) {
        if (u32(head) == 0x67446698u) {
            uint32_t error = u32(head + 4);
            CHECK(error == 0 || !r->structured);
        } else {
            CHECK(u32(head) == 0x668e33efu && r->structured);
            CHECK(take(r->fd, head + 16, 4));
            uint32_t length = u32(head + 16), kind = (uint32_t)head[6] << 8 | head[7];
            uint32_t flags = (uint32_t)head[4] << 8 | head[5];
            CHECK(flags <= 1 && length <= sizeof body);
            CHECK(kind == 0 || kind == 1 || kind == 2 || kind == 5 || kind == 0x8001);
            CHECK(kind != 0 || (length == 0 && flags == 1));
            CHECK(kind != 2 || length == 12);
            CHECK(kind != 5 || (length >= 12 && length % 8 == 4));
            CHECK(kind != 0x8001 || length >= 6);
            CHECK(take(r->fd, body, length));
            if (kind == 1) {
                uint64_t at = (uint64_t)u32(body) << 32 | u32(body + 4);
                CHECK(length > 8 && at < SIZE && length - 8 <= SIZE - at);
            }
            if (kind == 2) {
                uint64_t at = (uint64_t)u32(body) << 32 | u32(body + 4);
                CHECK(u32(body + 8) > 0 && at < SIZE && u32(body + 8) <= SIZE - at);
            }
            for (uint32_t i = 4; kind == 5 && i < length; i += 8)
                CHECK(u32(body + i) > 0 && u32(body + i) <= SIZE && u32(body + i + 4) <= 3);
        }
        r->replies++;
    }
    return NULL;
}

static size_t put_request(uint8_t *out, size_t room)
{
    uint32_t command = (uint32_t)(any(20) == 0 ? any(65536) : any(8));
    uint32_t length = (uint32_t)(any(8) == 0 ? any(1u << 26) : any(4) == 0 ? any(70000) : any(6000));
    uint64_t offset = any(10) == 0 ? UINT64_MAX - any(9) : any(SIZE + 4096);
    uint32_t flags = (uint32_t)(any(4) == 0 ? any(64) : 0);
    if (command == NBD_DISCONNECT && any(10) != 0)
        command = NBD_READ;
    if (any(6) == 0)
        offset = SIZE - (length <= SIZE ? length : SIZE);
    size_t payload = command == NBD_WRITE ? length : 0;
    if (28 + payload > room) {
        length = 100;
        payload = command == NBD_WRITE ? length : 0;
    }
    nbd_put_u32(out, 0x25609513u);
    out[4] = 0;
    out[5] = (uint8_t)flags;
    out[6] = (uint8_t)(command >> 8);
    out[7] = (uint8_t)command;
    nbd_put_u32(out + 8, 0);
    nbd_put_u32(out + 12, (uint32_t)any(UINT32_MAX));
    nbd_put_u32(out + 16, (uint32_t)(offset >> 32));
    nbd_put_u32(out + 20, (uint32_t)offset);
    nbd_put_u32(out + 24, length);
    memset(out + 28, 'x', payload);
    return 28 + payload;
}

static void one_connection(vx_pool *pool)
{
    static uint8_t stream[STREAM];
    size_t length = 0, sent = 0, early = any(200);
    uint64_t requests = any(60) + 1;
    for (uint64_t i = 0; i < requests && STREAM - length > 200; i++)
        length += put_request(stream + length, STREAM - length - 200);
    if (any(3) == 0) /* the stream itself is damaged */
        for (uint64_t i = any(4); i > 0; i--)
            stream[any(length)] ^= (uint8_t)(1u << any(8));
    if (any(4) == 0)
        length = any(length + 1);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    vx_nbd_terms terms = {.largest_payload = 1 << 20,
                          .context_id = 1,
                          .requests_limit = (uint32_t)any(16) + 1,
                          .bytes_limit = 1 << 22,
                          .read_only = any(4) == 0,
                          .structured = any(4) != 0};
    terms.block_status = terms.structured && any(4) != 0;
    early = early < length ? early : length;
    vx_nbd_connection *c = vx_nbd_create(pair[0], map, pool, &terms, stream, early);
    CHECK(c != NULL);
    reader r = {.fd = pair[1], .structured = terms.structured};
    pthread_t reading, serving;
    CHECK(pthread_create(&serving, NULL, (void *(*)(void *))(void (*)(void))vx_nbd_serve, c) == 0);
    bool checked = terms.structured; /* simple replies carry data that only the request explains */
    if (checked)
        CHECK(pthread_create(&reading, NULL, read_replies, &r) == 0);
    for (sent = early; sent < length;) {
        size_t n = any(2) ? length - sent : any(length - sent) + 1;
        ssize_t did = send(pair[1], stream + sent, n, MSG_NOSIGNAL | (checked ? 0 : MSG_DONTWAIT));
        if (did <= 0)
            break;
        sent += (size_t)did;
    }
    shutdown(pair[1], checked ? SHUT_WR : SHUT_RDWR);
    pthread_join(serving, NULL);
    vx_nbd_destroy(c);
    if (checked)
        pthread_join(reading, NULL);
    close(pair[1]);
}

int main(int argc, char **argv)
{
    uint64_t end = vx_now_ns() + (uint64_t)(argc > 1 ? atoi(argv[1]) : 5) * 1000000000u, runs = 0;
    seed = (uint64_t)(argc > 2 ? atoi(argv[2]) : 1) * 0x9E3779B97F4A7C15u + 1;
    vx_pool *pool = vx_pool_create(4, 1 << 24);
    vx_device *leaf = vx_memory_create(8 * SIZE, 8 * SIZE, 1);
    map = vx_map_create(SIZE, SIZE, PAGE_SHIFT, 1, VX_MAP_IN_PLACE, pool, 2, &upcalls);
    CHECK(map != NULL && vx_map_set_lower(map, 0, leaf) == 0);
    while (vx_now_ns() < end) {
        alarm(60); /* a connection that hangs is a bug, too */
        one_connection(pool);
        runs++;
    }
    printf("%llu connections\n", (unsigned long long)runs);
    vx_device_release(map);
    vx_device_release(leaf);
    vx_pool_destroy(pool);
    return 0;
}
