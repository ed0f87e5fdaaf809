/* Answers the lock calls that a filter reports, seccomp_unotify(2): one thread for each call that
 * is under way, so that waiting for a lock is the shim's own client doing just what it does in a
 * program. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "lock.h"
#include "native.h"
#include "rendezvous.h"
#include "report.h"
#include "supervise.h"

#define STACK_SIZE (256 * 1024)
#define MAX_IDLE 4
#define MAX_BUSY 64 /* threads that look at calls, which a hanging file system may make hang */
#define SPIN_NANOSECONDS 20000

struct supervisor supervisor;

int call_is_gone(const struct lock_call *call) {
    int result;

    do
        result = ioctl(supervisor.listener, NOTIFY_IS_VALID, &call->id);
    while (result < 0 && errno == EINTR);
    return result < 0;
}

static int reply(const struct lock_call *call, int result, unsigned flags) {
    struct notification_reply reply = {.id = call->id,
                                       .value = result < 0 ? 0 : result,
                                       .error = result < 0 ? result : 0,
                                       .flags = flags};

    int sent;

    do
        sent = ioctl(supervisor.listener, NOTIFY_REPLY, &reply);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

int call_reply(const struct lock_call *call, int result) {
    return reply(call, result, 0);
}

void call_leave_to_kernel(const struct lock_call *call) {
    reply(call, 0, NOTIFY_CONTINUE);
}

int is_same_file(const struct stat *one, const struct stat *other) {
    return one->st_ino == other->st_ino && one->st_dev == other->st_dev;
}

/* The kernel may refuse it: an error, but no lock that is none. */
static void fail_to_open(const struct lock_call *call) {
    const struct config *config = supervisor.config;
    int error = -call->target.descriptor;
    char line[256];

    if (call_is_gone(call))
        return;
    if (error == EBADF) {
        call_leave_to_kernel(call);
        return;
    }
    if (error != ESRCH && !config->quiet &&
        !__atomic_exchange_n(&supervisor.blamed, 1, __ATOMIC_RELAXED)) {
        snprintf(line, sizeof line,
                 "flockshim: cannot look into process %d (%s): its lock calls are not covered\n",
                 (int)call->tid, strerror(error));
        if (write(2, line, strlen(line)) < 0)
            return;
    }
    if (config->simulate || config->force)
        call_reply(call, -(config->simulate ? config->simulate : CONFIG_FORCED_ERROR));
    else
        call_leave_to_kernel(call);
}

/* Only root's supervisor may look into programs of others: setpriv(1), gosu. Their locks belong to
 * the keepers of those. */
static int is_of_another_user(const struct lock_call *call) {
    char path[40];
    struct stat status;

    if (geteuid() != 0 || supervisor.config->mode == MODE_SUCCESS ||
        supervisor.config->mode == MODE_FAIL)
        return 0;
    snprintf(path, sizeof path, "/proc/%d", (int)call->tid);
    return stat(path, &status) == 0 && status.st_uid != 0;
}

static void refuse_other_user(const struct lock_call *call, int error) {
    report(
        supervisor.config, call->target.descriptor,
        "the program runs as another user; start flockshim as that user, behind what changes it");
    close(call->target.descriptor);
    call_reply(call, -error);
}

/* A keeper that was started behind the filter has its files in the rendezvous directory, and what
 * it locks there must be locked by the kernel: --force and --simulate are not for them. */
static int is_keepers_own(const struct lock_call *call) {
    const struct config *config = supervisor.config;
    struct rendezvous rendezvous;
    struct stat one, other;
    char path[CONFIG_MAX_PATH];
    char *name;

    if ((!config->force && !config->simulate) || rendezvous_find(config, &rendezvous) < 0)
        return 0;
    path_of_descriptor(call->target.descriptor, path, sizeof path);
    name = strrchr(path, '/');
    if (!name)
        return 0;
    *name = 0;
    return stat(path, &one) == 0 && stat(rendezvous.directory, &other) == 0 &&
           is_same_file(&one, &other);
}

static int is_lock_operation(int operation) {
    int plain = operation & ~LOCK_NB;

    return plain == LOCK_SH || plain == LOCK_EX || plain == LOCK_UN;
}

static void look_into(struct lock_call *call, const struct seccomp_data *data) {
    const int is_record = is_record_call(data);
    int error;

    target_open(&call->target, call->tid, (int)data->args[0]);
    if (call->target.descriptor < 0) {
        fail_to_open(call);
        return;
    }
    /* From here on the file system may make us wait. */
    have_another_listen();
    error = is_record ? read_record_call(call, data) : 0;
    /* Only now is it sure whose descriptor that is. */
    if (call_is_gone(call) || (!error && is_taken_up_again(call))) {
        close(call->target.descriptor);
        return;
    }
    if (error || fstat(call->target.descriptor, &call->status) < 0 || is_keepers_own(call)) {
        close(call->target.descriptor);
        call_leave_to_kernel(call);
        return;
    }
    error = lock_without_kernel(supervisor.config, call->target.descriptor, &call->request);
    if (!error)
        error = is_record ? ask_kernel_about_records(call) : ask_kernel(call);
    if (error && is_of_another_user(call))
        refuse_other_user(call, error);
    else if (error)
        emulate_call(call, error);
}

static void answer(struct lock_call *call, const struct seccomp_data *data) {
    const int operation = (int)data->args[1];

    call->request = (struct client_request){.family = FAMILY_FLOCK, .operation = operation};
    if (is_record_call(data))
        look_into(call, data);
    else if ((int)data->args[0] == PING_DESCRIPTOR && operation == PING_OPERATION)
        call_reply(call, supervisor.mark);
    else if (is_lock_operation(operation))
        look_into(call, data);
    else
        call_leave_to_kernel(call);
}

static int poll_listener(short events) {
    struct pollfd event = {.fd = supervisor.listener, .events = events};

    return poll(&event, 1, 0) == 1;
}

static int64_t now_in_nanoseconds(void) {
    struct timespec now = {0};

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Who has locked mostly unlocks soon, and being woken takes longer (a fifth of an emulated lock and
 * unlock as measured). Yielding lets the program run where there is but one processor. */
static void await_next_call(void) {
    int64_t end = now_in_nanoseconds() + SPIN_NANOSECONDS;

    do
        sched_yield();
    while (!poll_listener(POLLIN) && now_in_nanoseconds() < end);
}

/* 0 where there are no programs any more. */
static int receive(union notification_buffer *buffer) {
    for (;;) {
        memset(buffer, 0, sizeof *buffer);
        if (ioctl(supervisor.listener, NOTIFY_RECEIVE, buffer) == 0)
            return 1;
        /* A call has ended by a signal before we could read of it; or all programs have. */
        if (errno == ENOENT ? poll_listener(0) : errno != EINTR)
            return 0;
    }
}

/* Counts this thread among those that listen, unless there are enough. */
static int is_needed(void) {
    int idle = __atomic_load_n(&supervisor.idle, __ATOMIC_SEQ_CST);

    do {
        if (idle >= MAX_IDLE)
            return 0;
    } while (!__atomic_compare_exchange_n(&supervisor.idle, &idle, idle + 1, 0, __ATOMIC_SEQ_CST,
                                          __ATOMIC_SEQ_CST));
    return 1;
}

static void *serve(void *unused) {
    union notification_buffer buffer;
    int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    while (receive(&buffer)) {
        struct lock_call call = {
            .id = buffer.notification.id, .tid = (pid_t)buffer.notification.tid, .wake = wake};

        __atomic_sub_fetch(&supervisor.idle, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&supervisor.busy, 1, __ATOMIC_SEQ_CST);
        answer(&call, &buffer.notification.call);
        __atomic_sub_fetch(&supervisor.busy, 1, __ATOMIC_SEQ_CST);
        if (!is_needed())
            break;
        await_next_call();
    }
    forget_information();
    target_forget();
    if (wake >= 0)
        close(wake);
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

int have_another_listen(void) {
    if (__atomic_load_n(&supervisor.idle, __ATOMIC_SEQ_CST) > 0)
        return 1;
    return __atomic_load_n(&supervisor.busy, __ATOMIC_SEQ_CST) <= MAX_BUSY && start_thread() == 0;
}

void begin_to_wait(void) {
    __atomic_sub_fetch(&supervisor.busy, 1, __ATOMIC_SEQ_CST);
}

void end_to_wait(void) {
    __atomic_add_fetch(&supervisor.busy, 1, __ATOMIC_SEQ_CST);
}

int native_supervise(const struct config *config, int listener, int mark) {
    supervisor.config = config;
    supervisor.listener = listener;
    supervisor.mark = mark;
    supervised_wait_init();
    ioctl(listener, NOTIFY_SET_FLAGS, NOTIFY_SYNC_WAKE_UP);
    /* One waits for a notification at any time, so the first call need not start the second. */
    return start_thread() < 0 ? -EAGAIN : start_thread();
}
