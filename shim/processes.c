#include "processes.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

/* 1, 0, or -1 where kcmp(2) is forbidden. */
static int same_table(pid_t one, pid_t other) {
    long order = syscall(SYS_kcmp, one, other, KCMP_FILES, 0, 0);

    return order < 0 ? -1 : order == 0;
}

/* The keeper's standby, which is its parent, shares the keeper's table. */
static int is_keeper(pid_t pid) {
    int same = same_table(native_self(), pid);

    return pid == native_self() || same == 1 || (same < 0 && pid == getppid());
}

static pid_t number_of(const struct dirent *entry) {
    return isdigit((unsigned char)*entry->d_name) ? atoi(entry->d_name) : -1;
}

/* Kernel threads share one table and no memory with one another, and so do main threads that have
 * ended: to look at one is enough. */
static int is_like(pid_t last, pid_t pid) {
    return last && same_table(last, pid) == 1 && syscall(SYS_kcmp, last, pid, KCMP_VM, 0, 0) == 0;
}

/* What was not looked at for want of descriptors or memory is not known to be closed. */
static int failure(void) {
    return errno == EMFILE || errno == ENFILE || errno == ENOMEM ? -errno : -1;
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
    if (stat(name, &status) < 0 || status.st_nlink == 3)
        return 0;
    tasks = opendir(name);
    if (!tasks)
        return failure() == -1 ? 0 : failure();
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
        return -errno;
    while (!found && (entry = readdir(processes))) {
        pid_t pid = number_of(entry);

        if (pid <= 0 || is_keeper(pid))
            continue;
        if (!is_like(last, pid))
            found = test(search, pid);
        if (!found)
            found = threads_find(pid, test, search);
        last = pid;
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
        return failure();
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

/* One that nobody has waited for yet is still there, but has closed everything; one of which only
 * the main thread has ended has not. pidfd_open(2) came with Linux 5.3. */
static int has_ended(pid_t pid) {
    struct pollfd process = {.fd = native_pidfd_open(pid), .events = POLLIN};
    struct mapped_text status;
    char name[64];
    int ended;

    if (process.fd >= 0) {
        ended = poll(&process, 1, 0) == 1;
        close(process.fd);
        return ended;
    }
    if (kill(pid, 0) < 0 && errno == ESRCH)
        return 1;
    snprintf(name, sizeof name, "/proc/%d/status", pid);
    if (!mapped_text_read(&status, name))
        return 0;
    ended = mapped_text_mentions(&status, "\nState:\tZ", "") &&
            mapped_text_mentions(&status, "\nThreads:\t1\n", "");
    mapped_text_free(&status);
    return ended;
}

/* What may not be looked into is not even listed where /proc is mounted with hidepid, proc(5).
 * Links tell: a list of descriptors may be readable though they themselves are not. */
int process_is_hidden(pid_t pid) {
    char name[64], byte;
    struct dirent *entry;
    DIR *tasks;
    int readable = 0;

    snprintf(name, sizeof name, "/proc/%d/task", pid);
    tasks = opendir(name);
    while (tasks && !readable && (entry = readdir(tasks))) {
        snprintf(name, sizeof name, "%d/cwd", number_of(entry));
        readable = readlinkat(dirfd(tasks), name, &byte, 1) >= 0;
    }
    if (tasks)
        closedir(tasks);
    return !readable && pid > 0 && !has_ended(pid);
}
