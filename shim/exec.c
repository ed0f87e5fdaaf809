/* Programs that start others: the user is told once of a child that will not have the library in
 * it. Often called where little is allowed, in a child of vfork(2), after a fork in a program with
 * threads, or in a signal handler: so nothing is written but the stack, and that is small. */
#include <errno.h>
#include <stddef.h>
#include <sys/types.h>

#include "config.h"
#include "next.h"
#include "reach.h"
#include "report.h"
#include "syscalls.h"
#include "text.h"
#include "told.h"

#define LIBRARY "libflockshim.so"
#define MAX_PATH 1024

#define EXPORTED __attribute__((visibility("default")))
/* Its memory on the stack shall be free again when libc's function runs. */
#define APART __attribute__((noinline))

EXPORTED int execve(const char *path, char *const arguments[], char *const environment[]);
EXPORTED int execv(const char *path, char *const arguments[]);
EXPORTED int execvp(const char *file, char *const arguments[]);
EXPORTED int posix_spawn(pid_t *child, const char *path, const void *actions,
                         const void *attributes, char *const arguments[],
                         char *const environment[]);
EXPORTED int posix_spawnp(pid_t *child, const char *file, const void *actions,
                          const void *attributes, char *const arguments[],
                          char *const environment[]);

typedef int execve_function(const char *, char *const[], char *const[]);
typedef int execv_function(const char *, char *const[]);
typedef int spawn_function(pid_t *, const char *, const void *, const void *, char *const[],
                           char *const[]);

/* Empty where nothing is to be told. */
static char the_run[TOLD_MAX_RUN + 1];

static char *const *own_environment(void) {
    return &environ ? environ : NULL;
}

/* What an environment says about telling. */
struct wishes {
    int silence;
    int preloads;
    const char *run;
};

/* Split as glibc and musl do. */
static int names_library(const char *list) {
    const char *name = list;

    for (; *list; list++) {
        const char *rest;

        if (*list == '/' || *list == ':' || *list == ' ' || (*list >= '\t' && *list <= '\r'))
            name = list + 1;
        rest = list == name ? text_after(name, LIBRARY) : NULL;
        if (rest && (!*rest || *rest == ':' || *rest == ' ' || (*rest >= '\t' && *rest <= '\r')))
            return 1;
    }
    return 0;
}

static struct wishes wishes_of(char *const *environment) {
    struct wishes wishes = {0};
    int fails = 0, simulates = 0;

    for (; environment && *environment; environment++) {
        const char *entry = *environment;
        const char *value;

        if ((value = text_after(entry, "LD_PRELOAD=")))
            wishes.preloads |= names_library(value);
        else if (!(entry = text_after(entry, "FLOCKSHIM_")))
            continue;
        else if ((value = text_after(entry, "RUN=")))
            wishes.run = value;
        else if ((value = text_after(entry, "QUIET=")))
            wishes.silence |= *value && !text_equal(value, "0");
        else if (text_after(entry, "SUPERVISED="))
            wishes.silence = 1;
        else if ((value = text_after(entry, "MODE=")))
            fails = text_equal(value, "fail");
        else if ((value = text_after(entry, "SIMULATE=")))
            simulates = *value;
    }
    wishes.silence |= fails && !simulates;
    return wishes;
}

static void note_run(const char *run) {
    struct text text = text_over(the_run, sizeof the_run);

    for (const char *at = run; *at; at++) {
        if (!(*at >= '0' && *at <= '9') && !(*at >= 'a' && *at <= 'f'))
            return;
    }
    text_add(&text, run);
}

__attribute__((constructor)) static void prepare(void) {
    struct wishes wishes = wishes_of(own_environment());

    if (wishes.run && !wishes.silence)
        note_run(wishes.run);
}

APART static void consider(const char *path, char *const *environment) {
    struct wishes wishes = wishes_of(environment);
    const struct config *config = config_get();
    struct reach reach;

    if (!wishes.silence && reach_is_out_of(&reach, path, wishes.preloads) &&
        report_would_be_seen(config) && told_first(config, the_run))
        report_not_covered(config, reach.program, reach.why);
}

static const char *search_path(void) {
    for (char *const *entry = own_environment(); entry && *entry; entry++) {
        const char *value = text_after(*entry, "PATH=");

        if (value)
            return value;
    }
    return "/bin:/usr/bin";
}

static int has_slash(const char *file) {
    for (; *file; file++) {
        if (*file == '/')
            return 1;
    }
    return 0;
}

/* What a search will find: the first that can be executed. */
APART static void consider_found(const char *file, char *const *environment) {
    const char *at = search_path();
    char path[MAX_PATH];

    for (;; at++) {
        struct text text = text_over(path, sizeof path);

        for (; *at && *at != ':'; at++)
            text_add(&text, (const char[]){*at, 0});
        if (text.length)
            text_add(&text, "/");
        text_add(&text, file);
        if (!text.truncated && reach_is_program(path)) {
            consider(path, environment);
            return;
        }
        if (!*at)
            return;
    }
}

static int by_kernel(const char *path, char *const arguments[], char *const environment[]) {
    errno = (int)-sys3(SYS_execve, path, arguments, environment);
    return -1;
}

static void consider_file(const char *file, char *const *environment) {
    if (has_slash(file))
        consider(file, environment);
    else if (*file)
        consider_found(file, environment);
}

int execve(const char *path, char *const arguments[], char *const environment[]) {
    execve_function *function = (execve_function *)next_function(NEXT_EXECVE);

    if (*the_run)
        consider(path, environment);
    return function ? function(path, arguments, environment)
                    : by_kernel(path, arguments, environment);
}

int execv(const char *path, char *const arguments[]) {
    execv_function *function = (execv_function *)next_function(NEXT_EXECV);

    if (*the_run)
        consider(path, own_environment());
    return function ? function(path, arguments) : by_kernel(path, arguments, own_environment());
}

int execvp(const char *file, char *const arguments[]) {
    execv_function *function = (execv_function *)next_function(NEXT_EXECVP);

    if (*the_run)
        consider_file(file, own_environment());
    if (function)
        return function(file, arguments);
    errno = ENOSYS;
    return -1;
}

int posix_spawn(pid_t *child, const char *path, const void *actions, const void *attributes,
                char *const arguments[], char *const environment[]) {
    spawn_function *function = (spawn_function *)next_function(NEXT_POSIX_SPAWN);

    if (*the_run)
        consider(path, environment);
    return function ? function(child, path, actions, attributes, arguments, environment) : ENOSYS;
}

int posix_spawnp(pid_t *child, const char *file, const void *actions, const void *attributes,
                 char *const arguments[], char *const environment[]) {
    spawn_function *function = (spawn_function *)next_function(NEXT_POSIX_SPAWNP);

    if (*the_run)
        consider_file(file, environment);
    return function ? function(child, file, actions, attributes, arguments, environment) : ENOSYS;
}
