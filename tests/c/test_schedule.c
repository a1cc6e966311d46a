/* SPDX-License-Identifier: MIT */
/* Disk models, dmclock, and the scheduler above a modelled disk, in virtual time. */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "qos/bucket.h"
#include "check.h"
#include "front/service.h"
#include "sim/delay.h"
#include "qos/dmclock.h"
#include "sim/injector.h"
#include "sim/load.h"
#include "leaf/memory.h"
#include "qos/schedule.h"
#include "map/switch.h"
#include "qos/throttle.h"

#define MS ((uint64_t)1000000u)
#define SECOND (1000 * MS)
#define UNIT 8192u
#define GIB ((uint64_t)1 << 30)
#define MOST 8u

static uint64_t seed = 7;

static uint64_t random_below(uint64_t bound)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % bound;
}

/* ---- models ---- */

static void a_hard_disk_takes_its_time(void)
{
    const uint64_t capacity = 1000 * GIB;
    vx_model *disk = vx_model_create(VX_MODEL_HDD, capacity, false);
    uint64_t now = 0, least = UINT64_MAX, most = 0;
    for (unsigned i = 0; i < 20000; i++) {
        uint64_t done = vx_model_serve(disk, VX_READ, random_below(capacity / 4096) * 4096, 4096, now);
        least = done - now < least ? done - now : least;
        most = done - now > most ? done - now : most;
        now = done;
    }
    double mean = (double)now / 20000 / 1e6;
    CHECK_GT(mean, 12.2);
    CHECK_LT(mean, 13.0); /* 79 requests a second */
    CHECK_GT(least, 20000);
    CHECK_LT(most, 18 * MS + 8333333 + MS);
    uint64_t began = now = vx_model_serve(disk, VX_READ, 0, 4096, now);
    for (unsigned i = 0; i < 1000; i++)
        now = vx_model_serve(disk, VX_READ, 4096 + (uint64_t)i * 262144, 262144, now);
    double outer = 1000 * 262144.0 / ((double)(now - began) / 1e9);
    CHECK_GT(outer, 199e6);
    CHECK_LT(outer, 201e6);
    began = now = vx_model_serve(disk, VX_READ, capacity - GIB - 4096, 4096, now);
    for (unsigned i = 0; i < 1000; i++)
        now = vx_model_serve(disk, VX_READ, capacity - GIB + (uint64_t)i * 262144, 262144, now);
    double inner = 1000 * 262144.0 / ((double)(now - began) / 1e9);
    CHECK_GT(inner, 99e6);
    CHECK_LT(inner, 101e6);
    uint64_t ends[32]; /* 32 requests in flight: reordering makes them more than twice as fast */
    for (unsigned i = 0; i < 32; i++)
        ends[i] = now;
    began = now;
    for (unsigned i = 0; i < 32000; i++) {
        unsigned first = 0;
        for (unsigned k = 1; k < 32; k++)
            if (ends[k] < ends[first])
                first = k;
        now = ends[first];
        ends[first] = vx_model_serve(disk, VX_READ, random_below(capacity / 4096) * 4096, 4096, now);
    }
    double queued = (double)(now - began) / 32000 / 1e6;
    CHECK_LT(queued, mean / 2);
    CHECK_GT(queued, mean / 4);
    vx_model_destroy(disk);

    disk = vx_model_create(VX_MODEL_HDD, capacity, true);
    CHECK_EQ(vx_model_serve(disk, VX_WRITE, 0, 65536, 0), MS / 10);
    CHECK_GE(vx_model_serve(disk, VX_FLUSH, 0, 0, MS / 10), MS / 10);
    now = SECOND;
    uint64_t waited = 0;
    for (unsigned i = 0; i < 5000; i++) { /* the cache soon fills */
        uint64_t done = vx_model_serve(disk, VX_WRITE, random_below(capacity / 65536) * 65536, 65536, now);
        waited += done - now;
        now = done;
    }
    CHECK_GT(waited / 5000, MS);
    CHECK_LT(waited / 5000, 5 * MS);
    uint64_t durable = vx_model_serve(disk, VX_FLUSH, 0, 0, now);
    CHECK_GT(durable, now + SECOND);
    CHECK_EQ(vx_model_serve(disk, VX_FLUSH, 0, 0, durable), durable);
    vx_model_destroy(disk);
    CHECK(vx_model_create(9, GIB, true) == NULL);
    CHECK(vx_model_create(0, 1, true) == NULL);
}

