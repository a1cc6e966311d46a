/* SPDX-License-Identifier: MIT */
/* Buckets and throttles in virtual time: hours pass in seconds, and each run is the same. */
#include <stdlib.h>
#include <string.h>

#include "qos/bucket.h"
#include "check.h"
#include "map/map.h"
#include "leaf/memory.h"
#include "qos/throttle.h"

#define SECOND ((uint64_t)1000000000u)
#define UNIT 8192u
#define MOST 400000u

static uint64_t seed = 1;

static uint64_t random_below(uint64_t bound)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % bound;
}

/* One admitted request. */
typedef struct admission {
    uint64_t at;    /* ns */
    uint64_t units;
} admission;

static admission history[MOST];
static size_t admitted;

/* No window holds more than rate * d + burst + the largest request: sum[j] - sum[i] - rate * (tj - ti)
 * is greatest where sum[i] - rate * ti was least. */
static void no_window_holds_too_much(double rate, double burst, double largest)
{
    double least = 1e300, sum = 0, worst = 0;
    for (size_t i = 0; i < admitted; i++) {
        double level = sum - rate * ((double)(history[i].at - history[0].at) / 1e9);
        if (level < least)
            least = level;
        sum += (double)history[i].units;
        double excess = level + (double)history[i].units - least;
        if (excess > worst)
            worst = excess;
    }
    CHECK_LE(worst, burst + largest + 1e-3);
}

static void a_bucket_never_admits_too_much(void)
{
    for (unsigned round = 0; round < 60; round++) {
        vx_bucket bucket = {0};
        uint64_t rate = 1 + random_below(round % 2 ? 100 : 300000);
        uint64_t burst = round % 3 ? random_below(1 + rate) : 0, largest = 0;
        uint64_t now = 12345 * SECOND, period = SECOND / rate + 1;
        vx_bucket_change(&bucket, rate, burst, burst, vx_ticks(now));
        admitted = 0;
        while (admitted < 3000) {
            uint64_t units = 1 + random_below(round % 5 ? 4 : 200);
            now += random_below(random_below(9) ? period : 20 * period);
            if (!vx_bucket_admit(&bucket, units, vx_ticks(now)))
                continue;
            history[admitted++] = (admission){now, units};
            largest = units > largest ? units : largest;
        }
        no_window_holds_too_much((double)rate, (double)burst, (double)largest);
    }
}

static void a_reservation_is_exact_for_a_day(void)
{
    static const uint64_t rates[] = {1, 3, 7, 100, 999, 33333, 200000, 999999937};
    for (unsigned i = 0; i < sizeof rates / sizeof *rates; i++) {
        vx_bucket bucket = {0};
        uint64_t start = vx_ticks(SECOND), due = start, count = 0;
        uint64_t end = start + vx_ticks(rates[i] > 1000 ? 3 * SECOND : 86400 * SECOND);
        vx_bucket_change(&bucket, rates[i], 0, 0, start);
        while (count < 3000000 && (due = vx_bucket_reserve(&bucket, 1, due)) < end)
            count++;
        double wanted = (double)(due - start) / (64e9) * (double)rates[i];
        CHECK_LE((double)count, wanted + 1);
        CHECK_GE((double)count, wanted * (rates[i] > 1000000 ? 0.9 : 0.99999) - 1);
    }
}

