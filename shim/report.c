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

void report(const struct config *config, int descriptor, const char *what) {
    char path[1024];
    char line[2048];
    struct text text = text_over(line, sizeof line - 1);

    if (config->quiet)
        return;
    path_of_descriptor(descriptor, path, sizeof path);
    text_add(&text, "flockshim: cannot lock ");
    text_add(&text, *path ? path : "a file");
    text_add(&text, ": ");
    text_add(&text, what);
    line[text.length++] = '\n';
    sys3(SYS_write, 2, line, text.length);
}
