/*
 * Increments a counter in a file by an unprotected read, think and write under the file's flock,
 * and writes down on a shared board what a checker needs to tell a lost update or a second holder
 * from the traces of a process killed at any instruction.
 *
 *     torture FILE BOARD SEAT TARGET READS
 *
 * Ends when SEAT has made TARGET increments, by however many processes; between two increments it
 * makes READS shared visits. The board's layout is mirrored in tests/support/board.py.
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
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SEATS = 128, VALUES = 65536 };

struct board {
    _Atomic uint64_t violations;
    _Atomic uint64_t holder;         /* pid of the exclusive holder */
    _Atomic uint64_t done[SEATS];    /* increments that were completed */
    _Atomic uint64_t readers[SEATS]; /* pid of the shared holder */
    _Atomic uint64_t writer[VALUES]; /* who wrote this value: pid * 2, + 1 when it was completed */
};

static struct board *board;
static uint64_t self;

static void violation(const char *what, uint64_t other) {
    atomic_fetch_add(&board->violations, 1);
    fprintf(stderr, "pid %lu: %s (pid %lu)\n", (unsigned long)self, what, (unsigned long)other);
}

static void fatal(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* Whether PID can run no more of its program. Its locks go before it becomes a zombie, so the
 * kernel's PF_EXITING (the flags of proc(5)'s stat) is what counts. */
static int is_gone(uint64_t pid) {
    char path[64], text[512], state;
    unsigned flags;
    snprintf(path, sizeof path, "/proc/%lu/stat", (unsigned long)pid);
    int file = open(path, O_RDONLY);
    if (file < 0)
        return 1;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0)
        return 1;
    text[length] = '\0';
    char *name_end = strrchr(text, ')');
    if (!name_end || sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2)
        fatal("stat");
    return state == 'Z' || state == 'X' || (flags & 4);
}

static void check_nobody(_Atomic uint64_t *cell, const char *what) {
    uint64_t other = atomic_load(cell);
    if (other && other != self && !is_gone(other))
        violation(what, other);
}

static void think(void) {
    for (int turns = (int)(self % 3); turns >= 0; turns--)
        sched_yield();
}

static void increment(int file, int seat) {
    uint64_t value = 0, before = atomic_exchange(&board->holder, self);
    if (before && !is_gone(before))
        violation("entered while another one holds", before);
    for (int i = 0; i < SEATS; i++)
        check_nobody(&board->readers[i], "entered while another one reads");
    if (pread(file, &value, sizeof value, 0) < 0)
        fatal("pread");
    think();
    if (++value >= VALUES)
        fatal("the board is full");
    uint64_t claim = atomic_exchange(&board->writer[value], self * 2);
    if (claim & 1)
        violation("an update was lost", claim / 2);
    else if (claim && !is_gone(claim / 2))
        violation("another one is writing the same value", claim / 2);
    if (pwrite(file, &value, sizeof value, 0) != sizeof value)
        fatal("pwrite");
    atomic_store(&board->writer[value], self * 2 + 1);
    atomic_fetch_add(&board->done[seat], 1);
    uint64_t expected = self;
    if (!atomic_compare_exchange_strong(&board->holder, &expected, 0))
        violation("another one entered meanwhile", expected);
}

static void visit(int seat) {
    atomic_store(&board->readers[seat], self);
    check_nobody(&board->holder, "read while another one holds");
    think();
    check_nobody(&board->holder, "read while another one holds");
    atomic_store(&board->readers[seat], 0);
}

static void locked(int file, int operation) {
    if (flock(file, operation) < 0)
        fatal("flock");
}

int main(int argc, char **argv) {
    if (argc != 6)
        return 2;
    int seat = atoi(argv[3]), reads = atoi(argv[5]);
    uint64_t target = strtoull(argv[4], NULL, 10);
    int shared = open(argv[2], O_RDWR);
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    if (board == MAP_FAILED)
        fatal("board");
    self = (uint64_t)getpid();
    int file = open(argv[1], O_RDWR | O_CLOEXEC);
    if (file < 0)
        fatal(argv[1]);
    while (atomic_load(&board->done[seat]) < target) {
        for (int i = 0; i < reads; i++) {
            locked(file, LOCK_SH);
            visit(seat);
            locked(file, LOCK_UN);
        }
        locked(file, LOCK_EX);
        increment(file, seat);
        locked(file, LOCK_UN);
    }
    return 0;
}