static void a_change_creates_and_loses_nothing(void)
{
    for (unsigned round = 0; round < 200; round++) {
        vx_bucket bucket = {0};
        uint64_t now = 77 * SECOND, rate = 1000, burst = 500;
        vx_bucket_change(&bucket, rate, burst, burst, vx_ticks(now));
        for (unsigned step = 0; step < 50; step++) {
            now += random_below(SECOND / 10);
            if (random_below(2))
                vx_bucket_admit(&bucket, 1 + random_below(300), vx_ticks(now));
            int64_t before = vx_bucket_level(&bucket, vx_ticks(now));
            rate = 1 + random_below(100000);
            uint64_t larger = burst + random_below(100);
            vx_bucket_change(&bucket, rate, larger, larger, vx_ticks(now));
            int64_t after = vx_bucket_level(&bucket, vx_ticks(now));
            CHECK_LE(after, before + 1);
            CHECK_GE(after, before - 2);
            vx_bucket_change(&bucket, rate, burst, burst, vx_ticks(now));
            CHECK_LE(vx_bucket_level(&bucket, vx_ticks(now)), (int64_t)burst);
        }
    }
    vx_bucket bucket = {0};
    vx_bucket_change(&bucket, 100, 50, 0, vx_ticks(SECOND)); /* a new limit with nothing saved */
    CHECK_EQ(vx_bucket_level(&bucket, vx_ticks(SECOND)), 0);
    CHECK_EQ(vx_bucket_level(&bucket, vx_ticks(3 * SECOND)), 50);
}

static void a_refund_gives_back_what_was_paid(void)
{
    vx_bucket bucket = {0};
    uint64_t now = vx_ticks(5 * SECOND);
    vx_bucket_change(&bucket, 10, 0, 0, now);
    CHECK(vx_bucket_admit(&bucket, 5, now));
    CHECK(!vx_bucket_admit(&bucket, 1, now + vx_ticks(SECOND / 4)));
    vx_bucket_refund(&bucket, 5);
    CHECK(vx_bucket_admit(&bucket, 1, now + vx_ticks(SECOND / 4)));
    vx_bucket_change(&bucket, 0, 0, 0, now);
    vx_bucket_refund(&bucket, 5);
    CHECK(vx_bucket_admit(&bucket, 1, now));
}

/* ---- throttles ---- */

#define FLOWS 32u

typedef struct client {
    vx_device *flow;
    uint64_t units, operations, units_each;
    uint64_t length, starts, ends; /* length in bytes, times in ns */
    uint32_t operation;
} client;

typedef struct sent {
    vx_request request;
    client *client;
} sent;

static vx_clock *clock_;
static vx_pool *pool;
static vx_qos *qos;
static client clients[FLOWS];
static sent requests[FLOWS][16];
static uint8_t data[1u << 20];

static void submit(sent *one);

static void completed(vx_request *request)
{
    sent *one = (sent *)request;
    uint64_t now = vx_clock_now(clock_);
    CHECK_EQ(request->result, 0);
    one->client->units += one->client->units_each;
    one->client->operations++;
    if (admitted < MOST)
        history[admitted++] = (admission){now, one->client->units_each};
    if (now < one->client->ends)
        submit(one);
}

static void submit(sent *one)
{
    client *c = one->client;
    memset(&one->request, 0, sizeof one->request);
    one->request.operation = c->operation;
    one->request.length = c->length;
    one->request.buffer = data;
    one->request.flags = VX_NOWAIT | VX_MAY_PARK;
    one->request.complete = completed;
    int answer = vx_submit(c->flow, &one->request);
    CHECK(answer == VX_DONE || answer == VX_PARKED);
    if (answer == VX_DONE)
        completed(&one->request);
}

static void set_up(void)
{
    clock_ = vx_clock_create(true);
    pool = vx_pool_create(2, 1 << 20, 1);
    qos = vx_qos_create(clock_, pool);
    vx_clock_advance(clock_, 1000 * SECOND);
    memset(clients, 0, sizeof clients);
    admitted = 0;
}

static void tear_down(vx_device *lower, unsigned flows)
{
    vx_clock_advance(clock_, vx_clock_now(clock_) + 100000 * SECOND);
    for (unsigned i = 0; i < flows; i++)
        vx_device_release(clients[i].flow);
    vx_device_release(lower);
    vx_qos_destroy(qos);
    vx_clock_stop(clock_);
    vx_clock_destroy(clock_);
    vx_pool_destroy(pool);
}