static double ssd_reads(vx_model *disk, unsigned depth)
{
    uint64_t ends[64] = {0}, last = 0;
    for (unsigned i = 0; i < 20000; i++) {
        unsigned k = i % depth;
        ends[k] = vx_model_serve(disk, VX_READ, random_below(GIB / 4096) * 4096, 4096, ends[k]);
        last = ends[k] > last ? ends[k] : last;
    }
    return 20000 / ((double)last / 1e9);
}

static void a_solid_state_disk_has_channels_and_a_buffer(void)
{
    vx_model *disk = vx_model_create(VX_MODEL_SSD, GIB, true);
    double one = ssd_reads(disk, 1);
    CHECK_GT(one, 12300);
    CHECK_LT(one, 12600);
    vx_model_destroy(disk);
    disk = vx_model_create(VX_MODEL_SSD, GIB, true);
    double many = ssd_reads(disk, 32);
    CHECK_GT(many, 6 * one);
    CHECK_LT(many, 8.1 * one);
    vx_model_destroy(disk);

    disk = vx_model_create(VX_MODEL_SSD, GIB, true);
    uint64_t now = 0;
    CHECK_LT(vx_model_serve(disk, VX_WRITE, 0, 4096, 0), 40000);
    double rates[2];
    for (unsigned round = 0; round < 2; round++) { /* an empty disk, then a full one */
        uint64_t began = now;
        for (uint64_t at = 0; at < GIB; at += 1 << 20)
            now = vx_model_serve(disk, VX_WRITE, at, 1 << 20, now);
        now = vx_model_serve(disk, VX_FLUSH, 0, 0, now);
        rates[round] = (double)GIB / ((double)(now - began) / 1e9);
    }
    CHECK_GT(rates[0], 200e6);
    CHECK_LT(rates[0], 330e6);
    CHECK_GT(rates[1], 75e6);
    CHECK_LT(rates[1], 90e6); /* each page is programmed four times */
    vx_model_serve(disk, VX_TRIM, 0, GIB, now);
    uint64_t began = now;
    for (uint64_t at = 0; at < GIB / 2; at += 1 << 20)
        now = vx_model_serve(disk, VX_WRITE, at, 1 << 20, now);
    now = vx_model_serve(disk, VX_FLUSH, 0, 0, now);
    CHECK_GT((double)GIB / 2 / ((double)(now - began) / 1e9), 300e6);
    vx_model_destroy(disk);
}

/* ---- dmclock ---- */

typedef struct wish {
    double reservation, limit, weight;
} wish;

/* The shares of `capacity` when all clients always want more: max(reservation, weight * level), at
 * most the limit. The level is the one at which the shares add up to `capacity`. */
static void water_fill(const wish *wishes, unsigned count, double capacity, double *shares)
{
    double low = 0, high = capacity * 1e6;
    for (unsigned step = 0; step < 200; step++) {
        double level = (low + high) / 2, sum = 0;
        for (unsigned i = 0; i < count; i++) {
            double x = wishes[i].weight * level;
            x = x < wishes[i].reservation ? wishes[i].reservation : x;
            x = wishes[i].limit > 0 && x > wishes[i].limit ? wishes[i].limit : x;
            shares[i] = x;
            sum += x;
        }
        if (sum > capacity)
            high = level;
        else
            low = level;
    }
}

/* Clients always want more of a device that serves one request after another. */
static void serve_all(const wish *wishes, unsigned count, double capacity, uint64_t largest,
                      double seconds, double *served)
{
    vx_dmclock all = {0};
    vx_dmclock_client clients[MOST];
    memset(clients, 0, sizeof clients);
    uint64_t now = vx_ticks(1000 * SECOND), begins = now + vx_ticks(2 * SECOND), when;
    uint64_t end = begins + vx_ticks((uint64_t)(seconds * 1e9));
    for (unsigned i = 0; i < count; i++) {
        vx_dmclock_set(&all, &clients[i], (uint64_t)wishes[i].reservation,
                       (uint64_t)wishes[i].limit, (uint64_t)wishes[i].weight, now);
        vx_dmclock_begin(&all, &clients[i], now);
        served[i] = 0;
    }
    while (now < end) {
        bool reserved;
        vx_dmclock_client *c = vx_dmclock_choose(&all, now, &reserved, &when);
        if (c == NULL) {
            CHECK_GT(when, now);
            CHECK_NE(when, UINT64_MAX);
            now = when;
            continue;
        }
        uint64_t units = 1 + (largest > 1 ? random_below(largest) : 0);
        vx_dmclock_serve(&all, c, reserved, units, units << 4, now);
        if (now >= begins)
            served[c - clients] += (double)units / seconds;
        now += (uint64_t)((double)units / capacity * 64e9);
    }
}

