/*
 * A process that does what it is told, one command a packet, so that a test can place every system
 * call of a history. Commands come in on a SOCK_SEQPACKET socket ("TOKEN NAME ARG…", at most one
 * descriptor attached) and each is answered with "TOKEN VALUE ERRNO", and a word more where the
 * call has changed what its argument points to.
 *
 * errno is set to ERRNO_BEFORE ahead of every command, so the answer shows whether it was touched.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lockdriver.h"
#include "recordcommands.h"

extern char **environ;

static volatile sig_atomic_t signals_seen[65];

static void answer_more(int control, const char *token, long value, int err, const char *more) {
    char text[2 * RESULT_MAX];
    int length = snprintf(text, sizeof text, "%s %ld %d %s", token, value, err, more);
    if (send(control, text, (size_t)length, MSG_NOSIGNAL) < 0)
        _exit(99);
}

static void answer(int control, const char *token, long value, int err) {
    answer_more(control, token, value, err, "");
}

static void *command_loop(void *control);
static void obey(struct request *rq);

static pthread_t start_thread(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument) != 0)
        _exit(98);
    pthread_detach(thread);
    return thread;
}

/* --- descriptors --- */

static long do_open(struct request *rq) {
    return open(rq->arg[0], (int)number(rq, 1), 0666);
}

static long do_close(struct request *rq) {
    return close((int)number(rq, 0));
}

static long do_closerange(struct request *rq) {
    return syscall(SYS_close_range, (unsigned)number(rq, 0), (unsigned)number(rq, 1), 0);
}

static long do_fclose(struct request *rq) {
    FILE *stream = fdopen((int)number(rq, 0), "r+");
    return stream ? fclose(stream) : -1;
}

static long do_dup(struct request *rq) {
    return dup((int)number(rq, 0));
}

static long do_dup2(struct request *rq) {
    return dup2((int)number(rq, 0), (int)number(rq, 1));
}

static long do_pipe(struct request *rq) {
    (void)rq;
    int ends[2];
    if (pipe(ends) < 0)
        return -1;
    return ends[0] * 1000 + ends[1];
}

/* The descriptor that came with the command becomes one of this process. */
static long do_adopt(struct request *rq) {
    return rq->passed;
}