static void begin(unsigned i, vx_device *lower, vx_limits *own, uint64_t length, unsigned depth,
                  uint64_t seconds)
{
    client *c = &clients[i];
    if (c->flow == NULL)
        c->flow = vx_throttle_create(lower, qos, own, 0);
    c->length = length;
    c->operation = VX_WRITE;
    c->units_each = (length + UNIT - 1) / UNIT;
    c->ends = vx_clock_now(clock_) + seconds * SECOND;
    for (unsigned d = 0; d < depth; d++) {
        requests[i][d].client = c;
        submit(&requests[i][d]);
    }
}

static void busy_flows_get_their_rate(void)
{
    static const uint64_t lengths[] = {4096, 8192, 65536, 1u << 20};
    static const uint64_t rates[] = {100, 2500, 25000};
    for (unsigned r = 0; r < 3; r++) {
        for (unsigned l = 0; l < 4; l++) {
            set_up();
            vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
            vx_limits *limits = vx_limits_create(qos, UNIT);
            vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = rates[r]}};
            vx_limits_set(limits, wanted, true);
            uint64_t seconds = rates[r] > 10000 ? 10 : 3600;
            begin(0, lower, limits, lengths[l], 8, seconds);
            vx_clock_advance(clock_, vx_clock_now(clock_) + seconds * SECOND);
            double got = (double)clients[0].units, want = (double)(rates[r] * seconds);
            double one = (double)clients[0].units_each * 2;
            CHECK_LE(got, want + one);
            CHECK_GE(got, want * 0.9999 - one);
            no_window_holds_too_much((double)rates[r], 0, (double)clients[0].units_each);
            tear_down(lower, 1);
        }
    }
}

static void flows_of_one_limit_share_it_fairly(void)
{
    for (unsigned flows = 2; flows <= FLOWS; flows *= 4) {
        set_up();
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *own = vx_limits_create(qos, UNIT), *group = vx_limits_create(qos, UNIT);
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 5000}};
        vx_limits_set(group, wanted, true);
        for (unsigned i = 0; i < flows; i++) {
            clients[i].flow = vx_throttle_create(lower, qos, own, i);
            vx_throttle_set_group(clients[i].flow, group);
            begin(i, lower, own, 4096, 1 + i % 16, 60);
        }
        vx_clock_advance(clock_, vx_clock_now(clock_) + 60 * SECOND);
        double sum = 0, squares = 0;
        for (unsigned i = 0; i < flows; i++) {
            double x = (double)clients[i].units;
            sum += x;
            squares += x * x;
        }
        CHECK_GT(sum * sum / (flows * squares), 0.999);
        CHECK_LE(sum, 300001);
        CHECK_GT(sum, 299900);
        tear_down(lower, flows);
    }
}

static void large_requests_do_not_hold_up_small_ones(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *own = vx_limits_create(qos, UNIT), *group = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 330}};
    vx_limits_set(group, wanted, true);
    for (unsigned i = 0; i < 2; i++) {
        clients[i].flow = vx_throttle_create(lower, qos, own, i);
        vx_throttle_set_group(clients[i].flow, group);
        begin(i, lower, own, i == 0 ? 1u << 20 : 4096, 4, 100);
    }
    vx_clock_advance(clock_, vx_clock_now(clock_) + 100 * SECOND);
    CHECK_GE(clients[1].units, 16300);
    CHECK_GE(clients[0].units, 16300); /* equal units, not equal requests */
    tear_down(lower, 2);
}