static void shares_are_those_of_water_filling(void)
{
    static const struct {
        unsigned count;
        double capacity;
        wish wishes[MOST];
    } scenes[] = {
        {2, 1000, {{0, 0, 1}, {0, 0, 3}}},
        {2, 1000, {{600, 0, 1}, {0, 0, 100}}},
        {3, 1000, {{300, 0, 1}, {0, 0, 1}, {0, 100, 1}}},
        {4, 1000, {{250, 0, 100}, {0, 0, 100}, {0, 0, 200}, {50, 60, 1000}}},
        {8, 100, {{40, 0, 1}, {0, 0, 10}, {0, 0, 10}, {0, 0, 10}, {0, 0, 10}, {0, 0, 10}, {0, 0, 10}, {0, 0, 10}}},
        {3, 10000, {{0, 500, 1}, {0, 700, 5}, {0, 100, 1000}}}, /* above the sum of limits */
        {3, 20000, {{9000, 0, 1}, {9000, 0, 1}, {0, 0, 10000}}},
    };
    double served[MOST], wanted[MOST];
    for (unsigned s = 0; s < sizeof scenes / sizeof *scenes; s++) {
        for (uint64_t largest = 1; largest <= 32; largest += 31) {
            double seconds = 2000 * (double)largest / scenes[s].capacity * 100;
            serve_all(scenes[s].wishes, scenes[s].count, scenes[s].capacity, largest, seconds, served);
            water_fill(scenes[s].wishes, scenes[s].count, scenes[s].capacity, wanted);
            for (unsigned i = 0; i < scenes[s].count; i++)
                CHECK_LT(fabs(served[i] - wanted[i]), 0.01 * wanted[i]);
        }
    }
    for (unsigned round = 0; round < 60; round++) {
        unsigned count = 2 + (unsigned)random_below(MOST - 1);
        wish wishes[MOST];
        double capacity = 1000, left = 900;
        for (unsigned i = 0; i < count; i++) {
            double r = random_below(2) ? (double)random_below((uint64_t)left / 2 + 1) : 0;
            left -= r;
            double l = random_below(3) ? 0 : r + 20 + (double)random_below(500);
            wishes[i] = (wish){r, l, 1 + (double)random_below(50)};
        }
        serve_all(wishes, count, capacity, 1 + random_below(4), 1500, served);
        water_fill(wishes, count, capacity, wanted);
        for (unsigned i = 0; i < count; i++)
            CHECK_LE(fabs(served[i] - wanted[i]), 0.01 * wanted[i] + 0.05);
    }
}

/* A client that was idle or served by its reservation neither starves nor catches up later. */
static void idling_gains_nothing(void)
{
    vx_dmclock all = {0};
    vx_dmclock_client a = {0}, b = {0};
    uint64_t now = vx_ticks(SECOND), when;
    vx_dmclock_set(&all, &a, 10, 0, 1, now);
    vx_dmclock_set(&all, &b, 0, 0, 1, now);
    vx_dmclock_begin(&all, &b, now);
    bool reserved;
    for (unsigned i = 0; i < 10000; i++, now += vx_ticks(MS))
        vx_dmclock_serve(&all, &b, false, 1, 1 << 4, now);
    vx_dmclock_begin(&all, &a, now);
    unsigned first = 0, by_reservation = 0;
    for (unsigned i = 0; i < 1000; i++, now += vx_ticks(MS)) {
        vx_dmclock_client *c = vx_dmclock_choose(&all, now, &reserved, &when);
        vx_dmclock_serve(&all, c, reserved, 1, 1 << 4, now);
        first += c == &a;
        by_reservation += reserved;
    }
    CHECK_GE(first, 495);
    CHECK_LE(first, 505);
    CHECK_LE(by_reservation, 12); /* 10 in this second, with a margin of 2 */
    vx_dmclock_set(&all, &a, 900, 0, 1, now);
    for (unsigned i = 0; i < 5000; i++, now += vx_ticks(MS)) {
        vx_dmclock_client *c = vx_dmclock_choose(&all, now, &reserved, &when);
        vx_dmclock_serve(&all, c, reserved, 1, 1 << 4, now);
    }
    vx_dmclock_set(&all, &a, 0, 0, 1, now); /* service by the former reservation no longer counts */
    first = 0;
    for (unsigned i = 0; i < 1000; i++, now += vx_ticks(MS)) {
        vx_dmclock_client *c = vx_dmclock_choose(&all, now, &reserved, &when);
        vx_dmclock_serve(&all, c, reserved, 1, 1 << 4, now);
        first += c == &a;
    }
    CHECK_GE(first, 495);
    CHECK_LE(first, 505);
}

