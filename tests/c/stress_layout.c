/* SPDX-License-Identifier: MIT
 *
 * A mirror under load, while its disks fail, return with other content, find no space, and its slabs move.
 * Nobody may see an older content than was seen before, no write may be lost, and the copies stay equal.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "array/layout.h"
#include "check.h"
#include "core/clock.h"
#include "core/epoch.h"
#include "core/run.h"
#include "leaf/file.h"

#define COLUMNS 2u
#define SLAB 65536u
#define UNIT 4096u
#define ROWS 3u
#define SECTOR 512u
#define SIZE (ROWS * COLUMNS * SLAB)
#define DISKS 5u /* two for each column, and one to move to */
#define DISK_BYTES (2 * ROWS * SLAB)
#define WRITERS 3u
#define READERS 2u
#define SEEN (SIZE / SECTOR)

static uint32_t copies = 2, slots = 3;
static vx_device *layout;
static vx_pool *pool;
static int fds[DISKS];
static _Atomic uint32_t incarnations[DISKS]; /* under owner */
static _Atomic int mode[DISKS];          /* 0, or the error of every write */
static _Atomic bool out[DISKS];          /* the handler has taken it out */
static _Atomic uint64_t era[ROWS];       /* raised when nothing may be written there any more */
static _Atomic uint64_t hot;             /* a sector that was written when a disk failed */
static uint64_t counts[WRITERS][SEEN]; /* how often each has written its sectors */
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* entries and marks */
static _Atomic uint64_t newest[SEEN];    /* what some reader saw */
static _Thread_local bool repairs; /* fills members, which no mark is needed for */
static bool full; /* instead of failing, disks find no space now and then */
static _Atomic bool stop;
static _Atomic uint64_t rounds[WRITERS + READERS], failures, returns, moves, lacking, prepared, compared;

ssize_t __real_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags);

static uint32_t disk_of(int fd)
{
    for (uint32_t i = 0; i < DISKS; i++)
        if (fds[i] == fd || fd == fds[i] + 1000)
            return i;
    return DISKS;
}

/* Some writes take long, so that others come between the copies; some fail, half done. */
ssize_t __wrap_pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    static _Atomic uint32_t calls;
    uint32_t disk = disk_of(fd);
    uint64_t row = (uint64_t)offset / SLAB % ROWS, before = atomic_load(&era[row]);
    CHECK(disk < DISKS);
    uint32_t call = atomic_fetch_add(&calls, 1);
    if (call % 8 == 0)
        usleep(call % 256 == 0 ? 3000 : 200);
    CHECK(repairs || atomic_load(&era[row]) == before);
    int error = atomic_load(&mode[disk]);
    if (error == 0 || (error == ENOSPC && atomic_load(&calls) % 3 != 0))
        return __real_pwritev2(fd, pieces, count, offset, flags);
    struct iovec half = {pieces->iov_base, pieces->iov_len / 1024 * 512};
    if (half.iov_len > 0 && error == EIO)
        (void)__real_pwritev2(fd, &half, 1, offset, flags);
    uint64_t within = (uint64_t)offset % SLAB;
    atomic_store(&hot, (row * COLUMNS * SLAB + within / UNIT * UNIT * COLUMNS + disk / 2 % COLUMNS * UNIT +
                        within % UNIT) / SECTOR);
    errno = error;
    return -1;
}

/* Some requests lose the processor just before they begin. */
uint32_t __real_vx_epoch_enter(vx_epochs *epochs, uint32_t hint);
uint32_t __wrap_vx_epoch_enter(vx_epochs *epochs, uint32_t hint);