static void limits_change_while_requests_wait(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 4096, 16, 1000000);
    double owed = 0;
    uint64_t before = clients[0].units;
    for (unsigned step = 0; step < 500; step++) {
        uint64_t part = random_below(SECOND);
        vx_clock_advance(clock_, vx_clock_now(clock_) + part);
        owed += (double)part / 1e9 * (double)wanted[0].rate;
        wanted[0].rate = 1 + random_below(500);
        vx_limits_set(limits, wanted, false);
    }
    double got = (double)(clients[0].units - before);
    CHECK_LE(got, owed + 2);
    CHECK_GE(got, owed - 2 - owed / 10000);
    wanted[0].rate = 0; /* no limit: everything passes at once */
    clients[0].ends = 0;
    vx_limits_set(limits, wanted, false);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 1);
    uint64_t waiting, units;
    vx_throttle_waiting(clients[0].flow, &waiting, &units);
    CHECK_EQ(waiting, 0);
    CHECK_EQ(units, 0);
    tear_down(lower, 1);
}

static void the_tighter_of_several_limits_counts(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1000},
                                       [VX_LIMIT_BYTES] = {.rate = 1u << 20},
                                       [VX_LIMIT_UNITS_READ] = {.rate = 1}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 65536, 4, 50); /* 128 units a second by bytes */
    vx_clock_advance(clock_, vx_clock_now(clock_) + 50 * SECOND);
    CHECK_GE(clients[0].operations, 799);
    CHECK_LE(clients[0].operations, 802);
    no_window_holds_too_much(128, 0, 8);
    vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND); /* the last requests complete */
    admitted = 0;
    begin(0, lower, limits, 512, 4, 50); /* 1000 by units */
    vx_clock_advance(clock_, vx_clock_now(clock_) + 50 * SECOND);
    CHECK_GE(admitted, 49990);
    CHECK_LE(admitted, 50010);
    no_window_holds_too_much(1000, 0, 1);
    tear_down(lower, 1);
}

static void credit_is_saved_and_spent(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 100, .credit = 9000, .credit_rate = 1000}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 4096, 4, 10); /* 10 s at 1000: 9000 from credit, 1000 from the rate */
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    CHECK_GE(clients[0].units, 9998);
    CHECK_LE(clients[0].units, 10004);
    vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
    admitted = 0;
    begin(0, lower, limits, 4096, 4, 10);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    CHECK_GE(admitted, 1080);
    CHECK_LE(admitted, 1110);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 50 * SECOND);
    int64_t levels[VX_LIMIT_KINDS];
    vx_limits_levels(limits, levels);
    CHECK_GE(levels[0], 4980);
    CHECK_LE(levels[0], 5010);
    tear_down(lower, 1);
}

static void a_flow_with_a_limit_of_its_own_takes_nothing_from_its_group(void)
{
    for (unsigned shared = 0; shared < 2; shared++) {
        set_up();
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *slow = vx_limits_create(qos, UNIT), *fast = vx_limits_create(qos, UNIT);
        vx_limits *group = vx_limits_create(qos, UNIT);
        vx_limit of_group[VX_LIMIT_KINDS] = {{.rate = 5000}}, of_slow[VX_LIMIT_KINDS] = {{.rate = 10}};
        vx_limit of_both[VX_LIMIT_KINDS] = {{.rate = 5000}, {.rate = 10}};
        vx_limits_set(group, of_group, true);
        vx_limits_set(slow, shared ? of_both : of_slow, true);
        for (unsigned i = 0; i < 2; i++) {
            clients[i].flow = vx_throttle_create(lower, qos, shared || i == 0 ? slow : fast, i);
            if (!shared)
                vx_throttle_set_group(clients[i].flow, group);
        }
        begin(0, lower, NULL, 4096, 0, 20); /* eight reads, limited to ten a second */
        clients[0].operation = VX_READ;
        for (unsigned d = 0; d < 8; d++) {
            requests[0][d].client = &clients[0];
            submit(&requests[0][d]);
        }
        begin(1, lower, NULL, 4096, 8, 20);
        vx_clock_advance(clock_, vx_clock_now(clock_) + 20 * SECOND);
        CHECK_GE(clients[0].units, 195);
        CHECK_LE(clients[0].units, 205);
        CHECK_GE(clients[1].units, 99500);
        CHECK_LE(clients[1].units, 100001);
        tear_down(lower, 2);
    }
}

