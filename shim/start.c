/* The program may have threads, be a vfork child, ignore or count its children, have closed its
 * standard descriptors or have none left. So everything happens in a child that shares the memory
 * but not the descriptors (CLONE_VM without CLONE_FILES, parent suspended by CLONE_VFORK): nothing
 * of it can be inherited by a fork in another thread, and there is nothing to clean up. Its exit
 * signal is 0, so that no SIGCHLD is sent and wait(2) does not see it unless asked by __WCLONE. The
 * keeper is its child, and is orphaned at once. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "start.h"
#include "syscalls.h"
#include "text.h"

#define STACK_SIZE (256 * 1024)
#define MAX_VARIABLES 8192
#define KERNEL_SIGNALS 64
#define BACKLOG 4096
#define MAX_START_TRIES 1000 /* of 10 ms */
#define LISTENER 3           /* the descriptor by which the keeper gets its socket */

/* The kernel's struct sigaction: handler, flags, restorer, mask, on both architectures. */
struct kernel_sigaction {
    void *handler;
    unsigned long flags;
    void *restorer;
    uint64_t mask;
};

struct start {
    const struct config *config;
    const struct rendezvous *rendezvous;
    char *keeper_stack;
    const char *volatile failure;
    int listener;
    int log;
    char script[CONFIG_MAX_PATH + 16];
    char *environment[MAX_VARIABLES + 1];
};

static _Noreturn void leave(void) {
    for (;;)
        sys1(SYS_exit_group, 0);
}

static _Noreturn void fail(struct start *start, const char *reason) {
    start->failure = reason;
    leave();
}

static int close_descriptors_listed(unsigned first) {
    char entries[4096];
    long got;
    long directory =
        sys4(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);

    if (directory < 0)
        return 0;
    while ((got = sys3(SYS_getdents64, directory, entries, sizeof entries)) > 0) {
        for (long at = 0; at < got;) {
            /* struct linux_dirent64: d_ino, d_off, d_reclen at 16, d_type at 18, d_name at 19 */
            const char *digit = entries + at + 19;
            unsigned number = 0;

            while (*digit >= '0' && *digit <= '9')
                number = number * 10 + (unsigned)(*digit++ - '0');
            if (digit != entries + at + 19 && number >= first && number != (unsigned)directory)
                sys1(SYS_close, number);
            at += *(unsigned short *)(entries + at + 16);
        }
    }
    sys1(SYS_close, directory);
    return 1;
}

/* close_range(2) came with Linux 5.9. */
static void close_descriptors_from(unsigned first) {
    if (sys3(SYS_close_range, first, ~0u, 0) == 0 || close_descriptors_listed(first))
        return;
    for (unsigned number = first; number < 65536; number++)
        sys1(SYS_close, number);
}

/* Descriptors 0 to 2 become /dev/null whatever they were, so that nothing opened later lands there.
 */
static void neutral_standard_descriptors(void) {
    long null = sys4(SYS_openat, AT_FDCWD, "/dev/null", O_RDWR, 0);

    for (int number = 0; null >= 0 && number < 3; number++) {
        if (null != number)
            sys3(SYS_dup3, null, number, 0);
    }
    if (null > 2)
        sys1(SYS_close, null);
}

static int is_listening(const struct rendezvous *rendezvous) {
    long probe = sys3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    long result = sys3(SYS_connect, probe, &rendezvous->address, sizeof rendezvous->address);

    sys1(SYS_close, probe);
    return result == 0;
}

/* Never through a symbolic link, never what others own or may enter: whoever controls the directory
 * could hand out locks. */
static int open_directory(struct start *start) {
    const char *path = start->rendezvous->directory;
    struct stat status;
    long made = sys3(SYS_mkdirat, AT_FDCWD, path, 0700);
    long directory;

    if (made < 0 && made != -EEXIST) {
        if (made == -ENOENT)
            fail(start, "the parent of the rendezvous directory does not exist; set FLOCKSHIM_DIR");
        if (made == -ENOSPC || made == -EDQUOT)
            fail(start, "no space for the rendezvous directory; set FLOCKSHIM_DIR");
        fail(start, "the rendezvous directory cannot be made; set FLOCKSHIM_DIR");
    }
    directory =
        sys4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    if (directory < 0 || sys2(SYS_fstat, directory, &status) < 0 ||
        status.st_uid != sys0(SYS_geteuid) || (status.st_mode & 077))
        fail(start,
             "the rendezvous directory is not a directory of yours with mode 0700; remove it "
             "or set FLOCKSHIM_DIR");
    return (int)directory;
}

static int open_in(struct start *start, int directory, const char *name, int flags) {
    long file = sys4(SYS_openat, directory, name, O_CREAT | O_NOFOLLOW | O_CLOEXEC | flags, 0600);

    if (file == -ENOSPC || file == -EDQUOT)
        fail(start, "the rendezvous directory is full; set FLOCKSHIM_DIR");
    if (file < 0)
        fail(start, "no file can be made in the rendezvous directory; set FLOCKSHIM_DIR");
    return (int)file;
}

