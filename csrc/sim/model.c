/* SPDX-License-Identifier: MIT */
#include "sim/model.h"

#include <pthread.h>
#include <stdlib.h>

#include "core/device.h"

#define US ((uint64_t)1000u)
#define MS (1000u * US)
#define SECOND (1000u * MS)
#define MIB ((uint64_t)1 << 20)
#define BUFFER (64u * MIB)

#define CYLINDERS 65536u
#define ZONES 16u
#define REVOLUTION 8333333u
#define QUEUE 32u

#define MOST_CHANNELS 16u
#define PAGE 16384u

typedef unsigned __int128 wide;

struct vx_model {
    uint32_t kind;
    uint64_t capacity; /* bytes */
    bool write_cache;
    pthread_mutex_t lock;

    /* write buffer: bytes held, when it will be empty without further writes, when last updated */
    uint64_t buffered, drained_at, looked_at;

    /* hard disk */
    uint64_t free_at, head, last_end;
    uint64_t ends[QUEUE]; /* completion times of the latest requests; a ring */
    uint32_t newest;

    /* solid-state disk */
    uint32_t channels;
    uint64_t channel_free[MOST_CHANNELS], bus_free;
    uint64_t bus_rate; /* bytes a second */
    uint8_t *written;  /* bitmap: a bit for each MiB that holds data */
    uint64_t mebibytes;
    _Atomic uint64_t mebibytes_written; /* changed under the lock; vx_model_cost reads it without */
};

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t root(uint64_t value)
{
    uint64_t found = 0;
    for (uint64_t bit = (uint64_t)1 << 31; bit != 0; bit >>= 1)
        if ((found + bit) * (found + bit) <= value)
            found += bit;
    return found;
}

/* ---- a hard disk ---- */

/* log2(1 + n) / 5 in thousandths. */
static const uint16_t gains[QUEUE] = {0,   200, 317, 400, 464, 517, 561, 600, 634, 664, 692,
                                      717, 740, 761, 781, 800, 817, 834, 850, 864, 878, 892,
                                      905, 917, 929, 940, 951, 961, 972, 981, 991, 1000};

static uint64_t seek_time(uint64_t from, uint64_t to)
{
    uint64_t distance = from > to ? from - to : to - from;
    if (distance == 0)
        return 0;
    if (distance <= CYLINDERS / 3)
        return 800 * US + 13300 * US * root(distance * CYLINDERS) / CYLINDERS;
    return 8500 * US + 14250 * US * (distance - CYLINDERS / 3) / CYLINDERS;
}

static uint64_t rate_of_zone(uint64_t zone)
{
    return 200000000u - 100000000u * zone / (ZONES - 1);
}

static uint64_t transfer_time(uint64_t length, uint64_t rate)
{
    return (uint64_t)((wide)length * SECOND / rate);
}

static uint32_t under_way(const vx_model *m, uint64_t now)
{
    uint32_t count = 0;
    while (count < QUEUE - 1 && m->ends[(m->newest + QUEUE - count) % QUEUE] > now)
        count++;
    return count;
}

static uint64_t with_queue(uint64_t positioning, uint32_t others)
{
    return positioning * 1000 / (1000u + gains[others < QUEUE ? others : QUEUE - 1]);
}

/* Moves the head; returns the time that seek, rotation and transfer take from `start` on. */
static uint64_t media_time(vx_model *m, uint64_t offset, uint64_t length, uint64_t start,
                           uint32_t others)
{
    uint64_t cylinder = (uint64_t)((wide)offset * CYLINDERS / m->capacity);
    uint64_t zone = cylinder / (CYLINDERS / ZONES);
    uint64_t rate = rate_of_zone(zone), time = transfer_time(length, rate);
    if (offset != m->last_end) {
        uint64_t seek = seek_time(m->head, cylinder);
        uint64_t track = rate * REVOLUTION / SECOND;
        uint64_t in_zone = offset - (uint64_t)((wide)zone * m->capacity / ZONES);
        uint64_t place = (in_zone % track) * REVOLUTION / track;
        uint64_t angle = (start + seek) % REVOLUTION;
        uint64_t turn = (place + REVOLUTION - angle) % REVOLUTION;
        time += with_queue(seek + turn, others);
    }
    m->head = cylinder;
    m->last_end = offset + length;
    return time;
}