uint32_t __wrap_vx_epoch_enter(vx_epochs *epochs, uint32_t hint)
{
    static _Atomic uint32_t calls;
    if (!repairs && atomic_fetch_add(&calls, 1) % (copies == 1 ? 4 : 64) == 0)
        usleep(300);
    return __real_vx_epoch_enter(epochs, hint);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint64_t entry_of(enum vx_kind kind, uint32_t disk, uint64_t slab)
{
    return vx_entry(kind, disk, slab * SLAB, 0);
}

/* Under `owner`. */
static void set_entry(uint64_t row, uint32_t member, uint64_t expected, uint64_t entry)
{
    uint8_t mismatched;
    CHECK_EQ(vx_layout_replace(layout, 1, &row, &member, &expected, &entry, &mismatched), 0);
}

static uint64_t read_entry(uint64_t row, uint32_t member)
{
    uint64_t entries[COLUMNS * VX_LAYOUT_SLOTS];
    vx_layout_read_entries(layout, row, 1, entries);
    return entries[member];
}

/* Under `owner`: every entry of the disk of one kind becomes another kind. */
static void change_disk(uint32_t disk, enum vx_kind from, enum vx_kind to)
{
    for (uint64_t row = 0; row < ROWS; row++)
        for (uint32_t member = 0; member < COLUMNS * slots; member++) {
            uint64_t entry = read_entry(row, member);
            if (vx_entry_kind(entry) == from && vx_entry_lower(entry) == disk)
                set_entry(row, member, entry, vx_entry(to, disk, vx_entry_offset(entry), 0));
        }
}

static uint64_t leaf_of(uint32_t disk)
{
    return 100 + disk + DISKS * atomic_load(&incarnations[disk]);
}

static int fault(uint64_t identity, vx_fault *what)
{
    CHECK_EQ(identity, 1);
    pthread_mutex_lock(&owner);
    if (what->kind == VX_FAULT_ROW) {
        CHECK_EQ(vx_layout_mark(layout, what->first, 1, true), 0);
        atomic_fetch_add(&prepared, 1);
    } else {
        CHECK_EQ(what->kind, VX_FAULT_MEMBER);
        CHECK_EQ(what->code, VX_E_IO);
        usleep(1000); /* readers go on meanwhile */
        if (what->leaf != leaf_of(what->disk)) { /* what failed has left, and another one is there */
            pthread_mutex_unlock(&owner);
            return VX_OK;
        }
        change_disk(what->disk, VX_DATA, VX_AWAY);
        change_disk(what->disk, VX_STALE, VX_AWAY);
        (void)vx_layout_clear_disk(layout, what->disk);
        atomic_store(&out[what->disk], true);
    }
    pthread_mutex_unlock(&owner);
    return VX_OK;
}

static const vx_upcalls upcalls = {.fault = fault};

static int transfer(uint32_t operation, void *buffer, uint64_t length, uint64_t offset)
{
    vx_failure failure;
    return vx_transfer(layout, operation, 0, buffer, length, offset, &failure);
}

/* Every sector holds its own number and how often it was written. */
static void fill(uint64_t *data, uint64_t sectors, uint64_t sector, const uint64_t *values)
{
    for (uint64_t i = 0; i < sectors; i++)
        for (uint32_t k = 0; k < SECTOR / 8; k += 2) {
            data[i * SECTOR / 8 + k] = sector + i;
            data[i * SECTOR / 8 + k + 1] = values[i];
        }
}

/* Writer w owns the sectors of every WRITERS-th run of 24. */
static void *write_and_read(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    uint64_t state = me + 4711;
    uint64_t *mine = counts[me];
    while (!atomic_load(&stop)) {
        uint64_t chosen = next_random(&state), data[24 * SECTOR / 8], wanted[24];
        uint64_t run = (chosen >> 8) % (SEEN / 24 / WRITERS) * WRITERS + me;
        uint64_t first = (chosen >> 32) % 24, count = 1 + (chosen >> 40) % (24 - first);
        uint64_t sector = run * 24 + first;
        CHECK_EQ(transfer(VX_READ, data, count * SECTOR, sector * SECTOR), 0);
        for (uint64_t i = 0; i < count; i++) {
            CHECK_EQ(data[i * SECTOR / 8 + 1], mine[sector + i]); /* else a write was lost */
            wanted[i] = mine[sector + i] + 1;
        }
        fill(data, count, sector, wanted);
        int result;
        if ((chosen & 3) == 0) { /* as a server does: answer at once, or not at all */
            vx_request request = {.operation = VX_WRITE,
                                  .flags = VX_NOWAIT,
                                  .offset = sector * SECTOR,
                                  .length = count * SECTOR,
                                  .buffer = (uint8_t *)data};
            int answer = vx_submit(layout, &request);
            result = answer == VX_DONE ? request.result : VX_E_CANCELLED;
            if (answer != VX_DONE) { /* and is written again */
                atomic_store(&hot, sector);
                usleep(300);
            }
            if (answer != VX_DONE)
                result = transfer(VX_WRITE, data, count * SECTOR, sector * SECTOR);
        } else {
            result = transfer(VX_WRITE, data, count * SECTOR, sector * SECTOR);
        }
        CHECK(result == 0 || result == VX_E_NOSPACE);
        CHECK_EQ(transfer(VX_READ, data, count * SECTOR, sector * SECTOR), 0);
        for (uint64_t i = 0; i < count; i++) {
            uint64_t found = data[i * SECTOR / 8 + 1];
            CHECK(found == wanted[i] || (result != 0 && found == mine[sector + i]));
            mine[sector + i] = found;
        }
        atomic_fetch_add(&lacking, result == VX_E_NOSPACE);
        atomic_fetch_add(&rounds[me], 1);
    }
    return NULL;
}

static void *watch(void *argument)
{
    uint32_t me = (uint32_t)(uintptr_t)argument;
    uint64_t state = me + 99;
    while (!atomic_load(&stop)) {
        uint64_t chosen = next_random(&state), data[4 * SECTOR / 8], before[4];
        uint64_t sector = (chosen & 7 ? atomic_load(&hot) : chosen >> 8) % (SEEN - 4);
        for (uint64_t i = 0; i < 4; i++)
            before[i] = atomic_load(&newest[sector + i]);
        CHECK_EQ(transfer(VX_READ, data, sizeof data, sector * SECTOR), 0);
        for (uint64_t i = 0; i < 4; i++) {
            uint64_t number = data[i * SECTOR / 8], found = data[i * SECTOR / 8 + 1];
            CHECK(number == sector + i || found == 0);
            if (data[(i + 1) * SECTOR / 8 - 1] != found)
                continue; /* half of a write that is under way */
            CHECK_GE(found, before[i]); /* else it went back */
            uint64_t seen = before[i];
            while (seen < found &&
                   !atomic_compare_exchange_weak(&newest[sector + i], &seen, found))
                ;
        }
        atomic_fetch_add(&rounds[WRITERS + me], 1);
    }
    return NULL;
}

static vx_device *new_leaf(uint32_t disk)
{
    int fd = dup3(fds[disk], fds[disk] + 1000, O_CLOEXEC);
    CHECK_GE(fd, 0);
    return vx_file_create(fd, DISK_BYTES, VX_FILE_MEMORY, leaf_of(disk));
}

static void join(uint32_t disk)
{
    atomic_fetch_add(&incarnations[disk], 1);
    vx_device *leaf = new_leaf(disk);
    CHECK_EQ(vx_layout_set_disk(layout, disk, leaf), 0);
    vx_device_release(leaf);
}

static void spoil(uint32_t disk, uint64_t offset, uint64_t length)
{
    static uint8_t garbage[SLAB];
    memset(garbage, 0xdd, sizeof garbage);
    for (uint64_t at = 0; at < length; at += SLAB)
        CHECK_EQ(pwrite(fds[disk], garbage, SLAB, (off_t)(offset + at)), SLAB);
}

/* Fills a member that is STALE from another one of its column. False: a disk failed meanwhile. */
static bool rebuild(uint64_t row, uint32_t from, uint32_t to, bool compares)
{
    vx_failure failure;
    for (uint64_t at = 0; at < SLAB; at += 4 * UNIT)
        if (vx_layout_copy(layout, row, from, to, at, 4 * UNIT, compares, &failure) != 0)
            return false;
    return true;
}

/* Waits until every request that is under way now has ended, with all that follows a failure. */
static void await_writers(void)
{
    for (uint32_t i = 0; i < WRITERS; i++)
        for (uint64_t before = rounds[i]; rounds[i] < before + 2;)
            usleep(100);
}

/* A disk fails under load, is taken out, returns with other content, and is filled. */
static void fail_and_return(uint32_t disk)
{
    atomic_store(&mode[disk], EIO);
    for (uint32_t i = 0; i < 1000 && !atomic_load(&out[disk]); i++)
        usleep(100);
    atomic_store(&mode[disk], 0);
    await_writers();
    if (!atomic_load(&out[disk]))
        return; /* nothing is written there: its slabs have moved */
    atomic_fetch_add(&failures, 1);
    spoil(disk, 0, DISK_BYTES);
    pthread_mutex_lock(&owner);
    atomic_store(&out[disk], false);
    join(disk);
    change_disk(disk, VX_AWAY, VX_STALE);
    pthread_mutex_unlock(&owner);
    for (uint64_t row = 0; row < ROWS; row++)
        for (uint32_t member = 0; member < COLUMNS * slots; member++) {
            uint64_t entry = read_entry(row, member);
            if (vx_entry_kind(entry) != VX_STALE)
                continue;
            uint32_t column = member / slots, from = column * slots;
            while (vx_entry_kind(read_entry(row, from)) != VX_DATA)
                from++;
            CHECK(rebuild(row, from, member, row & 1));
            pthread_mutex_lock(&owner);
            set_entry(row, member, entry, vx_entry(VX_DATA, disk, vx_entry_offset(entry), 0));
            pthread_mutex_unlock(&owner);
        }
    atomic_fetch_add(&returns, 1);
}

/* A slab moves to the spare disk, or back to the other half of its own. */
static void move(uint64_t row, uint32_t column, uint64_t *state)
{
    uint32_t from = UINT32_MAX, free_slot = UINT32_MAX;
    for (uint32_t i = 0; i < slots; i++) {
        enum vx_kind kind = vx_entry_kind(read_entry(row, column * slots + i));
        if (kind == VX_DATA && (from == UINT32_MAX || next_random(state) & 1))
            from = column * slots + i;
        if (kind == VX_HOLE)
            free_slot = column * slots + i;
    }
    CHECK(from != UINT32_MAX && free_slot != UINT32_MAX);
    uint64_t old = read_entry(row, from), slab = vx_entry_offset(old) / SLAB;
    uint32_t disk = vx_entry_lower(old) == DISKS - 1 ? 2 * column : DISKS - 1;
    for (uint32_t i = 0; i < slots; i++) /* never two copies on one disk */
        if (vx_entry_kind(read_entry(row, column * slots + i)) == VX_DATA &&
            vx_entry_lower(read_entry(row, column * slots + i)) == disk)
            disk = vx_entry_lower(old) == DISKS - 1 ? 2 * column + 1 : vx_entry_lower(old);
    slab = slab >= ROWS ? slab - ROWS : slab + ROWS;
    if (disk == DISKS - 1) /* of the two columns */
        slab = row + ROWS * column;
    spoil(disk, slab * SLAB, SLAB);
    pthread_mutex_lock(&owner);
    if (copies == 1)
        vx_layout_set_moving(layout, true);
    set_entry(row, free_slot, read_entry(row, free_slot), entry_of(VX_STALE, disk, slab));
    pthread_mutex_unlock(&owner);
    CHECK(rebuild(row, from, free_slot, false));
    pthread_mutex_lock(&owner);
    set_entry(row, free_slot, entry_of(VX_STALE, disk, slab), entry_of(VX_DATA, disk, slab));
    set_entry(row, from, old, entry_of(VX_HOLE, 0, 0));
    if (copies == 1)
        vx_layout_set_moving(layout, false);
    pthread_mutex_unlock(&owner);
    spoil(vx_entry_lower(old), vx_entry_offset(old), SLAB);
    atomic_fetch_add(&moves, 1);
}

static void find_no_space(uint32_t disk)
{
    atomic_store(&mode[disk], ENOSPC);
    usleep(20000);
    atomic_store(&mode[disk], 0);
    await_writers();
}

static void unmark(uint64_t row)
{
    pthread_mutex_lock(&owner);
    CHECK_EQ(vx_layout_mark(layout, row, 1, false), 0);
    atomic_fetch_add(&era[row], 1);
    pthread_mutex_unlock(&owner);
}

static void compare(uint64_t row, uint32_t column)
{
    uint8_t verdicts[SLAB / VX_LAYOUT_BLOCK];
    vx_failure failure;
    CHECK_EQ(vx_layout_compare(layout, row, column, 0, SLAB, verdicts, &failure), 0);
    for (uint32_t i = 0; i < SLAB / VX_LAYOUT_BLOCK; i++)
        CHECK_EQ(verdicts[i], 0);
    atomic_fetch_add(&compared, 1);
}

static void disturb(uint64_t *state)
{
    uint64_t chosen = next_random(state), row = (chosen >> 8) % ROWS;
    uint32_t column = (uint32_t)(chosen >> 20) % COLUMNS;
    switch (copies == 1 ? 3 : chosen % 5) {
    case 0:
        if (!full)
            fail_and_return((uint32_t)(chosen >> 30) % (DISKS - 1));
        break;
    case 1:
        if (full)
            find_no_space((uint32_t)(chosen >> 30) % DISKS);
        break;
    case 2:
        unmark(row);
        break;
    case 3:
        move(row, column, state);
        break;
    default:
        compare(row, column);
    }
}

static void begin(uint32_t number, bool without_space)
{
    full = without_space;
    copies = number;
    slots = copies + 1;
    vx_layout_terms terms = {.columns = COLUMNS, .copies = copies, .interleave = UNIT, .slab = SLAB,
                             .size = SIZE, .largest_size = SIZE};
    layout = vx_layout_create(&terms, pool, 1, &upcalls);
    CHECK(layout != NULL);
    for (uint32_t i = 0; i < DISKS; i++) {
        CHECK_EQ(ftruncate(fds[i], 0), 0);
        CHECK_EQ(ftruncate(fds[i], DISK_BYTES), 0);
        join(i);
    }
    for (uint64_t row = 0; row < ROWS; row++)
        for (uint32_t member = 0; member < COLUMNS * slots; member++) {
            uint32_t copy = member % slots;
            uint64_t entry = entry_of(VX_DATA, member / slots * 2 + copy, row);
            set_entry(row, member, 0, copy < copies ? entry : entry_of(VX_HOLE, 0, 0));
        }
    memset((void *)newest, 0, sizeof newest);
    memset(counts, 0, sizeof counts);
    atomic_store(&stop, false);
}

static void run(int seconds)
{
    pthread_t threads[WRITERS + READERS];
    uint64_t state = 1234567;
    for (uintptr_t i = 0; i < WRITERS; i++)
        pthread_create(&threads[i], NULL, write_and_read, (void *)i);
    /* A write that finds no space is taken back, and a reader may have seen it. */
    uint32_t readers = full ? 0 : READERS;
    for (uintptr_t i = 0; i < readers; i++)
        pthread_create(&threads[WRITERS + i], NULL, watch, (void *)i);
    uint64_t end = vx_now_ns() + (uint64_t)seconds * 1000000000;
    repairs = true;
    while (vx_now_ns() < end)
        disturb(&state);
    atomic_store(&stop, true);
    for (uint32_t i = 0; i < WRITERS + readers; i++) {
        pthread_join(threads[i], NULL);
        CHECK_GT(rounds[i], 0);
    }
    CHECK_EQ(transfer(VX_FLUSH, NULL, 0, 0), 0);
    vx_device_release(layout);
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 4;
    pool = vx_pool_create(4, 1 << 20, 1);
    for (uint32_t i = 0; i < DISKS; i++)
        fds[i] = memfd_create("disk", MFD_CLOEXEC);
    begin(1, false);
    run(seconds / 4 + 1);
    begin(2, true);
    run(seconds / 4 + 1);
    begin(2, false);
    run(seconds);
    printf("failures %llu returns %llu moves %llu without space %llu prepared %llu compared %llu\n",
           (unsigned long long)failures, (unsigned long long)returns, (unsigned long long)moves,
           (unsigned long long)lacking, (unsigned long long)prepared, (unsigned long long)compared);
    CHECK_GT(returns, 0);
    CHECK_GT(moves, 0);
    CHECK_GT(lacking, 0);
    CHECK_GT(prepared, ROWS);
    CHECK_GT(compared, 0);
    vx_pool_destroy(pool);
    return 0;
}
