/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the transmission phase with streams of requests, some of them damaged, against a map over
 * memory, under sanitizers. The client checks that every request that arrived whole is answered
 * once, with the error that the protocol requires, and that each byte read is one that the disk may
 * hold.
 * Usage: fuzz_nbd SECONDS SEED
 */
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "map/map.h"
#include "leaf/memory.h"
#include "front/nbd.h"
#include "front/nbd_wire.h"

#define SIZE ((uint64_t)1 << 20)
#define PAGE_SHIFT 14u
#define STREAM 400000u
#define MOST 60u

/* Damaged streams may write any data at any place, so they use a disk of their own. */
static vx_device *maps[2];
static uint64_t next_place[2], seed;
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
    vx_device *map = maps[identity - 1];
    uint64_t *place = &next_place[identity - 1];
    pthread_mutex_lock(&owner);
    if (what->kind == VX_FAULT_LOAD)
        for (uint64_t i = 0; i < what->count; i++)
            vx_map_install(map, what->first + i, 1, &hole);
    if (what->kind == VX_FAULT_GRANT) {
        vx_map_grant(map, 0, 1, place, 0, VX_GRANT_STALE);
        *place += 1u << PAGE_SHIFT;
        CHECK_LT(*place, 8 * SIZE);
    }
    pthread_mutex_unlock(&owner);
    return VX_OK;
}

static const vx_upcalls upcalls = {.fault = fault};

/* The requests that the client sent, in order; the cookie is the index. */
typedef struct asked {
    uint32_t command, flags, length;
    uint64_t offset;
    size_t end; /* where the request ends in the stream */
    enum nbd_error expected;
    uint32_t chunks, covered;
    uint32_t of_piece[SIZE / VX_SERVICE_PIECE + 1]; /* bytes covered; in order inside each piece */
    bool answered;
} asked;

/* The value that a byte of the disk must have, as far as the client knows. */
enum known { ANY, CONTENT, ZERO };

typedef struct client {
    int fd;
    bool structured;
    bool damaged; /* the stream is damaged: only the framing of the replies can be checked */
    asked requests[MOST];
    uint32_t count;
} client;

static uint8_t known[SIZE], written[SIZE], zeroed[SIZE];

/* All writes store the same byte at an offset, so the result does not depend on their order. */
static uint8_t content(uint64_t at)
{
    return (uint8_t)((at * 0x9E3779B1u >> 11) | 1);
}

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

static uint64_t u64(const uint8_t *in)
{
    return (uint64_t)u32(in) << 32 | u32(in + 4);
}

/* The error that the NBD specification requires, derived without the server's code. */
static enum nbd_error expectation(const asked *a, const vx_nbd_terms *terms)
{
    static const uint32_t allowed[8] = {[NBD_READ] = 1, [NBD_WRITE] = 1, [NBD_FLUSH] = 1,
                                        [NBD_TRIM] = 1, [NBD_CACHE] = 1, [NBD_WRITE_ZEROES] = 19,
                                        [NBD_BLOCK_STATUS] = 9};
    bool changes = a->command == NBD_WRITE || a->command == NBD_TRIM ||
                   a->command == NBD_WRITE_ZEROES;
    bool outside = a->offset > SIZE || SIZE - a->offset < a->length;
    if (a->command > 7)
        return NBD_EINVAL;
    if (a->flags & ~(allowed[a->command] | (a->command == NBD_READ && terms->structured ? 4u : 0)))
        return NBD_EINVAL;
    if (changes && terms->read_only)
        return NBD_EPERM;
    if ((a->command == NBD_READ || a->command == NBD_WRITE) && a->length > terms->largest_payload)
        return NBD_EINVAL;
    if (a->command != NBD_FLUSH && outside)
        return a->command == NBD_WRITE || a->command == NBD_WRITE_ZEROES ? NBD_ENOSPC : NBD_EINVAL;
    if (a->command == NBD_BLOCK_STATUS && (!terms->block_status || a->length == 0))
        return NBD_EINVAL;
    return NBD_OK;
}

