/* Record locks of supervised programs: what fcntl(2) is told stands in their memory. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "record.h"
#include "supervise.h"

/* Commands of programs of 32 bits, for a struct flock with 64-bit offsets. */
#define NARROW_F_GETLK64 12
#define NARROW_F_SETLKW64 14

/* i386 aligns what has 64 bits to 4 bytes only. */
struct packed_flock {
    int16_t type, whence;
    int64_t start, length;
    int32_t pid;
} __attribute__((packed));

struct narrow_flock {
    int16_t type, whence;
    int32_t start, length, pid;
};

union any_flock {
    struct flock wide;
    struct packed_flock packed;
    struct narrow_flock narrow;
};

static const size_t sizes[] = {
    [LAYOUT_64] = sizeof(struct flock),
    [LAYOUT_PACKED] = sizeof(struct packed_flock),
    [LAYOUT_32] = sizeof(struct narrow_flock),
};

static int is_narrow(const struct seccomp_data *data) {
    return data->arch == AUDIT_ARCH_I386 || data->arch == AUDIT_ARCH_ARM;
}

int is_record_call(const struct seccomp_data *data) {
    if (is_narrow(data))
        return data->nr == 55 || data->nr == 221;
    return (data->nr & 0xff) == SYS_fcntl;
}

/* 32-bit commands become ours. */
static void set_command(struct record_place *place, const struct seccomp_data *data) {
    place->command = (int)data->args[1];
    place->layout = LAYOUT_64;
    if (!is_narrow(data))
        return;
    if (place->command >= F_GETLK && place->command <= F_SETLKW) {
        place->layout = LAYOUT_32;
        return;
    }
    if (data->arch == AUDIT_ARCH_I386)
        place->layout = LAYOUT_PACKED;
    if (place->command >= NARROW_F_GETLK64 && place->command <= NARROW_F_SETLKW64)
        place->command += F_GETLK - NARROW_F_GETLK64;
}

static long copy(pid_t tid, void *ours, uint64_t its, size_t size, int writes) {
    struct iovec here = {.iov_base = ours, .iov_len = size};
    struct iovec there = {.iov_base = (void *)(uintptr_t)its, .iov_len = size};
    char path[40];
    long done;
    int file;

    done = writes ? process_vm_writev(tid, &here, 1, &there, 1, 0)
                  : process_vm_readv(tid, &here, 1, &there, 1, 0);
    if (done >= 0 || (errno != ENOSYS && errno != EPERM))
        return done;
    /* Forbidden by a container's filter, perhaps, that lets files be opened: proc(5). */
    snprintf(path, sizeof path, "/proc/%d/mem", (int)tid);
    file = open(path, (writes ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    if (file < 0)
        return -1;
    done = writes ? pwrite(file, ours, size, (off_t)its) : pread(file, ours, size, (off_t)its);
    close(file);
    return done;
}

static struct flock widened(const union any_flock *any, enum record_layout layout) {
    if (layout == LAYOUT_PACKED)
        return (struct flock){.l_type = any->packed.type,
                              .l_whence = any->packed.whence,
                              .l_start = any->packed.start,
                              .l_len = any->packed.length,
                              .l_pid = any->packed.pid};
    if (layout == LAYOUT_32)
        return (struct flock){.l_type = any->narrow.type,
                              .l_whence = any->narrow.whence,
                              .l_start = any->narrow.start,
                              .l_len = any->narrow.length,
                              .l_pid = any->narrow.pid};
    return any->wide;
}

/* As fixup_compat_flock in the kernel's fs/fcntl.c. */
static int narrow(union any_flock *any, struct flock *lock, enum record_layout layout) {
    if (layout == LAYOUT_PACKED) {
        any->packed = (struct packed_flock){lock->l_type, lock->l_whence, lock->l_start,
                                            lock->l_len, lock->l_pid};
    } else if (layout == LAYOUT_32) {
        if (lock->l_start > INT32_MAX)
            return -EOVERFLOW;
        if (lock->l_len > INT32_MAX)
            lock->l_len = INT32_MAX;
        any->narrow = (struct narrow_flock){lock->l_type, lock->l_whence, (int32_t)lock->l_start,
                                            (int32_t)lock->l_len, lock->l_pid};
    } else {
        any->wide = *lock;
    }
    return 0;
}

int read_record_call(struct lock_call *call, const struct seccomp_data *data) {
    struct record_place *place = &call->place;
    union any_flock any;

    set_command(place, data);
    place->address = data->args[2];
    if (!record_is_command(place->command) ||
        copy(call->tid, &any, place->address, sizes[place->layout], 0) !=
            (long)sizes[place->layout])
        return -EFAULT;
    place->lock = widened(&any, place->layout);
    return record_request(call->target.descriptor, place->command, &place->lock, &call->request);
}

int write_record_answer(const struct lock_call *call, const struct client_wait *wait) {
    const struct record_place *place = &call->place;
    struct flock lock = place->lock;
    union any_flock any;
    int result;

    record_answer(wait, &lock);
    result = narrow(&any, &lock, place->layout);
    if (result == 0 && copy(call->tid, &any, place->address, sizes[place->layout], 1) !=
                           (long)sizes[place->layout])
        result = -EFAULT;
    return result;
}
