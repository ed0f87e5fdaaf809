/* Is an open file description still open anywhere but in the keeper? A lock lives exactly as long:
 * flock(2). kcmp(2) decides; where it is forbidden (seccomp filters of containers) two descriptors
 * with the same path are taken for one description, so that a lock may last longer but never less.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "native.h"
#include "processes.h"

#define PATH_SIZE 4096
/* The last real-time signal: a value of F_SETSIG that no program sets on a file. */
#define SIGNAL_MARK 64

struct search {
    int kept;
    int known_pid;
    struct native_place *place;
    char mapping[64]; /* how a line of /proc/PID/maps names the file: by number, or by path */
    char path[PATH_SIZE];
};

static int path_of(pid_t pid, int number, char *path) {
    char link[64];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/%d/fd/%d", pid, number);
    length = readlink(link, path, PATH_SIZE - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static long kcmp(pid_t one, pid_t other, int type, unsigned long a, unsigned long b) {
    return syscall(SYS_kcmp, one, other, type, a, b);
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
    pid_t self = getpid();
    long order = kcmp(self, self, KCMP_FILE, (unsigned long)one, (unsigned long)other);

    if (order < 0)
        return same_by_mark(one, other);
    return order == 0;
}

int native_compare(int one, int other, int *error) {
    pid_t self = getpid();
    long order = kcmp(self, self, KCMP_FILE, (unsigned long)one, (unsigned long)other);

    *error = order < 0 ? errno : 0;
    return order == 1 ? -1 : order == 2 ? 1 : 0;
}

static int same_path(int kept, pid_t pid, int number) {
    char one[PATH_SIZE], other[PATH_SIZE];

    return path_of(getpid(), kept, one) && path_of(pid, number, other) && strcmp(one, other) == 0;
}

int native_is_open_at(int kept, int pid, int number) {
    long order = kcmp(getpid(), pid, KCMP_FILE, (unsigned long)kept, (unsigned long)number);

    if (order >= 0)
        return order == 0;
    return (errno == EPERM || errno == EACCES || errno == ENOSYS) && same_path(kept, pid, number);
}

static int is_kept(const struct search *search, pid_t pid, int number) {
    return native_is_open_at(search->kept, pid, number);
}

int native_is_open_in(int kept, int pid) {
    struct search search = {.kept = kept};

    return descriptors_find(pid, is_kept, &search) >= 0;
}

static int find_among_descriptors(void *argument, pid_t pid) {
    struct search *search = argument;
    int number = descriptors_find(pid, is_kept, search);

    if (number < 0)
        return 0;
    *search->place = (struct native_place){.pid = pid, .number = number};
    return 1;
}

static int is_carrying(const struct search *search, pid_t pid, int number) {
    char path[PATH_SIZE];

    return path_of(pid, number, path) && strncmp(path, "socket:[", 8) == 0 &&
           socket_may_carry(pid, number, search->kept);
}

static int has_path(const struct search *search, pid_t pid, int number) {
    char path[PATH_SIZE];

    return path_of(pid, number, path) && strcmp(path, search->path) == 0;
}

/* The kernel does not say which description a mapping was made by. One in a process that has
 * another description of the file open is taken for a mapping of that: else a program's crash would
 * block all those that have the file mapped. */
static int is_mapped(const struct search *search, pid_t pid) {
    char maps[64];

    snprintf(maps, sizeof maps, "/proc/%d/maps", pid);
    return file_has_line_with(maps, search->mapping, search->path) &&
           descriptors_find(pid, has_path, search) < 0;
}

/* A description without a descriptor: mapped into memory, mmap(2), or under way in a socket. A
 * process that has changed its privileges may not be looked into; the one that locked is then taken
 * to hold on. */
static int find_hidden(void *argument, pid_t pid) {
    struct search *search = argument;

    if (!is_mapped(search, pid) && descriptors_find(pid, is_carrying, search) < 0 &&
        !(pid == search->known_pid && !descriptors_readable(pid)))
        return 0;
    *search->place = (struct native_place){.pid = pid, .number = -1};
    return 1;
}

/* Descriptors are looked at again in the end: a description may move from a socket into a process
 * that had been looked at before, or to a forked child, while we look. */
int native_find_open(int kept, uint64_t device, uint64_t inode, int known_pid,
                     struct native_place *place) {
    struct search search = {.kept = kept, .known_pid = known_pid, .place = place};

    path_of(getpid(), kept, search.path);
    snprintf(search.mapping, sizeof search.mapping, " %02x:%02x %lu ", major(device), minor(device),
             (unsigned long)inode);
    return processes_find(find_among_descriptors, &search) ||
           processes_find(find_hidden, &search) || processes_find(find_among_descriptors, &search);
}