static void check_error(asked *a, uint32_t error)
{
    bool fast = a->command == NBD_WRITE_ZEROES && a->flags & 16 && error == NBD_ENOTSUP;
    CHECK(error == (uint32_t)a->expected || (fast && a->expected == NBD_OK));
    if (fast)
        a->expected = NBD_ENOTSUP;
    a->answered = true;
}

static void check_data(const uint8_t *data, uint64_t at, uint32_t length)
{
    for (uint64_t i = at; i < at + length; i++) {
        uint8_t byte = data == NULL ? 0 : data[i - at];
        CHECK(byte == 0 || byte == content(i));
        if (!written[i] && !zeroed[i])
            CHECK(known[i] == ANY || byte == (known[i] == CONTENT ? content(i) : 0));
        else if (!zeroed[i] && known[i] == CONTENT)
            CHECK_EQ(byte, content(i));
    }
}

static void check_chunk(client *c, asked *a, uint32_t kind, bool last, const uint8_t *body,
                        uint32_t length)
{
    CHECK(!a->answered);
    if (kind == NBD_CHUNK_ERROR) {
        CHECK(last);
        CHECK_NE(u32(body), 0);
        check_error(a, u32(body));
        return;
    }
    CHECK_EQ(a->expected, NBD_OK);
    CHECK(c->structured);
    a->chunks++;
    if (kind == NBD_CHUNK_DATA || kind == NBD_CHUNK_HOLE) {
        uint32_t n = kind == NBD_CHUNK_DATA ? length - 8 : u32(body + 8);
        CHECK_EQ(a->command, NBD_READ);
        CHECK_GT(n, 0);
        CHECK_GE(u64(body), a->offset);
        CHECK_LE(u64(body) - a->offset + n, a->length);
        uint32_t at = (uint32_t)(u64(body) - a->offset), piece = at / (uint32_t)VX_SERVICE_PIECE;
        if (a->flags & 4) /* DF: all data in one chunk */
            piece = 0;
        CHECK_EQ(at, piece * (uint32_t)VX_SERVICE_PIECE + a->of_piece[piece]);
        a->of_piece[piece] += n;
        CHECK(a->of_piece[piece] <= VX_SERVICE_PIECE || a->flags & 4);
        CHECK(a->chunks == 1 || !(a->flags & 4));
        check_data(kind == NBD_CHUNK_DATA ? body + 8 : NULL, u64(body), n);
        a->covered += n;
        CHECK_EQ(last, (a->covered == a->length));
    } else if (kind == NBD_CHUNK_STATUS) {
        uint64_t sum = 0;
        CHECK_EQ(a->command, NBD_BLOCK_STATUS);
        CHECK(last);
        CHECK_EQ(u32(body), 1);
        for (uint32_t i = 4; i < length; i += 8)
            sum += u32(body + i);
        CHECK_LE(sum, a->length);
        CHECK((length == 12 || !(a->flags & 8)));
    } else {
        CHECK(last);
        CHECK_EQ(a->length, 0);
    }
    if (last)
        check_error(a, NBD_OK);
}

static void check_framing(uint32_t kind, uint32_t flags, const uint8_t *body, uint32_t length)
{
    CHECK_LE(flags, 1);
    CHECK(kind == 0 || kind == 1 || kind == 2 || kind == 5 || kind == 0x8001);
    CHECK(kind != 0 || (length == 0 && flags == 1));
    CHECK(kind != 1 || (length > 8 && u64(body) < SIZE && length - 8 <= SIZE - u64(body)));
    CHECK(kind != 2 || (length == 12 && u32(body + 8) > 0 && u64(body) < SIZE && u32(body + 8) <=
          SIZE - u64(body)));
    CHECK(kind != 5 || (length >= 12 && length % 8 == 4));
    CHECK(kind != 0x8001 || length >= 6);
    for (uint32_t i = 4; kind == 5 && i < length; i += 8)
        CHECK(u32(body + i) > 0 && u32(body + i) <= SIZE && u32(body + i + 4) <= 3);
}

