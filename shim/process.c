/* Thin wrappers of system calls that Python 3.9 has no name for. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

int native_clone_sharing_descriptors(void) {
    long pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);

    return pid < 0 ? -errno : (int)pid;
}

int native_self(void) {
    return (int)syscall(SYS_getpid);
}

int native_die_with_parent(int signal) {
    return prctl(PR_SET_PDEATHSIG, signal) < 0 ? -errno : 0;
}

int native_pidfd_open(int pid) {
    long descriptor = syscall(SYS_pidfd_open, pid, 0);

    return descriptor < 0 ? -errno : (int)descriptor;
}

int native_pidfd_getfd(int pid, int number) {
    int handle = native_pidfd_open(pid);
    long descriptor;

    if (handle < 0)
        return handle;
    descriptor = syscall(SYS_pidfd_getfd, handle, number, 0);
    if (descriptor < 0)
        descriptor = -errno;
    close(handle);
    return (int)descriptor;
}

int native_become_subreaper(void) {
    return prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0 ? -errno : 0;
}

int native_inotify_init(void) {
    int inotify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);

    return inotify < 0 ? -errno : inotify;
}

int native_inotify_add_watch(int inotify, const char *path, uint32_t mask) {
    int watch = inotify_add_watch(inotify, path, mask);

    return watch < 0 ? -errno : watch;
}

int native_inotify_rm_watch(int inotify, int watch) {
    return inotify_rm_watch(inotify, watch) < 0 ? -errno : 0;
}

void native_close(int descriptor) {
    close(descriptor);
}
