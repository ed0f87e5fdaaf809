/* Programs that start others: the user is told once of a child that will not have the library in
 * it. Often called where little is allowed, in a child of vfork(2), after a fork in a program with
 * threads, or in a signal handler: so nothing is written but the stack, and that is small.
 *
 * posix_spawn(3) is not among them: before glibc 2.34 there may be no way to libc's own. */
#include <errno.h>
#include <stddef.h>

#include "config.h"
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

extern void *dlsym(void *handle, const char *name) __attribute__((weak));
extern int execvpe(const char *file, char *const arguments[], char *const environment[])
    __attribute__((weak));

#define RTLD_NEXT ((void *)-1L)

typedef int execve_function(const char *, char *const[], char *const[]);
typedef int execv_function(const char *, char *const[]);

/* Another preloaded library may have these functions too (fakechroot has), and must be called. It
 * needs dlsym(3) itself, so where that is missing there is only libc behind us. */
static struct {
    execve_function *execve;
    execv_function *execv, *execvp;
} next;

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
        else if ((value = text_after(entry, "VIA=")))
            wishes.silence |= text_equal(value, "seccomp");
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

    if (dlsym) {
        next.execve = (execve_function *)dlsym(RTLD_NEXT, "execve");
        next.execv = (execv_function *)dlsym(RTLD_NEXT, "execv");
        next.execvp = (execv_function *)dlsym(RTLD_NEXT, "execvp");
    }
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

/* What execvp(3) will find: the first that can be executed. */
APART static void consider_found(const char *file) {
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
            consider(path, own_environment());
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

int execve(const char *path, char *const arguments[], char *const environment[]) {
    if (*the_run)
        consider(path, environment);
    if (next.execve)
        return next.execve(path, arguments, environment);
    return by_kernel(path, arguments, environment);
}

int execv(const char *path, char *const arguments[]) {
    if (*the_run)
        consider(path, own_environment());
    if (next.execv)
        return next.execv(path, arguments);
    return by_kernel(path, arguments, own_environment());
}

int execvp(const char *file, char *const arguments[]) {
    if (*the_run && has_slash(file))
        consider(file, own_environment());
    else if (*the_run && *file)
        consider_found(file);
    if (next.execvp)
        return next.execvp(file, arguments);
    if (execvpe)
        return execvpe(file, arguments, own_environment());
    errno = ENOSYS;
    return -1;
}
