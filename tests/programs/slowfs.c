/*
 * Preloaded into every process of a host: makes the operations of cluster mode on names in its
 * directory slow at random, before and after they are done, so that those of several hosts meet in
 * ways they hardly ever do on one machine. As on Lustre, renameat2 takes no flags.
 *
 * A file named /dev/shm/stop-before-OPERATION (link, rename) makes the process stop itself
 * before its next such operation, until it is continued.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ONE_IN = 4, MOST_NANOSECONDS = 10000000 };

static void dawdle(const char *name) {
    struct timespec now;
    if (!strstr(name, ".flockshim"))
        return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    unsigned chance = (unsigned)now.tv_nsec ^ (unsigned)gettid();
    if (rand_r(&chance) % ONE_IN)
        return;
    struct timespec pause = {0, rand_r(&chance) % MOST_NANOSECONDS};
    nanosleep(&pause, NULL);
}

static void stop_if_told(const char *operation, const char *name) {
    char gate[64];
    snprintf(gate, sizeof gate, "/dev/shm/stop-before-%s", operation);
    /* Not kill(2), which another thread may take, and this one do its operation all the same. */
    if (strstr(name, ".flockshim") && access(gate, F_OK) == 0)
        raise(SIGSTOP);
}

static int done(long result, const char *name) {
    int error = errno;
    dawdle(name);
    errno = error;
    return (int)result;
}

int renameat2(int from, const char *name, int to, const char *new, unsigned flags) {
    if (flags) {
        errno = EINVAL;
        return -1;
    }
    dawdle(name);
    stop_if_told("rename", name);
    return done(syscall(SYS_renameat2, from, name, to, new, 0), name);
}

int renameat(int from, const char *name, int to, const char *new) {
    return renameat2(from, name, to, new, 0);
}

int linkat(int from, const char *name, int to, const char *new, int flags) {
    dawdle(name);
    stop_if_told("link", name);
    return done(syscall(SYS_linkat, from, name, to, new, flags), name);
}

int unlinkat(int directory, const char *name, int flags) {
    dawdle(name);
    return done(syscall(SYS_unlinkat, directory, name, flags), name);
}
