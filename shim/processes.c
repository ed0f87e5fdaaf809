#include "processes.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* 1, 0, or -1 where kcmp(2) is forbidden. */
static int same_table(pid_t one, pid_t other) {
    long order = syscall(SYS_kcmp, one, other, KCMP_FILES, 0, 0);

    return order < 0 ? -1 : order == 0;
}

/* The keeper's standby, which is its parent, shares the keeper's table. */
static int is_keeper(pid_t pid) {
    int same = same_table(getpid(), pid);

    return pid == getpid() || same == 1 || (same < 0 && pid == getppid());
}

static pid_t number_of(const struct dirent *entry) {
    return isdigit((unsigned char)*entry->d_name) ? atoi(entry->d_name) : -1;
}

/* Kernel threads share one table and no memory with one another: to look at one is enough. */
static int is_like(pid_t last, pid_t pid) {
    return last && same_table(last, pid) == 1 && syscall(SYS_kcmp, last, pid, KCMP_VM, 0, 0) == 0;
}

/* Threads share the table of their process, as a rule; unshare(CLONE_FILES) makes an exception, and
 * the main thread may have ended while others go on (its table then shows empty). */
static int threads_find(pid_t pid, process_test test, struct search *search) {
    struct stat status;
    struct dirent *entry;
    char name[64];
    DIR *tasks;
    int found = 0;

    snprintf(name, sizeof name, "/proc/%d/task", pid);
    /* The directory's link count is the number of threads and 2: no need to list a single one. */
    if (stat(name, &status) < 0 || status.st_nlink == 3 || !(tasks = opendir(name)))
        return 0;
    while (!found && (entry = readdir(tasks))) {
        pid_t thread = number_of(entry);

        if (thread > 0 && thread != pid && same_table(pid, thread) != 1)
            found = test(search, thread);
    }
    closedir(tasks);
    return found;
}

int processes_find(process_test test, struct search *search) {
    DIR *processes = opendir("/proc");
    struct dirent *entry;
    pid_t last = 0;
    int found = 0;

    if (!processes)
        return 0;
    while (!found && (entry = readdir(processes))) {
        pid_t pid = number_of(entry);

        if (pid > 0 && !is_keeper(pid) && !is_like(last, pid)) {
            found = test(search, pid) || threads_find(pid, test, search);
            last = pid;
        }
    }
    closedir(processes);
    return found;
}

int descriptors_find(pid_t pid, descriptor_test test, struct search *search) {
    char name[64];
    struct dirent *entry;
    DIR *descriptors;
    int found = -1;

    snprintf(name, sizeof name, "/proc/%d/fd", pid);
    descriptors = opendir(name);
    if (!descriptors)
        return errno == EACCES || errno == EPERM ? -EACCES : -1;
    while (found < 0 && (entry = readdir(descriptors))) {
        int number = number_of(entry);

        if (number >= 0 && test(search, pid, dirfd(descriptors), number))
            found = number;
    }
    closedir(descriptors);
    return found;
}

long file_field(const char *file, const char *field, int base) {
    FILE *stream = fopen(file, "re");
    char line[256];
    long value = -1;

    while (stream && fgets(line, sizeof line, stream)) {
        if (strncmp(line, field, strlen(field)) == 0)
            value = strtol(line + strlen(field), NULL, base);
    }
    if (stream)
        fclose(stream);
    return value;
}

int mapped_text_read(struct mapped_text *maps, const char *file) {
    size_t room = 65536;
    ssize_t got;
    int descriptor = open(file, O_RDONLY | O_CLOEXEC);

    *maps = (struct mapped_text){.text = descriptor < 0 ? NULL : malloc(room)};
    while (maps->text && (got = read(descriptor, maps->text + maps->size, room - maps->size)) > 0) {
        maps->size += (size_t)got;
        if (room - maps->size < 4096) {
            char *larger = realloc(maps->text, room *= 2);

            if (!larger)
                mapped_text_free(maps);
            maps->text = larger;
        }
    }
    if (descriptor >= 0)
        close(descriptor);
    return maps->text != NULL;
}

void mapped_text_free(struct mapped_text *maps) {
    free(maps->text);
}

static int has_line_ending(const struct mapped_text *maps, const char *path) {
    const char *at = maps->text, *end = maps->text + maps->size;
    size_t length = strlen(path);

    while (length && (at = memmem(at, (size_t)(end - at), path, length))) {
        if (at + length == end || at[length] == '\n')
            return 1;
        at++;
    }
    return 0;
}

int mapped_text_mentions(const struct mapped_text *maps, const char *part, const char *path) {
    return memmem(maps->text, maps->size, part, strlen(part)) || has_line_ending(maps, path);
}
