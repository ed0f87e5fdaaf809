#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>

#include "report.h"
#include "syscalls.h"
#include "text.h"

/* null(4), as stat(2) shows it. */
#define NULL_DEVICE 0x103

void path_of_descriptor(int descriptor, char *path, unsigned long size) {
    char link[40];
    struct text name = text_over(link, sizeof link);
    long length;

    text_add(&name, "/proc/self/fd/");
    text_add_number(&name, descriptor);
    length = sys4(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    path[length < 0 ? 0 : length] = 0;
}

/* A program that has closed its standard error may have opened a file of its own there since. */
static int is_standard_error(const struct config *config) {
    struct stat status;

    return sys2(SYS_fstat, 2, &status) == 0 &&
           (!S_ISREG(status.st_mode) ||
            (status.st_dev == config->error_device && status.st_ino == config->error_inode));
}

/* Neither a pipe that nobody reads may make a difference to the program (pipe(7), SIGPIPE) nor a
 * terminal that stops writers in the background (termios(3), TOSTOP). */
static void write_error(const struct config *config, const char *line, size_t length) {
    const uint64_t pipe = (uint64_t)1 << (SIGPIPE - 1);
    const uint64_t blocked = pipe | (uint64_t)1 << (SIGTTOU - 1);
    const struct timespec at_once = {0};
    uint64_t before, pending = 0;

    if (!is_standard_error(config))
        return;
    sys2(SYS_rt_sigpending, &pending, sizeof pending);
    sys4(SYS_rt_sigprocmask, SIG_BLOCK, &blocked, &before, sizeof blocked);
    if (sys3(SYS_write, 2, line, length) == -EPIPE && !(pending & pipe))
        sys4(SYS_rt_sigtimedwait, &pipe, NULL, &at_once, sizeof pipe);
    sys4(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
}

/* A name must not make a terminal do something. */
static void make_printable(char *path) {
    for (unsigned char *at = (unsigned char *)path; *at; at++) {
        int second_set = at[0] == 0xc2 && at[1] >= 0x80 && at[1] < 0xa0; /* C1, in UTF-8 */

        if (*at < ' ' || *at == 127 || second_set)
            *at = '?';
        if (second_set)
            *++at = '?';
    }
}

static void say(const struct config *config, const char *before, int descriptor,
                const char *between, const char *after) {
    char path[1024];
    char line[2048];
    struct text text = text_over(line, sizeof line - 1);

    path_of_descriptor(descriptor, path, sizeof path);
    make_printable(path);
    text_add(&text, "flockshim: ");
    text_add(&text, before);
    text_add(&text, *path ? path : "a file");
    text_add(&text, between);
    text_add(&text, after);
    line[text.length++] = '\n';
    write_error(config, line, text.length);
}

void report(const struct config *config, int descriptor, const char *what) {
    if (!config->quiet)
        say(config, "cannot lock ", descriptor, ": ", what);
}

void report_timeout(const struct config *config, int descriptor, const char *holder) {
    if (!config->quiet)
        say(config, "cannot lock ", descriptor, ": timed out (--timeout), held by ", holder);
}

void report_waiting(const struct config *config, int descriptor, const char *holder) {
    say(config, "waiting for the lock on ", descriptor, ", held by ", holder);
}

void report_waited(const struct config *config, int descriptor, long seconds) {
    char after[32];
    struct text text = text_over(after, sizeof after);

    if (!seconds)
        return;
    text_add(&text, " after ");
    text_add_number(&text, seconds);
    text_add(&text, " s");
    say(config, "got the lock on ", descriptor, after, "");
}

int report_would_be_seen(const struct config *config) {
    struct pollfd standard_error = {.fd = 2, .events = POLLOUT};
    struct timespec at_once = {0};
    struct stat status;

    return is_standard_error(config) && sys2(SYS_fstat, 2, &status) == 0 &&
           !(S_ISCHR(status.st_mode) && status.st_rdev == NULL_DEVICE) &&
           sys4(SYS_ppoll, &standard_error, 1, &at_once, NULL) == 1 &&
           standard_error.revents == POLLOUT;
}

void report_not_covered(const struct config *config, const char *program, const char *why) {
    char line[1536];
    struct text text = text_over(line, 1024);

    text_add(&text, "flockshim: ");
    text_add(&text, program);
    make_printable(line);
    text.size = sizeof line - 1;
    text_add(&text, " ");
    text_add(&text, why);
    text_add(&text, " and not covered: it locks as without flockshim; to cover it, use flockshim "
                    "--via seccomp COMMAND");
    line[text.length++] = '\n';
    write_error(config, line, text.length);
}
