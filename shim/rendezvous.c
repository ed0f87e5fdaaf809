#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "rendezvous.h"
#include "syscalls.h"
#include "text.h"

#define FNV_OFFSET 14695981039346656037u
#define FNV_PRIME 1099511628211u

static uint64_t hash(uint64_t sum, const void *bytes, long size) {
    const unsigned char *at = bytes;

    while (size-- > 0)
        sum = (sum ^ *at++) * FNV_PRIME;
    return sum;
}

/* /proc/self describes the main thread, which may have ended; thread-self came with Linux 3.17. */
static uint64_t hash_file_number(uint64_t sum, const char *path, const char *instead) {
    struct stat status;

    if (sys4(SYS_newfstatat, AT_FDCWD, path, &status, 0) < 0 &&
        sys4(SYS_newfstatat, AT_FDCWD, instead, &status, 0) < 0)
        return sum;
    return hash(sum, &status.st_ino, sizeof status.st_ino);
}

/* Control groups have the same names in every control group namespace (Linux 4.6). */
static uint64_t hash_namespaces(uint64_t sum) {
    sum = hash_file_number(sum, "/proc/thread-self/ns/pid", "/proc/self/ns/pid");
    return hash_file_number(sum, "/proc/thread-self/ns/cgroup", "/proc/self/ns/cgroup");
}

static uint64_t hash_control_group(uint64_t sum) {
    char buffer[2048];
    long got;
    long file = sys4(SYS_openat, AT_FDCWD, "/proc/thread-self/cgroup", O_RDONLY | O_CLOEXEC, 0);

    if (file == -ENOENT)
        file = sys4(SYS_openat, AT_FDCWD, "/proc/self/cgroup", O_RDONLY | O_CLOEXEC, 0);
    if (file < 0)
        return sum;
    while ((got = sys3(SYS_read, file, buffer, sizeof buffer)) > 0)
        sum = hash(sum, buffer, got);
    sys1(SYS_close, file);
    return sum;
}

static void add_default_directory(struct text *text) {
    int shared_memory = sys3(SYS_faccessat, AT_FDCWD, "/dev/shm", W_OK | X_OK) == 0;

    text_add(text, shared_memory ? "/dev/shm/flockshim-" : "/tmp/flockshim-");
    text_add_number(text, sys0(SYS_geteuid));
}

/* Where a process belongs costs as much to read as all the rest of a lock call, and nearly never
 * changes: its control group at most by being moved, its pid namespace never. So the last answer
 * stands for a second, for this process only (not for a child that inherits the memory, nor for a
 * parent that shares it by vfork). Pid 1 is left out: its child may be pid 1 too, of a namespace of
 * its own. */
static struct {
    uint64_t stamp; /* pid and second of the answer; 0 while it is being written */
    uint64_t key;
} last;

static uint64_t stamp_now(void) {
    struct timespec now = {0};
    uint64_t pid = (uint64_t)sys0(SYS_getpid);

    sys2(SYS_clock_gettime, CLOCK_MONOTONIC_COARSE, &now);
    return pid == 1 ? 0 : pid << 32 | ((uint64_t)now.tv_sec & 0xffffffff);
}

static uint64_t find_key(void) {
    uint64_t stamp = stamp_now();
    uint64_t key = __atomic_load_n(&last.key, __ATOMIC_ACQUIRE);

    if (stamp && __atomic_load_n(&last.stamp, __ATOMIC_ACQUIRE) == stamp &&
        __atomic_load_n(&last.key, __ATOMIC_ACQUIRE) == key)
        return key;
    key = hash_control_group(hash_namespaces(FNV_OFFSET));
    __atomic_store_n(&last.stamp, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&last.key, key, __ATOMIC_SEQ_CST);
    __atomic_store_n(&last.stamp, stamp, __ATOMIC_SEQ_CST);
    return key;
}

int rendezvous_set_key(struct rendezvous *rendezvous, const char *key) {
    struct text text = text_over(rendezvous->key, sizeof rendezvous->key);
    struct text path = text_over(rendezvous->address.sun_path, sizeof rendezvous->address.sun_path);

    text_add(&text, key);
    rendezvous->address.sun_family = AF_UNIX;
    text_add(&path, rendezvous->directory);
    text_add(&path, "/k-");
    text_add(&path, rendezvous->key);
    text_add(&path, ".sock");
    return path.truncated ? -ENAMETOOLONG : 0;
}

int rendezvous_find(const struct config *config, struct rendezvous *rendezvous) {
    struct text directory = text_over(rendezvous->directory, sizeof rendezvous->directory);
    char digits[RENDEZVOUS_KEY_SIZE];
    struct text key = text_over(digits, sizeof digits);

    if (*config->directory)
        text_add(&directory, config->directory);
    else
        add_default_directory(&directory);
    if (directory.truncated)
        return -ENAMETOOLONG;
    text_add_hex(&key, find_key());
    return rendezvous_set_key(rendezvous, digits);
}

static void add_short_hex(struct text *text, uint64_t number) {
    char digits[RENDEZVOUS_KEY_SIZE];
    struct text padded = text_over(digits, sizeof digits);
    const char *first = digits;

    text_add_hex(&padded, number);
    while (first[0] == '0' && first[1])
        first++;
    text_add(text, first);
}

/* The name that host.py gives a proxy. */
int rendezvous_has_proxy(const struct rendezvous *rendezvous,
                         const struct protocol_request *request) {
    char path[CONFIG_MAX_DIRECTORY + 64];
    struct text text = text_over(path, sizeof path);

    text_add(&text, rendezvous->directory);
    text_add(&text, request->family == FAMILY_FLOCK ? "/p-" : "/r-");
    add_short_hex(&text, request->device);
    text_add(&text, "-");
    add_short_hex(&text, request->inode);
    return sys3(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
}