static void *read_replies(void *argument)
{
    client *c = argument;
    static uint8_t body[1 << 21];
    uint8_t head[20];
    while (take(c->fd, head, 16)) {
        uint64_t cookie = u64(head + 8);
        asked *a = !c->damaged && cookie < c->count ? &c->requests[cookie] : NULL;
        CHECK(a != NULL || c->damaged);
        if (u32(head) == 0x67446698u) {
            uint32_t error = u32(head + 4);
            CHECK(error == 0 || !c->structured);
            if (a == NULL)
                continue;
            CHECK(!a->answered);
            CHECK(!(c->structured && a->command == NBD_READ));
            check_error(a, error);
            if (error == 0 && a->command == NBD_READ) {
                CHECK(take(c->fd, body, a->length));
                check_data(body, a->offset, a->length);
            }
            continue;
        }
        CHECK_EQ(u32(head), 0x668e33efu);
        CHECK(c->structured);
        CHECK(take(c->fd, head + 16, 4));
        uint32_t length = u32(head + 16), kind = (uint32_t)head[6] << 8 | head[7];
        uint32_t flags = (uint32_t)head[4] << 8 | head[5];
        CHECK_LE(length, sizeof body);
        CHECK(take(c->fd, body, length));
        check_framing(kind, flags, body, length);
        if (a != NULL)
            check_chunk(c, a, kind, flags & 1, body, length);
    }
    return NULL;
}

static void touch(client *c)
{
    memset(written, 0, SIZE);
    memset(zeroed, 0, SIZE);
    for (uint32_t i = 0; i < c->count; i++) {
        asked *a = &c->requests[i];
        if (a->expected != NBD_OK)
            continue;
        if (a->command == NBD_WRITE)
            memset(written + a->offset, 1, a->length);
        if (a->command == NBD_WRITE_ZEROES || a->command == NBD_TRIM)
            memset(zeroed + a->offset, 1, a->length);
    }
}

/* Checks that every request that arrived whole was answered, and updates `known`. */
static void settle(client *c, size_t sent)
{
    for (uint64_t i = 0; i < SIZE && !c->damaged; i++)
        if (written[i] && zeroed[i])
            known[i] = ANY;
    for (uint32_t i = 0; i < c->count; i++) {
        asked *a = &c->requests[i];
        bool change = !c->damaged && a->expected == NBD_OK && a->length > 0;
        if (a->command == NBD_DISCONNECT && a->end <= sent)
            sent = 0;
        CHECK(c->damaged || a->end > sent || a->answered);
        if (change && a->command == NBD_WRITE)
            for (uint64_t at = a->offset; at < a->offset + a->length; at++)
                known[at] = zeroed[at] || !a->answered ? ANY : CONTENT;
        if (change && a->command == NBD_WRITE_ZEROES)
            for (uint64_t at = a->offset; at < a->offset + a->length; at++)
                known[at] = written[at] || !a->answered ? ANY : ZERO;
        if (change && a->command == NBD_TRIM)
            memset(known + a->offset, ANY, a->length);
    }
}

static size_t put_request(client *c, uint8_t *out, size_t at, const vx_nbd_terms *terms)
{
    asked *a = &c->requests[c->count];
    *a = (asked){.command = (uint32_t)(any(20) == 0 ? any(65536) : any(8)),
                 .flags = (uint32_t)(any(6) == 0 ? any(64) : any(2) ? 1u << any(5) : 0)};
    uint64_t choice = any(20);
    a->length = (uint32_t)(choice < 1   ? any(1u << 26)
                           : choice < 2 ? any(SIZE)
                           : choice < 6 ? any(70000)
                           : choice < 7 ? 0
                                        : any(6000));
    a->offset = any(10) == 0 ? UINT64_MAX - any(9) : any(SIZE + 4096);
    if (a->command == NBD_DISCONNECT && any(10) != 0)
        a->command = NBD_READ;
    if (any(6) == 0)
        a->offset = SIZE - (a->length <= SIZE ? a->length : SIZE);
    if (a->command == NBD_WRITE && at + 28 + a->length + 200 > STREAM)
        a->length = 100;
    size_t payload = a->command == NBD_WRITE ? a->length : 0;
    a->expected = expectation(a, terms);
    a->end = at + 28 + payload;
    out += at;
    nbd_put_u32(out, 0x25609513u);
    nbd_put_u32(out + 4, a->flags << 16 | a->command);
    nbd_put_u32(out + 8, 0);
    nbd_put_u32(out + 12, c->count);
    nbd_put_u32(out + 16, (uint32_t)(a->offset >> 32));
    nbd_put_u32(out + 20, (uint32_t)a->offset);
    nbd_put_u32(out + 24, a->length);
    for (size_t i = 0; i < payload; i++)
        out[28 + i] = content(a->offset + i);
    c->count++;
    return a->end;
}

