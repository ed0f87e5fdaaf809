#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "target.h"

/* Newer than the headers that we build on. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
#endif

/* Which process a thread is of costs more to read than all the rest. tgkill(2) tells whether what
 * is remembered still holds. */
#define REMEMBERED 64
static uint64_t remembered[REMEMBERED];

static pid_t read_process_of(pid_t tid) {
    char path[40], status[1024];
    const char *line;
    ssize_t got;
    int file;

    snprintf(path, sizeof path, "/proc/%d/status", tid);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    got = read(file, status, sizeof status - 1);
    close(file);
    status[got < 0 ? 0 : got] = 0;
    line = strstr(status, "\nTgid:");
    return line ? (pid_t)strtol(line + 6, NULL, 10) : -1;
}

static pid_t process_of(pid_t tid) {
    uint64_t *place = &remembered[tid % REMEMBERED];
    uint64_t entry = __atomic_load_n(place, __ATOMIC_RELAXED);
    pid_t pid = (pid_t)(entry >> 32);

    if ((pid_t)(entry & 0xffffffff) == tid && syscall(SYS_tgkill, pid, tid, 0) == 0)
        return pid;
    pid = read_process_of(tid);
    if (pid > 0)
        __atomic_store_n(place, (uint64_t)pid << 32 | (uint32_t)tid, __ATOMIC_RELAXED);
    return pid;
}

static int stat_descriptor(pid_t pid, int number, struct stat *status) {
    char path[64];

    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, number);
    return stat(path, status);
}

/* Threads may have tables of descriptors of their own: unshare(2), CLONE_FILES. Where kcmp(2) is
 * forbidden it must do that the number is of the same file in both. */
static int has_table_of(pid_t tid, pid_t pid, int number) {
    long order = syscall(SYS_kcmp, tid, pid, KCMP_FILES, 0, 0);
    struct stat one, other;

    if (order >= 0)
        return order == 0;
    return stat_descriptor(tid, number, &one) == 0 && stat_descriptor(pid, number, &other) == 0 &&
           one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

/* Of the thread that this thread has served last: most call again and again. Unlike a number it
 * never becomes another's. */
static __thread struct {
    pid_t tid, pid;
    int handle;
} kept;

void target_forget(void) {
    if (kept.tid)
        close(kept.handle);
    kept.tid = 0;
}

static int keep(pid_t tid, pid_t pid, int handle) {
    kept.tid = tid;
    kept.pid = pid;
    kept.handle = handle;
    return handle;
}

static int open_handle(struct target *target, pid_t tid, int number) {
    int handle = (int)syscall(SYS_pidfd_open, tid, 0);

    if (handle >= 0) {
        target->pid = tid;
        return keep(tid, tid, handle);
    }
    if (errno == ESRCH || errno == ENOSYS || errno == EPERM || errno == EMFILE || errno == ENFILE)
        return -errno;
    target->pid = process_of(tid);
    if (target->pid < 0)
        return -ESRCH;
    handle = (int)syscall(SYS_pidfd_open, tid, PIDFD_THREAD);
    if (handle >= 0)
        return keep(tid, target->pid, handle);
    if (errno != EINVAL)
        return -errno;
    if (!has_table_of(tid, target->pid, number))
        return -ENOTSUP;
    handle = (int)syscall(SYS_pidfd_open, target->pid, 0);
    return handle < 0 ? -errno : handle;
}

static int duplicate(int handle, int number) {
    int descriptor = (int)syscall(SYS_pidfd_getfd, handle, number, 0);

    return descriptor < 0 ? -errno : descriptor;
}

void target_open(struct target *target, pid_t tid, int number) {
    int handle;

    target->number = number;
    if (kept.tid == tid) {
        target->pid = kept.pid;
        target->descriptor = duplicate(kept.handle, number);
        if (target->descriptor != -ESRCH)
            return;
    }
    target_forget();
    handle = open_handle(target, tid, number);
    target->descriptor = handle < 0 ? handle : duplicate(handle, number);
    if (handle >= 0 && !kept.tid)
        close(handle);
}
