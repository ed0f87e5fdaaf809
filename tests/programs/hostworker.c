/*
 * Locks a file that holds a counter, again and again, exclusively to increment it or shared to look
 * at it, and writes down each thing it does, before it does it, so that a checker can tell from the
 * logs of all processes of all hosts whether two were inside at once.
 *
 *     hostworker FILE LOG STOP READERS PAUSE
 *
 * READERS percent of the visits are shared. In each and after it are pauses of up to PAUSE
 * nanoseconds. It ends when the file STOP is there. A line of the log is a word, the time
 * (CLOCK_MONOTONIC, which all namespaces of a machine share) and a value; see
 * tests/support/intervals.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

static int log_file;
static unsigned chance;
static int longest_pause;

/* One write(2) a line: a process that is killed leaves no half of one. */
static void note(const char *word, uint64_t value) {
    struct timespec now;
    char line[80];
    clock_gettime(CLOCK_MONOTONIC, &now);
    int length = snprintf(line, sizeof line, "%s %lld%09ld %llu\n", word, (long long)now.tv_sec,
                          now.tv_nsec, (unsigned long long)value);
    if (write(log_file, line, (size_t)length) != length)
        _exit(98);
}

static void fail(const char *what) {
    note(what, (uint64_t)errno);
    exit(1);
}

static void think(void) {
    struct timespec pause = {0, longest_pause ? rand_r(&chance) % longest_pause : 0};
    if (longest_pause)
        nanosleep(&pause, NULL);
}

static uint64_t look(int file) {
    uint64_t value = 0;
    if (pread(file, &value, sizeof value, 0) < 0)
        fail("pread");
    return value;
}

static void visit(int file, int exclusive) {
    note("ask", 0);
    while (flock(file, exclusive ? LOCK_EX : LOCK_SH) < 0)
        if (errno != EINTR)
            fail("flock");
    note(exclusive ? "exclusive" : "shared", 0);
    uint64_t value = look(file);
    note("read", value);
    think();
    if (exclusive) {
        value++;
        note("write", value);
        if (pwrite(file, &value, sizeof value, 0) != sizeof value)
            fail("pwrite");
        think();
    }
    note("end", look(file));
    if (flock(file, LOCK_UN) < 0)
        fail("unlock");
}

int main(int argc, char **argv) {
    if (argc != 6)
        return 2;
    longest_pause = atoi(argv[5]);
    log_file = open(argv[2], O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    chance = (unsigned)now.tv_nsec;
    int file = -1, readers = atoi(argv[4]);
    while (access(argv[3], F_OK) != 0) {
        if (file >= 0 && rand_r(&chance) % 2 == 0) {
            close(file);
            file = -1;
        }
        if (file < 0)
            file = open(argv[1], O_RDWR | O_CLOEXEC);
        if (file < 0)
            fail("open");
        visit(file, (int)(rand_r(&chance) % 100) >= readers);
        think();
    }
    note("done", 0);
    return 0;
}
