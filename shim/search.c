/* Are open file descriptions still open anywhere but in the keeper? The kernel counts, but does not
 * tell; so every process of the host is asked, for all the descriptions in question at once. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "native.h"
#include "processes.h"

#define PATH_SIZE 4096

struct search {
    struct native_suspect **suspects; /* in the order of native_compare */
    int count;
    int missing; /* of which no place is known yet */
    pid_t self;
};

static void found_at(struct search *search, struct native_suspect *suspect, pid_t pid, int number) {
    if (!suspect->pid)
        search->missing--;
    suspect->pid = pid;
    suspect->number = number;
}

static int by_order(const void *one, const void *other) {
    int error;

    return native_compare((*(struct native_suspect *const *)one)->kept,
                          (*(struct native_suspect *const *)other)->kept, &error);
}

static int read_link(int directory, int number, char *path) {
    char name[16];
    ssize_t length;

    snprintf(name, sizeof name, "%d", number);
    length = readlinkat(directory, name, path, PATH_SIZE - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* Without kcmp(2), one by one. Returns whether to leave this process, of which nothing can be seen.
 */
static int look_without_order(struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    if (!read_link(directory, number, path))
        return errno == EACCES || errno == EPERM;
    for (int i = 0; i < search->count; i++) {
        struct native_suspect *suspect = search->suspects[i];

        if (!suspect->pid && strcmp(path, suspect->path) == 0 &&
            native_is_open_at(suspect->kept, pid, number))
            found_at(search, suspect, pid, number);
    }
    return 0;
}

static int look_at_descriptor(struct search *search, pid_t pid, int directory, int number) {
    int low = 0, high = search->count;

    while (low < high) {
        int middle = (low + high) / 2;
        long order = syscall(SYS_kcmp, search->self, pid, KCMP_FILE,
                             (unsigned long)search->suspects[middle]->kept, (unsigned long)number);

        if (order < 0)
            return errno != EBADF && look_without_order(search, pid, directory, number);
        if (order == 0) {
            found_at(search, search->suspects[middle], pid, number);
            break;
        }
        if (order == 1)
            low = middle + 1;
        else
            high = middle;
    }
    return !search->missing;
}

static int look_at_descriptors(struct search *search, pid_t pid) {
    int result = descriptors_find(pid, look_at_descriptor, search);

    return result < -1 ? result : !search->missing;
}

static int look_at_socket(struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    if (!read_link(directory, number, path) || strncmp(path, "socket:[", 8) != 0 ||
        socket_under_way(pid, number) <= 0)
        return 0;
    for (int i = 0; i < search->count; i++) {
        struct native_suspect *suspect = search->suspects[i];

        if (!suspect->pid && socket_may_carry(pid, number, suspect->kept))
            found_at(search, suspect, pid, -1);
    }
    return !search->missing;
}

static int has_path(struct search *search, pid_t pid, int directory, int number) {
    char path[PATH_SIZE];

    (void)pid;
    return read_link(directory, number, path) && strcmp(path, search->suspects[0]->path) == 0;
}

/* The kernel does not say which description a mapping was made by. One in a process that has
 * another description of the file open is taken for a mapping of that: else a program's crash would
 * block all those that have the file mapped. */
static void look_at_mappings(struct search *search, pid_t pid) {
    char name[64];
    struct mapped_text maps;

    snprintf(name, sizeof name, "/proc/%d/maps", pid);
    if (!mapped_text_read(&maps, name))
        return;
    for (int i = 0; i < search->count; i++) {
        struct native_suspect *suspect = search->suspects[i];
        struct search one = {.suspects = &suspect, .count = 1};

        if (!suspect->pid && mapped_text_mentions(&maps, suspect->mapping, suspect->path) &&
            descriptors_find(pid, has_path, &one) < 0)
            found_at(search, suspect, pid, -1);
    }
    mapped_text_free(&maps);
}

/* Also without a descriptor: under way in a socket, or mapped into memory, mmap(2). Sockets come
 * first: what is received meanwhile is found among the descriptors. */
static int look_everywhere(struct search *search, pid_t pid) {
    descriptors_find(pid, look_at_socket, search);
    look_at_mappings(search, pid);
    return look_at_descriptors(search, pid);
}

static void describe(struct native_suspect *suspect) {
    char link[64];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/self/fd/%d", suspect->kept);
    length = readlink(link, suspect->path, PATH_SIZE - 1);
    suspect->path[length < 0 ? 0 : length] = 0;
    snprintf(suspect->mapping, sizeof suspect->mapping, " %02x:%02x %lu ", major(suspect->device),
             minor(suspect->device), (unsigned long)suspect->inode);
}

/* A process that has changed its privileges may not be looked into; the one that locked is then
 * taken to hold on. */
static void trust_hidden(struct search *search) {
    for (int i = 0; i < search->count; i++) {
        struct native_suspect *suspect = search->suspects[i];

        if (!suspect->pid && process_is_hidden(suspect->known_pid))
            found_at(search, suspect, suspect->known_pid, -1);
    }
}

/* Twice: a description may move while we look, by a socket or to a forked child, into a process
 * that had been looked at before. */
int native_find_open(struct native_suspect *suspects, int count) {
    struct search search = {.count = count, .missing = count, .self = native_self()};
    int found;

    search.suspects = malloc((size_t)count * sizeof *search.suspects);
    if (!search.suspects)
        return -ENOMEM;
    for (int i = 0; i < count; i++) {
        search.suspects[i] = &suspects[i];
        describe(&suspects[i]);
    }
    qsort(search.suspects, (size_t)count, sizeof *search.suspects, by_order);
    found = processes_find(look_at_descriptors, &search);
    if (!found)
        found = processes_find(look_everywhere, &search);
    if (!found)
        trust_hidden(&search);
    free(search.suspects);
    return found < 0 ? found : search.missing;
}

static int look_for_one(struct search *search, pid_t pid, int directory, int number) {
    (void)directory;
    return native_is_open_at(search->suspects[0]->kept, pid, number);
}

int native_is_open_in(int kept, int pid) {
    struct native_suspect suspect = {.kept = kept};
    struct native_suspect *only = &suspect;
    struct search search = {.suspects = &only, .count = 1};

    return descriptors_find(pid, look_for_one, &search) >= 0;
}
