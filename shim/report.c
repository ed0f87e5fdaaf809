#include <fcntl.h>

#include "report.h"
#include "syscalls.h"
#include "text.h"

void path_of_descriptor(int descriptor, char *path, unsigned long size) {
    char link[40];
    struct text name = text_over(link, sizeof link);
    long length;

    text_add(&name, "/proc/self/fd/");
    text_add_number(&name, descriptor);
    length = sys4(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void say(const char *before, int descriptor, const char *between, const char *after) {
    char path[1024];
    char line[2048];
    struct text text = text_over(line, sizeof line - 1);

    path_of_descriptor(descriptor, path, sizeof path);
    text_add(&text, "flockshim: ");
    text_add(&text, before);
    text_add(&text, *path ? path : "a file");
    text_add(&text, between);
    text_add(&text, after);
    line[text.length++] = '\n';
    sys3(SYS_write, 2, line, text.length);
}

void report(const struct config *config, int descriptor, const char *what) {
    if (!config->quiet)
        say("cannot lock ", descriptor, ": ", what);
}

void report_waiting(int descriptor, const char *holder) {
    say("waiting for the lock on ", descriptor, ", held by ", holder);
}

void report_waited(int descriptor) {
    say("got the lock on ", descriptor, "", "");
}