static void share_time(vx_dmclock *all, uint64_t *now, uint64_t steps, uint64_t step_ns,
                       vx_dmclock_client *clients, unsigned count, double *served)
{
    bool reserved;
    uint64_t when;
    for (unsigned i = 0; i < count; i++)
        served[i] = 0;
    for (uint64_t i = 0; i < steps; i++, *now += vx_ticks(step_ns)) {
        vx_dmclock_client *c = vx_dmclock_choose(all, *now, &reserved, &when);
        if (c == NULL)
            continue;
        vx_dmclock_serve(all, c, reserved, 1, 16, *now);
        served[c - clients]++;
    }
}

/* Service while other clients were idle does not count against a client, and a client that its
 * limit held back has no claim on what others got meanwhile. */
static void the_past_counts_for_nothing(void)
{
    vx_dmclock all = {0};
    vx_dmclock_client c[3];
    double served[3];
    uint64_t now = vx_ticks(SECOND);
    memset(c, 0, sizeof c);
    vx_dmclock_set(&all, &c[0], 500, 0, 100, now);
    vx_dmclock_set(&all, &c[1], 0, 0, 100, now);
    vx_dmclock_begin(&all, &c[0], now);
    share_time(&all, &now, 8 * 3600 * 450, SECOND / 450, c, 2, served); /* a night alone */
    vx_dmclock_begin(&all, &c[1], now);
    share_time(&all, &now, 30000, SECOND / 3000, c, 2, served);
    CHECK_LT(fabs(served[0] - served[1]), 100);

    memset(c, 0, sizeof c);
    all = (vx_dmclock){0};
    vx_dmclock_set(&all, &c[0], 0, 100, 100, now);
    vx_dmclock_set(&all, &c[1], 0, 0, 100, now);
    vx_dmclock_set(&all, &c[2], 0, 0, 100, now);
    vx_dmclock_begin(&all, &c[0], now);
    vx_dmclock_begin(&all, &c[1], now);
    share_time(&all, &now, 3600 * 1000, MS, c, 2, served);
    CHECK_LT(fabs(served[0] - 360000), 100);
    for (unsigned i = 0; i < 50; i++) { /* it begins at any time, also right after a service */
        share_time(&all, &now, 7, MS, c, 2, served);
        vx_dmclock_begin(&all, &c[2], now);
        share_time(&all, &now, 500, MS, c, 3, served);
        CHECK_GT(served[1], 200);
        CHECK_GT(served[2], 200);
        vx_dmclock_end(&c[2]);
    }
}

/* Earlier service by weight does not use up a reservation. */
static void a_reservation_outlives_good_times(void)
{
    vx_dmclock all = {0};
    vx_dmclock_client c[2];
    double served[2];
    uint64_t now = vx_ticks(SECOND);
    memset(c, 0, sizeof c);
    vx_dmclock_set(&all, &c[0], 500, 0, 1, now);
    vx_dmclock_set(&all, &c[1], 0, 0, 100, now);
    vx_dmclock_begin(&all, &c[0], now);
    share_time(&all, &now, 30000, SECOND / 3000, c, 2, served); /* alone, far above reservation */
    vx_dmclock_begin(&all, &c[1], now);
    share_time(&all, &now, 1000, MS, c, 2, served);
    CHECK_GE(served[0], 490);
    CHECK_LE(served[0], 560);
}

static void setting_again_gains_nothing(void)
{
    vx_dmclock all = {0};
    vx_dmclock_client c[2];
    double served[2], sum = 0;
    uint64_t now = vx_ticks(SECOND);
    memset(c, 0, sizeof c);
    vx_dmclock_set(&all, &c[0], 5, 10, 1, now);
    vx_dmclock_set(&all, &c[1], 0, 0, 10000, now);
    vx_dmclock_begin(&all, &c[0], now);
    vx_dmclock_begin(&all, &c[1], now);
    for (unsigned i = 0; i < 1000; i++) {
        vx_dmclock_set(&all, &c[0], 5, i % 2 ? 10 : 11, 1, now);
        share_time(&all, &now, 10, MS, c, 2, served);
        sum += served[0];
    }
    CHECK_GE(sum, 49);
    CHECK_LE(sum, 60); /* in ten seconds */
}

