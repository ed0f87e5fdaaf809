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
#define SLOTS 64

static struct {
    const struct config *config;
    int listener;
    int mark;
    int idle;   /* threads that wait for a notification */
    int blamed; /* the user was told that a program cannot be looked into */
} supervisor;

/* The calls on one file, or on several with the same place: how many there were. A call whose
 * program has gone gives back what it got, but not after another call that may rest on it. */
static struct {
    pthread_mutex_t mutex;
    unsigned turn;
} slots[SLOTS];

struct lock_call {
    const struct notification *notification;
    struct target target;
    struct stat status;
    int operation;
    int may_wait;
    unsigned turn;
};

static int is_gone(void *notification) {
    return ioctl(supervisor.listener, NOTIFY_IS_VALID, &((struct notification *)notification)->id) <
           0;
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

static size_t slot_of(const struct lock_call *call) {
    return (call->status.st_dev ^ call->status.st_ino) % SLOTS;
}

static void take_turn(struct lock_call *call) {
    size_t slot = slot_of(call);

    pthread_mutex_lock(&slots[slot].mutex);
    call->turn = ++slots[slot].turn;
    pthread_mutex_unlock(&slots[slot].mutex);
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

static int unlock_by_kernel(int descriptor) {
    return kernel_has_locked(descriptor) == 1 ? (int)sys2(SYS_flock, descriptor, LOCK_UN) : 0;
}

/* Our duplicate is closed before the program is told, so that nobody finds the description open
 * after the program has closed it. So giving back needs another. */
static void give_back(const struct lock_call *call, int kernel_error) {
    struct client_wait wait = {.timeout = -1, .poll = 1, .cancel = -1};
    size_t slot = slot_of(call);
    struct target target;
    struct stat status;

    pthread_mutex_lock(&slots[slot].mutex);
    if (slots[slot].turn == call->turn) {
        target_open(&target, call->notification->tid, call->target.number);
        if (target.descriptor >= 0) {
            if (fstat(target.descriptor, &status) == 0 && status.st_ino == call->status.st_ino &&
                status.st_dev == call->status.st_dev) {
                wait.pid = target.pid;
                wait.number = target.number;
                if (kernel_error)
                    lock_by_mode(supervisor.config, &wait, target.descriptor, LOCK_UN,
                                 kernel_error);
                else
                    unlock_by_kernel(target.descriptor);
            }
            close(target.descriptor);
        }
    }
    pthread_mutex_unlock(&slots[slot].mutex);
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
                               .context = (void *)call->notification};
    int result = wait_for_lock(call, &wait, kernel_error);

    close(call->target.descriptor);
    if (reply(call, result, 0) == -ENOENT && result == 0 && call->operation != LOCK_UN &&
        !wait.unchanged)
        give_back(call, kernel_error);
}

/* Where the kernel can lock, it does: the real call on the same description. What the description
 * holds already the kernel shall change itself, since only it can do so at the moment when the
 * program learns of it. */
static void ask_kernel(struct lock_call *call) {
    int known = kernel_has_locked(call->target.descriptor);
    int result;

    if (known == 1) {
        close(call->target.descriptor);
        leave_to_kernel(call);
        return;
    }
    result = (int)sys2(SYS_flock, call->target.descriptor, call->operation | LOCK_NB);
    if (config_triggers(supervisor.config, -result)) {
        emulate(call, -result);
        return;
    }
    close(call->target.descriptor);
    if (result == -EWOULDBLOCK && !(call->operation & LOCK_NB))
        leave_to_kernel(call);
    else if (reply(call, result, 0) == -ENOENT && result == 0 && call->operation != LOCK_UN &&
             known == 0)
        give_back(call, 0);
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
    if (is_gone((void *)notification) || fstat(call.target.descriptor, &call.status) < 0) {
        close(call.target.descriptor);
        return;
    }
    take_turn(&call);
    error = lock_without_kernel(supervisor.config, call.target.descriptor, call.operation);
    if (error)
        emulate(&call, error);
    else
        ask_kernel(&call);
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
    for (size_t i = 0; i < SLOTS; i++)
        pthread_mutex_init(&slots[i].mutex, NULL);
    ioctl(listener, NOTIFY_SET_FLAGS, NOTIFY_SYNC_WAKE_UP);
    /* One waits for a notification at any time, so the first call need not start the second. */
    return start_thread() < 0 ? -EAGAIN : start_thread();
}
