/* Supervised calls on files that the kernel may be able to lock.
 *
 * What the kernel does by itself it does exactly: with its own queue, its signals, and no moment at
 * which a lock is had and the program does not know of it. So calls are left to it wherever it is
 * known to lock. Of other files a call is made here first, on the program's own description. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "shared.h"
#include "supervise.h"
#include "syscalls.h"

/* Kinds of files of file systems that may have a server, and whether the kernel has been seen to
 * lock them, by flock(2) and by fcntl(2). Added in front, never removed. */
struct kind {
    dev_t device;
    mode_t type;
    int is_locked, has_records;
    struct kind *next;
};

static struct kind *kinds;

/* The calls that are being made here: one for a file at a time, and none of it is left to the
 * kernel meanwhile. Should its program be gone, a call gives back what it got, and nobody else may
 * have come to rest on that. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left;
    struct lock_call *first;
} here = {.mutex = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static struct kind *find_kind(const struct stat *status) {
    struct kind *kind = __atomic_load_n(&kinds, __ATOMIC_ACQUIRE);

    while (kind && (kind->device != status->st_dev || kind->type != (status->st_mode & S_IFMT)))
        kind = kind->next;
    return kind;
}

static void add_kind(const struct stat *status) {
    struct kind *kind = malloc(sizeof *kind);

    if (!kind)
        return;
    kind->device = status->st_dev;
    kind->type = status->st_mode & S_IFMT;
    kind->is_locked = kind->has_records = 0;
    kind->next = __atomic_load_n(&kinds, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&kinds, &kind->next, kind, 0, __ATOMIC_RELEASE,
                                        __ATOMIC_RELAXED))
        ;
}

int kernel_locks(const struct stat *status) {
    const struct kind *kind = find_kind(status);

    return kind && __atomic_load_n(&kind->is_locked, __ATOMIC_RELAXED);
}

static void learn_that_kernel_locks(const struct stat *status) {
    struct kind *kind = find_kind(status);

    if (kind)
        __atomic_store_n(&kind->is_locked, 1, __ATOMIC_RELAXED);
}

static int is_file_busy(const struct lock_call *call) {
    for (const struct lock_call *other = here.first; other; other = other->next) {
        if (is_same_file(&other->status, &call->status))
            return 1;
    }
    return 0;
}

static void enter(struct lock_call *call) {
    pthread_mutex_lock(&here.mutex);
    while (is_file_busy(call))
        pthread_cond_wait(&here.left, &here.mutex);
    call->next = here.first;
    here.first = call;
    pthread_mutex_unlock(&here.mutex);
}

static void leave(const struct lock_call *call) {
    struct lock_call **place = &here.first;

    pthread_mutex_lock(&here.mutex);
    while (*place != call)
        place = &(*place)->next;
    *place = call->next;
    pthread_cond_broadcast(&here.left);
    pthread_mutex_unlock(&here.mutex);
}

/* What proc(5), fdinfo, shows of a descriptor it looks up at each read, by its number; opening it
 * costs five times as much as reading. */
static __thread struct {
    int of; /* the descriptor */
    int file;
} information = {.of = -1, .file = -1};

void forget_information(void) {
    if (information.of >= 0)
        close(information.file);
    information.of = -1;
}

static int open_information(int descriptor) {
    char path[40];

    if (information.of == descriptor)
        return information.file;
    forget_information();
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", descriptor);
    information.file = open(path, O_RDONLY | O_CLOEXEC);
    if (information.file >= 0)
        information.of = descriptor;
    return information.file;
}

/* Whether the kernel has a flock(2) lock of this description. File systems that ask a server may
 * not show theirs. */
static int has_kernel_lock(int descriptor) {
    char info[2048];
    int file = open_information(descriptor);
    ssize_t got;

    if (file < 0)
        return -errno;
    got = pread(file, info, sizeof info - 1, 0);
    info[got < 0 ? 0 : got] = 0;
    return strstr(info, ": FLOCK ") != NULL;
}

/* Our duplicate is closed before the program is told, so that nobody finds the description open
 * after the program has closed it. So giving back needs another. */
static void give_back(const struct lock_call *call) {
    struct target target;
    struct stat status;

    target_open(&target, call->tid, call->target.number);
    if (target.descriptor < 0)
        return;
    if (fstat(target.descriptor, &status) == 0 && is_same_file(&status, &call->status) &&
        has_kernel_lock(target.descriptor) == 1)
        sys2(SYS_flock, target.descriptor, LOCK_UN);
    close(target.descriptor);
}

static void close_and_leave_to_kernel(const struct lock_call *call) {
    close(call->target.descriptor);
    call_leave_to_kernel(call);
}

/* A description may hold a lock from before there was a supervisor: that the kernel shall change.
 */
static int make_call(const struct lock_call *call) {
    int descriptor = call->target.descriptor;
    int had = has_kernel_lock(descriptor);
    int locks = !(call->request.operation & LOCK_UN);
    int result = had == 1 ? -EWOULDBLOCK
                          : (int)sys2(SYS_flock, descriptor, call->request.operation | LOCK_NB);

    if (config_triggers(supervisor.config, -result))
        return -result;
    if (had == 1 || (locks && (result == 0 || result == -EWOULDBLOCK)))
        learn_that_kernel_locks(&call->status);
    if (result == -EWOULDBLOCK) {
        close_and_leave_to_kernel(call);
        return 0;
    }
    close(descriptor);
    if (call_reply(call, result) == -ENOENT && result == 0 && locks && had == 0)
        give_back(call);
    return 0;
}

int ask_kernel(struct lock_call *call) {
    int error = 0;

    /* Of a file system that has a server that is asked once only, since the server is, statfs(2). A
     * local one is asked each time: once unmounted, its device number may be another's at once. */
    if (!find_kind(&call->status)) {
        if (is_of_one_host(call->target.descriptor)) {
            close_and_leave_to_kernel(call);
            return 0;
        }
        add_kind(&call->status);
    }
    enter(call);
    if (kernel_locks(&call->status))
        close_and_leave_to_kernel(call);
    else if (call_is_gone(call))
        close(call->target.descriptor);
    else
        error = make_call(call);
    leave(call);
    return error;
}

/* Asking who is in the way fails as locking would, and changes nothing. */
static int test_records(const struct lock_call *call) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    return (int)-sys3(SYS_fcntl, call->target.descriptor, F_GETLK, &lock);
}

int ask_kernel_about_records(struct lock_call *call) {
    struct kind *kind = find_kind(&call->status);
    int error = 0;

    if (!kind && !is_of_one_host(call->target.descriptor)) {
        add_kind(&call->status);
        kind = find_kind(&call->status);
    }
    if (kind && !__atomic_load_n(&kind->has_records, __ATOMIC_RELAXED))
        error = test_records(call);
    if (config_triggers(supervisor.config, error))
        return error;
    if (kind && !error)
        __atomic_store_n(&kind->has_records, 1, __ATOMIC_RELAXED);
    close_and_leave_to_kernel(call);
    return 0;
}
