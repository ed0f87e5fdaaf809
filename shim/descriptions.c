/* Is an open file description still open anywhere but in the keeper? A lock lives exactly as long:
 * flock(2). kcmp(2) decides; where it is forbidden (seccomp filters of containers) a flag of the
 * description does. What cannot be seen counts as open: a lock may last longer but never less.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "native.h"
#include "processes.h"

#define PATH_SIZE 4096
/* The last real-time signal: a value of F_SETSIG that no program sets on a file. */
#define SIGNAL_MARK 64
#define FLAG_TURNS 6 /* even, so that the flag is as before in the end */

struct search {
    int kept;
    int known_pid;
    struct native_place *place;
    char mapping[64]; /* how a line of /proc/PID/maps names the file: by number, or by path */
    char path[PATH_SIZE];
};

static long kcmp_file(pid_t other, int mine, int its) {
    return syscall(SYS_kcmp, getpid(), other, KCMP_FILE, (unsigned long)mine, (unsigned long)its);
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
    long order = kcmp_file(getpid(), one, other);

    return order < 0 ? same_by_mark(one, other) : order == 0;
}

int native_compare(int one, int other, int *error) {
    long order = kcmp_file(getpid(), one, other);

    *error = order < 0 ? errno : 0;
    return order == 1 ? -1 : order == 2 ? 1 : 0;
}

static int read_link(int directory, const char *name, char *path) {
    ssize_t length = readlinkat(directory, name, path, PATH_SIZE - 1);

    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int path_in(int directory, int number, char *path) {
    char name[16];

    snprintf(name, sizeof name, "%d", number);
    return read_link(directory, name, path);
}

/* The list of descriptors of a process may be readable though they themselves are not. */
static int is_hidden(const struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    (void)search;
    (void)pid;
    return !path_in(directory, number, path) && (errno == EACCES || errno == EPERM);
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
    return !path_of(getpid(), kept, one) || strcmp(one, other) == 0 ||
           !path_of(getpid(), kept, again) || strcmp(one, again) != 0;
}

int native_is_open_at(int kept, int pid, int number) {
    long order = kcmp_file(pid, kept, number);

    if (order >= 0)
        return order == 0;
    return (errno == EPERM || errno == EACCES || errno == ENOSYS) &&
           may_have_path_of(kept, pid, number) && same_by_flag(kept, pid, number);
}

static int is_kept(const struct search *search, pid_t pid, int directory, int number) {
    (void)directory;
    return native_is_open_at(search->kept, pid, number);
}

int native_is_open_in(int kept, int pid) {
    struct search search = {.kept = kept};

    return descriptors_find(pid, is_kept, &search) >= 0;
}

static int found_at(struct search *search, pid_t pid, int number) {
    *search->place = (struct native_place){.pid = pid, .number = number};
    return 1;
}

static int find_among_descriptors(struct search *search, pid_t pid) {
    int number = descriptors_find(pid, is_kept, search);

    return number >= 0 && found_at(search, pid, number);
}

static int is_carrying(const struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    return path_in(directory, number, path) && strncmp(path, "socket:[", 8) == 0 &&
           socket_may_carry(pid, number, search->kept);
}

static int has_path(const struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    (void)pid;
    return path_in(directory, number, path) && strcmp(path, search->path) == 0;
}

/* The kernel does not say which description a mapping was made by. One in a process that has
 * another description of the file open is taken for a mapping of that: else a program's crash would
 * block all those that have the file mapped. */
static int is_mapped(struct search *search, pid_t pid) {
    char maps[64];

    snprintf(maps, sizeof maps, "/proc/%d/maps", pid);
    return file_mentions(maps, search->mapping, search->path) &&
           descriptors_find(pid, has_path, search) < 0;
}

/* Also without a descriptor: mapped into memory, mmap(2), or under way in a socket. Sockets come
 * first: what is received meanwhile is found among the descriptors. A process that has changed its
 * privileges may not be looked into; the one that locked is then taken to hold on. */
static int find_anyhow(struct search *search, pid_t pid) {
    int carried = descriptors_find(pid, is_carrying, search);
    int is_known = pid == search->known_pid;

    if (carried >= 0 || (is_known && carried == -EACCES) || is_mapped(search, pid) ||
        (is_known && descriptors_find(pid, is_hidden, search) >= 0))
        return found_at(search, pid, -1);
    return find_among_descriptors(search, pid);
}

/* Twice: a description may move while we look, by a socket or to a forked child, into a process
 * that had been looked at before. */
int native_find_open(int kept, uint64_t device, uint64_t inode, int known_pid,
                     struct native_place *place) {
    struct search search = {.kept = kept, .known_pid = known_pid, .place = place};

    path_of(getpid(), kept, search.path);
    snprintf(search.mapping, sizeof search.mapping, " %02x:%02x %lu ", major(device), minor(device),
             (unsigned long)inode);
    return processes_find(find_among_descriptors, &search) || processes_find(find_anyhow, &search);
}
