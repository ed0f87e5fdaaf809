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
#include "record.h"

#define X32_BIT 0x40000000 /* x32 has the architecture of x86_64, and marks its numbers */

/* A kernel may run programs of several architectures, whose numbers differ: seccomp(2). Those of 32
 * bits have fcntl64 besides. */
static const struct {
    uint32_t architecture, flock[2], fcntl[2];
} lock_calls[] = {
#if defined(__x86_64__)
    {AUDIT_ARCH_X86_64, {73, X32_BIT | 73}, {72, X32_BIT | 72}},
    {AUDIT_ARCH_I386, {143, 143}, {55, 221}},
#else
    {AUDIT_ARCH_AARCH64, {32, 32}, {25, 25}},
    {AUDIT_ARCH_ARM, {143, 143}, {55, 221}},
#endif
};

/* Commands of fcntl(2) for record locks. Only programs of 32 bits have F_GETLK64 to F_SETLKW64, the
 * last here. */
static const uint32_t setting[] = {F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, 13, 14};
static const uint32_t testing[] = {F_GETLK, F_OFD_GETLK, 12};

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define GROUP_LENGTH 8
#define FIELD(name) ((uint32_t)offsetof(struct seccomp_data, name))

struct program {
    struct sock_filter code[160];
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

static void append(struct program *program, const struct program *part) {
    for (unsigned short i = 0; i < part->length; i++)
        program->code[program->length++] = part->code[i];
}

static void jump_if(struct program *program, uint32_t value, size_t target) {
    add(program, BPF_JMP | BPF_JEQ | BPF_K, value, (unsigned char)(target - program->length - 1),
        0);
}

/* What is answered to whom. */
struct parts {
    struct program flock, fcntl, fcntl_of_32_bits;
};

/* Goes on in one of the parts with a lock call, and lets others pass. */
static void select_calls(struct program *program, const struct parts *parts) {
    const size_t of_flock = COUNT(lock_calls) * GROUP_LENGTH + 1;
    const size_t of_fcntl = of_flock + parts->flock.length;

    for (size_t i = 0; i < COUNT(lock_calls); i++) {
        const size_t of_this_fcntl = of_fcntl + (i ? parts->fcntl.length : 0);

        load(program, FIELD(arch));
        add(program, BPF_JMP | BPF_JEQ | BPF_K, lock_calls[i].architecture, 0, GROUP_LENGTH - 2);
        load(program, FIELD(nr));
        jump_if(program, lock_calls[i].flock[0], of_flock);
        jump_if(program, lock_calls[i].flock[1], of_flock);
        jump_if(program, lock_calls[i].fcntl[0], of_this_fcntl);
        jump_if(program, lock_calls[i].fcntl[1], of_this_fcntl);
        finish(program, SECCOMP_RET_ALLOW);
    }
    finish(program, SECCOMP_RET_ALLOW);
    append(program, &parts->flock);
    append(program, &parts->fcntl);
    append(program, &parts->fcntl_of_32_bits);
}

static void answer_commands(struct program *program, const uint32_t commands[], size_t count,
                            uint32_t answer) {
    for (size_t i = 0; i < count; i++) {
        add(program, BPF_JMP | BPF_JEQ | BPF_K, commands[i], 0, 1);
        finish(program, answer);
    }
}

static void answer_fcntl(struct parts *parts, uint32_t to_setting, uint32_t to_testing) {
    load(&parts->fcntl, FIELD(args[1]));
    answer_commands(&parts->fcntl, setting, COUNT(setting) - 2, to_setting);
    answer_commands(&parts->fcntl, testing, COUNT(testing) - 1, to_testing);
    finish(&parts->fcntl, SECCOMP_RET_ALLOW);
    load(&parts->fcntl_of_32_bits, FIELD(args[1]));
    answer_commands(&parts->fcntl_of_32_bits, setting, COUNT(setting), to_setting);
    answer_commands(&parts->fcntl_of_32_bits, testing, COUNT(testing), to_testing);
    finish(&parts->fcntl_of_32_bits, SECCOMP_RET_ALLOW);
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
    struct parts parts = {.flock = {.length = 0}};

    finish(&parts.flock, NOTIFY_RETURN);
    answer_fcntl(&parts, NOTIFY_RETURN, NOTIFY_RETURN);
    select_calls(&program, &parts);
    return install(&program, NOTIFY_NEW_LISTENER);
}

/* That no lock is in the way F_GETLK says in the program's memory, where a filter cannot write:
 * then the kernel is asked. */
int native_answer_lock_calls(int error) {
    const uint32_t answer = SECCOMP_RET_ERRNO | (uint32_t)error;
    struct program program = {.length = 0};
    struct parts parts = {.flock = {.length = 0}};

    answer_ping(&parts.flock, error ? PING_ERROR_OF_FAILURE : PING_ERROR_OF_SUCCESS);
    let_bad_calls_pass(&parts.flock);
    finish(&parts.flock, answer);
    answer_fcntl(&parts, answer, error ? answer : SECCOMP_RET_ALLOW);
    select_calls(&program, &parts);
    return install(&program, 0);
}

int native_ping_supervisor(void) {
    long result = syscall(SYS_flock, PING_DESCRIPTOR, PING_OPERATION);

    return result < 0 ? -errno : (int)result;
}
