/*
 * Runs a command, in its own place, whose system calls fail as in a container or on an old kernel:
 *
 *     confine EPERM:kcmp,pidfd_getfd ENOSYS:statx -- COMMAND ARG…
 *
 * by a filter of seccomp(2), which all that the command starts inherit: the keeper too. A call that
 * these headers have no number for fails on this system anyway, and is passed over. NOTIFY in place
 * of an errno has calls reported to a listener, as some containers do; nobody answers them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CALL(name)                                                                                 \
    { #name, SYS_##name }

struct named {
    const char *name;
    int number;
};

/* What happens to a call: seccomp(2). */
static const struct named answers[] = {
    {"0", SECCOMP_RET_ERRNO},
    {"EPERM", SECCOMP_RET_ERRNO | EPERM},
    {"ENOSYS", SECCOMP_RET_ERRNO | ENOSYS},
    {"EMFILE", SECCOMP_RET_ERRNO | EMFILE},
    {"ENOMEM", SECCOMP_RET_ERRNO | ENOMEM},
    {"NOTIFY", 0x7fc00000},
};

static const struct named calls[] = {
    CALL(kcmp),
    CALL(flock),
    CALL(acct),
    CALL(inotify_init1),
    CALL(inotify_add_watch),
    CALL(memfd_create),
    CALL(getrandom),
    CALL(membarrier),
    CALL(copy_file_range),
    CALL(statx),
    CALL(preadv2),
    CALL(pwritev2),
    CALL(rseq),
    CALL(pidfd_send_signal),
#ifdef SYS_pidfd_open
    CALL(pidfd_open),
#endif
#ifdef SYS_clone3
    CALL(clone3),
#endif
#ifdef SYS_close_range
    CALL(close_range),
#endif
#ifdef SYS_openat2
    CALL(openat2),
#endif
#ifdef SYS_pidfd_getfd
    CALL(pidfd_getfd),
#endif
#ifdef SYS_faccessat2
    CALL(faccessat2),
#endif
#ifdef SYS_epoll_pwait2
    CALL(epoll_pwait2),
#endif
    CALL(execveat),
    CALL(renameat2),
    CALL(seccomp),
    CALL(sched_setattr),
    CALL(userfaultfd),
    CALL(mlock2),
    CALL(bpf),
};

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

enum { MOST_STEPS = 256 };

enum { NEW_LISTENER = 1 << 3 }; /* Linux 5.0 */

static struct sock_filter steps[MOST_STEPS];
static unsigned short count;
static unsigned flags;

static void add(struct sock_filter step) {
    if (count == MOST_STEPS) {
        fprintf(stderr, "confine: too many calls\n");
        exit(125);
    }
    steps[count++] = step;
}

static const struct named *find(const struct named *table, size_t size, const char *name) {
    for (size_t i = 0; i < size; i++) {
        if (strcmp(table[i].name, name) == 0)
            return &table[i];
    }
    fprintf(stderr, "confine: %s is not known\n", name);
    exit(125);
}

/* RULE is ERRNO:CALL,CALL… */
static void forbid(char *rule) {
    const char *name = strsep(&rule, ":");
    const struct named *answer = find(answers, sizeof answers / sizeof *answers, name);

    if (strcmp(name, "NOTIFY") == 0)
        flags = NEW_LISTENER;
    while ((name = strsep(&rule, ","))) {
        const struct named *call = find(calls, sizeof calls / sizeof *calls, name);

        add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)call->number, 0, 1));
        add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, (unsigned)answer->number));
    }
}

static int install(void) {
    struct sock_fprog program = {.len = count, .filter = steps};
    long result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);

    /* Root may do so without PR_SET_NO_NEW_PRIVS, which would disarm set-uid programs. */
    if (result < 0 && errno == EACCES && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
        result = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    /* The listener lives as long as the command. */
    return result > 0 ? fcntl((int)result, F_SETFD, 0) : (int)result;
}

int main(int argc, char **argv) {
    int at = 1;

    add((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                     offsetof(struct seccomp_data, arch)));
    add((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0));
    add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    add((struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)));
    for (; at < argc && strcmp(argv[at], "--") != 0; at++)
        forbid(argv[at]);
    add((struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    if (at + 1 >= argc) {
        fprintf(stderr, "usage: confine ERRNO:CALL,CALL... -- COMMAND ARG...\n");
        return 125;
    }
    if (install() < 0) {
        perror("confine: seccomp");
        return 125;
    }
    execvp(argv[at + 1], argv + at + 1);
    perror(argv[at + 1]);
    return 127;
}
