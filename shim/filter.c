/* The seccomp(2) filters that see lock calls and let everything else pass. */
#include <errno.h>
#include <linux/filter.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "notify.h"

#define X32_BIT 0x40000000 /* x32 has the architecture of x86_64, and marks its numbers */

/* A kernel may run programs of several architectures, whose numbers differ: seccomp(2). */
static const struct {
    uint32_t architecture, number;
} flock_calls[] = {
#if defined(__x86_64__)
    {AUDIT_ARCH_X86_64, 73},
    {AUDIT_ARCH_X86_64, X32_BIT | 73},
    {AUDIT_ARCH_I386, 143},
#else
    {AUDIT_ARCH_AARCH64, 32},
    {AUDIT_ARCH_ARM, 143},
#endif
};

#define CALLS (sizeof flock_calls / sizeof *flock_calls)
#define FIELD(name) ((uint32_t)offsetof(struct seccomp_data, name))

struct program {
    struct sock_filter code[64];
    unsigned short length;
};

static void add(struct program *program, uint16_t code, uint32_t value, unsigned char then,
                unsigned char otherwise) {
    program->code[program->length++] =
        (struct sock_filter){.code = code, .k = value, .jt = then, .jf = otherwise};
}

static void load(struct program *program, uint32_t field) {
    add(program, BPF_LD | BPF_W | BPF_ABS, field, 0, 0);
}

static void finish(struct program *program, uint32_t answer) {
    add(program, BPF_RET | BPF_K, answer, 0, 0);
}

/* Goes on behind with a call of flock(2), and lets others pass. */
static void select_flock(struct program *program) {
    for (size_t i = 0; i < CALLS; i++) {
        unsigned char rest = (unsigned char)(4 * (CALLS - i - 1) + 1);

        load(program, FIELD(arch));
        add(program, BPF_JMP | BPF_JEQ | BPF_K, flock_calls[i].architecture, 0, 2);
        load(program, FIELD(nr));
        add(program, BPF_JMP | BPF_JEQ | BPF_K, flock_calls[i].number, rest, 0);
    }
    finish(program, SECCOMP_RET_ALLOW);
}

/* Calls that the kernel would refuse whatever the file system are left to it. Which descriptors are
 * open a filter cannot see. */
static void let_bad_calls_pass(struct program *program) {
    load(program, FIELD(args[0]));
    add(program, BPF_JMP | BPF_JGE | BPF_K, PING_DESCRIPTOR, 5, 0);
    load(program, FIELD(args[1]));
    add(program, BPF_ALU | BPF_AND | BPF_K, ~(uint32_t)LOCK_NB, 0, 0);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, LOCK_SH, 3, 0);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, LOCK_EX, 2, 0);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, LOCK_UN, 1, 0);
    finish(program, SECCOMP_RET_ALLOW);
}

static void answer_ping(struct program *program, uint32_t error) {
    load(program, FIELD(args[1]));
    add(program, BPF_JMP | BPF_JEQ | BPF_K, PING_OPERATION, 0, 1);
    finish(program, SECCOMP_RET_ERRNO | error);
}

static long seccomp_filter(const struct sock_fprog *program, unsigned int flags) {
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, program);
}

static int set_filter(struct sock_fprog *program, unsigned int flags) {
    /* Else kernels before 5.16 take the filter for a sandbox's, and slow the program down. */
    long result = seccomp_filter(program, flags | FILTER_SPEC_ALLOW);

    if (result < 0 && errno == EINVAL)
        result = seccomp_filter(program, flags);
    /* seccomp(2) came with Linux 3.17, filters with 3.5. */
    if (result < 0 && errno == ENOSYS && !flags)
        result = prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program);
    return result < 0 ? -errno : (int)result;
}

/* Who is privileged may keep set-uid programs working behind the filter: seccomp(2). */
static int install(struct program *program, unsigned int flags) {
    struct sock_fprog whole = {.len = program->length, .filter = program->code};
    int result = set_filter(&whole, flags);

    if (result == -EACCES && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
        result = set_filter(&whole, flags);
    return result;
}

int native_report_lock_calls(void) {
    struct program program = {.length = 0};

    select_flock(&program);
    finish(&program, NOTIFY_RETURN);
    return install(&program, NOTIFY_NEW_LISTENER);
}

int native_answer_lock_calls(int error) {
    struct program program = {.length = 0};

    select_flock(&program);
    answer_ping(&program, error ? PING_ERROR_OF_FAILURE : PING_ERROR_OF_SUCCESS);
    let_bad_calls_pass(&program);
    finish(&program, SECCOMP_RET_ERRNO | (uint32_t)error);
    return install(&program, 0);
}

int native_ping_supervisor(void) {
    long result = syscall(SYS_flock, PING_DESCRIPTOR, PING_OPERATION);

    return result < 0 ? -errno : (int)result;
}