/* The most milliseconds by which a unit can be late; the formula is from vhdx/qos/admission.py. */
static double most_late(const double *every, unsigned count, double cost, double blocking)
{
    double most = -1e9;
    for (unsigned i = 0; i < count; i++)
        for (double l = every[i]; l < 20000; l += every[i]) {
            double late = blocking - l;
            for (unsigned j = 0; j < count; j++)
                late += floor(l / every[j] + 1e-9) * cost;
            most = late > most ? late : most;
        }
    return most;
}

/* Clients with one request in flight each share a device with one that always wants more and whose
 * requests take longer. Reservations that just fit miss no deadline and are kept in full. */
static void what_just_fits_is_in_time(void)
{
    for (unsigned round = 0; round < 200; round++) {
        unsigned count = 1 + (unsigned)random_below(MOST - 1);
        double cost = 1, large = 1 + (double)random_below(4), every[MOST] = {0};
        uint64_t rates[MOST], parts[MOST];
        for (unsigned i = 0; i < count; i++)
            parts[i] = 1 + random_below(100);
        for (double scale = 40;; scale *= 0.98) { /* lower all rates together until they fit */
            for (unsigned i = 0; i < count; i++) {
                rates[i] = 1 + (uint64_t)(scale * (double)parts[i]) / 10;
                every[i] = 1000 / (double)rates[i];
            }
            if (most_late(every, count, cost, large) <= 0)
                break;
        }
        vx_dmclock all = {0};
        vx_dmclock_client c[MOST];
        memset(c, 0, sizeof c);
        double had[MOST] = {0};
        uint64_t now = vx_ticks(SECOND), begins = now, when, due[MOST];
        vx_dmclock_set(&all, &c[count], 0, 0, VX_LARGEST_WEIGHT, now);
        vx_dmclock_begin(&all, &c[count], now);
        for (unsigned i = 0; i < count; i++) {
            vx_dmclock_set(&all, &c[i], rates[i], 0, 1, now);
            vx_dmclock_begin(&all, &c[i], now);
        }
        while (now < begins + vx_ticks(20 * SECOND)) {
            bool reserved;
            vx_dmclock_client *one = vx_dmclock_choose(&all, now, &reserved, &when);
            unsigned i = (unsigned)(one - c);
            due[i] = one->reserved_at + vx_ticks((uint64_t)(every[i] * 1e6));
            vx_dmclock_serve(&all, one, reserved, 1, 1 << 4, now);
            if (i == count) {
                now += vx_ticks((uint64_t)(large * 1e6));
                continue;
            }
            one->active = true;
            vx_dmclock_end(one);
            now += vx_ticks((uint64_t)(cost * 1e6));
            CHECK(!reserved || now <= due[i] + vx_ticks(1000));
            had[i]++;
            vx_dmclock_begin(&all, one, now); /* at once, while it is still active */
        }
        for (unsigned i = 0; i < count; i++)
            CHECK_GE(had[i], 20 * (double)rates[i] - 1);
    }
}

/* ---- the scheduler, above a modelled disk ---- */

static vx_clock *clock_;
static vx_pool *pool;
static vx_model *model;
static vx_scheduler *scheduler;
static vx_device *disks[MOST], *tops[MOST];
static vx_share *shares[MOST];
static vx_meter *meters[MOST];
static vx_load *loads[MOST];

static void set_up(uint32_t kind, unsigned count, uint32_t depth, bool by_time)
{
    clock_ = vx_clock_create(true);
    pool = vx_pool_create(1, 1 << 20, 1);
    vx_clock_advance(clock_, 1000 * SECOND);
    model = vx_model_create(kind, count * (uint64_t)(64u << 20), false);
    scheduler = vx_scheduler_create(clock_, pool, UNIT, depth, by_time ? model : NULL);
    for (unsigned i = 0; i < count; i++) {
        vx_device *memory = vx_memory_create(64u << 20, 64u << 20, i);
        disks[i] = vx_delay_create(memory, model, clock_, i * (uint64_t)(64u << 20), i);
        vx_device_release(memory);
        shares[i] = vx_share_create(scheduler);
        tops[i] = vx_schedule_create(disks[i], shares[i], i);
        meters[i] = vx_meter_create(UNIT);
        vx_meter_switch(meters[i], true);
    }
}

static void begin(unsigned i, uint64_t length, uint32_t depth, bool scheduled)
{
    vx_load_terms terms = {.span = 64u << 20, .length = length, .depth = depth, .seed = i + 1,
                           .write_percent = 30};
    loads[i] = vx_load_create(scheduled ? tops[i] : disks[i], clock_, pool, meters[i], &terms);
    CHECK(loads[i] != NULL);
    vx_load_start(loads[i]);
}

