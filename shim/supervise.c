/* Answers the lock calls that a filter reports, seccomp_unotify(2): one thread for each call that
 * is under way, so that waiting for a lock is the shim's own client doing just what it does in a
 * program. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "native.h"
#include "notify.h"
#include "report.h"
#include "syscalls.h"
#include "target.h"

#define STACK_SIZE (256 * 1024)
#define MAX_IDLE 4

static struct {
    const struct config *config;
    int listener;
    int mark;
    int idle;   /* threads that wait for a notification */
    int blamed; /* the user was told that a program cannot be looked into */
} supervisor;

struct lock_call {
    const struct notification *notification;
    struct target target;
    struct stat status;
    int operation;
    int may_wait;
    int delivered;
    struct lock_call *next; /* in `at_kernel` */
};

/* The calls for which the kernel is being asked: one for a file at a time. Should its program be
 * gone, a call gives back what it got before anybody else can have been misled by it. */
static struct {
    pthread_mutex_t mutex;
    pthread_cond_t left;
    struct lock_call *first;
} at_kernel = {.mutex = PTHREAD_MUTEX_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static int is_gone(void *lock_call) {
    const struct lock_call *call = lock_call;

    return ioctl(supervisor.listener, NOTIFY_IS_VALID, &call->notification->id) < 0;
}

/* 0, or -ENOENT where the call has ended by a signal. */
static int reply(const struct lock_call *call, int result, unsigned flags) {
    struct notification_reply reply = {.id = call->notification->id,
                                       .value = result < 0 ? 0 : result,
                                       .error = result < 0 ? result : 0,
                                       .flags = flags};

    return ioctl(supervisor.listener, NOTIFY_REPLY, &reply) < 0 ? -errno : 0;
}

static void leave_to_kernel(const struct lock_call *call) {
    reply(call, 0, NOTIFY_CONTINUE);
}

static int is_same_file(const struct stat *one, const struct stat *other) {
    return one->st_ino == other->st_ino && one->st_dev == other->st_dev;
}

static int is_file_busy(const struct lock_call *call) {
    for (const struct lock_call *other = at_kernel.first; other; other = other->next) {
        if (is_same_file(&other->status, &call->status))
            return 1;
    }
    return 0;
}

static void enter_kernel(struct lock_call *call) {
    pthread_mutex_lock(&at_kernel.mutex);
    while (is_file_busy(call))
        pthread_cond_wait(&at_kernel.left, &at_kernel.mutex);
    call->next = at_kernel.first;
    at_kernel.first = call;
    pthread_mutex_unlock(&at_kernel.mutex);
}

static void leave_kernel(const struct lock_call *call) {
    struct lock_call **place = &at_kernel.first;

    pthread_mutex_lock(&at_kernel.mutex);
    while (*place != call)
        place = &(*place)->next;
    *place = call->next;
    pthread_cond_broadcast(&at_kernel.left);
    pthread_mutex_unlock(&at_kernel.mutex);
}

/* Whether the kernel has a flock(2) lock of this description: proc(5), fdinfo. File systems that
 * ask a server may not show theirs. */
static int kernel_has_locked(int descriptor) {
    char path[40], info[2048];
    ssize_t got;
    int file;

    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", descriptor);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -errno;
    got = read(file, info, sizeof info - 1);
    close(file);
    info[got < 0 ? 0 : got] = 0;
    return strstr(info, ": FLOCK ") != NULL;
}

/* Our duplicate is closed before the program is told, so that nobody finds the description open
 * after the program has closed it. So giving back needs another. */
static void give_back(const struct lock_call *call) {
    struct target target;
    struct stat status;

    target_open(&target, (pid_t)call->notification->tid, call->target.number);
    if (target.descriptor < 0)
        return;
    if (fstat(target.descriptor, &status) == 0 && is_same_file(&status, &call->status) &&
        kernel_has_locked(target.descriptor) == 1)
        sys2(SYS_flock, target.descriptor, LOCK_UN);
    close(target.descriptor);
}

/* Where the kernel can lock, it does: the real call on the same description. What the description
 * holds already the kernel shall change itself, since only it can do so at the moment when the
 * program learns of it. Returns the errno that means that it cannot lock, or 0: answered. */
static int ask_kernel(const struct lock_call *call) {
    int known = kernel_has_locked(call->target.descriptor);
    int result;

    if (known == 1) {
        close(call->target.descriptor);
        leave_to_kernel(call);
        return 0;
    }
    result = (int)sys2(SYS_flock, call->target.descriptor, call->operation | LOCK_NB);
    if (config_triggers(supervisor.config, -result))
        return -result;
    close(call->target.descriptor);
    if (result == -EWOULDBLOCK && !(call->operation & LOCK_NB))
        leave_to_kernel(call);
    else if (reply(call, result, 0) == -ENOENT && result == 0 && call->operation != LOCK_UN &&
             known == 0)
        give_back(call);
    return 0;
}

static int ask_kernel_alone(struct lock_call *call) {
    int error = 0;

    enter_kernel(call);
    if (is_gone(call))
        close(call->target.descriptor);
    else
        error = ask_kernel(call);
    leave_kernel(call);
    return error;
}

static int deliver(void *lock_call) {
    struct lock_call *call = lock_call;

    close(call->target.descriptor);
    call->delivered = 1;
    return reply(call, 0, 0);
}

static int wait_for_lock(const struct lock_call *call, struct client_wait *wait, int kernel_error) {
    const struct config *config = supervisor.config;
    int operation = call->operation | (call->may_wait ? 0 : LOCK_NB);
    int result = lock_by_mode(config, wait, call->target.descriptor, operation, kernel_error);

    if (wait->timed_out) {
        report_timeout(config, call->target.descriptor, wait->refusal);
    } else if (*wait->refusal) {
        report(config, call->target.descriptor, wait->refusal);
    } else if (result == -EWOULDBLOCK && !(call->operation & LOCK_NB)) {
        report(config, call->target.descriptor,
               "no thread can be started for waiting; raise the limit (ulimit -u)");
        return -kernel_error;
    }
    return result;
}

static void emulate(struct lock_call *call, int kernel_error) {
    struct client_wait wait = {.timeout = supervisor.config->timeout,
                               .poll = 1,
                               .cancel = -1,
                               .pid = call->target.pid,
                               .number = call->target.number,
                               .gone = is_gone,
                               .deliver = deliver,
                               .call = call};
    int result = wait_for_lock(call, &wait, kernel_error);

    if (!call->delivered) {
        close(call->target.descriptor);
        reply(call, result, 0);
    }
}

/* Its call is left to the kernel, which may refuse it: an error, but no lock that is none. */
static void fail_to_open(const struct lock_call *call) {
    const struct config *config = supervisor.config;
    int error = -call->target.descriptor;
    char line[256];

    if (error != EBADF && error != ESRCH && !config->quiet &&
        !__atomic_exchange_n(&supervisor.blamed, 1, __ATOMIC_RELAXED)) {
        snprintf(line, sizeof line,
                 "flockshim: cannot look into process %d (%s): its lock calls are not covered\n",
                 (int)call->notification->tid, strerror(error));
        if (write(2, line, strlen(line)) < 0)
            return;
    }
    if (config->simulate || config->force)
        reply(call, -(config->simulate ? config->simulate : CONFIG_FORCED_ERROR), 0);
    else
        leave_to_kernel(call);
}

static int is_lock_operation(int operation) {
    int plain = operation & ~LOCK_NB;

    return plain == LOCK_SH || plain == LOCK_EX || plain == LOCK_UN;
}

static void answer(const struct notification *notification, int may_wait) {
    struct lock_call call = {.notification = notification,
                             .operation = (int)notification->call.args[1],
                             .may_wait = may_wait};
    int number = (int)notification->call.args[0];
    int error;

    if (number == PING_DESCRIPTOR && call.operation == PING_OPERATION) {
        reply(&call, supervisor.mark, 0);
        return;
    }
    if (!is_lock_operation(call.operation)) {
        leave_to_kernel(&call);
        return;
    }
    target_open(&call.target, (pid_t)notification->tid, number);
    if (call.target.descriptor < 0) {
        fail_to_open(&call);
        return;
    }
    /* Only now is it sure whose descriptor that is. */
    if (is_gone(&call) || fstat(call.target.descriptor, &call.status) < 0) {
        close(call.target.descriptor);
        return;
    }
    error = lock_without_kernel(supervisor.config, call.target.descriptor, call.operation);
    if (!error)
        error = ask_kernel_alone(&call);
    if (error)
        emulate(&call, error);
}

static int has_hung_up(void) {
    struct pollfd event = {.fd = supervisor.listener};

    return poll(&event, 1, 0) == 1;
}

static int start_thread(void);

static void *serve(void *unused) {
    union notification_buffer buffer;

    do {
        int may_wait = 1;

        memset(&buffer, 0, sizeof buffer);
        while (ioctl(supervisor.listener, NOTIFY_RECEIVE, &buffer) < 0) {
            /* A call has ended by a signal before we could read of it; or all programs have. */
            if (errno == ENOENT ? has_hung_up() : errno != EINTR)
                return unused;
        }
        if (__atomic_sub_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST) == 0)
            may_wait = start_thread() == 0;
        answer(&buffer.notification, may_wait);
    } while (__atomic_add_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST) <= MAX_IDLE);
    __atomic_sub_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST);
    return unused;
}

static int start_thread(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    int error;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    __atomic_add_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST);
    error = pthread_create(&thread, &attributes, serve, NULL);
    if (error)
        __atomic_sub_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST);
    pthread_attr_destroy(&attributes);
    return -error;
}

int native_supervise(const struct config *config, int listener, int mark) {
    supervisor.config = config;
    supervisor.listener = listener;
    supervisor.mark = mark;
    ioctl(listener, NOTIFY_SET_FLAGS, NOTIFY_SYNC_WAKE_UP);
    /* One waits for a notification at any time, so the first call need not start the second. */
    return start_thread() < 0 ? -EAGAIN : start_thread();
}