/* Setting a group again, or switching between two, passes no request early and keeps none back. */
static void groups_change_while_requests_wait(void)
{
    for (unsigned changes = 0; changes < 2; changes++) {
        for (unsigned slow = 0; slow < 2; slow++) {
            set_up();
            vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
            vx_limits *groups[2], *own = vx_limits_create(qos, UNIT);
            vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 100}}, of_own[VX_LIMIT_KINDS] = {{.rate = 60}};
            for (unsigned g = 0; g < 2; g++) {
                groups[g] = vx_limits_create(qos, UNIT);
                vx_limits_set(groups[g], wanted, true);
            }
            if (slow)
                vx_limits_set(own, of_own, true);
            for (unsigned i = 0; i < 20; i++) {
                clients[i].flow = vx_throttle_create(lower, qos, own, i);
                vx_throttle_set_group(clients[i].flow, groups[0]);
                begin(i, lower, own, 4096, 2, 20);
            }
            for (unsigned step = 0; step < 2000; step++) {
                vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND / 100);
                for (unsigned i = 0; i < 20; i++)
                    vx_throttle_set_group(clients[i].flow, groups[changes & (step / 50)]);
            }
            uint64_t units = 0;
            for (unsigned i = 0; i < 20; i++)
                units += clients[i].units;
            uint64_t rate = slow ? 60 : 100;
            CHECK_LE(units, rate * 20 + (changes ? 40 * 20 : 1));
            CHECK_GE(units, rate * 19);
            int64_t levels[VX_LIMIT_KINDS];
            vx_limits_levels(groups[1], levels);
            CHECK_GE(levels[0], -21);
            tear_down(lower, 20);
        }
    }
}

static void draining_holds_up_nothing(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 1u << 20, 8, 0);
    CHECK_EQ(clients[0].operations, 0);
    CHECK(clients[0].flow->operations->is_holding(clients[0].flow));
    clients[0].flow->operations->drain(clients[0].flow, false);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 1);
    CHECK_EQ(clients[0].operations, 8);
    CHECK(!clients[0].flow->operations->is_holding(clients[0].flow));
    tear_down(lower, 1);
}

static void a_stall_lets_nothing_pass(void)
{
    /* Three flows share a limit of one a second, due after 1, 2 and 3 s. The process stalls. */
    static const struct {
        double from, to, at[3];
    } scenes[] = {{0, 0, {1, 2, 3}},
                  {0.99, 1.05, {1.05, 2, 3}}, /* a delay below 100 ms is made up for */
                  {0.99, 1.12, {1.12, 2.12, 3.12}},
                  {0.99, 3.49, {3.49, 4.49, 5.49}},
                  {0.5, 100, {100, 101, 102}}};
    for (unsigned i = 0; i < sizeof scenes / sizeof scenes[0]; i++) {
        set_up();
        uint64_t start = vx_clock_now(clock_);
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *group = vx_limits_create(qos, UNIT);
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1}};
        vx_limits_set(group, wanted, true);
        begin(3, lower, group, UNIT, 1, 0);
        CHECK_EQ(clients[3].operations, 1);
        admitted = 0;
        for (unsigned f = 0; f < 3; f++)
            begin(f, lower, group, UNIT, 1, 0);
        vx_clock_advance(clock_, start + (uint64_t)(scenes[i].from * 1e9));
        vx_clock_skip(clock_, start + (uint64_t)(scenes[i].to * 1e9));
        vx_clock_advance(clock_, start + 200 * SECOND);
        CHECK_EQ(admitted, 3);
        for (unsigned n = 0; n < 3; n++) {
            double at = (double)(history[n].at - start) / (double)SECOND;
            CHECK_GT(at, scenes[i].at[n] - 1e-6);
            CHECK_LT(at, scenes[i].at[n] + 1e-6);
        }
        tear_down(lower, 4);
    }
}