static uint64_t units_of(unsigned i)
{
    vx_meter_facts facts;
    vx_meter_read(meters[i], &facts);
    return facts.units[0] + facts.units[1];
}

static void tear_down(unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        vx_load_stop(loads[i]);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 3600 * SECOND);
    vx_scheduler_facts all;
    vx_scheduler_read(scheduler, &all);
    CHECK_EQ(all.waiting, 0);
    CHECK_EQ(all.below, 0);
    for (unsigned i = 0; i < count; i++) {
        vx_share_facts mine;
        vx_load_facts facts;
        vx_share_read(shares[i], &mine);
        CHECK_EQ(mine.waiting, 0);
        CHECK_EQ(mine.waiting_units, 0);
        CHECK_EQ(mine.below, 0);
        vx_load_read(loads[i], &facts);
        CHECK_EQ(facts.failed, 0);
        CHECK_EQ(facts.under_way, 0);
        vx_load_destroy(loads[i]);
        vx_device_release(tops[i]);
        vx_device_release(disks[i]);
        vx_meter_destroy(meters[i]);
    }
    vx_scheduler_release(scheduler);
    vx_model_destroy(model);
    vx_clock_stop(clock_);
    vx_clock_destroy(clock_);
    vx_pool_destroy(pool);
}

/* For an hour, one of eight clients on a hard disk has a reservation of 40 normalised IOPS, and the
 * others always want more. It gets at least 98 % of them, and at least 37 in each second. Without
 * the reservation it gets fewer than 30 a second. */
static void a_minimum_is_kept_for_an_hour(void)
{
    for (unsigned kept = 0; kept < 2; kept++) {
        set_up(VX_MODEL_HDD, 8, 8, true);
        for (unsigned i = 0; i < 8; i++)
            vx_share_set(shares[i], i == 0 && kept ? 40 : 0, 0, 100);
        for (unsigned i = 0; i < 8; i++)
            begin(i, i % 3 == 2 ? 131072 : 8192, i == 0 ? 4 : 32, true);
        vx_clock_advance(clock_, vx_clock_now(clock_) + 2 * SECOND);
        uint64_t first = units_of(0), before = first, least = UINT64_MAX;
        for (unsigned second = 0; second < 3600; second++) {
            vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
            uint64_t now = units_of(0);
            least = now - before < least ? now - before : least;
            before = now;
        }
        if (kept)
            CHECK(before - first >= 3600 * 40 * 98 / 100 && least >= 37);
        else
            CHECK_LT(before - first, 3600 * 30);
        for (unsigned i = 1; i < 8; i++)
            CHECK_GT(units_of(i), 3600);
        tear_down(8);
    }
}

static void weights_share_the_time_of_the_disk(void)
{
    set_up(VX_MODEL_SSD, 3, 16, false);
    for (unsigned i = 0; i < 3; i++)
        vx_share_set(shares[i], 0, i == 2 ? 2000 : 0, i == 0 ? 100 : 300);
    for (unsigned i = 0; i < 3; i++)
        begin(i, 8192, 64, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 2 * SECOND);
    uint64_t before[3];
    for (unsigned i = 0; i < 3; i++)
        before[i] = units_of(i);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 20 * SECOND);
    double got[3];
    for (unsigned i = 0; i < 3; i++)
        got[i] = (double)(units_of(i) - before[i]) / 20;
    CHECK_LT(fabs(got[1] / got[0] - 3), 0.03);
    CHECK_LT(fabs(got[2] - 2000), 20);
    tear_down(3);
}

/* Large requests are cut: a small request waits for a piece of a large one, not for 32 MiB. */
static void nobody_waits_for_a_large_request(void)
{
    set_up(VX_MODEL_HDD, 2, 1, true);
    vx_share_set(shares[0], 0, 0, 100);
    vx_share_set(shares[1], 0, 0, 100);
    begin(0, 8192, 1, true);
    begin(1, 32u << 20, 2, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 60 * SECOND);
    CHECK_GT(units_of(0), 60 * 20);
    CHECK_GE(units_of(1), 8192);
    tear_down(2);
}