static int listen_at(struct start *start) {
    const struct sockaddr_un *address = &start->rendezvous->address;
    long listener = sys3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    sys3(SYS_unlinkat, AT_FDCWD, address->sun_path, 0);
    if (listener < 0 || sys3(SYS_bind, listener, address, sizeof *address) < 0 ||
        sys2(SYS_listen, listener, BACKLOG) < 0)
        fail(start, "no socket can be made in the rendezvous directory; set FLOCKSHIM_DIR");
    return (int)listener;
}

static void default_signals(void) {
    struct kernel_sigaction action = {0};
    uint64_t none = 0;

    for (int number = 1; number <= KERNEL_SIGNALS; number++)
        sys4(SYS_rt_sigaction, number, &action, NULL, sizeof action.mask);
    sys4(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
}

static void become_keeper(void *argument) {
    struct start *start = argument;
    char *arguments[] = {(char *)start->config->python,
                         (char *)"-I",
                         (char *)"-S",
                         start->script,
                         (char *)start->rendezvous->directory,
                         (char *)start->rendezvous->key,
                         NULL};

    sys0(SYS_setsid);
    sys1(SYS_chdir, "/");
    sys3(SYS_dup3, start->log, 1, 0);
    sys3(SYS_dup3, start->log, 2, 0);
    sys3(SYS_dup3, start->listener, LISTENER, 0);
    close_descriptors_from(LISTENER + 1);
    default_signals();
    sys3(SYS_execve, arguments[0], arguments, start->environment);
    fail(start,
         "the keeper cannot be started: FLOCKSHIM_PYTHON cannot be executed; run flockshim again "
         "from an installation that is there");
}

/* The keeper finds out by /proc which processes have a lock's description open. */
static void check_proc(struct start *start) {
    char link[24], digits[24];
    struct text number = text_over(digits, sizeof digits);
    long length = sys4(SYS_readlinkat, AT_FDCWD, "/proc/self", link, sizeof link - 1);

    if (length < 0)
        fail(start, "the keeper cannot be started: /proc is not mounted");
    link[length] = 0;
    text_add_number(&number, sys0(SYS_getpid));
    if (!text_equal(link, digits))
        fail(start,
             "the keeper cannot be started: /proc is that of another pid namespace; mount it anew");
}

/* Held while a keeper is started, for milliseconds; but whoever does so may be stopped just then,
 * and our program hears no signal as long as we wait. */
static void lock_start(struct start *start, int lock) {
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};

    for (int tries = 0; sys2(SYS_flock, lock, LOCK_EX | LOCK_NB) < 0; tries++) {
        if (tries == MAX_START_TRIES)
            fail(start, "another program that starts a keeper does not go on; continue or kill it");
        sys2(SYS_nanosleep, &pause, NULL);
    }
}

static void start_in_child(void *argument) {
    struct start *start = argument;
    int directory, lock;

    close_descriptors_from(3);
    neutral_standard_descriptors();
    check_proc(start);
    directory = open_directory(start);
    lock = open_in(start, directory, "start.lock", O_RDWR);
    lock_start(start, lock);
    if (is_listening(start->rendezvous))
        leave();
    start->log = open_in(start, directory, "keeper.log", O_WRONLY | O_APPEND);
    start->listener = listen_at(start);
    if (sys_clone_call(CLONE_VM | CLONE_VFORK | SIGCHLD, start->keeper_stack, become_keeper,
                       start) < 0)
        start->failure = "the keeper cannot be started: no more processes are allowed";
    if (start->failure)
        sys3(SYS_unlinkat, AT_FDCWD, start->rendezvous->address.sun_path, 0);
    leave();
}

/* Without LD_PRELOAD: the keeper must not be its own client. */
static void copy_environment(struct start *start) {
    int count = 0;

    if (&environ && environ) {
        for (char **entry = environ; *entry && count < MAX_VARIABLES; entry++) {
            if (!text_after(*entry, "LD_PRELOAD="))
                start->environment[count++] = *entry;
        }
    }
    start->environment[count] = NULL;
}

static void run_child(struct start *start, char *stack) {
    uint64_t all = ~(uint64_t)0, before;
    long child;

    sys4(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    child = sys_clone_call(CLONE_VM | CLONE_VFORK, stack, start_in_child, start);
    if (child < 0)
        start->failure = "the keeper cannot be started: no more processes are allowed";
    else
        while (sys4(SYS_wait4, child, NULL, __WCLONE, NULL) == -EINTR)
            ;
    sys4(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
}

const char *start_keeper(const struct config *config, const struct rendezvous *rendezvous) {
    const size_t head = (sizeof(struct start) + 4095) & ~(size_t)4095;
    const size_t size = head + 2 * STACK_SIZE;
    const char *failure;
    struct text script;
    struct start *start;
    long memory;

    if (!*config->python || !*config->home)
        return "FLOCKSHIM_PYTHON or FLOCKSHIM_HOME is not set; run the program by flockshim, or "
               "eval \"$(flockshim --env)\"";
    memory = sys6(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory < 0 && memory > -4096)
        return "the keeper cannot be started: no memory";
    start = (struct start *)memory;
    start->config = config;
    start->rendezvous = rendezvous;
    start->keeper_stack = (char *)memory + head + STACK_SIZE;
    script = text_over(start->script, sizeof start->script);
    text_add(&script, config->home);
    text_add(&script, "/keeper.py");
    copy_environment(start);
    run_child(start, (char *)memory + size);
    failure = start->failure;
    sys2(SYS_munmap, memory, size);
    return failure;
}