static void a_stall_saves_nothing(void)
{
    /* The limit is 100 a second, with 1,000 saved at most. The process stalls while a client waits.
     * After the stall the timer comes first, or a request. */
    for (unsigned scene = 0; scene < 8; scene++) {
        uint64_t still = scene % 2 ? 4 : 40; /* s: shorter or longer than credit can be saved */
        bool burst = scene / 2 % 2, request_first = scene / 4;
        set_up();
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *limits = vx_limits_create(qos, UNIT);
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 100, .credit = 1000}};
        if (burst)
            wanted[0] = (vx_limit){.rate = 100, .burst = 1000};
        vx_limits_set(limits, wanted, false);
        begin(0, lower, limits, UNIT, 4, 200);
        vx_clock_advance(clock_, vx_clock_now(clock_) + 20 * SECOND);
        CHECK_GE(clients[0].units, 1999);
        CHECK_LE(clients[0].units, 2001);
        vx_clock_skip(clock_, vx_clock_now(clock_) + still * SECOND);
        vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
        CHECK_GE(clients[0].units, 2985);
        CHECK_LE(clients[0].units, 3015);
        clients[0].ends = 0; /* idle: credit saved before the stall stays, none is added */
        vx_clock_advance(clock_, vx_clock_now(clock_) + 3 * SECOND);
        vx_clock_skip(clock_, vx_clock_now(clock_) + still * SECOND);
        uint64_t before = clients[0].units;
        if (request_first)
            begin(1, lower, limits, UNIT, 1, 0);
        CHECK_EQ(clients[1].units, request_first);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
        begin(0, lower, limits, UNIT, 4, 1);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
        CHECK_GE(clients[0].units - before, 480);
        CHECK_LE(clients[0].units - before, 520);
        /* Units spent just before a stall stay spent, whichever comes first. */
        vx_clock_advance(clock_, vx_clock_now(clock_) + 20 * SECOND);
        begin(0, lower, limits, 1u << 20, 7, 0); /* 896 units */
        vx_clock_skip(clock_, vx_clock_now(clock_) + still * SECOND);
        if (request_first)
            begin(1, lower, limits, UNIT, 1, 0);
        before = clients[0].units;
        begin(0, lower, limits, UNIT, 4, 1);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
        CHECK_GE(clients[0].units - before, 190);
        CHECK_LE(clients[0].units - before, 220);
        tear_down(lower, 2);
    }
}

static void whoever_comes_first_after_a_stall(void)
{
    /* The limit is ten a second with a burst of ten, which is used up. After a stall of an hour,
     * one of these comes before the timer: a change, the removal of a group, a drain, a request, or
     * a read of the levels. */
    for (unsigned scene = 0; scene < 5; scene++) {
        set_up();
        int64_t levels[VX_LIMIT_KINDS];
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *group = vx_limits_create(qos, UNIT), *own = vx_limits_create(qos, UNIT);
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 10, .burst = 10}};
        vx_limits_set(group, wanted, true);
        clients[0].flow = vx_throttle_create(lower, qos, own, 0);
        vx_throttle_set_group(clients[0].flow, group);
        begin(0, lower, own, UNIT, 14, 0);
        CHECK_GE(clients[0].operations, 10);
        CHECK_LT(clients[0].operations, 14);
        begin(1, lower, group, UNIT, 2, 0);
        CHECK_EQ(clients[1].operations, 0);
        uint64_t passed = admitted;
        vx_clock_skip(clock_, vx_clock_now(clock_) + 3600 * SECOND);
        if (scene == 0)
            vx_limits_set(group, wanted, false);
        else if (scene == 1)
            vx_throttle_set_group(clients[0].flow, NULL);
        else if (scene == 2)
            clients[0].flow->operations->drain(clients[0].flow, false);
        else if (scene == 3)
            begin(2, lower, group, UNIT, 1, 0);
        vx_limits_levels(group, levels);
        CHECK_GE(levels[0], -8);
        CHECK_LE(levels[0], 2);
        CHECK_LE(admitted, passed + 1);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
        CHECK_EQ(clients[0].operations, 14);
        CHECK_EQ(clients[1].operations, 2);
        tear_down(lower, scene == 3 ? 3 : 2);
    }
}