static void limits_and_background_work(void)
{
    set_up(VX_MODEL_NVME, 2, 4, false);
    vx_share *background = vx_share_create(scheduler);
    vx_share_set(shares[0], 0, 0, 100);
    vx_share_set(shares[1], 0, 50, 100); /* limited and alone: only the timer resumes it */
    vx_share_set(background, 10, 100, 1);
    begin(1, 4096, 8, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    CHECK_GE(units_of(1), 499);
    CHECK_LE(units_of(1), 510);
    vx_slot *slot = vx_share_take_slot(background, 8192); /* returns at once: a slot is free */
    vx_slot_end(slot);
    vx_share_facts mine;
    vx_share_read(background, &mine);
    CHECK_EQ(mine.requests, 1);
    CHECK_EQ(mine.units, 1);
    CHECK_EQ(mine.below, 0);
    begin(0, 4096, 8, true);
    tear_down(2);
}

static void count_completed(vx_request *request)
{
    CHECK_EQ(request->result, 0);
    ++*(unsigned *)request->context;
}

/* The requests of a paused disk take no slot from other disks. */
static void a_paused_disk_holds_up_nobody(void)
{
    set_up(VX_MODEL_SSD, 2, 1, false);
    vx_device *paused = vx_switch_create(disks[0], pool, 5);
    vx_device *top = vx_schedule_create(paused, shares[0], 6);
    uint8_t data[4096];
    vx_request one = {.operation = VX_READ, .flags = VX_NOWAIT | VX_MAY_PARK, .length = 4096,
                      .buffer = data, .complete = count_completed};
    unsigned completions = 0;
    one.context = &completions;
    vx_switch_pause(paused);
    CHECK_EQ(vx_submit(top, &one), VX_PARKED);
    begin(0, 8192, 1, true);
    begin(1, 8192, 4, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
    CHECK_EQ(completions, 0);
    CHECK_GT(units_of(1), 5000);
    vx_switch_resume(paused);
    for (unsigned i = 0; i < 100; i++) { /* a thread of the pool resumes the request */
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        vx_share_facts facts;
        vx_share_read(shares[0], &facts);
        vx_clock_advance(clock_, vx_clock_now(clock_) + MS);
    }
    CHECK_EQ(completions, 1);
    vx_device_release(top);
    vx_device_release(paused);
    tear_down(2);
}

/* A reservation is kept beside large writes with FUA. With units of 1 MiB, a request of
 * 1 MiB costs one unit. */
static void large_units_and_durable_writes(void)
{
    set_up(VX_MODEL_HDD, 2, 8, true);
    vx_share_set(shares[0], 40, 0, 100);
    vx_share_set(shares[1], 0, 0, 100);
    vx_request writes[16];
    unsigned completions = 0;
    uint8_t *data = calloc(1, 32u << 20);
    begin(0, 8192, 4, true);
    begin(1, 8192, 1, true);
    for (unsigned i = 0; i < 16; i++) {
        memset(&writes[i], 0, sizeof writes[i]);
        writes[i].operation = VX_WRITE;
        writes[i].flags = VX_NOWAIT | VX_MAY_PARK | VX_FUA;
        writes[i].length = 32u << 20;
        writes[i].buffer = data;
        writes[i].complete = count_completed;
        writes[i].context = &completions;
        CHECK_EQ(vx_submit(tops[1], &writes[i]), VX_PARKED);
    }
    uint64_t before = units_of(0);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 2 * SECOND);
    CHECK_GE(units_of(0) - before, 78);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 100 * SECOND);
    CHECK_EQ(completions, 16);
    free(data);
    tear_down(2);

    set_up(VX_MODEL_SSD, 1, 8, false);
    vx_scheduler *other = vx_scheduler_create(clock_, pool, 1u << 20, 8, NULL);
    vx_share *share = vx_share_create(other);
    vx_share_set(share, 0, 40, 1);
    vx_device *top = vx_schedule_create(disks[0], share, 9);
    vx_load_terms terms = {.span = 64u << 20, .length = 1u << 20, .depth = 2, .seed = 1};
    vx_load *load = vx_load_create(top, clock_, pool, NULL, &terms);
    vx_load_start(load);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    vx_load_facts facts;
    vx_load_read(load, &facts);
    CHECK_GE(facts.answered, 395);
    CHECK_LE(facts.answered, 403);
    vx_load_stop(load);
    begin(0, 8192, 1, true);
    tear_down(1);
    vx_load_destroy(load);
    vx_device_release(top);
    vx_scheduler_release(other);
}

static _Atomic unsigned slots_ended;

static void note_result(vx_request *request)
{
    *(int32_t *)request->context = request->result;
}

