/*
 * Increments counters that lie side by side in a file, by an unprotected read, think and write
 * under record locks on ranges of them, and writes down on a shared board what a checker needs to
 * tell a lost update or a second holder from the traces of a process killed at any instruction.
 *
 *     recordtorture FILE BOARD SEAT TARGET READS
 *
 * Ends when SEAT has made TARGET increments, by however many processes; between two turns it makes
 * READS visits. Seats of an odd number lock by their open file description, the others as a
 * process. RECORDTORTURE=none in the environment leaves out the locks, =short the last cell of each
 * range: then the board must tell. Its layout is mirrored in tests/test_record_torture.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SEATS = 128, CELLS = 16, VALUES = 16384, WIDTH = sizeof(uint64_t), WIDEST = 4 };

struct cell {
    _Atomic uint64_t holder;         /* pid of the exclusive holder */
    _Atomic uint64_t readers[SEATS]; /* pids of the shared holders */
    _Atomic uint64_t
        writer[VALUES + 1]; /* who wrote this value: pid * 2, + 1 when it was completed */
};

struct board {
    _Atomic uint64_t violations;
    _Atomic uint64_t last;        /* pid of the last that got an exclusive lock */
    _Atomic uint64_t done[SEATS]; /* increments that were completed */
    struct cell cells[CELLS];
};

static struct board *board;
static const char *name, *sabotage;
static uint64_t self;
static int file, seat;
static uint32_t dice;

static void violation(const char *what, int cell, uint64_t other) {
    atomic_fetch_add(&board->violations, 1);
    fprintf(stderr, "pid %lu, cell %d: %s (pid %lu)\n", (unsigned long)self, cell, what,
            (unsigned long)other);
}