static void what_is_due_in_a_stall_comes_later(void)
{
    for (unsigned scene = 0; scene < 4; scene++) {
        bool credit = scene % 2, drained = scene / 2;
        set_up();
        vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
        vx_limits *group = vx_limits_create(qos, UNIT);
        vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1, .credit = credit ? 100 : 0}};
        vx_limits_set(group, wanted, false);
        for (unsigned f = 0; f < 20; f++)
            begin(f, lower, group, UNIT, 1, 0);
        uint64_t passed = admitted;
        CHECK_LE(passed, 1);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND / 2);
        vx_clock_skip(clock_, vx_clock_now(clock_) + 40 * SECOND);
        vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND / 4);
        CHECK_LE(admitted, passed + 1);
        passed = admitted;
        vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
        CHECK_GE(admitted, passed + 9);
        CHECK_LE(admitted, passed + 11);
        if (drained) { /* in mixed order, followed by a stall */
            for (unsigned f = 0; f < 20; f++) {
                vx_device *flow = clients[f * 7 % 20].flow;
                flow->operations->drain(flow, false);
            }
            vx_clock_skip(clock_, vx_clock_now(clock_) + 5 * SECOND);
            vx_clock_advance(clock_, vx_clock_now(clock_) + 1);
            CHECK_EQ(admitted, 20);
        }
        tear_down(lower, 20);
    }
}

/* Linked with --wrap=realloc: the clock allocates memory for timers with realloc. */
static bool no_memory;
void *__real_realloc(void *memory, size_t size);
void *__wrap_realloc(void *memory, size_t size);

void *__wrap_realloc(void *memory, size_t size)
{
    return no_memory ? NULL : __real_realloc(memory, size);
}

static void without_memory_what_waits_passes_and_limits_stay(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 100}};
    vx_limits_set(limits, wanted, true);
    no_memory = true;
    begin(0, lower, limits, UNIT, 8, 0);
    CHECK_EQ(clients[0].operations, 8); /* they pass early rather than never */
    no_memory = false;
    begin(0, lower, limits, UNIT, 8, 10);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    CHECK_GE(clients[0].operations, 8 + 990);
    CHECK_LE(clients[0].operations, 8 + 1001);
    tear_down(lower, 1);
}

static unsigned dropped;

static void was_dropped(vx_request *request)
{
    CHECK_EQ(request->result, VX_E_CANCELLED);
    dropped++;
}

static void what_is_dropped_is_neither_done_nor_paid(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 1}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 1u << 20, 8, 0);
    for (unsigned i = 0; i < 8; i++)
        requests[0][i].request.complete = was_dropped;
    clients[0].flow->operations->drain(clients[0].flow, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 1);
    CHECK_EQ(dropped, 8);
    CHECK_EQ(clients[0].operations, 0);
    int64_t levels[VX_LIMIT_KINDS];
    vx_limits_levels(limits, levels);
    CHECK_GE(levels[0], -1); /* at most the piece that was due stays charged */
    tear_down(lower, 1);

    set_up(); /* a flow that waits behind the dropped requests moves up */
    lower = vx_memory_create(1 << 20, 1 << 20, 0);
    limits = vx_limits_create(qos, UNIT);
    vx_limits_set(limits, wanted, true);
    dropped = 0;
    begin(0, lower, limits, 1u << 20, 2, 0);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 33 * SECOND); /* some pieces are paid for */
    begin(1, lower, limits, 4096, 1, 0);
    for (unsigned i = 0; i < 2; i++)
        requests[0][i].request.complete = was_dropped;
    clients[0].flow->operations->drain(clients[0].flow, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 2 * SECOND);
    CHECK_EQ(dropped, 2);
    CHECK_EQ(clients[1].operations, 1);
    tear_down(lower, 2);
}

