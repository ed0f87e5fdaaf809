/* Starts a program in one of many ways:
 *
 *     starter exec|fork|vfork|thread|signal execve|execv|execvp|posix_spawn|posix_spawnp|bare \
 *         [FILE [ARG...]]
 *
 * `bare` is execve with no environment at all; without FILE the path is NULL. Prints the errno that
 * is left, and how many descriptors are open more than before. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef AT_MINSIGSTKSZ
#define AT_MINSIGSTKSZ 51
#endif

/* What a program may hope for beside the signal's own frame. */
#define SMALL_STACK 7168
/* musl allows less, with which its own posix_spawn(3) fails. */
#define SMALL_THREAD (PTHREAD_STACK_MIN > 16384 ? PTHREAD_STACK_MIN : 16384)
#define PAGE 4096

extern char **environ;

static const char *how, *function;
static char **arguments;

static int open_descriptors(void) {
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;

    if (!directory)
        return -1;
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void wait_for(pid_t child) {
    int status = 0;

    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(status))
        printf("died of signal %d\n", WTERMSIG(status));
}

/* As if it were a function that replaces the process. */
static void spawn(int (*function)(pid_t *, const char *, const posix_spawn_file_actions_t *,
                                  const posix_spawnattr_t *, char *const *, char *const *)) {
    pid_t child;

    errno = function(&child, arguments[0], NULL, NULL, arguments, environ);
    if (!errno)
        wait_for(child);
}

static void become(void) {
    if (!strcmp(function, "execve"))
        execve(arguments[0], arguments, environ);
    else if (!strcmp(function, "execv"))
        execv(arguments[0], arguments);
    else if (!strcmp(function, "execvp"))
        execvp(arguments[0], arguments);
    else if (!strcmp(function, "posix_spawn"))
        spawn(posix_spawn);
    else if (!strcmp(function, "posix_spawnp"))
        spawn(posix_spawnp);
    else
        execve(arguments[0], arguments, NULL);
}

static void become_in_handler(int signal_number) {
    (void)signal_number;
    become();
    _exit(1);
}

static void prepare_handler(void) {
    size_t frame = getauxval(AT_MINSIGSTKSZ) ? getauxval(AT_MINSIGSTKSZ) : 2048;
    size_t size = frame + SMALL_STACK;
    size_t pages = (size + PAGE - 1) & ~(size_t)(PAGE - 1);
    char *memory =
        mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {.ss_sp = memory + PAGE, .ss_size = size};
    struct sigaction action = {.sa_handler = become_in_handler, .sa_flags = SA_ONSTACK};

    mprotect(memory, PAGE, PROT_NONE);
    sigaltstack(&stack, NULL);
    sigaction(SIGUSR1, &action, NULL);
}

static void *start(void *unused) {
    pid_t child;

    if (!strcmp(how, "exec")) {
        become();
        return unused;
    }
    if (!strcmp(how, "signal"))
        prepare_handler();
    child = !strcmp(how, "vfork") || !strcmp(how, "thread") ? vfork() : fork();
    if (child == 0) {
        if (!strcmp(how, "signal"))
            raise(SIGUSR1);
        become();
        _exit(1);
    }
    wait_for(child);
    return unused;
}

int main(int count, char **words) {
    int before = open_descriptors();

    if (count < 3)
        return 2;
    how = words[1];
    function = words[2];
    arguments = words + 3;
    errno = 0;
    if (!strcmp(how, "thread")) {
        pthread_attr_t attributes;
        pthread_t thread;

        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, SMALL_THREAD);
        pthread_create(&thread, &attributes, start, NULL);
        pthread_join(thread, NULL);
    } else {
        start(NULL);
    }
    if (!strcmp(how, "exec") || !strcmp(how, "vfork"))
        printf("errno %d, %d descriptors more\n", errno, open_descriptors() - before);
    return 0;
}