/* ---- the write buffer of both kinds ---- */

static void drain(vx_model *m, uint64_t now)
{
    if (now >= m->drained_at)
        m->buffered = 0;
    else if (now > m->looked_at)
        m->buffered = (uint64_t)((wide)m->buffered * (m->drained_at - now) /
                                 (m->drained_at - m->looked_at));
    m->looked_at = later(m->looked_at, now);
}

/* Adds a write that takes `work` on the medium to the buffer; returns when the buffer has room. */
static uint64_t buffer_write(vx_model *m, uint64_t length, uint64_t work, uint64_t now)
{
    drain(m, now);
    uint64_t held = length < BUFFER ? length : BUFFER, room_at = now;
    if (m->buffered + held > BUFFER)
        room_at += (uint64_t)((wide)(m->drained_at - now) * (m->buffered + held - BUFFER) /
                              m->buffered);
    m->buffered += held;
    m->drained_at = later(m->drained_at, now) + work;
    return room_at;
}

static uint64_t serve_hdd(vx_model *m, uint32_t operation, uint64_t offset, uint64_t length,
                          uint64_t now)
{
    if (operation == VX_FLUSH) {
        m->free_at = later(m->free_at, later(m->drained_at, now));
        return m->free_at;
    }
    if (operation == VX_ZERO || operation == VX_TRIM)
        return later(m->free_at, now) + 100 * US;
    if (operation == VX_WRITE && m->write_cache) {
        uint64_t head = m->head, end = m->last_end;
        uint64_t work = media_time(m, offset, length, now, 0) / 4;
        m->head = head; /* the head moves only when the cache is written out */
        m->last_end = offset == end ? offset + length : end;
        return buffer_write(m, length, work, now) + 100 * US;
    }
    uint32_t others = under_way(m, now);
    uint64_t start = later(m->free_at, now);
    uint64_t time = media_time(m, offset, length, start, others);
    m->free_at = start + time;
    if (m->drained_at > now)
        m->drained_at += time; /* the buffer does not drain during a request */
    m->newest = (m->newest + 1) % QUEUE;
    m->ends[m->newest] = m->free_at;
    return m->free_at;
}

/* ---- a solid-state disk ---- */

static void mark(vx_model *m, uint64_t offset, uint64_t length, bool written)
{
    uint64_t first = written ? offset / MIB : (offset + MIB - 1) / MIB;
    uint64_t end = written ? (offset + length + MIB - 1) / MIB : (offset + length) / MIB;
    for (uint64_t i = first; i < end && i < m->mebibytes; i++) {
        bool is = m->written[i / 8] >> (i % 8) & 1;
        if (is != written) {
            m->written[i / 8] ^= (uint8_t)(1u << (i % 8));
            atomic_fetch_add(&m->mebibytes_written, written ? 1 : (uint64_t)-1);
        }
    }
}

/* Pages programmed for each page written, in thousandths. */
static uint64_t amplification(const vx_model *m)
{
    uint64_t full = atomic_load(&m->mebibytes_written) * 1000 / m->mebibytes;
    return full <= 700 ? 1000 : 1000 + 3000 * (full - 700) / 300;
}

static uint64_t program_time(const vx_model *m, uint64_t length)
{
    uint64_t bytes_a_second = m->channels * (uint64_t)PAGE * (SECOND / (400 * US));
    return transfer_time(length, bytes_a_second) * amplification(m) / 1000;
}

static uint64_t read_pages(vx_model *m, uint64_t offset, uint64_t length, uint64_t now)
{
    uint64_t done = now;
    for (uint64_t page = offset / PAGE; page * PAGE < offset + length; page++) {
        uint64_t *channel = &m->channel_free[page % m->channels];
        *channel = later(*channel, now) + 80 * US;
        done = later(done, *channel);
    }
    return done;
}

