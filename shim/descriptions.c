/* Is an open file description still open anywhere but in the keeper? A lock lives exactly as long:
 * flock(2). kcmp(2) decides; where it is forbidden (seccomp filters of containers) a flag of the
 * description does. What cannot be seen counts as open: a lock may last longer but never less.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "processes.h"

#define PATH_SIZE 4096
/* The last real-time signal: a value of F_SETSIG that no program sets on a file. */
#define SIGNAL_MARK 64
#define FLAG_TURNS 6 /* even, so that the flag is as before in the end */

static long kcmp_file(pid_t other, int mine, int its) {
    return syscall(SYS_kcmp, native_self(), other, KCMP_FILE, (unsigned long)mine,
                   (unsigned long)its);
}

/* Without kcmp: a property of the description that nobody uses for files, fcntl(2) F_SETSIG, is
 * changed by one descriptor and looked for by the other. */
static int same_by_mark(int one, int other) {
    int before = fcntl(one, F_GETSIG);
    int mark = before == SIGNAL_MARK ? SIGNAL_MARK - 1 : SIGNAL_MARK;
    int same;

    if (before < 0 || fcntl(one, F_SETSIG, mark) < 0)
        return -errno;
    same = fcntl(other, F_GETSIG) == mark;
    fcntl(one, F_SETSIG, before);
    return same;
}

int native_same_description(int one, int other) {
    long order = kcmp_file(native_self(), one, other);

    return order < 0 ? same_by_mark(one, other) : order == 0;
}

int native_compare(int one, int other, int *error) {
    long order = kcmp_file(native_self(), one, other);

    *error = order < 0 ? errno : 0;
    return order == 1 ? -1 : order == 2 ? 1 : 0;
}

static int read_link(int directory, const char *name, char *path) {
    ssize_t length = readlinkat(directory, name, path, PATH_SIZE - 1);

    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int path_of(pid_t pid, int number, char *path) {
    char name[64];

    snprintf(name, sizeof name, "/proc/%d/fd/%d", pid, number);
    return read_link(AT_FDCWD, name, path);
}

/* 1 or 0: the flag that descriptor `number` of process `pid` has, proc(5) fdinfo; -1: not to be
 * seen. */
static int flag_in(pid_t pid, int number) {
    char name[64];
    long flags;

    snprintf(name, sizeof name, "/proc/%d/fdinfo/%d", pid, number);
    flags = file_field(name, "flags:", 8);
    return flags < 0 ? -1 : (flags & O_NONBLOCK) != 0;
}

static int turn_flag(int kept) {
    int flags = fcntl(kept, F_GETFL);

    return flags < 0 ? -1 : fcntl(kept, F_SETFL, flags ^ O_NONBLOCK);
}

/* Without kcmp: a flag that files have and don't heed, O_NONBLOCK, is turned by our descriptor and
 * back again; does it turn in the other? The program may set it at the same moment, so only a flag
 * that has stayed through all the turns says no. */
static int same_by_flag(int kept, pid_t pid, int number) {
    int before = flag_in(pid, number);

    for (int turns = 1; turns <= FLAG_TURNS; turns++) {
        if (before < 0 || turn_flag(kept) < 0)
            return 1;
        if (flag_in(pid, number) == before)
            continue;
        if (turns % 2)
            turn_flag(kept);
        return 1;
    }
    return 0;
}

/* Spares most descriptors that look. A path that changes meanwhile or is too long for proc(5) says
 * nothing. */
static int may_have_path_of(int kept, pid_t pid, int number) {
    char one[PATH_SIZE], other[PATH_SIZE], again[PATH_SIZE];

    if (!path_of(pid, number, other))
        return errno == ENAMETOOLONG;
    return !path_of(native_self(), kept, one) || strcmp(one, other) == 0 ||
           !path_of(native_self(), kept, again) || strcmp(one, again) != 0;
}

int native_was_closed_at(int kept, int pid, int number) {
    char name[64];
    struct dirent *entry;
    DIR *tasks;
    int found;

    if (native_is_open_at(kept, pid, number) || process_is_hidden(pid))
        return 0;
    /* The main thread may have ended, or one have a table of its own: unshare(2). */
    snprintf(name, sizeof name, "/proc/%d/task", pid);
    tasks = opendir(name);
    found = !tasks && errno != ENOENT;
    while (tasks && !found && (entry = readdir(tasks)))
        found = *entry->d_name != '.' && native_is_open_at(kept, atoi(entry->d_name), number);
    if (tasks)
        closedir(tasks);
    return !found;
}

int native_is_open_at(int kept, int pid, int number) {
    long order = kcmp_file(pid, kept, number);

    if (order >= 0)
        return order == 0;
    return (errno == EPERM || errno == EACCES || errno == ENOSYS) &&
           may_have_path_of(kept, pid, number) && same_by_flag(kept, pid, number);
}
