/* fcntl(2) and lockf(3), of which only the commands for record locks are ours. Everything else is
 * handed on as it came. */
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lock.h"
#include "next.h"
#include "record.h"
#include "report.h"
#include "syscalls.h"

/* By these names whatever headers make of the usual ones, and not as builtins. */
#define EXPORTED_AS(name) __asm__(name) __attribute__((visibility("default")))

extern int our_fcntl(int descriptor, int command, ...) EXPORTED_AS("fcntl");
extern int our_fcntl64(int descriptor, int command, ...) EXPORTED_AS("fcntl64");
extern int our_lockf(int descriptor, int command, off_t length) EXPORTED_AS("lockf");
extern int our_lockf64(int descriptor, int command, off_t length) EXPORTED_AS("lockf64");

/* What pthread_cleanup_push(3) has been in C libraries for as long as they are here. */
struct cleanup_buffer {
    void *opaque[8];
};
extern void _pthread_cleanup_push(struct cleanup_buffer *buffer, void (*routine)(void *),
                                  void *argument) __attribute__((weak));
extern void _pthread_cleanup_pop(struct cleanup_buffer *buffer, int execute) __attribute__((weak));

typedef int fcntl_function(int descriptor, int command, ...);

/* Of the C library, where some are cancellation points: pthreads(7). */
static int call_next(enum next which, int descriptor, int command, void *argument) {
    fcntl_function *next = (fcntl_function *)next_function(which);
    long result;

    if (!next)
        next = (fcntl_function *)next_function(NEXT_FCNTL);
    if (next)
        return next(descriptor, command, argument);
    result = sys3(SYS_fcntl, descriptor, command, argument);
    if (result < 0)
        errno = (int)-result;
    return result < 0 ? -1 : (int)result;
}

/* The program may have given an address that is none, or cannot be written: what the kernel can
 * find out without harm. 0, or -errno. */
static long transfer(long call, struct flock *ours, const struct flock *its) {
    struct iovec here = {.iov_base = ours, .iov_len = sizeof *ours};
    struct iovec there = {.iov_base = (void *)its, .iov_len = sizeof *its};
    long done = sys6(call, sys0(SYS_getpid), SYS_ARG(&here), 1, SYS_ARG(&there), 1, 0);

    return done < 0 ? done : 0;
}

/* These calls may be forbidden, in containers. */
static int copy_in(struct flock *ours, const struct flock *its) {
    long result = transfer(SYS_process_vm_readv, ours, its);

    if (result < 0 && result != -EFAULT)
        *ours = *its;
    return result == -EFAULT ? -EFAULT : 0;
}

static int copy_out(struct flock *its, struct flock *ours) {
    long result = transfer(SYS_process_vm_writev, ours, its);

    if (result < 0 && result != -EFAULT)
        *its = *ours;
    return result == -EFAULT ? -EFAULT : 0;
}

/* The errno that stands in for the kernel's, or 0: ask the kernel. */
static int without_kernel(const struct config *config, int descriptor, int command,
                          const struct flock *given) {
    struct client_request request;
    struct flock lock;

    if ((!config->force && !config->simulate) || copy_in(&lock, given) < 0 ||
        record_request(descriptor, command, &lock, &request) < 0)
        return 0;
    return lock_without_kernel(config, descriptor, &request);
}

/* F_SETLKW is a cancellation point, so it must wait in one; and a thread that is cancelled there
 * must leave no socket behind. Both pthreads(7) and these two are the same in glibc and musl. */
static void close_socket(void *socket) {
    sys1(SYS_close, *(int *)socket);
}

static long receive_cancellably(int socket, void *buffer, unsigned long size) {
    long (*next)(int, void *, unsigned long, int) =
        (long (*)(int, void *, unsigned long, int))next_function(NEXT_RECV);
    struct cleanup_buffer cleanup;
    long got;

    _pthread_cleanup_push(&cleanup, close_socket, &socket);
    got = next(socket, buffer, size, 0);
    _pthread_cleanup_pop(&cleanup, 0);
    return got < 0 ? -errno : got;
}

static int can_be_cancelled(int command) {
    return (command == F_SETLKW || command == F_OFD_SETLKW) && &_pthread_cleanup_push &&
           &_pthread_cleanup_pop && next_function(NEXT_RECV);
}

/* 0 or -errno. */
__attribute__((noinline)) static int emulate(const struct config *config, int descriptor,
                                             int command, struct flock *its, int kernel_error) {
    struct client_wait wait = {.timeout = config->timeout, .cancel = -1};
    struct flock lock = *its;
    struct client_request request;
    int result = record_request(descriptor, command, &lock, &request);

    if (can_be_cancelled(command))
        wait.receive = receive_cancellably;
    if (result == 0)
        result = lock_by_mode(config, &wait, descriptor, &request, kernel_error);
    if (result == 0 && request.operation & LOCK_TEST) {
        record_answer(&wait, &lock);
        result = copy_out(its, &lock);
    }
    if (wait.timed_out)
        report_timeout(config, descriptor, wait.refusal);
    else if (*wait.refusal)
        report(config, descriptor, wait.refusal);
    return result;
}

static int finish(int result) {
    if (result < 0)
        errno = -result;
    return result < 0 ? -1 : 0;
}

static int lock_record(enum next which, int descriptor, int command, struct flock *lock) {
    const struct config *config = config_get();
    int before = errno;
    int error = without_kernel(config, descriptor, command, lock);

    if (!error) {
        int result = call_next(which, descriptor, command, lock);

        if (result != -1 || !config_triggers(config, errno))
            return result;
        error = errno;
    }
    error = emulate(config, descriptor, command, lock, error);
    errno = before;
    return finish(error);
}

static int call(enum next which, int descriptor, int command, void *argument) {
    if (record_is_command(command))
        return lock_record(which, descriptor, command, argument);
    return call_next(which, descriptor, command, argument);
}

/* Where no argument was given, what is handed on is not looked at: the C libraries do the same. */
int our_fcntl(int descriptor, int command, ...) {
    va_list arguments;
    void *argument;

    va_start(arguments, command);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    return call(NEXT_FCNTL, descriptor, command, argument);
}

int our_fcntl64(int descriptor, int command, ...) {
    va_list arguments;
    void *argument;

    va_start(arguments, command);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    return call(NEXT_FCNTL64, descriptor, command, argument);
}

/* lockf(3) asks the kernel by another way than the fcntl that we have replaced. That a read lock is
 * asked about, F_TEST, is how both C libraries do it. */
static int lock_section(int descriptor, int command, off_t length) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_CUR, .l_len = length};

    switch (command) {
    case F_LOCK:
        return lock_record(NEXT_FCNTL, descriptor, F_SETLKW, &lock);
    case F_TLOCK:
        return lock_record(NEXT_FCNTL, descriptor, F_SETLK, &lock);
    case F_ULOCK:
        lock.l_type = F_UNLCK;
        return lock_record(NEXT_FCNTL, descriptor, F_SETLK, &lock);
    case F_TEST:
        lock.l_type = F_RDLCK;
        if (lock_record(NEXT_FCNTL, descriptor, F_GETLK, &lock) < 0)
            return -1;
        return lock.l_type == F_UNLCK || lock.l_pid == sys0(SYS_getpid) ? 0 : finish(-EACCES);
    default:
        return finish(-EINVAL);
    }
}

int our_lockf(int descriptor, int command, off_t length) {
    return lock_section(descriptor, command, length);
}

int our_lockf64(int descriptor, int command, off_t length) {
    return lock_section(descriptor, command, length);
}