/* A cut write with FUA completes only after its flush, and fails if the flush fails. */
static void a_cut_write_is_flushed(void)
{
    set_up(VX_MODEL_SSD, 1, 8, false);
    vx_device *hold = vx_injector_create(disks[0], pool, 5);
    vx_device *top = vx_schedule_create(hold, shares[0], 6);
    uint8_t *data = calloc(1, 1 << 20);
    for (unsigned fails = 0; fails < 2; fails++) {
        vx_injector_settings settings = {.fail_mask = fails << VX_FLUSH, .fail_code = VX_E_IO};
        vx_injector_set(hold, &settings);
        int32_t result = 1;
        vx_request one = {.operation = VX_WRITE, .flags = VX_NOWAIT | VX_MAY_PARK | VX_FUA,
                          .length = 1 << 20, .buffer = data, .complete = note_result,
                          .context = &result};
        CHECK_EQ(vx_submit(top, &one), VX_PARKED);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
        CHECK_EQ(result, (fails ? VX_E_IO : VX_OK));
    }
    free(data);
    begin(0, 8192, 1, true);
    vx_device_release(top);
    vx_device_release(hold);
    tear_down(1);
}

/* When a client is gone, its request ends with the piece that is below; the rest fails. */
static void the_rest_of_what_is_dropped_fails(void)
{
    set_up(VX_MODEL_SSD, 1, 1, false);
    uint8_t *data = calloc(1, 32u << 20);
    const vx_initiator gone = {0}, other = {0};
    int32_t results[2] = {1, 1};
    vx_request two[2];
    memset(two, 0, sizeof two);
    for (unsigned i = 0; i < 2; i++) {
        two[i].operation = VX_WRITE;
        two[i].flags = VX_NOWAIT | VX_MAY_PARK;
        two[i].length = 32u << 20;
        two[i].buffer = data;
        two[i].initiator = i == 0 ? &gone : &other;
        two[i].complete = note_result;
        two[i].context = &results[i];
        CHECK_EQ(vx_submit(tops[0], &two[i]), VX_PARKED);
    }
    tops[0]->operations->drop(tops[0], &gone);
    CHECK_EQ(results[0], 1);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    vx_share_facts facts;
    vx_share_read(shares[0], &facts);
    CHECK_EQ(results[0], VX_E_CANCELLED);
    CHECK_EQ(results[1], 0);
    CHECK_EQ(facts.units, (32u << 20) / UNIT + (256u << 10) / UNIT);
    free(data);
    begin(0, 8192, 1, true);
    tear_down(1);
}

static void *end_slot_later(void *slot)
{
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    slots_ended++;
    vx_slot_end(slot);
    return NULL;
}

/* vx_scheduler_stop waits for slots in use, whose holders still use the clock and the pool. */
static void a_stop_waits_for_slots(void)
{
    set_up(VX_MODEL_SSD, 1, 1, false);
    pthread_t thread;
    vx_slot *slot = vx_share_take_slot(shares[0], 4096);
    CHECK_EQ(pthread_create(&thread, NULL, end_slot_later, slot), 0);
    vx_scheduler_stop(scheduler);
    CHECK_EQ(slots_ended, 1);
    CHECK(vx_share_take_slot(shares[0], 4096) == NULL);
    pthread_join(thread, NULL);
    begin(0, 8192, 1, true);
    tear_down(1);
}

static void the_same_again_is_the_same(void)
{
    uint64_t units[2][3];
    for (unsigned run = 0; run < 2; run++) {
        set_up(VX_MODEL_HDD, 3, 4, true);
        for (unsigned i = 0; i < 3; i++) {
            vx_share_set(shares[i], 10 * i, 0, 1 + i);
            begin(i, 4096u << i, 4 + i, true);
        }
        vx_clock_advance(clock_, vx_clock_now(clock_) + 100 * SECOND);
        for (unsigned i = 0; i < 3; i++)
            units[run][i] = units_of(i);
        tear_down(3);
    }
    CHECK_EQ(memcmp(units[0], units[1], sizeof units[0]), 0);
}

int main(void)
{
    RUN(a_hard_disk_takes_its_time);
    RUN(a_solid_state_disk_has_channels_and_a_buffer);
    RUN(shares_are_those_of_water_filling);
    RUN(idling_gains_nothing);
    RUN(the_past_counts_for_nothing);
    RUN(a_reservation_outlives_good_times);
    RUN(what_just_fits_is_in_time);
    RUN(setting_again_gains_nothing);
    RUN(a_minimum_is_kept_for_an_hour);
    RUN(weights_share_the_time_of_the_disk);
    RUN(nobody_waits_for_a_large_request);
    RUN(limits_and_background_work);
    RUN(a_paused_disk_holds_up_nobody);
    RUN(a_cut_write_is_flushed);
    RUN(large_units_and_durable_writes);
    RUN(the_rest_of_what_is_dropped_fails);
    RUN(a_stop_waits_for_slots);
    RUN(the_same_again_is_the_same);
    return CHECK_REPORT();
}
