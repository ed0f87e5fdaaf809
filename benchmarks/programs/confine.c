/* What flockshim is compared with. usage: confine allow|look|trace-all|trace-locks COMMAND [ARG...]
 *   allow        behind a filter that lets every call pass
 *   look         behind one that looks at the arguments of flock(2), and lets every call pass
 *   trace-all    under ptrace(2), stopped at the begin and end of every call
 *   trace-locks  under ptrace(2), stopped by a filter at each flock(2)
 * Both tracers answer flock(2) with success instead of the kernel, which is the least that one
 * could do that answers lock calls. Of what COMMAND starts they know nothing.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef __x86_64__
#error "how a tracer answers a call is known for x86_64 only"
#endif

#define OPTIONS                                                                                    \
    (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL)

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void filter_with(struct sock_filter *code, unsigned short length) {
    struct sock_fprog program = {.len = length, .filter = code};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) < 0)
        fail("seccomp");
}

static void filter_nothing(void) {
    struct sock_filter code[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};

    filter_with(code, sizeof code / sizeof *code);
}

/* A filter that depends on arguments the kernel must run at each call; what is the same for all
 * calls of one number it knows without. */
static void filter_locks(uint32_t answer) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_flock, 0, 2),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x80000000, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, answer),
    };

    filter_with(code, sizeof code / sizeof *code);
}

static void become(char **command) {
    execvp(*command, command);
    fail(*command);
}

static void answer_lock_call(pid_t pid) {
    long number = ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user_regs_struct, orig_rax), 0);

    if (number != SYS_flock)
        return;
    ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, orig_rax), -1);
    ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, rax), 0);
}

static int trace(pid_t pid, int all) {
    int status, inside = 0;
    long signal = 0;

    if (waitpid(pid, &status, 0) < 0 || !WIFSTOPPED(status))
        fail("the traced process has ended");
    if (ptrace(PTRACE_SETOPTIONS, pid, 0, OPTIONS) < 0)
        fail("ptrace");
    while (ptrace(all ? PTRACE_SYSCALL : PTRACE_CONT, pid, 0, signal) == 0 &&
           waitpid(pid, &status, 0) == pid && WIFSTOPPED(status)) {
        signal = 0;
        if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
            inside = !inside;
            if (inside)
                answer_lock_call(pid);
        } else if (status >> 8 == (SIGTRAP | PTRACE_EVENT_SECCOMP << 8)) {
            answer_lock_call(pid);
        } else if (status >> 16 == 0) {
            signal = WSTOPSIG(status);
        }
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int main(int count, char **words) {
    const char *way = count > 2 ? words[1] : "";
    int all = strcmp(way, "trace-all") == 0;
    pid_t child;

    if (strcmp(way, "allow") == 0) {
        filter_nothing();
        become(words + 2);
    } else if (strcmp(way, "look") == 0) {
        filter_locks(SECCOMP_RET_ALLOW);
        become(words + 2);
    } else if (!all && strcmp(way, "trace-locks") != 0) {
        fprintf(stderr, "usage: confine allow|look|trace-all|trace-locks COMMAND [ARG...]\n");
        return 2;
    }
    child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, 0, 0) < 0)
            fail("ptrace");
        raise(SIGSTOP);
        if (!all)
            filter_locks(SECCOMP_RET_TRACE);
        become(words + 2);
    }
    return trace(child, all);
}