static void fatal(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int chance(int sides) {
    dice = dice * 1664525 + 1013904223;
    return (int)((dice >> 16) % (unsigned)sides);
}

/* Whether PID can run no more of its program: see torture.c. */
static int is_gone(uint64_t pid) {
    char path[64], text[512], state;
    unsigned flags;
    snprintf(path, sizeof path, "/proc/%lu/stat", (unsigned long)pid);
    int stat = open(path, O_RDONLY);
    if (stat < 0)
        return 1;
    ssize_t length = read(stat, text, sizeof text - 1);
    close(stat);
    if (length <= 0)
        return 1;
    text[length] = '\0';
    char *name_end = strrchr(text, ')');
    if (!name_end || sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2)
        fatal("stat");
    return state == 'Z' || state == 'X' || (flags & 4);
}

static void check_nobody(_Atomic uint64_t *place, int cell, const char *what) {
    uint64_t other = atomic_load(place);
    if (other && other != self && !is_gone(other))
        violation(what, cell, other);
}

static void think(void) {
    for (int turns = chance(3); turns >= 0; turns--)
        sched_yield();
}

static void reopen(void) {
    if (file >= 0)
        close(file);
    file = open(name, O_RDWR | O_CLOEXEC);
    if (file < 0)
        fatal(name);
}

/* Cells from FIRST on, or to the end of the file if COUNT is 0. Whether the lock was had. */
static int locked(int type, int first, int count, int wait) {
    if (*sabotage == 'n')
        return 1;
    if (*sabotage == 's' && count > 1)
        count--;
    struct flock lock = {.l_type = (short)type,
                         .l_whence = SEEK_SET,
                         .l_start = (off_t)first * WIDTH,
                         .l_len = (off_t)count * WIDTH};
    int command = seat % 2 ? (wait ? F_OFD_SETLKW : F_OFD_SETLK) : (wait ? F_SETLKW : F_SETLK);
    if (fcntl(file, command, &lock) == 0)
        return 1;
    if (wait || (errno != EAGAIN && errno != EACCES))
        fatal("fcntl");
    return 0;
}

static uint64_t value_of(int cell) {
    uint64_t value;
    if (pread(file, &value, sizeof value, (off_t)cell * WIDTH) != sizeof value)
        fatal("pread");
    return value;
}

static void enter(int first, int count) {
    atomic_store(&board->last, self);
    for (int cell = first; cell < first + count; cell++) {
        struct cell *here = &board->cells[cell];
        uint64_t before = atomic_exchange(&here->holder, self);
        if (before && before != self && !is_gone(before))
            violation("entered while another one holds", cell, before);
        for (int i = 0; i < SEATS; i++)
            check_nobody(&here->readers[i], cell, "entered while another one reads");
    }
}

static void leave(int first, int count) {
    for (int cell = first; cell < first + count; cell++) {
        uint64_t expected = self;
        if (!atomic_compare_exchange_strong(&board->cells[cell].holder, &expected, 0))
            violation("another one entered meanwhile", cell, expected);
    }
}

static void increment(int cell) {
    struct cell *here = &board->cells[cell];
    uint64_t value = value_of(cell);
    think();
    if (++value >= VALUES)
        fatal("the board is full");
    uint64_t claim = atomic_exchange(&here->writer[value], self * 2);
    if (claim & 1)
        violation("an update was lost", cell, claim / 2);
    else if (claim && !is_gone(claim / 2))
        violation("another one is writing the same value", cell, claim / 2);
    if (pwrite(file, &value, sizeof value, (off_t)cell * WIDTH) != sizeof value)
        fatal("pwrite");
    atomic_store(&here->writer[value], self * 2 + 1);
    atomic_fetch_add(&board->done[seat], 1);
}

/* What the file says must have been written, and nothing later, while nobody may write. */
static uint64_t inspect(int first, int count) {
    uint64_t sum = 0;
    for (int cell = first; cell < first + count; cell++) {
        struct cell *here = &board->cells[cell];
        uint64_t value = value_of(cell), next = atomic_load(&here->writer[value + 1]);
        uint64_t claim = value ? atomic_load(&here->writer[value]) : 1;
        check_nobody(&here->holder, cell, "read while another one holds");
        if (!(claim & 1) && !is_gone(claim / 2))
            violation("read what is being written", cell, claim / 2);
        if (next & 1)
            violation("read what has been overwritten", cell, next / 2);
        sum += value;
    }
    return sum;
}

static void mark_reader(int first, int count, uint64_t who) {
    for (int cell = first; cell < first + count; cell++)
        atomic_store(&board->cells[cell].readers[seat], who);
}

/* With a read lock on these cells. */
static void watch(int first, int count) {
    mark_reader(first, count, self);
    uint64_t sum = inspect(first, count);
    think();
    if (inspect(first, count) != sum)
        violation("the sum has changed", first, 0);
    mark_reader(first, count, 0);
}

static void visit(void) {
    int whole = chance(2), count = whole ? CELLS : 1 + chance(WIDEST);
    int first = chance(CELLS - count + 1);
    locked(F_RDLCK, first, whole ? 0 : count, 1);
    watch(first, count);
    /* Reading on, and writing besides, if that can be had. */
    int cell = first + chance(count);
    if (chance(3) == 0 && locked(F_WRLCK, cell, 1, 0)) {
        enter(cell, 1);
        increment(cell);
        leave(cell, 1);
        locked(F_RDLCK, cell, 1, 0);
        watch(first, count);
    }
    locked(F_UNLCK, 0, 0, 0);
}

/* Some cells, a few more behind them, given back in one of several ways. */
static void turn(void) {
    int count = 1 + chance(WIDEST), more = chance(2), first = chance(CELLS - count - more + 1);
    locked(F_WRLCK, first, count, 1);
    enter(first, count);
    if (more && locked(F_WRLCK, first + count, more, chance(2))) {
        enter(first + count, more);
        count += more;
    }
    for (int cell = first; cell < first + count; cell++)
        increment(cell);
    leave(first, count);
    int way = chance(32);
    if (way == 0) {
        reopen();
    } else if (way < 11) {
        locked(F_RDLCK, first, count, 0);
        watch(first, count);
    } else if (way < 21) {
        for (int cell = first; cell < first + count; cell++)
            locked(F_UNLCK, cell, 1, 0);
    }
    locked(F_UNLCK, first, count, 0);
}

int main(int argc, char **argv) {
    if (argc != 6)
        return 2;
    int reads = atoi(argv[5]), shared = open(argv[2], O_RDWR);
    uint64_t target = strtoull(argv[4], NULL, 10);
    seat = atoi(argv[3]);
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    if (board == MAP_FAILED)
        fatal("board");
    self = (uint64_t)getpid();
    dice = (uint32_t)self * 2654435761u;
    name = argv[1];
    sabotage = getenv("RECORDTORTURE") ? getenv("RECORDTORTURE") : "";
    file = -1;
    reopen();
    while (atomic_load(&board->done[seat]) < target) {
        for (int i = 0; i < reads; i++)
            visit();
        turn();
    }
    return 0;
}
