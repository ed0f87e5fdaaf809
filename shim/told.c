#include <fcntl.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>

#include "rendezvous.h"
#include "syscalls.h"
#include "text.h"
#include "told.h"

/* rendezvous.py removes them too. */
#define MARKER "told-"
#define SECONDS_KEPT (24 * 60 * 60)

/* The same conditions as in start.c, for the same reasons. */
static int open_directory(const char *path) {
    struct stat status;
    long directory;

    sys3(SYS_mkdirat, AT_FDCWD, path, 0700);
    directory =
        sys4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    if (directory >= 0 && sys2(SYS_fstat, directory, &status) == 0 &&
        status.st_uid == sys0(SYS_geteuid) && !(status.st_mode & 077))
        return (int)directory;
    if (directory >= 0)
        sys1(SYS_close, directory);
    return -1;
}

static int make_marker(int directory, const char *run) {
    char name[sizeof MARKER + TOLD_MAX_RUN];
    struct text text = text_over(name, sizeof name);
    long marker;

    text_add(&text, MARKER);
    text_add(&text, run);
    marker = sys4(SYS_openat, directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                  0600);
    if (marker < 0)
        return 0;
    sys1(SYS_close, marker);
    return 1;
}

static void remove_if_old(int directory, const char *name) {
    struct timespec now = {0};
    struct stat status;

    sys2(SYS_clock_gettime, CLOCK_REALTIME, &now);
    if (sys4(SYS_newfstatat, directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        status.st_mtime < now.tv_sec - SECONDS_KEPT)
        sys3(SYS_unlinkat, directory, name, 0);
}

/* Not every user has a keeper that would do so. Apart, so that its memory is on a small stack only
 * while it is needed. */
__attribute__((noinline)) static void remove_old_markers(int directory) {
    char entries[1024];
    long got;

    while ((got = sys3(SYS_getdents64, directory, entries, sizeof entries)) > 0) {
        for (long at = 0; at < got; at += *(unsigned short *)(entries + at + 16)) {
            /* struct linux_dirent64: d_reclen at 16, d_name at 19 */
            if (text_after(entries + at + 19, MARKER))
                remove_if_old(directory, entries + at + 19);
        }
    }
}

int told_first(const struct config *config, const char *run) {
    struct rendezvous rendezvous;
    int directory, first;

    if (rendezvous_find(config, &rendezvous) < 0)
        return 0;
    directory = open_directory(rendezvous.directory);
    if (directory < 0)
        return 0;
    first = make_marker(directory, run);
    if (first)
        remove_old_markers(directory);
    sys1(SYS_close, directory);
    return first;
}
