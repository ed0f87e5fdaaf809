#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "processes.h"

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

/* Threads share the table of their process, as a rule; unshare(CLONE_FILES) makes an exception, and
 * the main thread may have ended while others go on (its table then shows empty). */
static int threads_find(pid_t pid, process_test test, void *argument) {
    char name[64];
    struct dirent *entry;
    DIR *tasks;
    int found = 0;

    snprintf(name, sizeof name, "/proc/%d/task", pid);
    tasks = opendir(name);
    if (!tasks)
        return 0;
    while (!found && (entry = readdir(tasks))) {
        pid_t thread = atoi(entry->d_name);

        if (thread > 0 && thread != pid && same_table(pid, thread) != 1)
            found = test(argument, thread);
    }
    closedir(tasks);
    return found;
}

int processes_find(process_test test, void *argument) {
    DIR *processes = opendir("/proc");
    struct dirent *entry;
    int found = 0;

    if (!processes)
        return 0;
    while (!found && (entry = readdir(processes))) {
        pid_t pid = isdigit((unsigned char)*entry->d_name) ? atoi(entry->d_name) : 0;

        if (pid > 0 && !is_keeper(pid))
            found = test(argument, pid) || threads_find(pid, test, argument);
    }
    closedir(processes);
    return found;
}

int descriptors_find(pid_t pid, descriptor_test test, const struct search *search) {
    char name[64];
    struct dirent *entry;
    DIR *descriptors;
    int found = -1;

    snprintf(name, sizeof name, "/proc/%d/fd", pid);
    descriptors = opendir(name);
    if (!descriptors)
        return -1;
    while (found < 0 && (entry = readdir(descriptors))) {
        if (isdigit((unsigned char)*entry->d_name) && test(search, pid, atoi(entry->d_name)))
            found = atoi(entry->d_name);
    }
    closedir(descriptors);
    return found;
}

int descriptors_readable(pid_t pid) {
    char name[64];
    DIR *descriptors;

    snprintf(name, sizeof name, "/proc/%d/fd", pid);
    descriptors = opendir(name);
    if (descriptors)
        closedir(descriptors);
    return descriptors || (errno != EACCES && errno != EPERM);
}

static FILE *open_file(const char *name) {
    return fopen(name, "re");
}

long file_field(const char *file, const char *field) {
    FILE *stream = open_file(file);
    char line[256];
    long value = 0;

    while (stream && fgets(line, sizeof line, stream)) {
        if (strncmp(line, field, strlen(field)) == 0)
            value = atol(line + strlen(field));
    }
    if (stream)
        fclose(stream);
    return value;
}

static int ends_in(const char *line, size_t length, const char *path) {
    size_t wanted = strlen(path);

    return wanted && length > wanted && line[length - wanted - 1] == ' ' &&
           memcmp(line + length - wanted, path, wanted) == 0;
}

int file_has_line_with(const char *file, const char *part, const char *path) {
    FILE *stream = open_file(file);
    char *line = NULL;
    size_t size = 0;
    ssize_t length;
    int found = 0;

    while (stream && !found && (length = getline(&line, &size, stream)) > 0) {
        if (line[length - 1] == '\n')
            length--;
        found = strstr(line, part) || ends_in(line, (size_t)length, path);
    }
    free(line);
    if (stream)
        fclose(stream);
    return found;
}