typedef struct served {
    vx_nbd_connection *connection;
    int fd;
} served;

static void *serve(void *argument)
{
    served *s = argument;
    vx_nbd_serve(s->connection);
    shutdown(s->fd, SHUT_RDWR); /* after a DISCONNECT the server reads no further */
    return NULL;
}

static void one_connection(vx_pool *pool)
{
    static uint8_t stream[STREAM];
    static client c;
    size_t length = 0, sent = 0, early = any(200);
    uint64_t requests = any(MOST) + 1;
    vx_nbd_terms terms = {.largest_payload = any(2) ? 1 << 20 : 1 << 16,
                          .context_id = 1,
                          .requests_limit = (uint32_t)any(16) + 1,
                          .bytes_limit = 1 << 22,
                          .read_only = any(4) == 0,
                          .structured = any(4) != 0};
    terms.block_status = terms.structured && any(4) != 0;
    c.structured = terms.structured;
    c.damaged = any(3) == 0;
    c.count = 0;
    while (c.count < requests && STREAM - length > 400)
        length = put_request(&c, stream, length, &terms);
    if (c.damaged) /* flip up to three bits of the stream */
        for (uint64_t i = any(4); i > 0; i--)
            stream[any(length)] ^= (uint8_t)(1u << any(8));
    if (any(4) == 0)
        length = any(length + 1);
    touch(&c);
    int pair[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    early = early < length ? early : length;
    vx_nbd_connection *connection =
        vx_nbd_create(pair[0], maps[c.damaged], pool, &terms, stream, early);
    CHECK(connection != NULL);
    c.fd = pair[1];
    pthread_t reading, serving;
    served served_by = {connection, pair[0]};
    CHECK_EQ(pthread_create(&serving, NULL, serve, &served_by), 0);
    /* With simple replies to a damaged stream, data and reply headers cannot be told apart. */
    bool checked = terms.structured || !c.damaged;
    if (checked)
        CHECK_EQ(pthread_create(&reading, NULL, read_replies, &c), 0);
    for (sent = early; sent < length;) {
        size_t n = any(2) ? length - sent : any(length - sent) + 1;
        ssize_t did = send(pair[1], stream + sent, n, MSG_NOSIGNAL | (checked ? 0 : MSG_DONTWAIT));
        if (did <= 0)
            break;
        sent += (size_t)did;
    }
    shutdown(pair[1], checked ? SHUT_WR : SHUT_RDWR);
    pthread_join(serving, NULL);
    vx_nbd_destroy(connection);
    if (checked)
        pthread_join(reading, NULL);
    settle(&c, sent);
    close(pair[1]);
}

int main(int argc, char **argv)
{
    uint64_t end = vx_now_ns() + (uint64_t)(argc > 1 ? atoi(argv[1]) : 5) * 1000000000u, runs = 0;
    seed = (uint64_t)(argc > 2 ? atoi(argv[2]) : 1) * 0x9E3779B97F4A7C15u + 1;
    vx_pool *pool = vx_pool_create(4, 1 << 24, 1);
    vx_device *leaves[2];
    for (uint64_t i = 0; i < 2; i++) {
        leaves[i] = vx_memory_create(8 * SIZE, 8 * SIZE, 1);
        maps[i] = vx_map_create(SIZE, SIZE, PAGE_SHIFT, 1, VX_MAP_IN_PLACE, pool, i + 1, &upcalls);
        CHECK(maps[i] != NULL);
        CHECK_EQ(vx_map_set_lower(maps[i], 0, leaves[i]), 0);
    }
    while (vx_now_ns() < end) {
        alarm(60); /* ends the test if a connection hangs */
        one_connection(pool);
        runs++;
    }
    printf("%llu connections\n", (unsigned long long)runs);
    for (int i = 0; i < 2; i++) {
        vx_device_release(maps[i]);
        vx_device_release(leaves[i]);
    }
    vx_pool_destroy(pool);
    return 0;
}