static long do_sendfd(struct request *rq) {
    int fd = (int)number(rq, 1);
    char space[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec part = {.iov_base = "x", .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    return sendmsg((int)number(rq, 0), &message, 0);
}

/* Receives into TEXT; returns the length, and in *FD the descriptor that came along or -1. */
static ssize_t receive(int socket, char *text, size_t size, int *fd) {
    char space[CMSG_SPACE(sizeof *fd)];
    struct iovec part = {.iov_base = text, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    ssize_t length = recvmsg(socket, &message, 0);
    *fd = -1;
    if (length < 0)
        return length;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(header), sizeof *fd);
    return length;
}

static long do_recvfd(struct request *rq) {
    char byte;
    int fd;
    return receive((int)number(rq, 0), &byte, 1, &fd) < 0 ? -1 : fd;
}

static long do_mmap(struct request *rq) {
    void *at = mmap(NULL, MAP_SIZE, PROT_READ, MAP_SHARED, (int)number(rq, 0), 0);
    return at == MAP_FAILED ? -1 : (long)at;
}

static long do_munmap(struct request *rq) {
    return munmap((void *)number(rq, 0), MAP_SIZE);
}

static long do_lseek(struct request *rq) {
    return (long)lseek((int)number(rq, 0), wide(rq, 1), (int)number(rq, 2));
}

static long do_ftruncate(struct request *rq) {
    return ftruncate((int)number(rq, 0), wide(rq, 1));
}

/* --- flock --- */

static long do_flock(struct request *rq) {
    return flock((int)number(rq, 0), (int)number(rq, 1));
}

static long do_probe(struct request *rq) {
    int fd = open(rq->arg[0], O_RDONLY);
    if (fd < 0)
        return -1;
    long value = flock(fd, (int)number(rq, 1) | LOCK_NB);
    int err = errno;
    flock(fd, LOCK_UN);
    close(fd);
    errno = err;
    return value;
}

static long do_vforkflock(struct request *rq) {
    int fd = (int)number(rq, 0), operation = (int)number(rq, 1);
    volatile long value = -1;
    volatile int err = 0;
    pid_t child = vfork();
    if (child == 0) {
        errno = ERRNO_BEFORE;
        value = flock(fd, operation);
        err = errno;
        _exit(0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        _exit(97);
    errno = err;
    return value;
}

/* --- any command in a thread of its own --- */

struct job {
    struct request request;
    char text[];
};

static pthread_t last_job;

static void *job_thread(void *argument) {
    struct job *job = argument;
    answer(job->request.control, job->request.token, gettid(), ERRNO_BEFORE);
    obey(&job->request);
    free(job);
    return NULL;
}

/* Answered twice: first with the thread's id, then as the command is that follows. */
static long do_later(struct request *rq) {
    struct job *job = calloc(1, sizeof *job + PACKET_MAX);
    if (!job)
        _exit(96);
    char *end = job->text;
    job->request = (struct request){.control = rq->control, .passed = -1};
    job->request.token = strcpy(end, rq->token);
    end += strlen(end) + 1;
    job->request.name = strcpy(end, rq->arg[0]);
    for (int i = 1; i < ARGS_MAX && rq->arg[i]; i++) {
        end += strlen(end) + 1;
        job->request.arg[i - 1] = strcpy(end, rq->arg[i]);
    }
    last_job = start_thread(job_thread, job);
    return ANSWERED;
}

/* Cancels the thread of the last such command. */
static long do_cancel(struct request *rq) {
    (void)rq;
    return pthread_cancel(last_job);
}

/* --- processes and threads; the new one obeys the descriptor that came with the command --- */

static long do_fork(struct request *rq) {
    pid_t child = fork();
    if (child == 0) {
        dup2(rq->passed, rq->control);
        close(rq->passed);
        return ANSWERED;
    }
    close(rq->passed);
    return child;
}

static long do_spawn(struct request *rq) {
    char control[16];
    snprintf(control, sizeof control, "%d", rq->control);
    char *words[] = {"lockdriver", control, NULL};
    if (number(rq, 0))
        unsetenv("LD_PRELOAD");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, rq->passed, rq->control);
    posix_spawn_file_actions_addclose(&actions, rq->passed);
    pid_t child;
    int failed = posix_spawn(&child, "/proc/self/exe", &actions, NULL, words, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(rq->passed);
    errno = failed ? failed : ERRNO_BEFORE;
    return failed ? -1 : child;
}

/* Another program, with what follows its name as its arguments. */
static long do_run(struct request *rq) {
    pid_t child;
    char *words[ARGS_MAX + 1] = {NULL};
    for (int i = 0; i < ARGS_MAX; i++)
        words[i] = (char *)rq->arg[i];
    int failed = posix_spawn(&child, words[0], NULL, NULL, words, environ);
    errno = failed ? failed : ERRNO_BEFORE;
    return failed ? -1 : child;
}

static long do_exec(struct request *rq) {
    char control[16];
    snprintf(control, sizeof control, "%d", rq->control);
    if (number(rq, 0))
        unsetenv("LD_PRELOAD");
    execl("/proc/self/exe", "lockdriver", control, rq->token, (char *)NULL);
    return -1;
}

static long do_thread(struct request *rq) {
    start_thread(command_loop, (void *)(long)rq->passed);
    return 0;
}

static long do_endthread(struct request *rq) {
    answer(rq->control, rq->token, 0, ERRNO_BEFORE);
    pthread_exit(NULL);
}

/* The main thread goes, and another one obeys in its place. */
static long do_mainexit(struct request *rq) {
    start_thread(command_loop, (void *)(long)rq->control);
    answer(rq->control, rq->token, 0, ERRNO_BEFORE);
    pthread_exit(NULL);
}

static long do_unsharefiles(struct request *rq) {
    (void)rq;
    return unshare(CLONE_FILES);
}

static long do_wait(struct request *rq) {
    (void)rq;
    return waitpid(-1, NULL, __WALL | WNOHANG);
}

static long do_exit(struct request *rq) {
    exit((int)number(rq, 0));
}

/* --- surroundings --- */

static void count_signal(int which) {
    signals_seen[which]++;
}

static long do_sigaction(struct request *rq) {
    struct sigaction action = {.sa_handler = count_signal, .sa_flags = (int)number(rq, 1)};
    return sigaction((int)number(rq, 0), &action, NULL);
}

static long do_sigignore(struct request *rq) {
    return signal((int)number(rq, 0), SIG_IGN) == SIG_ERR ? -1 : 0;
}

static long do_sigcount(struct request *rq) {
    return signals_seen[number(rq, 0)];
}

static long do_sigthread(struct request *rq) {
    return syscall(SYS_tgkill, getpid(), (pid_t)number(rq, 0), (int)number(rq, 1));
}

static long do_chdir(struct request *rq) {
    return chdir(rq->arg[0]);
}

static long do_prctl(struct request *rq) {
    return prctl((int)number(rq, 0), number(rq, 1), 0L, 0L, 0L);
}

static long do_clearenv(struct request *rq) {
    (void)rq;
    return clearenv();
}

static long do_maxfiles(struct request *rq) {
    rlim_t most = (rlim_t)number(rq, 0);
    return setrlimit(RLIMIT_NOFILE, &(struct rlimit){.rlim_cur = most, .rlim_max = most});
}

#define COMMAND(name)                                                                              \
    { #name, do_##name }

static const struct {
    const char *name;
    long (*run)(struct request *);
} commands[] = {
    COMMAND(open),      COMMAND(close),     COMMAND(prctl),        COMMAND(closerange),
    COMMAND(fclose),    COMMAND(dup),       COMMAND(dup2),         COMMAND(pipe),
    COMMAND(adopt),     COMMAND(sendfd),    COMMAND(recvfd),       COMMAND(mmap),
    COMMAND(munmap),    COMMAND(flock),     COMMAND(probe),        COMMAND(vforkflock),
    COMMAND(fork),      COMMAND(spawn),     COMMAND(exec),         COMMAND(thread),
    COMMAND(endthread), COMMAND(mainexit),  COMMAND(unsharefiles), COMMAND(run),
    COMMAND(wait),      COMMAND(exit),      COMMAND(sigaction),    COMMAND(sigignore),
    COMMAND(sigcount),  COMMAND(sigthread), COMMAND(chdir),        COMMAND(clearenv),
    COMMAND(maxfiles),  COMMAND(lseek),     COMMAND(ftruncate),    COMMAND(record),
    COMMAND(lockf),     COMMAND(fcntl),     COMMAND(fcntlbytes),   COMMAND(later),
    COMMAND(cancel),
};

static void obey(struct request *rq) {
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(commands[i].name, rq->name) != 0)
            continue;
        errno = ERRNO_BEFORE;
        long value = commands[i].run(rq);
        if (value != ANSWERED)
            answer_more(rq->control, rq->token, value, errno, rq->result);
        return;
    }
    answer(rq->control, rq->token, -1, ENOTSUP);
}

static void *command_loop(void *argument) {
    int control = (int)(long)argument;
    for (;;) {
        char text[PACKET_MAX];
        struct request rq = {.control = control};
        ssize_t length = receive(control, text, sizeof text - 1, &rq.passed);
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            _exit(0);
        text[length] = '\0';
        char *rest = text;
        rq.token = strsep(&rest, " ");
        rq.name = strsep(&rest, " ");
        for (int i = 0; i < ARGS_MAX && rest; i++)
            rq.arg[i] = strsep(&rest, " ");
        if (!rq.name)
            _exit(95);
        obey(&rq);
    }
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    /* Lets the test read this process's /proc/PID/task/TID/syscall where Yama restricts that. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    int control = atoi(argv[1]);
    if (control < CONTROL_MIN) {
        int high = fcntl(control, F_DUPFD, CONTROL_MIN);
        close(control);
        control = high;
    }
    if (argc > 2)
        answer(control, argv[2], 0, ERRNO_BEFORE);
    command_loop((void *)(long)control);
}