static void a_large_trim_does_not_hold_up_others(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *own = vx_limits_create(qos, UNIT), *group = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 100}};
    vx_limits_set(group, wanted, true);
    vx_device *large = vx_map_create((uint64_t)1 << 40, (uint64_t)1 << 40, 20, 1, 0, pool, 0, NULL);
    clients[1].flow = vx_throttle_create(lower, qos, own, 1);
    vx_device *trimmer = vx_throttle_create(large, qos, own, 2);
    vx_throttle_set_group(clients[1].flow, group);
    vx_throttle_set_group(trimmer, group);
    sent trim = {.request = {.operation = VX_TRIM, .length = (uint64_t)4 << 30,
                             .flags = VX_NOWAIT | VX_MAY_PARK, .complete = was_dropped}};
    CHECK_EQ(vx_submit(trimmer, &trim.request), VX_PARKED);
    begin(1, lower, own, 4096, 4, 20);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 20 * SECOND);
    CHECK_GE(clients[1].operations, 55); /* one between two pieces of the trim */
    dropped = 0;
    trimmer->operations->drain(trimmer, true);
    vx_clock_advance(clock_, vx_clock_now(clock_) + SECOND);
    CHECK_EQ(dropped, 1);
    vx_device_release(trimmer);
    clients[0].flow = clients[1].flow;
    vx_device_release(large);
    tear_down(lower, 1);
}

static void zero_and_trim_count_by_mebibytes(void)
{
    set_up();
    vx_device *lower = vx_memory_create(1 << 20, 1 << 20, 0);
    vx_limits *limits = vx_limits_create(qos, UNIT);
    vx_limit wanted[VX_LIMIT_KINDS] = {{.rate = 10}, [VX_LIMIT_BYTES] = {.rate = 1}};
    vx_limits_set(limits, wanted, true);
    begin(0, lower, limits, 1u << 20, 0, 10);
    clients[0].operation = VX_ZERO;
    clients[0].units_each = 1;
    requests[0][0].client = &clients[0];
    submit(&requests[0][0]);
    vx_clock_advance(clock_, vx_clock_now(clock_) + 10 * SECOND);
    CHECK_GE(clients[0].operations, 100);
    CHECK_LE(clients[0].operations, 102);
    tear_down(lower, 1);
}

int main(void)
{
    RUN(a_bucket_never_admits_too_much);
    RUN(a_reservation_is_exact_for_a_day);
    RUN(a_change_creates_and_loses_nothing);
    RUN(a_refund_gives_back_what_was_paid);
    RUN(busy_flows_get_their_rate);
    RUN(flows_of_one_limit_share_it_fairly);
    RUN(large_requests_do_not_hold_up_small_ones);
    RUN(limits_change_while_requests_wait);
    RUN(the_tighter_of_several_limits_counts);
    RUN(credit_is_saved_and_spent);
    RUN(a_flow_with_a_limit_of_its_own_takes_nothing_from_its_group);
    RUN(groups_change_while_requests_wait);
    RUN(draining_holds_up_nothing);
    RUN(a_stall_lets_nothing_pass);
    RUN(a_stall_saves_nothing);
    RUN(whoever_comes_first_after_a_stall);
    RUN(what_is_due_in_a_stall_comes_later);
    RUN(without_memory_what_waits_passes_and_limits_stay);
    RUN(what_is_dropped_is_neither_done_nor_paid);
    RUN(a_large_trim_does_not_hold_up_others);
    RUN(zero_and_trim_count_by_mebibytes);
    return CHECK_REPORT();
}