static uint64_t serve_ssd(vx_model *m, uint32_t operation, uint64_t offset, uint64_t length,
                          uint64_t now)
{
    if (operation == VX_FLUSH)
        return later(now, m->drained_at);
    if (operation == VX_ZERO || operation == VX_TRIM) {
        mark(m, offset, length, false);
        return now + 50 * US;
    }
    m->bus_free = later(m->bus_free, now) + transfer_time(length, m->bus_rate);
    if (operation == VX_READ)
        return later(read_pages(m, offset, length, now), m->bus_free);
    mark(m, offset, length, true);
    uint64_t programmed = program_time(m, length);
    if (!m->write_cache)
        return m->bus_free = later(m->bus_free, now) + later(programmed, 400 * US / m->channels);
    uint64_t room_at = buffer_write(m, length, programmed, now);
    return later(room_at, m->bus_free) + 25 * US;
}

/* ---- both ---- */

uint64_t vx_model_serve(vx_model *m, uint32_t operation, uint64_t offset, uint64_t length,
                        uint64_t now)
{
    if (operation == VX_EXTENTS)
        return now;
    pthread_mutex_lock(&m->lock);
    offset %= m->capacity;
    uint64_t done = m->kind == VX_MODEL_HDD ? serve_hdd(m, operation, offset, length, now)
                                            : serve_ssd(m, operation, offset, length, now);
    pthread_mutex_unlock(&m->lock);
    return done;
}

uint64_t vx_model_cost(const vx_model *m, uint32_t operation, uint64_t length, bool in_a_row,
                       uint32_t others)
{
    if (operation == VX_ZERO || operation == VX_TRIM)
        return m->kind == VX_MODEL_HDD ? 100 * US : 50 * US;
    if (m->kind != VX_MODEL_HDD)
        return operation == VX_READ
                   ? later(80 * US * ((length + PAGE - 1) / PAGE) / m->channels,
                           transfer_time(length, m->bus_rate))
                   : program_time(m, length);
    uint64_t positioning = in_a_row ? 0 : with_queue(8400 * US + REVOLUTION / 2, others);
    uint64_t time = positioning + transfer_time(length, 150000000u);
    return operation == VX_WRITE && m->write_cache ? time / 4 : time;
}

uint64_t vx_model_worst(const vx_model *m, uint32_t operation, uint64_t length, uint32_t others)
{
    if (operation == VX_ZERO || operation == VX_TRIM)
        return vx_model_cost(m, operation, length, false, others);
    if (m->kind == VX_MODEL_HDD)
        return with_queue(seek_time(0, CYLINDERS - 1) + REVOLUTION, others) +
               transfer_time(length, rate_of_zone(ZONES - 1)) + 1;
    uint64_t pages = length / PAGE + 1 + (length % PAGE > 1); /* it may start inside a page */
    uint64_t on_one = (pages + m->channels - 1) / m->channels * 80 * US;
    uint64_t programmed = later(4 * transfer_time(length, m->channels * (uint64_t)PAGE *
                                                              (SECOND / (400 * US))) + 4,
                                400 * US / m->channels);
    return transfer_time(length, m->bus_rate) + 1 + (operation == VX_READ ? on_one : programmed);
}

vx_model *vx_model_create(uint32_t kind, uint64_t capacity, bool write_cache)
{
    if (kind > VX_MODEL_NVME || capacity < MIB)
        return NULL;
    vx_model *m = calloc(1, sizeof *m);
    if (m == NULL)
        return NULL;
    m->kind = kind;
    m->capacity = capacity;
    m->write_cache = write_cache;
    m->last_end = UINT64_MAX;
    m->channels = kind == VX_MODEL_NVME ? 16 : 8;
    m->bus_rate = kind == VX_MODEL_NVME ? 3000000000u : 500000000u;
    m->mebibytes = capacity / MIB;
    if (kind != VX_MODEL_HDD && (m->written = calloc(m->mebibytes / 8 + 1, 1)) == NULL) {
        free(m);
        return NULL;
    }
    pthread_mutex_init(&m->lock, NULL);
    return m;
}

void vx_model_destroy(vx_model *m)
{
    pthread_mutex_destroy(&m->lock);
    free(m->written);
    free(m);
}
